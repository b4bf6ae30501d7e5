"""Exact measures of policies that the claims about tokens need."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo_jax import strings, toy
from dpo_jax.types import Preferences
from experiments.lab.pipeline import Pipeline, Start
from experiments.lab.string_worlds import STRINGS


def entanglement(
    pipeline: Pipeline, start: Start, pairs: Preferences, change: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How often gradients at the start tell whether a chosen response becomes more probable in training.

    Returns:
      By the gradients of the pair alone, as if no other pair were trained on: it rises where the gradient of its
      log-probability is larger than the product with that of the rejected one. And by those of all pairs: the direction
      of the first step.
    """
    table = pipeline.table(start.world)
    jacobian = jax.jacrev(lambda params: table(params).ravel())(start.params)
    rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)], axis=-1)
    products = rows @ rows.T
    chosen, rejected = (start.world.num_responses * pairs.prompts + ids for ids in pairs.responses)
    pulls = jnp.zeros(len(products)).at[chosen].add(1.0).at[rejected].add(-1.0)
    rises = {"alone": products[chosen, chosen] > products[chosen, rejected], "all": (products @ pulls)[chosen] > 0}
    alone, with_all = (jnp.mean((rise == (change > 0)) * 1.0) for rise in rises.values())
    return alone, with_all


def compared(pairs: Preferences, shape: tuple[int, ...]) -> Array:
    """Which responses to which prompts were compared."""
    seen = jnp.zeros(shape, bool)
    for ids in pairs.responses:
        seen = seen.at[pairs.prompts, ids].set(True)
    return seen


def bad(start: Start) -> Array:
    """Strings that are worse than the SFT policy's mean."""
    return start.world.rewards < toy.expected_reward(start.log_probs, start.world.rewards)[:, None]


def token_log_probs(log_probs: Array, every: strings.Strings = STRINGS) -> Array:
    """The log-probability that a string reaches each prefix and has each next token."""
    reached = strings.prefix_log_probs(log_probs, every)
    return reached[..., None] + strings.next_token_log_probs(log_probs, every)


def entropy(log_probs: Array) -> Array:
    """Of each prompt's distribution (nats)."""
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def mean_where(log_probs: Array, values: Array, where: Array) -> Array:
    """The mean of values under a policy, given that a response is among some."""
    weights = jnp.where(where, jnp.exp(log_probs), 0)
    return jnp.mean(jnp.sum(weights * values, -1) / jnp.maximum(jnp.sum(weights, -1), 1e-20))


def correlation(x: Array, y: Array, weights: Array) -> Array:
    """The correlation of two tables under weights."""
    shares = weights / jnp.sum(weights)
    x, y = (values - jnp.sum(shares * values) for values in (x, y))
    return jnp.sum(shares * x * y) / jnp.sqrt(jnp.sum(shares * x**2) * jnp.sum(shares * y**2))


def accuracy(scores: Array, rewards: Array, weights: Array) -> Array:
    """How often a score predicts a new comparison of two different responses that are drawn by weights: exact."""
    wins = toy.preference_table(rewards)
    above, below = scores[..., :, None] > scores[..., None, :], scores[..., :, None] < scores[..., None, :]
    right = jnp.where(above, wins, jnp.where(below, 1 - wins, 0.5))
    pairs = weights[..., :, None] * weights[..., None, :]
    pairs = jnp.where(np.eye(rewards.shape[-1], dtype=bool)[None], 0, pairs)
    return jnp.mean(jnp.sum(pairs * right, (-1, -2)) / jnp.sum(pairs, (-1, -2)))
