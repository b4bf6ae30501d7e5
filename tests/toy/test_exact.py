import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from dpo_jax import toy


@pytest.fixture(params=[0.02, 0.3, 5.0])
def beta(request):
    return request.param


@pytest.fixture
def reference(key, world):
    return jax.nn.log_softmax(jax.random.normal(key, world.rewards.shape))


@pytest.fixture
def policy(world):
    return jax.nn.log_softmax(jax.random.normal(jax.random.key(99), world.rewards.shape))


def objective(policy, reference, rewards, beta):
    """Reward minus beta KL, in float64, from probabilities."""
    pi, ref = np.exp(np.float64(policy)), np.exp(np.float64(reference))
    return (pi * rewards).sum(-1) - beta * (pi * np.log(pi / ref)).sum(-1)


def test_log_partition_by_hand(world, reference, beta):
    expected = np.log((np.exp(np.float64(reference)) * np.exp(np.float64(world.rewards) / beta)).sum(-1))
    np.testing.assert_allclose(toy.log_partition(reference, world.rewards, beta=beta), expected, rtol=1e-5, atol=1e-6)


def test_optimal_policy_is_what_an_optimiser_finds(world, reference):
    """An independent maximum: SciPy on the logits of one prompt."""
    beta, rewards = 0.3, np.float64(world.rewards[0])
    found = optimize.minimize(
        lambda logits: -objective(logits - np.log(np.exp(logits).sum()), reference[0], rewards, beta),
        np.zeros(len(rewards)),
        tol=1e-12,
    ).x
    expected = np.exp(found) / np.exp(found).sum()
    optimum = toy.optimal_policy(reference, world.rewards, beta=beta)[0]
    np.testing.assert_allclose(jnp.exp(optimum), expected, atol=1e-4)


def test_optimal_policy_beats_every_other(world, reference, policy, beta):
    best = objective(toy.optimal_policy(reference, world.rewards, beta=beta), reference, world.rewards, beta)
    assert np.all(best >= objective(policy, reference, world.rewards, beta))
    np.testing.assert_allclose(best, beta * toy.log_partition(reference, world.rewards, beta=beta), rtol=1e-4)


def test_the_limits_of_beta(world, reference):
    np.testing.assert_allclose(toy.optimal_policy(reference, world.rewards, beta=1e6), reference, atol=1e-5)
    greedy = toy.greedy(toy.optimal_policy(reference, world.rewards, beta=1e-4))
    assert greedy.tolist() == jnp.argmax(world.rewards, axis=-1).tolist()


def test_the_reward_is_recovered_from_its_optimum(world, reference, beta):
    optimum = toy.optimal_policy(reference, world.rewards, beta=beta)
    log_partition = toy.log_partition(reference, world.rewards, beta=beta)
    recovered = toy.recovered_reward(optimum, reference, log_partition, beta=beta)
    np.testing.assert_allclose(recovered, world.rewards, atol=1e-5 * max(1, beta))
    implicit = toy.implicit_reward(optimum, reference, beta=beta)
    np.testing.assert_allclose(
        implicit - implicit[:, :1], world.rewards - world.rewards[:, :1], atol=1e-5 * max(1, beta)
    )


def test_expected_reward_by_hand():
    log_probs = jnp.log(jnp.array([[0.25, 0.75], [1.0, 0.0]]))
    rewards = jnp.array([[1.0, 3.0], [5.0, 100.0]])
    assert toy.expected_reward(log_probs, rewards).tolist() == [2.5, 5.0]


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
    optimum = toy.optimal_policy(reference, world.rewards, beta=beta)
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
        with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
            function(reference, world.rewards, beta=0)
    with pytest.raises(ValueError, match="betas must be positive and finite, got -1.0 in row 1"):
        toy.frontier(reference, world.rewards, jnp.array([1.0, -1.0]))
