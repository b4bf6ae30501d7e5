import inspect
import operator
from decimal import Decimal, localcontext
from itertools import product

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import optimize

from dpo_jax import toy

best_of_n_policy, optimal_policy_at_kl = jax.jit(toy.best_of_n_policy), jax.jit(toy.optimal_policy_at_kl)
optimal_policy, log_partition = jax.jit(toy.optimal_policy), jax.jit(toy.log_partition)


@pytest.fixture(params=[0.02, 0.3, 5.0])
def beta(request):
    return request.param


@pytest.fixture
def reference(key, world):
    return draw_table(key, world.rewards)


@pytest.fixture
def policy(world):
    return draw_table(jax.random.key(99), world.rewards)


@jax.jit
def draw_table(key, rewards):
    return jax.nn.log_softmax(jax.random.normal(key, rewards.shape))


def objective(policy, reference, rewards, beta):
    """Reward minus beta KL, in float64, from probabilities."""
    pi, ref = np.exp(np.float64(policy)), np.exp(np.float64(reference))
    return (pi * rewards).sum(-1) - beta * (pi * np.log(pi / ref)).sum(-1)


def test_log_partition_by_hand(world, reference, beta):
    expected = np.log((np.exp(np.float64(reference)) * np.exp(np.float64(world.rewards) / beta)).sum(-1))
    np.testing.assert_allclose(log_partition(reference, world.rewards, beta=beta), expected, rtol=1e-5, atol=1e-6)


def test_optimal_policy_is_what_an_optimiser_finds(world, reference):
    """An independent maximum: SciPy on the logits of one prompt."""
    beta, rewards = 0.3, np.float64(world.rewards[0])
    found = optimize.minimize(
        lambda logits: -objective(logits - np.log(np.exp(logits).sum()), reference[0], rewards, beta),
        np.zeros(len(rewards)),
        tol=1e-12,
    ).x
    expected = np.exp(found) / np.exp(found).sum()
    optimum = optimal_policy(reference, world.rewards, beta=beta)[0]
    np.testing.assert_allclose(jnp.exp(optimum), expected, atol=1e-4)


def test_optimal_policy_beats_every_other(world, reference, policy, beta):
    best = objective(optimal_policy(reference, world.rewards, beta=beta), reference, world.rewards, beta)
    assert np.all(best >= objective(policy, reference, world.rewards, beta))
    np.testing.assert_allclose(best, beta * log_partition(reference, world.rewards, beta=beta), rtol=1e-4)


def test_the_limits_of_beta(world, reference):
    np.testing.assert_allclose(optimal_policy(reference, world.rewards, beta=1e6), reference, atol=1e-5)
    greedy = toy.greedy(optimal_policy(reference, world.rewards, beta=1e-4))
    assert greedy.tolist() == jnp.argmax(world.rewards, axis=-1).tolist()


@pytest.mark.parametrize("kl", [0.01, 0.3, 1.0])
def test_the_optimum_at_a_divergence_has_it_and_is_that_of_some_beta(world, reference, kl):
    found = np.float64(optimal_policy_at_kl(reference, world.rewards, kl=kl))
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-6)
    divergence = (np.exp(found) * (found - np.float64(reference))).sum(-1).mean()
    assert divergence == pytest.approx(kl, rel=1e-3, abs=1e-5)

    def excess(beta):
        tilted = np.float64(reference) + np.float64(world.rewards) / beta
        log_probs = tilted - np.log(np.exp(tilted).sum(-1, keepdims=True))
        return (np.exp(log_probs) * (log_probs - reference)).sum(-1).mean() - kl

    beta = optimize.brentq(excess, 1e-2, 1e3)
    np.testing.assert_allclose(found, optimal_policy(reference, world.rewards, beta=beta), atol=2e-2 * kl + 1e-3)


