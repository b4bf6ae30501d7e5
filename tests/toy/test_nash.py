"""Games between responses, against linear algebra, SciPy and the paper's equations written once more."""

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

solved = toy.regularized_equilibrium

CYCLE = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
"""Rock, paper, scissors: who beats whom."""

SKEWED = np.log([0.9, 0.06, 0.04])


def game(wins):
    """The preference whose upper triangle is given."""
    wins = np.asarray(wins)
    return np.triu(wins, 1) + np.tril(1 - wins.T, -1) + np.eye(len(wins)) / 2


exploitability = jax.jit(toy.exploitability)
regularized_exploitability = jax.jit(toy.regularized_exploitability)


def games_and_policies(*, num_policies):
    """Any game of four responses, and any policies: log-probabilities."""
    logits = hnp.arrays(float, (num_policies, 4), elements=st.floats(-5, 5))
    wins = hnp.arrays(float, (4, 4), elements=st.floats(0, 1))
    return st.tuples(wins.map(game), logits.map(lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))))


def normalised(logits):
    return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()


def kl(log_probs, others):
    return np.sum(np.exp(log_probs) * (log_probs - others))


def regularized_equilibrium(reference, preference, tau):
    """Log-probabilities of the policy that is the best answer to itself: the root of an equation in its logits."""

    def residual(logits):
        return logits - reference - preference @ np.exp(normalised(logits)) / tau

    found = optimize.root(residual, reference, tol=1e-13)
    assert np.abs(residual(found.x)).max() < 1e-9
    return normalised(found.x)


def example(seed, num=4):
    """A game and a reference policy."""
    rng = np.random.default_rng(seed)
    return game(rng.random((num, num))), np.log(rng.dirichlet(np.ones(num)))


def examples(num):
    """Their games and their references, stacked."""
    return (np.stack(tables) for tables in zip(*map(example, range(num)), strict=True))


def in_float64(function, *tables, **hyperparameters):
    with jax.enable_x64(True):
        return np.asarray(function(*map(jnp.asarray, tables), **hyperparameters))


# Tables


def test_preference_table_says_who_beats_whom():
    rewards = np.array([[0.0, 1.0, 0.5], [2.0, -1.0, 2.0]])
    table = np.asarray(toy.preference_table(jnp.asarray(rewards), temperature=0.5, flip_probability=0.1))
    chex.assert_shape(table, (2, 3, 3))
    for prompt in range(2):
        for i in range(3):
            for j in range(3):
                wins = 1 / (1 + np.exp(-(rewards[prompt, i] - rewards[prompt, j]) / 0.5))
                np.testing.assert_allclose(table[prompt, i, j], 0.1 + 0.8 * wins, rtol=1e-6)


# Without a price


@pytest.mark.parametrize("margins", [(0.1, 0.2, 0.3), (0.5, 0.05, 0.25), (0.4, 0.4, 0.4)])
def test_each_response_of_a_cycle_is_as_probable_as_the_margin_between_the_others(margins):
    """Each response must win half the time: (P - 1/2) p = 0, whose solution is the stake of the opposite match."""
    first_second, second_third, third_first = margins
    wins = np.array([[0, 0.5 + first_second, 0.5 - third_first], [0, 0, 0.5 + second_third], [0, 0, 0]])
    expected = np.array([second_third, third_first, first_second]) / sum(margins)
    np.testing.assert_allclose(toy.nash_equilibrium(game(wins)), expected, atol=1e-6)


@given(st.integers(1, 6).flatmap(lambda n: hnp.arrays(float, (n, n), elements=st.floats(0, 1))).map(game))
@settings(max_examples=100, deadline=None)
def test_nothing_beats_the_equilibrium(preference):
    probs = toy.nash_equilibrium(preference)
    assert np.all(probs >= 0)
    np.testing.assert_allclose(probs.sum(), 1, atol=1e-6)
    for row in preference:
        assert row @ probs <= 0.5 + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_games_in_single_precision_have_an_equilibrium_too(seed):
    rng = np.random.default_rng(seed)
    for _ in range(30):
        preference = game(rng.random((5, 5))).astype(np.float32)
        probs = toy.nash_equilibrium(preference)
        assert np.all(probs >= 0)
        np.testing.assert_allclose(probs.sum(), 1, atol=1e-6)
        assert np.max(preference @ probs) <= 0.5 + 1e-6


def test_tables_that_add_up_to_one_but_for_rounding_have_an_equilibrium():
    preference = 0.5 + 0.1 * CYCLE - 4e-6
    np.testing.assert_allclose(toy.nash_equilibrium(preference), 1 / 3, atol=1e-3)


