"""Policies of the one-token world: a table of log-probabilities, and the networks that produce one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.fast.layers import DenseByRows, dense
from dpo_jax.fast.rows import take
from dpo_jax.types import LogProbFn, Params, ValueFn


class ToyLM(nn.Module):
    """The notebook's network: embedding -> dense -> ReLU -> dense -> logits, from PyTorch's initial distribution.

    Its outputs can also be rewards (`score_fn`); with one output it is a value function (`value_fn`).

    Attributes:
      num_responses: number of possible responses.
      hidden_dim: width of the hidden layer.
    """

    num_responses: int
    hidden_dim: int = 32

    @nn.compact
    def __call__(self, embeddings: Float[Array, "*prompts features"]) -> Float[Array, "*prompts responses"]:
        hidden = nn.relu(dense(self.hidden_dim, embeddings)(embeddings))
        return DenseByRows(self.num_responses, name="Dense_1")(hidden)


class TablePolicy(nn.Module):
    """One logit for each prompt and response: can represent any policy. It starts uniform.

    Attributes:
      num_responses: number of possible responses.
    """

    num_responses: int

    @nn.compact
    def __call__(self, embeddings: Float[Array, "prompts features"]) -> Float[Array, "prompts responses"]:
        return self.param("logits", nn.initializers.zeros, (embeddings.shape[0], self.num_responses), embeddings.dtype)


def table_fn(
    policy: nn.Module, embeddings: Float[Array, "prompts features"]
) -> Callable[[Params], Float[Array, "prompts responses"]]:
    """The function from a policy's parameters to its table of log-probabilities (nats), one row for each prompt."""
    scores = score_table_fn(policy, embeddings)
    return lambda params: jax.nn.log_softmax(scores(params))


def log_prob_fn(policy: nn.Module, embeddings: Float[Array, "prompts features"]) -> LogProbFn:
    """The function `(params, prompts, responses) -> log-probabilities` (nats) that objectives take.

    The network runs once for each distinct prompt, for any number of comparisons.
    """
    table = table_fn(policy, embeddings)
    return lambda params, prompts, responses: lookup(table(params), prompts, responses)


def score_table_fn(
    network: nn.Module, embeddings: Float[Array, "prompts features"]
) -> Callable[[Params], Float[Array, "prompts responses"]]:
    """The function from a network's parameters to its table of outputs: logits, or the rewards of a reward model."""
    return lambda params: cast(Array, network.apply(params, embeddings))


def score_fn(network: nn.Module, embeddings: Float[Array, "prompts features"]) -> LogProbFn:
    """The function `(params, prompts, responses) -> outputs` of a network: a reward model's rewards."""
    scores = score_table_fn(network, embeddings)
    return lambda params, prompts, responses: lookup(scores(params), prompts, responses)


def value_fn(network: nn.Module, embeddings: Float[Array, "prompts features"]) -> ValueFn:
    """The function `(params, prompts) -> values` of a network with one output."""
    scores = score_table_fn(network, embeddings)
    return lambda params, prompts: lookup(scores(params), prompts, jnp.zeros_like(prompts))


def lookup(table: Float[Array, "prompts responses"], prompts: Int[Array, "*n"], responses: Any) -> Any:
    """Entries of a table for prompts and for responses: an array of ids, or any pytree of such arrays.

    Raises:
      TypeError: ids are not integers, or the entries of the table are not floats.
      ValueError: an id is out of range. Where ids are traced their values are unknown; there, an id outside the
        table yields NaN instead of another response's entry.
    """
    table = jnp.asarray(table)
    num_prompts, num_responses = table.shape
    checks.floating("table", table)
    checks.ids("prompts", prompts, num_prompts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(responses):
        name = f"responses{jax.tree_util.keystr(path)}"
        checks.ids(name, leaf, num_responses)
        checks.same_shape(**{"prompts": prompts, name: leaf})
    return jax.tree.map(lambda ids: _entries(table, prompts, ids), responses)


@as_one
def _entries(table: Float[Array, "prompts responses"], prompts: Int[Array, "*n"], responses: Int[Array, "*n"]) -> Array:
    """Entries of a table; NaN for ids outside of it."""
    num_prompts, num_responses = table.shape
    rows, columns = jnp.asarray(prompts, jnp.int32), jnp.asarray(responses, jnp.int32)
    inside = (rows >= 0) & (rows < num_prompts) & (columns >= 0) & (columns < num_responses)
    place = jnp.where(inside, rows * num_responses + columns, 0)
    return jnp.where(inside, take(table.ravel(), place), jnp.nan)


def generate(
    key: Key[Array, ""], log_probs: Float[Array, "prompts responses"], prompts: Int[Array, "*n"]
) -> Int[Array, "*n"]:
    """Samples a response to each prompt, by inverting the cumulative distribution: one uniform number a response.

    Args:
      key: typed PRNG key.
      log_probs: the policy's table (nats).
      prompts: ids of the prompts to respond to.

    Raises:
      TypeError, ValueError: the key is not a key, an id is out of range, or a prompt has no possible response. Where
        these are traced their values are unknown; there, the response is -1, which is no response.
    """
    checks.key(key)
    checks.ids("prompts", prompts, log_probs.shape[0])
    probs = jnp.exp(at_least_float32(log_probs))
    checks.choices("exp(log_probs)", probs)
    probs = probs.at[prompts].get(mode="fill", wrap_negative_indices=False)
    return invert_cumulative(jax.random.uniform(key, jnp.shape(prompts)), probs)


def greedy(log_probs: Float[Array, "prompts responses"]) -> Int[Array, " prompts"]:
    """The most probable response to each prompt; the first one in case of a tie.

    Raises:
      ValueError: an entry is NaN, or a prompt has no possible response. Where the table is traced its values are
        unknown; there, the response is -1, which is no response.
    """
    checks.not_nan("log_probs", log_probs)
    checks.choices("exp(log_probs)", (log_probs > -jnp.inf) * 1.0)
    return jnp.where(jnp.max(log_probs, axis=-1) > -jnp.inf, jnp.argmax(log_probs, axis=-1), -1)


@as_one
def invert_cumulative(uniform: Float[Array, "*n"], weights: Float[Array, "*n responses"]) -> Int[Array, "*n"]:
    """Draws an index with probability proportional to the weights, given uniform numbers in [0, 1).

    An index of weight zero is never drawn. Where no weight is positive, or one is NaN, the index is -1. Weights of 16
    bits are added in float32: near a sum of 0.9 the spacing of bfloat16 is 0.004, so rarer responses would never be
    drawn.
    """
    cumulative = jnp.cumsum(at_least_float32(weights), axis=-1)
    total = cumulative[..., -1:]
    index = jnp.sum(uniform[..., None] * total >= cumulative, axis=-1, dtype=jnp.int32)
    return jnp.where(total[..., 0] > 0, index, -1)


def at_least_float32(values: Any) -> Float[Array, "..."]:
    """Promotes numbers to float32 at least: sampling needs the precision.

    `jax.random.bernoulli` also compares with uniform numbers of the given dtype; those of bfloat16 are multiples of
    1/128.
    """
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
