from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import rlhf, toy
from dpo_jax.types import LogProbFn, RewardFn, ValueFn

NUM_PROMPTS, NUM_RESPONSES = 2, 4
POLICY, VALUE = toy.TablePolicy(NUM_RESPONSES), toy.TablePolicy(1)


class Bandit(NamedTuple):
    """A small world, a table policy that differs from uniform, and what learners ask for."""

    world: toy.World
    reference: dict
    table: jax.Array
    log_probs: object
    log_prob: LogProbFn
    value: ValueFn
    reward: RewardFn

    def exchange(self, group_size=None, num_prompts=None):
        """Ask and respond: all responses to all prompts, or samples."""
        embeddings = self.world.embeddings
        if group_size is None:
            return toy.ask_everything(self.world), toy.enumerate_fn(POLICY, embeddings)
        ask = toy.ask_uniformly(self.world, num=num_prompts) if num_prompts else toy.ask_everything(self.world)
        return ask, toy.respond_fn(POLICY, embeddings, group_size=group_size)

    def learner(self, make, *exchange, **hyperparameters):
        if make is rlhf.ppo:
            hyperparameters = {"value": self.value, **hyperparameters}
        ask, respond = self.exchange(*exchange)
        shared = {"log_prob": self.log_prob, "reward": self.reward, "reference_params": self.reference}
        return make(ask=ask, respond=respond, **shared, **hyperparameters)

    def start(self, make):
        if make is not rlhf.ppo:
            return self.reference
        return rlhf.ActorCritic(self.reference, VALUE.init(jax.random.key(0), self.world.embeddings))

    def distance(self, params, optimum):
        """Total variation to an optimum, on the worst prompt."""
        table = self.log_probs(policy_of(params))
        return 0.5 * jnp.max(jnp.sum(jnp.abs(jnp.exp(table) - jnp.exp(optimum)), axis=-1))


def policy_of(params):
    return params.policy if isinstance(params, rlhf.ActorCritic) else params


@pytest.fixture(scope="session")
def bandit():
    return _make_bandit()


@pytest.fixture(scope="session")
def make_bandit():
    return _make_bandit


def _make_bandit(dtype=jnp.float32):
    world = toy.make_world(jax.random.key(3), num_prompts=NUM_PROMPTS, num_responses=NUM_RESPONSES, embedding_dim=3)
    world = jax.tree.map(lambda leaf: leaf.astype(dtype), world)
    table = jax.nn.log_softmax(jax.random.normal(jax.random.key(4), (NUM_PROMPTS, NUM_RESPONSES), dtype))
    read = (partial(f, POLICY) for f in (toy.table_fn, toy.log_prob_fn))
    log_probs, log_prob = (f(world.embeddings) for f in read)
    value = toy.value_fn(VALUE, world.embeddings)
    return Bandit(world, {"params": {"logits": table}}, table, log_probs, log_prob, value, toy.reward_fn(world.rewards))