def test_no_policy_at_the_same_divergence_earns_more(world, reference):
    """An independent maximum: SciPy on the logits of two prompts, whose divergences may differ."""
    table, rewards = np.float64(reference[:2]), np.float64(world.rewards[:2])

    def log_probs(logits):
        logits = logits.reshape(rewards.shape)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    found = optimize.minimize(
        lambda logits: -np.sum(np.exp(log_probs(logits)) * rewards),
        table.ravel(),
        constraints={
            "type": "ineq",
            "fun": lambda logits: 0.4 - np.mean(np.sum(np.exp(log_probs(logits)) * (log_probs(logits) - table), -1)),
        },
        method="SLSQP",
        options={"maxiter": 300, "ftol": 1e-12},
    ).x
    optimum = optimal_policy_at_kl(reference[:2], world.rewards[:2], kl=0.4)
    np.testing.assert_allclose(jnp.exp(optimum), np.exp(log_probs(found)), atol=1e-3)


def test_the_limits_of_the_divergence(world, reference):
    np.testing.assert_allclose(optimal_policy_at_kl(reference, world.rewards, kl=0.0), reference, atol=1e-3)
    best = jnp.argmax(world.rewards, axis=-1)
    far = optimal_policy_at_kl(reference, world.rewards, kl=100.0)
    assert jnp.all(jnp.exp(far)[np.arange(5), best] > 0.99)
    equal = jnp.full(reference.shape, 0.3)
    np.testing.assert_allclose(optimal_policy_at_kl(reference, equal, kl=1.0), reference, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_optimum_at_a_divergence_knows_no_unit_of_rewards(world, reference, scale):
    expected = optimal_policy_at_kl(reference, world.rewards, kl=0.5)
    np.testing.assert_allclose(
        optimal_policy_at_kl(reference, scale * world.rewards + 3 * scale, kl=0.5), expected, atol=1e-3
    )


def test_divergences_can_be_swept_and_must_not_be_negative(world, reference):
    kls = jnp.array([0.1, 0.6])
    several = jax.jit(jax.vmap(lambda kl: toy.optimal_policy_at_kl(reference, world.rewards, kl=kl)))(kls)
    np.testing.assert_allclose(toy.kl_to_reference(several, jnp.stack([reference] * 2)).mean(-1), kls, rtol=1e-3)
    for kl in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"kl must be in \[0, inf\), got {kl}"):
            toy.optimal_policy_at_kl(reference, world.rewards, kl=kl)
    with pytest.raises(ValueError, match="shapes must be equal, got"):
        inspect.unwrap(toy.optimal_policy_at_kl)(reference, world.rewards[:2], kl=1.0)


