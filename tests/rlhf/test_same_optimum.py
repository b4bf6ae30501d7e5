"""DPO and RLHF come to the same policy, given infinite data and a policy that can become any other, and not else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from dpo_jax import losses, rlhf, toy, train
from dpo_jax.types import Responses
from tests.rlhf.conftest import POLICY, policy_of

BETA, NUM_ROUNDS = 0.3, 2000
EVERYTHING = {
    "num_epochs": NUM_ROUNDS,
    "batch_size": 10**6,
    "optimizer": optax.adam(optax.cosine_decay_schedule(0.05, NUM_ROUNDS)),
}


def dpo(bandit, log_prob, params):
    pairs = train.with_reference(log_prob, bandit.reference, toy.all_preferences(bandit.world))
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=BETA)
    return jax.jit(lambda key: train.fit(key, params, pairs, objective=objective, **EVERYTHING)[0])(jax.random.key(0))


def reward_model(bandit):
    table = toy.score_table_fn(POLICY, bandit.world.embeddings)
    start = POLICY.init(jax.random.key(1), bandit.world.embeddings)
    pairs = toy.all_preferences(bandit.world)
    objective = train.reference_free_objective(toy.score_fn(POLICY, bandit.world.embeddings), losses.bradley_terry_loss)
    fit = jax.jit(lambda key: train.fit(key, start, pairs, objective=objective, **EVERYTHING)[0])
    return table(fit(jax.random.key(0)))


def reinforced(bandit, make, rewards, log_prob):
    learner = bandit._replace(reward=toy.reward_fn(rewards), log_prob=log_prob).learner(make, beta=BETA)
    rate = optax.cosine_decay_schedule(0.05, NUM_ROUNDS)
    run = jax.jit(
        lambda key: train.fit_online(
            key, bandit.start(make), learner, optimizer=optax.adam(rate), num_epochs=1, rounds_per_epoch=NUM_ROUNDS
        )[0]
    )
    return policy_of(run(jax.random.key(1)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [rlhf.rloo, rlhf.ppo])
def test_with_infinite_data_and_a_table_they_are_the_same(bandit, make):
    learned = reward_model(bandit)
    np.testing.assert_allclose(
        learned - learned.mean(-1, keepdims=True),
        bandit.world.rewards - bandit.world.rewards.mean(-1, keepdims=True),
        atol=1e-4,
    )
    by_dpo = bandit.log_probs(dpo(bandit, bandit.log_prob, bandit.reference))
    by_rlhf = reinforced(bandit, make, learned, bandit.log_prob)
    assert bandit.distance(by_rlhf, by_dpo) < 1e-4
    assert bandit.distance(by_rlhf, toy.optimal_policy(bandit.table, bandit.world.rewards, beta=BETA)) < 1e-4


@pytest.mark.slow
def test_a_policy_that_cannot_tell_prompts_apart_ends_in_two_places():
    """RLHF maximises the mean reward. DPO reproduces the mean probability of winning, another mean."""
    rewards = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    world = toy.World(jnp.ones((2, 1)), rewards)
    blind = {"params": {"logits": jnp.zeros(2)}}

    def table(params):
        return jnp.broadcast_to(jax.nn.log_softmax(params["params"]["logits"])[None], (2, 2))

    def log_prob(params, prompts, responses):
        return toy.lookup(table(params), prompts, responses)

    pairs = train.with_reference(log_prob, blind, toy.all_preferences(world))
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=BETA)
    by_dpo, _ = train.fit(jax.random.key(0), blind, pairs, objective=objective, **EVERYTHING)

    def respond(_, params, prompts):
        probs = jax.lax.stop_gradient(jnp.exp(table(params)))
        return Responses(jnp.broadcast_to(jnp.arange(2)[None], (2, 2)), 2 * probs[prompts])

    learner = rlhf.rloo(
        ask=toy.ask_everything(world),
        respond=respond,
        log_prob=log_prob,
        reward=toy.reward_fn(rewards),
        reference_params=blind,
        beta=BETA,
    )
    by_rlhf, _ = train.fit_online(
        jax.random.key(0), blind, learner, optimizer=EVERYTHING["optimizer"], num_epochs=NUM_ROUNDS
    )

    def margin(params):
        logits = params["params"]["logits"]
        return BETA * (logits[0] - logits[1])

    mean_reward = (3.0 - 0.5) / 2
    mean_probability = (special.expit(3.0) + special.expit(-0.5)) / 2
    np.testing.assert_allclose(margin(by_rlhf), mean_reward, atol=1e-3)
    np.testing.assert_allclose(margin(by_dpo), special.logit(mean_probability), atol=1e-3)
    assert margin(by_rlhf) > margin(by_dpo) + 0.5