def test_where_there_is_a_reward_the_best_response_is_the_equilibrium(world):
    for rewards in world.rewards:
        probs = toy.nash_equilibrium(np.asarray(toy.preference_table(rewards)))
        np.testing.assert_allclose(probs, np.arange(10) == np.argmax(rewards), atol=1e-6)


@given(games_and_policies(num_policies=1))
@settings(max_examples=50, deadline=None)
def test_exploitability_is_what_the_best_response_wins_beyond_half(example):
    preference, (log_probs,) = example
    wins = [sum(preference[i, j] * np.exp(log_probs[j]) for j in range(4)) for i in range(4)]
    found = in_float64(exploitability, log_probs, preference)
    np.testing.assert_allclose(found, max(wins) - 0.5, atol=1e-12)
    assert found >= -1e-12


def test_only_the_equilibrium_of_a_cycle_cannot_be_exploited():
    preference = game([[0, 0.6, 0.2], [0, 0, 0.7], [0, 0, 0]])
    equilibrium = np.array([2, 3, 1]) / 6
    assert abs(in_float64(exploitability, np.log(equilibrium), preference)) < 1e-12
    for others in np.random.default_rng(0).dirichlet(np.ones(3), size=20):
        mixed = 0.9 * equilibrium + 0.1 * others
        found = in_float64(exploitability, np.log(mixed), preference)
        assert found > 0.01 * np.abs(mixed - equilibrium).sum()


def test_a_policy_that_never_says_something_can_be_exploited():
    only_rock = jnp.array([0.0, -jnp.inf, -jnp.inf])
    np.testing.assert_allclose(toy.exploitability(only_rock, jnp.asarray(0.5 + 0.4 * CYCLE)), 0.4, rtol=1e-6)


# With a price