def test_coverage_by_hand(policy, reference):
    pi, ref = np.exp(np.float64(policy)), np.exp(np.float64(reference))
    found = toy.coverage(policy, reference)
    np.testing.assert_allclose(found, np.sum(pi**2 / ref, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(found, 1 + np.sum((pi - ref) ** 2 / ref, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(toy.coverage(policy, policy), 1, rtol=1e-5)


def test_coverage_of_what_never_occurs():
    policy = jnp.log(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    reference = jnp.log(jnp.array([[0.5, 0.0, 0.5], [0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]))
    found, slope = jax.value_and_grad(lambda table: toy.coverage(table, reference[1:]).sum())(policy[1:])
    assert toy.coverage(policy, reference).tolist() == pytest.approx([np.inf, 2.0, 1.0])
    assert found == pytest.approx(3.0)
    np.testing.assert_allclose(slope, [[4, 0, 0], [1, 1, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match="shapes must be equal, got"):
        inspect.unwrap(toy.coverage)(policy, reference[:1])


def best_of_n_by_enumeration(probs, scores, num):
    """Every way to draw the samples, and every one of the best among them."""
    found = np.zeros(len(probs))
    for samples in product(range(len(probs)), repeat=num):
        best = [sample for sample in samples if scores[sample] == max(scores[list(samples)])]
        for sample in best:
            found[sample] += np.prod(probs[list(samples)]) / len(best)
    return found


@pytest.mark.parametrize("num", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("probs", "scores"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0.3, -1.0, 2.0, 0.5]),
        ([0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 1.0, 0.0]),
        ([0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]),
        ([0.0, 0.5, 0.2, 0.3], [2.0, 1.0, 0.0, 1.0]),
        ([0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0, 0.5]),
        ([0.0, 0.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]),
    ],
    ids=["distinct", "ties", "all tied", "best impossible", "tied with impossible", "certain"],
)
def test_best_of_n_by_enumeration(probs, scores, num):
    log_probs, scores = jnp.log(jnp.array(probs)), np.array(scores, np.float32)
    found = best_of_n_policy(log_probs, jnp.asarray(scores), num=num)
    np.testing.assert_allclose(jnp.exp(found), best_of_n_by_enumeration(np.array(probs), scores, num), atol=1e-6)
    assert jnp.all(jnp.isneginf(found) == jnp.isneginf(log_probs))


def best_of_n_exactly(log_probs, scores, num):
    """The closed form with 60 digits: log-probabilities, -inf below e^-1000."""
    with localcontext(prec=60):
        probs = [Decimal(float(log_prob)).exp() for log_prob in log_probs]
        below, equal = (
            [
                sum((p for p, other in zip(probs, scores, strict=True) if holds(other, own)), Decimal(0))
                for own in scores
            ]
            for holds in (operator.lt, operator.eq)
        )
        found = [
            p / same * (((less + same) / sum(probs)) ** num - (less / sum(probs)) ** num)
            for p, less, same in zip(probs, below, equal, strict=True)
        ]
        return np.array([float(p.ln()) if p > Decimal("1e-430") else -np.inf for p in found])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num", [1, 2, 4, 10_000, 1_000_000, 10**12])
def test_best_of_n_is_exact_for_every_n(num, ties):
    """In float32 the best of 10,000 had probabilities that sum to 0.9994, of a million to 0.942."""
    scores = np.arange(10.0, dtype=np.float32) // (2 if ties else 1)
    for sharpness in (1, 6):
        log_probs = jax.nn.log_softmax(sharpness * jax.random.normal(jax.random.key(2), (10,)))
        expected = best_of_n_exactly(np.asarray(log_probs), scores, num)
        found = best_of_n_policy(log_probs, jnp.asarray(scores), num=float(num))
        kept = np.isfinite(expected)
        np.testing.assert_allclose(found[kept], expected[kept], rtol=2e-6, atol=5e-7)
        np.testing.assert_allclose(np.exp(np.float64(found)).sum(), 1, rtol=3e-7)
        narrow = best_of_n_policy(log_probs.astype(jnp.bfloat16), jnp.asarray(scores, jnp.bfloat16), num=float(num))
        np.testing.assert_allclose(np.exp(np.float64(narrow)).sum(), 1, rtol=1e-2)


def test_a_score_that_is_nan_leaves_no_best():
    log_probs = jnp.log(jnp.array([[0.3, 0.3, 0.4], [0.3, 0.3, 0.4]]))
    scores = jnp.array([[0.1, jnp.nan, 0.7], [0.1, 0.2, 0.7]])
    found = best_of_n_policy(log_probs, scores, num=4.0)
    assert jnp.isnan(found).tolist() == [[True] * 3, [False] * 3]
    with pytest.raises(ValueError, match=r"scores must be a number, not NaN, got nan in row \(0, 1\)"):
        toy.best_of_n_policy(log_probs, scores, num=4)


def test_what_is_measured_of_nan_is_nan():
    """For the prompt concerned, and no other one."""
    policy = jnp.log(jnp.full((2, 3), 1 / 3))
    wrong = jnp.array([[0.1, jnp.nan, 0.7], [0.1, 0.2, 0.7]])

    @jax.jit
    def measures():
        return {
            "ranking accuracy, of scores": toy.ranking_accuracy(wrong, policy),
            "ranking accuracy, of rewards": toy.ranking_accuracy(policy, wrong),
            "reward error": toy.reward_error(wrong, policy),
            "expected reward": toy.expected_reward(policy, wrong),
            "regret": toy.regret(policy, policy, wrong, beta=1.0),
            "win rate": toy.win_rate(policy, policy, wrong),
            "win rate, noiseless": toy.win_rate(policy, policy, wrong, temperature=0.0),
            "KL": toy.kl_to_reference(wrong, policy),
            "KL, of the reference": toy.kl_to_reference(policy, wrong),
            "implicit reward": toy.implicit_reward(wrong, policy, beta=1.0)[:, 1],
            "exploitability": toy.exploitability(policy, toy.preference_table(wrong)),
            "accuracy of the truth": jax.vmap(toy.bayes_prediction)(wrong)["accuracy"],
        }

    for name, measured in measures().items():
        assert jnp.isnan(measured).tolist() == [True, False], name


def test_best_of_one_is_the_policy_itself(world, policy):
    np.testing.assert_allclose(best_of_n_policy(policy, world.rewards, num=1.0), policy, rtol=1e-5, atol=1e-6)


def test_best_of_n_for_numbers_in_between(world, policy):
    found = jax.jit(jax.vmap(lambda num: toy.best_of_n_policy(policy, world.rewards, num=num)))(
        jnp.array([1.0, 1.5, 2.0, 2.5, 3.0])
    )
    np.testing.assert_allclose(jnp.exp(found).sum(-1), 1, rtol=1e-5)
    best = jnp.exp(found)[:, np.arange(5), jnp.argmax(world.rewards, axis=-1)]
    assert jnp.all(jnp.diff(best, axis=0) > 0)
    np.testing.assert_allclose(found[2], best_of_n_policy(policy, world.rewards, num=2.0), rtol=1e-4, atol=1e-5)


@given(
    hnp.arrays(float, 5, elements=st.floats(-10, 0)),
    hnp.arrays(float, 5, elements=st.integers(-3, 3).map(float)),
    st.floats(1, 100),
)
@settings(max_examples=50, deadline=None)
def test_divergence_of_best_of_n_is_bounded(logits, scores, num):
    with jax.enable_x64(True):
        log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
        best = np.asarray(best_of_n_policy(jnp.asarray(log_probs), jnp.asarray(scores), num=num))
    np.testing.assert_allclose(np.exp(best).sum(), 1, rtol=1e-10)
    assert -1e-10 <= np.sum(np.exp(best) * (best - log_probs)) <= np.log(num) - (num - 1) / num + 1e-10


def test_divergence_of_best_of_n_reaches_its_bound_where_responses_are_many():
    log_probs, num = jnp.full(1000, -np.log(1000)), 4
    best = best_of_n_policy(log_probs, jnp.arange(1000.0), num=num)
    np.testing.assert_allclose(toy.kl_to_reference(best, log_probs), np.log(num) - (num - 1) / num, rtol=1e-2)


def test_best_of_very_many_is_the_best_possible_response(world, policy):
    best = jnp.argmax(world.rewards, axis=-1)
    impossible = policy.at[np.arange(5), best].set(-jnp.inf)
    second = jnp.argmax(world.rewards.at[np.arange(5), best].set(-jnp.inf), axis=-1)
    for log_probs, expected in ((policy, best), (jax.nn.log_softmax(impossible), second)):
        found = best_of_n_policy(log_probs, world.rewards, num=1000)
        assert jnp.all(jnp.isfinite(found) == jnp.isfinite(log_probs))
        np.testing.assert_allclose(jnp.exp(found), jax.nn.one_hot(expected, 10), atol=1e-3)


def test_best_of_n_knows_how_rare_a_rare_response_is():
    rare = -30.0
    for scores, expected in (([1.0, 0.0], [rare + np.log(5), 0.0]), ([0.0, 1.0], [5 * rare, 0.0])):
        found = best_of_n_policy(jnp.array([rare, 0.0]), jnp.array(scores), num=5)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_best_of_n_has_a_finite_gradient():
    @jax.jit
    def best(logits):
        return toy.best_of_n_policy(jax.nn.log_softmax(logits), jnp.array([0.0, 1.0, 1.0, 2.0]), num=3.0)

    logits = jnp.array([0.5, -0.5, 0.0, 1.0])
    slopes = jax.jit(jax.jacobian(best))(logits)
    for step in 1e-2 * np.eye(4, dtype=np.float32):
        numeric = (best(logits + step) - best(logits - step)) / 2e-2
        np.testing.assert_allclose(slopes @ step / 1e-2, numeric, atol=1e-2)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.exp(best(x)))))
    for impossible in np.eye(4, dtype=bool):
        chex.assert_tree_all_finite(slope(np.where(impossible, -np.float32(np.inf), logits)))


def test_the_reward_is_recovered_from_its_optimum(world, reference, beta):
    optimum = optimal_policy(reference, world.rewards, beta=beta)
    constant = log_partition(reference, world.rewards, beta=beta)
    recovered = toy.recovered_reward(optimum, reference, constant, beta=beta)
    np.testing.assert_allclose(recovered, world.rewards, atol=1e-5 * max(1, beta))
    implicit = toy.implicit_reward(optimum, reference, beta=beta)
    np.testing.assert_allclose(
        implicit - implicit[:, :1], world.rewards - world.rewards[:, :1], atol=1e-5 * max(1, beta)
    )


def test_the_impossible_has_an_implicit_reward():
    """Zero where neither policy can give a response, infinite where only one can, and a gradient all the same."""
    policy, reference = jnp.array([-0.5, -jnp.inf, -jnp.inf, -1.0]), jnp.array([-1.0, -jnp.inf, -0.5, -jnp.inf])
    expected = [1.0, 0.0, -jnp.inf, jnp.inf]
    assert toy.implicit_reward(policy, reference, beta=2.0).tolist() == expected
    recovered = toy.recovered_reward(policy, reference, jnp.array(1.5), beta=2.0)
    assert recovered.tolist() == [value + 3.0 for value in expected]
    for argument, slope in ((0, 2.0), (1, -2.0)):
        gradient = jax.grad(lambda *tables: toy.implicit_reward(*tables, beta=2.0).sum(), argument)(policy, reference)
        assert gradient.tolist() == [slope, 0.0, slope, slope]
    neither = jnp.array([-jnp.inf])
    assert jax.grad(lambda beta: toy.implicit_reward(neither, neither, beta=beta)[0])(2.0) == 0.0


def test_infinite_rewards_of_the_impossible_change_nothing():
    policy, rewards = jnp.log(jnp.array([0.25, 0.75, 0.0, 0.0])), jnp.array([1.0, 3.0, jnp.inf, -jnp.inf])
    equals = jnp.array([1.0, 3.0, -jnp.inf, -jnp.inf])

    @jax.jit
    def measures():
        return {
            "expected reward": jax.value_and_grad(toy.expected_reward)(policy, rewards),
            "optimum": jnp.exp(toy.optimal_policy(policy, rewards, beta=1.0)[2:]),
            "regret": toy.regret(policy, policy, rewards, beta=1.0),
            "win rate": jax.value_and_grad(toy.win_rate, 2)(policy, policy, equals),
            "noiseless": toy.win_rate(policy, policy, equals, temperature=0.0),
        }

    measured = measures()
    chex.assert_trees_all_close(measured["expected reward"], (2.5, jnp.array([0.25, 2.25, 0, 0])), rtol=1e-6)
    assert measured["optimum"].tolist() == [0, 0]
    assert measured["regret"] >= 0
    chex.assert_trees_all_close(measured["win rate"], (0.5, jnp.zeros(4)), atol=1e-6)
    assert measured["noiseless"] == 0.5


def test_expected_reward_by_hand():
    log_probs = jnp.log(jnp.array([[0.25, 0.75], [1.0, 0.0]]))
    rewards = jnp.array([[1.0, 3.0], [5.0, 100.0]])
    assert toy.expected_reward(log_probs, rewards).tolist() == [2.5, 5.0]


def test_an_infinite_reward_counts_where_it_is_possible():
    rewards = jnp.array([[1.0, jnp.inf]])
    found = [toy.expected_reward(jnp.log(jnp.array([probs])), rewards).item() for probs in ([1.0, 0.0], [0.5, 0.5])]
    assert found == [1.0, np.inf]


def test_what_underflows_adds_nothing_to_the_kl():
    assert toy.kl_to_reference(jnp.array([0.0, -200.0]), jnp.array([0.0, -jnp.inf])) == 0


def test_kl_by_hand():
    policy, reference = jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0]])), jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), np.log(2)]
    np.testing.assert_allclose(toy.kl_to_reference(policy, reference), expected, rtol=1e-6)
    np.testing.assert_allclose(toy.kl_to_reference(policy, policy), 0.0, atol=1e-7)
    assert toy.kl_to_reference(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))) == jnp.inf


