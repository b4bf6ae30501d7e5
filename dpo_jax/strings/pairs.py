"""Pairs of strings that are alike: with a shared prefix, or at an edit distance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dpo_jax import checks
from dpo_jax.strings.space import Strings
from dpo_jax.toy.policy import at_least_float32, invert_cumulative

MOST_TO_COMPARE = 4096
"""The largest number of strings of which all pairs are compared."""


def shared_prefixes(strings: Strings) -> Int[np.ndarray, "responses responses"]:
    """For each pair of strings, how many tokens they share before they first differ.

    Raises:
      ValueError: there are more than `MOST_TO_COMPARE` strings.
    """
    _check_size(strings)
    shared, same = np.zeros((strings.num_responses,) * 2, np.int8), True
    for column in strings.tokens.T:
        same &= (column[:, None] == column) & (column >= 0)
        shared += same
    return shared


def edit_distances(strings: Strings) -> Int[np.ndarray, "responses responses"]:
    """For each pair of strings, how many letters must be inserted, deleted or replaced to make one of the other.

    Source: Levenshtein 1966; Wagner and Fischer 1974, by their table.

    Raises:
      ValueError: there are more than `MOST_TO_COMPARE` strings.
    """
    _check_size(strings)
    lengths, shape = strings.lengths, (strings.num_responses,) * 2
    above = [np.full(shape, column, np.int8) for column in range(strings.horizon + 1)]
    found = np.broadcast_to(lengths, shape).astype(np.int8)  # of the empty string to all others
    for row in range(1, strings.horizon + 1):
        here = [np.full(shape, row, np.int8)]
        for column in range(1, strings.horizon + 1):
            differ = strings.tokens[:, row - 1, None] != strings.tokens[:, column - 1]
            here.append(np.minimum(np.minimum(above[column], here[-1]) + 1, above[column - 1] + differ).astype(np.int8))
        above = here
        done = np.stack(here)[lengths, :, np.arange(strings.num_responses)].T
        found = np.where((lengths == row)[:, None], done, found)
    return found


def sample_pairs(
    key: Key[Array, ""],
    log_probs: Float[Array, "prompts responses"],
    allowed: Bool[Array, "responses responses"],
    *,
    num: int,
) -> tuple[Int[Array, " num"], tuple[Int[Array, " num"], Int[Array, " num"]]]:
    """Uniform prompts, each with two independent samples of a policy, given that the pair is allowed.

    `toy.label_pairs` makes comparisons of them. With `allowed = shared_prefixes(strings) == 2`, for instance, the two
    share their first two tokens and differ in the third.

    Args:
      key: typed PRNG key.
      log_probs: the policy's table (nats); zeros draw uniformly.
      allowed: which pairs; symmetric. Equal responses are never paired.
      num: how many; static.

    Raises:
      TypeError, ValueError: an argument is not as described, or a prompt has no allowed pair. Where tables are traced
        their values are unknown; there, the ids of such a prompt are -1, which is no response.
    """
    checks.key(key)
    checks.size("num", num)
    checks.not_nan("log_probs", log_probs)
    checks.boolean("allowed", allowed)
    if allowed.shape != (log_probs.shape[-1],) * 2:
        raise ValueError(f"allowed must have a row and a column for each response, got shape {allowed.shape}")
    if not checks.is_traced(allowed) and not np.array_equal(allowed, np.transpose(allowed)):
        raise ValueError("allowed must be symmetric: the two responses of a pair have no order")
    prompt_key, pair_key = jax.random.split(key)
    probs = jax.nn.softmax(at_least_float32(log_probs))
    partners = (allowed & ~np.eye(len(allowed), dtype=bool)).astype(probs.dtype)
    weights = probs * jnp.matmul(probs, partners, precision="highest")
    checks.choices("allowed", weights, at_least=2)
    prompts = jax.random.randint(prompt_key, (num,), 0, len(log_probs))
    first_uniform, second_uniform = jax.random.uniform(pair_key, (2, num))
    first = invert_cumulative(first_uniform, weights[prompts])
    second = invert_cumulative(second_uniform, probs[prompts] * partners[first])
    return prompts, (first, jnp.where(first < 0, -1, second))


def _check_size(strings: Strings) -> None:
    if strings.num_responses > MOST_TO_COMPARE:
        raise ValueError(
            f"{strings.num_responses:,} strings have too many pairs to list; at most {MOST_TO_COMPARE:,} strings: "
            "take fewer letters or a shorter horizon"
        )