@pytest.mark.parametrize("tau", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_regularized_exploitability_is_what_the_best_answer_gains(seed, tau):
    """The maximum, found by SciPy in the logits of the answer."""
    preference, reference = example(seed)
    policy = normalised(np.random.default_rng(seed + 100).normal(size=4))

    def gain(log_probs):
        return np.exp(log_probs) @ preference @ np.exp(policy) - tau * kl(log_probs, reference)

    best = -optimize.minimize(lambda logits: -gain(normalised(logits)), reference, tol=1e-10).fun
    found = in_float64(regularized_exploitability, policy, reference, preference, tau=tau)
    np.testing.assert_allclose(found, best - gain(policy), atol=1e-8)


@given(games_and_policies(num_policies=2), st.floats(0.2, 10))
@settings(max_examples=50, deadline=None)
def test_regularized_exploitability_is_zero_at_the_equilibrium_and_positive_elsewhere(example, tau):
    """The equilibrium alone gains tau KL(policy || equilibrium) from any policy, so the best answer gains no less."""
    preference, (policy, reference) = example
    equilibrium = regularized_equilibrium(reference, preference, tau)
    tables = (np.stack(pair) for pair in ([equilibrium, policy], [reference] * 2, [preference] * 2))
    at_equilibrium, elsewhere = in_float64(regularized_exploitability, *tables, tau=tau)
    np.testing.assert_allclose(at_equilibrium, 0, atol=1e-8)
    assert elsewhere >= tau * kl(policy, equilibrium) - 1e-8


def test_saying_what_the_reference_never_says_costs_everything():
    preference, uniform, never = np.full((2, 2), 0.5), np.log([0.5, 0.5]), np.array([0.0, -np.inf])
    assert in_float64(regularized_exploitability, uniform, never, preference, tau=0.1) == np.inf
    np.testing.assert_allclose(in_float64(regularized_exploitability, never, never, preference, tau=0.1), 0, atol=1e-12)


# Nash mirror descent


@pytest.mark.parametrize(("tau", "learning_rate"), [(0.1, 0.5), (0.5, 2.0), (2.0, 0.1), (1.0, 1.0)])
def test_step_against_the_equations(tau, learning_rate):
    preference, reference = example(0)
    pi, mu = np.exp(normalised(np.arange(4.0))), np.exp(reference)
    mixed = pi ** (1 - learning_rate * tau) * mu ** (learning_rate * tau)
    mixed /= mixed.sum()
    expected = mixed * np.exp(learning_rate * np.array([row @ mixed for row in preference]))
    found = in_float64(toy.nash_md_step, np.log(pi), reference, preference, tau=tau, learning_rate=learning_rate)
    np.testing.assert_allclose(np.exp(found), expected / expected.sum(), rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_step_maximises_preference_to_the_mixture_less_the_divergence_from_it(seed):
    preference, reference = example(seed)
    tau, learning_rate = 0.5, 1.5
    policy = normalised(np.random.default_rng(seed + 100).normal(size=4))
    mixed = normalised((1 - learning_rate * tau) * policy + learning_rate * tau * reference)

    def loss(logits):
        answer = normalised(logits)
        return kl(answer, mixed) - learning_rate * np.exp(answer) @ preference @ np.exp(mixed)

    found = in_float64(toy.nash_md_step, policy, reference, preference, tau=tau, learning_rate=learning_rate)
    best = optimize.minimize(loss, mixed, tol=1e-12).x
    np.testing.assert_allclose(np.exp(found), np.exp(normalised(best)), atol=1e-6)
    for change in np.random.default_rng(seed).normal(size=(100, 4)):
        assert loss(found) < loss(found + 0.1 * change)


def test_the_equilibrium_stays_where_it_is():
    preference, reference = example(1)
    equilibrium = regularized_equilibrium(reference, preference, 0.5)
    for rate in (1e-3, 1e-2):
        found = in_float64(toy.nash_md_step, equilibrium, reference, preference, tau=0.5, learning_rate=rate)
        assert np.abs(found - equilibrium).max() < 10 * rate**2


def test_descent_is_a_loop_over_steps():
    preference, reference = example(2)
    expected = np.exp(reference)
    for step in range(30):
        rate = 2 / (0.3 * (step + 2))
        mixed = expected ** (1 - rate * 0.3) * np.exp(reference) ** (rate * 0.3)
        mixed /= mixed.sum()
        expected = mixed * np.exp(rate * preference @ mixed)
        expected /= expected.sum()
    np.testing.assert_allclose(
        np.exp(in_float64(solved, reference, preference, tau=0.3, num_steps=30)),
        expected,
        rtol=1e-10,
    )


@pytest.mark.parametrize("num_steps", [1, 2, 5, 30, 300])
@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_descent_keeps_the_promise_of_theorem_1(tau, num_steps):
    preference, reference = examples(20)
    found = in_float64(solved, reference, preference, tau=tau, num_steps=num_steps)
    for game, start, end in zip(preference, reference, found, strict=True):
        assert kl(regularized_equilibrium(start, game, tau), end) <= 8 / (tau**2 * (num_steps + 1))


@pytest.mark.parametrize("tau", [0.1, 0.3, 1.0])
def test_descent_arrives_at_the_regularized_equilibrium(tau):
    preference, reference = examples(10)
    found = in_float64(solved, reference, preference, tau=tau, num_steps=20_000)
    expected = np.stack([regularized_equilibrium(*tables, tau) for tables in zip(reference, preference, strict=True)])
    assert np.abs(np.exp(found) - np.exp(expected)).sum(-1).max() / 2 < 1e-4


def test_descent_in_bfloat16_arrives_as_near_as_its_digits_allow():
    """Its steps are smaller than the last digit of a log-probability: they ended 0.17 nats away."""
    preference = game(np.full((3, 3), 0.5) + 0.4 * CYCLE)
    tables = (jnp.asarray(table, jnp.bfloat16) for table in (SKEWED, preference))
    found = solved(*tables, tau=jnp.array(0.05, jnp.bfloat16), num_steps=1000)
    assert found.dtype == jnp.bfloat16
    expected = solved(*(jnp.asarray(np.float32(table)) for table in (SKEWED, preference)), tau=0.05, num_steps=1000)
    np.testing.assert_allclose(np.float32(found), expected, atol=0.03)


def test_descent_at_a_small_price_arrives_at_the_equilibrium_without_one():
    preference = game([[0, 0.8, 0.1], [0, 0, 0.7], [0, 0, 0]])
    found = in_float64(solved, SKEWED, preference, tau=0.002, num_steps=200_000)
    np.testing.assert_allclose(np.exp(found), toy.nash_equilibrium(preference), atol=1e-2)


def test_descent_finds_the_cycle_where_no_reward_does():
    """Comparisons of a symmetric cycle are explained best by equal rewards, and these leave the reference as it is."""
    preference, uniform = 0.5 + 0.4 * CYCLE, np.full(3, 1 / 3)
    np.testing.assert_allclose(toy.nash_equilibrium(preference), uniform, atol=1e-6)
    found = in_float64(solved, SKEWED, preference, tau=0.002, num_steps=200_000)
    np.testing.assert_allclose(np.exp(found), uniform, atol=1e-2)

    margins = lambda rewards: rewards[:, None] - rewards  # noqa: E731
    likelihood = lambda rewards: np.sum(preference * np.logaddexp(0, -margins(rewards)))  # noqa: E731
    rewards = optimize.minimize(likelihood, [1.0, -0.5, 0.3], tol=1e-10).x
    np.testing.assert_allclose(rewards, rewards[0], atol=1e-5)
    reference, preference = (jnp.asarray(table, jnp.float32) for table in (SKEWED, preference))
    optimum = toy.optimal_policy(reference, jnp.asarray(rewards, jnp.float32), beta=0.1)
    np.testing.assert_allclose(jnp.exp(optimum), np.exp(SKEWED), atol=1e-3)
    assert toy.exploitability(jnp.asarray(found, jnp.float32), preference) < 0.01
    assert toy.exploitability(optimum, preference) > 0.3


def test_descent_never_says_what_the_reference_never_says():
    reference = np.array([*np.log([0.5, 0.5]), -np.inf])
    found = np.exp(in_float64(solved, reference, 0.5 + 0.4 * CYCLE, tau=1.0, num_steps=10))
    assert found[2] == 0
    np.testing.assert_allclose(
        found[:2],
        np.exp(in_float64(solved, reference[:2], 0.5 + 0.4 * CYCLE[:2, :2], tau=1.0, num_steps=10)),
        rtol=1e-10,
    )


# Axes, tracing, bad input


def test_axes_before_the_last_are_kept():
    preference, reference = map(jnp.asarray, examples(3))
    policy = jnp.stack([jnp.log(jnp.full(4, 0.25))] * 3)
    for run in (
        lambda p, r, w: toy.exploitability(p, w),
        lambda p, r, w: toy.regularized_exploitability(p, r, w, tau=0.5),
        lambda p, r, w: toy.nash_md_step(p, r, w, tau=0.5, learning_rate=1.0),
        lambda p, r, w: solved(r, w, tau=0.5, num_steps=3),
    ):
        together = jax.jit(run)(policy, reference, preference)
        one_by_one = jax.jit(jax.vmap(run))(policy, reference, preference)
        np.testing.assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-6)


def test_price_can_be_swept_and_the_game_known_while_tracing():
    preference, reference = (jnp.asarray(table) for table in example(0))
    run = lambda tau: solved(reference, preference, tau=tau, num_steps=5)  # noqa: E731
    swept = jax.jit(jax.vmap(run))(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(swept, [run(0.5), run(2.0)], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({(0, 1): 0.4}, "preference.* must be 1 for all i and j"),
        ({(0, 0): 0.4999}, "preference.* must be 1 for all i and j"),
        ({(0, 1): 1.5, (1, 0): -0.5}, r"preference must be in .0, 1., got 1.5 in row \(0, 1\)"),
        ({(2, 0): np.nan}, r"preference must be in .0, 1., got nan in row \(2, 0\)"),
    ],
)
def test_what_is_no_preference_is_refused(change, message):
    preference = 0.5 + 0.4 * CYCLE
    for place, value in change.items():
        preference[place] = value
    with pytest.raises(ValueError, match=message):
        toy.nash_equilibrium(preference)
    with pytest.raises(ValueError, match=message):
        solved(jnp.asarray(SKEWED), jnp.asarray(preference), tau=1.0, num_steps=1)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda p, r: toy.regularized_exploitability(r, r, p, tau=0.0), ValueError, "tau must be in .0, inf."),
        (
            lambda p, r: solved(r, p, tau=-1.0, num_steps=1),
            ValueError,
            "tau must be in .0, inf., got -1",
        ),
        (
            lambda p, r: solved(r, p, tau=1.0, num_steps=0),
            ValueError,
            "num_steps must be at least 1, got 0",
        ),
        (
            lambda p, r: solved(r, p, tau=1.0, num_steps=1.5),
            TypeError,
            "num_steps must be a whole number",
        ),
        (
            lambda p, r: toy.nash_md_step(r, r, p, tau=1.0, learning_rate=0.0),
            ValueError,
            "learning_rate must be in .0, i",
        ),
        (lambda p, r: toy.nash_md_step(r, r, p, tau=-1.0, learning_rate=0.1), ValueError, "tau must be in .0, inf."),
        (lambda p, r: toy.nash_md_step(r, r, p, tau=2.0, learning_rate=0.6), ValueError, "learning_rate"),
    ],
)
def test_hyperparameters_are_checked(as_users_have_it, run, error, message):
    preference, reference = (jnp.asarray(table) for table in example(0))
    with pytest.raises(error, match=message):
        run(preference, reference)
