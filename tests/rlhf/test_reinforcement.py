"""What learners keep beside the policy, by hand, on all responses to all prompts: baselines, values, prices of KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import rlhf

BETA = 0.4


@pytest.fixture(scope="module")
def moved(bandit):
    """A policy away from its reference."""
    return {"params": {"logits": bandit.table + jax.random.normal(jax.random.key(6), bandit.table.shape)}}


def by_hand(bandit, moved):
    """The policy's probabilities, its log-ratios and its net rewards."""
    table, reference = np.float64(bandit.log_probs(moved)), np.float64(bandit.table)
    return np.exp(table), table - reference, np.float64(bandit.world.rewards) - BETA * (table - reference)


def test_the_baseline_is_the_mean_net_reward_of_the_batches_before(bandit, moved, key):
    learner = bandit.learner(rlhf.reinforce, beta=BETA, momentum=0.75)
    probs, _, net = by_hand(bandit, moved)
    mean, memory = (probs * net).sum(-1).mean(), learner.memory
    for expected_before, weight in ((0.0, 0.25), (mean, 0.4375)):  # the first one has no batch before it
        rollouts, memory = learner.collect(key, moved, memory)
        np.testing.assert_allclose(rollouts.advantages, (net - expected_before).ravel(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose([memory.value, memory.weight], [mean, weight], rtol=1e-5)


def test_errors_of_values_count_by_the_weights_of_responses_and_by_their_share_of_the_loss(bandit, moved, key):
    probs, _, net = by_hand(bandit, moved)
    params = bandit.start(rlhf.ppo)._replace(policy=moved)  # all values are 0
    losses = {}
    for share in (0.0, 0.3):
        learner = bandit.learner(rlhf.ppo, beta=BETA, value_weight=share, value_clip=jnp.inf)
        run = lambda key, learner=learner: learner.objective(params, learner.collect(key, params, None)[0])  # noqa: E731
        losses[share], metrics = jax.jit(run)(key)
        np.testing.assert_allclose(metrics["value_loss"], 0.5 * (probs * net**2).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(losses[0.3] - losses[0.0], 0.3 * metrics["value_loss"], rtol=1e-3)


def test_advantages_of_ppo_are_relative_to_the_values(bandit, moved, key):
    values = jnp.array([[0.5], [2.0]])
    learner = bandit.learner(rlhf.ppo, beta=BETA, advantages=lambda advantages, _: advantages)
    rollouts, _ = learner.collect(key, rlhf.ActorCritic(moved, {"params": {"logits": values}}), None)
    expected = by_hand(bandit, moved)[2] - values
    np.testing.assert_allclose(rollouts.advantages, expected.ravel(), rtol=1e-4, atol=1e-6)


def test_the_price_of_kl_follows_the_kl_of_the_policy(bandit, moved, key):
    probs, ratios, _ = by_hand(bandit, moved)
    kl = (probs * ratios).sum(-1).mean()
    control = rlhf.AdaptiveKL(initial=BETA, target=kl / 1.1, gain=0.5)
    learner = bandit.learner(rlhf.ppo, beta=control)
    rollouts, price = learner.collect(key, bandit.start(rlhf.ppo)._replace(policy=moved), learner.memory)
    np.testing.assert_allclose(price, BETA * 1.05, rtol=1e-5)
    np.testing.assert_allclose(rollouts.returns, by_hand(bandit, moved)[2].ravel(), rtol=1e-4)  # at the price before
