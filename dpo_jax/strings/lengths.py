"""What losses need to know of lengths: numbers of tokens, means, and sums that leave tokens out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_jax import checks
from dpo_jax.fast.rows import take
from dpo_jax.strings.space import Strings
from dpo_jax.types import LogProbFn, Params, TokenLogps


def token_lookup(
    next_tokens: Float[Array, "prompts prefixes choices"],
    strings: Strings,
    prompts: Int[Array, "*n"],
    responses: Int[Array, "*n"],
) -> TokenLogps:
    """Log-probabilities of the tokens of some strings, from the table of next tokens (`next_token_log_probs`).

    Raises:
      TypeError, ValueError: ids are not integers, or out of range. Where they are traced their values are unknown;
        there, all tokens of such a string are NaN.
    """
    num_prompts, num_prefixes, num_choices = next_tokens.shape
    checks.ids("prompts", prompts, num_prompts)
    checks.ids("responses", responses, strings.num_responses)
    checks.same_shape(prompts=prompts, responses=responses)
    known = (prompts >= 0) & (prompts < num_prompts) & (responses >= 0) & (responses < strings.num_responses)
    rows = jnp.where(known, responses, 0)
    places = take(jnp.asarray(num_choices * strings.prefixes + jnp.maximum(strings.tokens, 0)), rows)
    mask = take(jnp.asarray(strings.mask), rows)
    start = num_prefixes * num_choices * jnp.where(known, prompts, 0)
    found = take(next_tokens.ravel(), start[..., None] + places)
    return TokenLogps(jnp.where(known[..., None], jnp.where(mask, found, 0), jnp.nan), mask)


def num_tokens_of(strings: Strings, responses: Any) -> Any:
    """The number of tokens of each response: of an array of ids, or of any pytree of such arrays.

    As a hyperparameter of `losses.length_normalized_dpo_loss`, say:
    `lengths=lambda params, batch, logps: num_tokens_of(strings, batch.responses)`. 0 for an id out of range.
    """
    return jax.tree.map(lambda ids: _entries(strings.num_tokens, ids), responses)


def lengths_of(strings: Strings, responses: Any) -> Any:
    """The number of letters of each response, plus 1: with an end token for the longest strings, too.

    For losses that know only differences of lengths, such as `losses.length_regularized_dpo_loss`. The longest strings
    need no end token, so numbers of tokens do not tell them from those that are one letter shorter.
    """
    return jax.tree.map(lambda ids: _entries(strings.lengths + 1, ids), responses)


def on_means(log_prob: LogProbFn, strings: Strings) -> LogProbFn:
    """Means over tokens, from a function that returns sums: for SimPO, ORPO and others.

    Score the reference in the same way: `train.with_reference(on_means(log_prob, strings), ...)`.
    """

    def mean_log_prob(params: Params, prompts: Array, responses: Any) -> Any:
        sums = log_prob(params, prompts, responses)
        return jax.tree.map(lambda total, num: total / num, sums, num_tokens_of(strings, responses))

    return mean_log_prob


def _entries(table: Any, ids: Int[Array, "*n"]) -> Int[Array, "*n"]:
    known = (ids >= 0) & (ids < len(table))
    return jnp.where(known, take(jnp.asarray(table), jnp.where(known, ids, 0)), 0)