def test_kl_has_a_finite_gradient_where_a_probability_is_zero():
    gradient = jax.grad(lambda p: toy.kl_to_reference(p, jnp.log(jnp.array([0.5, 0.5]))))(jnp.array([0.0, -jnp.inf]))
    chex.assert_tree_all_finite(gradient)


def test_win_rate_by_enumeration(world, policy, reference):
    pi, opponent, rewards = (np.float64(table[0]) for table in (jnp.exp(policy), jnp.exp(reference), world.rewards))
    expected = sum(
        pi[i] * opponent[j] / (1 + np.exp(rewards[j] - rewards[i])) for i in range(len(pi)) for j in range(len(pi))
    )
    np.testing.assert_allclose(toy.win_rate(policy, reference, world.rewards)[0], expected, rtol=1e-5)
    np.testing.assert_allclose(toy.win_rate(policy, policy, world.rewards), 0.5, rtol=1e-5)
    both = toy.win_rate(policy, reference, world.rewards) + toy.win_rate(reference, policy, world.rewards)
    np.testing.assert_allclose(both, 1.0, rtol=1e-5)


def test_noiseless_win_rate_asks_which_is_better():
    best, worst = jnp.log(jnp.array([[1.0, 0.0]])), jnp.log(jnp.array([[0.0, 1.0]]))
    assert toy.win_rate(best, worst, jnp.array([[0.6, 0.5]]), temperature=0.0) == 1.0


def test_regret_is_what_the_objective_lacks(world, reference, policy, beta):
    optimum = optimal_policy(reference, world.rewards, beta=beta)
    lacking = objective(optimum, reference, world.rewards, beta) - objective(policy, reference, world.rewards, beta)
    np.testing.assert_allclose(toy.regret(policy, reference, world.rewards, beta=beta), lacking, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(toy.regret(optimum, reference, world.rewards, beta=beta), 0.0, atol=1e-6)


@pytest.mark.parametrize(("temperature", "flip"), [(1.0, 0.0), (0.2, 0.1), (0.0, 0.0)])
def test_bayes_prediction_is_what_no_predictor_exceeds(world, temperature, flip):
    found = toy.bayes_prediction(world.rewards, temperature=temperature, flip_probability=flip)
    rewards, losses, hits = np.float64(world.rewards), [], []
    for row in rewards:
        for i in range(len(row)):
            for j in range(len(row)):
                if i != j:
                    wins = 1 / (1 + np.exp(-(row[i] - row[j]) / temperature)) if temperature else float(row[i] > row[j])
                    wins = (1 - flip) * wins + flip * (1 - wins)
                    losses.append(-sum(p * np.log(p) for p in (wins, 1 - wins) if p))
                    hits.append(max(wins, 1 - wins))
    np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["accuracy"], np.mean(hits), rtol=1e-5)


SCORES = np.random.default_rng(0).integers(-2, 3, size=(4, 6)).astype(np.float32)
TRUTH = np.random.default_rng(1).integers(-3, 4, size=(4, 6)).astype(np.float32)


def test_ranking_accuracy_is_the_share_of_pairs_in_the_right_order():
    expected = np.zeros(4)
    for row in range(4):
        pairs = [(i, j) for i in range(6) for j in range(6) if i < j]
        for i, j in pairs:
            said, true = SCORES[row, i] - SCORES[row, j], TRUTH[row, i] - TRUTH[row, j]
            expected[row] += (0.5 if said == 0 or true == 0 else (said > 0) == (true > 0)) / len(pairs)
    found = toy.ranking_accuracy(jnp.asarray(SCORES), jnp.asarray(TRUTH))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(toy.ranking_accuracy)(SCORES, TRUTH), expected, rtol=1e-6)


def test_ranking_accuracy_by_hand():
    truth = np.array([1.0, 2.0, 4.0])
    scores = np.array([[-3.0, 0.0, 9.0], [3.0, 2.0, 1.0], [5.0, 5.0, 5.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    found = jax.jit(toy.ranking_accuracy)(scores, np.tile(truth, (5, 1)))
    np.testing.assert_allclose(found, [1, 0, 0.5, 5 / 6, 0.5], rtol=1e-6)
    assert toy.ranking_accuracy(jnp.array([1.0, 2.0]), jnp.array([3.0, 3.0])) == 0.5


def test_ranking_accuracy_of_the_very_close_and_of_the_impossible():
    assert toy.ranking_accuracy(jnp.array([1e-25, 3e-25]), jnp.array([1e-25, 2e-25])) == 1.0
    assert toy.ranking_accuracy(jnp.array([-jnp.inf, 0.0]), jnp.array([1.0, 2.0])) == 1.0
    assert toy.ranking_accuracy(jnp.array([-jnp.inf, -jnp.inf]), jnp.array([1.0, 2.0])) == 0.5


def test_reward_error_is_that_of_the_differences_from_the_mean():
    error = SCORES - np.float64(TRUTH)
    expected = [np.sqrt(np.mean([(value - sum(row) / 6) ** 2 for value in row])) for row in error]
    np.testing.assert_allclose(toy.reward_error(jnp.asarray(SCORES), jnp.asarray(TRUTH)), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(toy.reward_error)(SCORES, TRUTH), expected, rtol=1e-5)
    np.testing.assert_allclose(toy.reward_error(jnp.asarray(TRUTH), jnp.asarray(TRUTH)), 0, atol=1e-7)


def test_level_of_a_score_does_not_matter():
    shifted = jnp.asarray(SCORES + np.array([[4.0], [-8.0], [0.0], [16.0]], np.float32))
    for function in (toy.ranking_accuracy, toy.reward_error):
        np.testing.assert_allclose(
            function(shifted, jnp.asarray(TRUTH)), function(jnp.asarray(SCORES), jnp.asarray(TRUTH)), rtol=1e-6
        )


def test_frontier_rises_and_no_policy_lies_above_it(world, reference, policy):
    betas = jnp.geomspace(0.003, 100.0, 200)
    curve = toy.frontier(reference, world.rewards, betas)
    assert jnp.all(jnp.diff(curve["kl_to_reference"]) <= 1e-6)
    assert jnp.all(jnp.diff(curve["expected_reward"]) <= 1e-6)
    for mixture in (0.1, 0.5, 1.0):
        mixed = jnp.logaddexp(jnp.log(mixture) + policy, jnp.log1p(-mixture) + reference)
        point = toy.evaluate(mixed, reference, world.rewards)
        best = np.interp(point["kl_to_reference"], curve["kl_to_reference"][::-1], curve["expected_reward"][::-1])
        assert point["expected_reward"] < best


def test_tables_may_have_more_axes(world, reference, policy):
    stacked = jax.tree.map(lambda table: jnp.stack([table, table]), (policy, reference, world.rewards))
    np.testing.assert_allclose(
        toy.regret(*stacked, beta=0.1)[1], toy.regret(policy, reference, world.rewards, beta=0.1), rtol=1e-6
    )


def test_bad_beta_is_refused(world, reference):
    for function in (toy.optimal_policy, toy.log_partition):
        with pytest.raises(ValueError, match="beta must be in .0, inf., got 0"):
            function(reference, world.rewards, beta=0)
    with pytest.raises(ValueError, match="betas must be in .0, inf., got -1.0 in row 1"):
        toy.frontier(reference, world.rewards, jnp.array([1.0, -1.0]))


def test_bad_numbers_of_samples_are_refused(world, policy):
    for num, shown in ((0, "0"), (0.5, "0.5"), (np.inf, "inf"), (np.nan, "nan")):
        with pytest.raises(ValueError, match=f"num must be in .1, inf., got {shown}"):
            toy.best_of_n_policy(policy, world.rewards, num=num)


def test_scores_of_another_shape_are_refused(as_users_have_it, world, policy):
    for function in (lambda *tables: toy.best_of_n_policy(*tables, num=2), toy.ranking_accuracy, toy.reward_error):
        with pytest.raises(ValueError, match=r"shapes must be equal, got .* \(5, 10\), .* \(5, 9\)"):
            function(policy, world.rewards[:, 1:])
