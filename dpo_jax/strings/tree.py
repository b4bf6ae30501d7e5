r"""Tokens of exact policies: from a table of strings to its next tokens and back, values, advantages and KL by token.

A policy is a table of log-probabilities `[*n, responses]`. Where it is read token by token it is a table
`[*n, prefixes, choices]`: for each prefix, the log-probability of each next token. Both say the same.

Rewards belong to whole strings. How a reward is spread over the tokens changes values, but no advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.strings.space import Strings, checked
from dpo_jax.toy.exact import IMPOSSIBLE, log_partition
from dpo_jax.types import Numeric


def string_log_probs(
    next_tokens: Float[Array, "*n prefixes choices"], strings: Strings
) -> Float[Array, "*n responses"]:
    r"""The table of a policy that is given token by token.

    .. math:: \log \pi(y) = \sum_t \log \pi(y_t | y_{<t})

    Args:
      next_tokens: log-probabilities of the next token after each prefix, or any other numbers: the sum along each
        string.
      strings: which strings there are.
    """
    if next_tokens.shape[-2:] != (strings.num_prefixes, strings.num_choices):
        raise ValueError(
            f"next_tokens must have {strings.num_prefixes} prefixes and {strings.num_choices} choices, got shape "
            f"{next_tokens.shape}"
        )
    return _sums(next_tokens, strings)


@partial(as_one, static_argnames="strings")
def _sums(next_tokens: Float[Array, "*n prefixes choices"], strings: Strings) -> Float[Array, "*n responses"]:
    """The sum along each string."""
    ended, reached = [], jnp.zeros((*next_tokens.shape[:-2], 1), next_tokens.dtype)
    for first, last in _levels(strings):
        here = reached[..., None] + next_tokens[..., first:last, :]
        ended.append(here[..., strings.num_letters :].reshape(*here.shape[:-2], -1))
        reached = here[..., : strings.num_letters].reshape(*here.shape[:-2], -1)
    return jnp.concatenate([*ended, reached], axis=-1)


def next_token_log_probs(
    log_probs: Float[Array, "*n responses"], strings: Strings
) -> Float[Array, "*n prefixes choices"]:
    """The log-probabilities of the next token after each prefix; uniform after prefixes that never occur."""
    totals = _totals(log_probs, strings)
    return jax.nn.log_softmax(jnp.maximum(totals, IMPOSSIBLE))


def prefix_log_probs(log_probs: Float[Array, "*n responses"], strings: Strings) -> Float[Array, "*n prefixes"]:
    """The log-probability that a string begins with each prefix."""
    return jax.nn.logsumexp(_totals(log_probs, strings), axis=-1)


def token_log_ratios(
    log_probs: Float[Array, "*n responses"], reference_log_probs: Float[Array, "*n responses"], strings: Strings
) -> Float[Array, "*n prefixes choices"]:
    r"""The log-ratio of policy to reference for each next token, :math:`\log \pi(v|s) - \log \pi_{ref}(v|s)`."""
    checks.same_shape(log_probs=log_probs, reference_log_probs=reference_log_probs)
    return next_token_log_probs(log_probs, strings) - next_token_log_probs(reference_log_probs, strings)


def soft_values(
    reference_log_probs: Float[Array, "*n responses"],
    rewards: Float[Array, "*n responses"],
    strings: Strings,
    *,
    beta: Numeric,
) -> Float[Array, "*n prefixes"]:
    r"""The optimal value of each prefix in the objective of RLHF.

    .. math:: V(s) = \beta \log \sum_{y \succeq s} \pi_{ref}(y|s) \exp(r(y) / \beta)

    That of the empty prefix is :math:`\beta \log Z`. Source: Rafailov et al. 2024, "From r to Q*: Your Language Model
    is Secretly a Q-Function", arXiv 2404.12358, Sec. 3.2, with a reward for whole strings.

    Args:
      reference_log_probs: log-probabilities of the reference policy.
      rewards: of the strings.
      strings: which strings there are.
      beta: strength of the pull towards the reference; positive.
    """
    return log_partition(
        next_token_log_probs(reference_log_probs, strings),
        _soft_values_of_tokens(reference_log_probs, rewards, strings, beta),
        beta=beta,
    ) * jnp.asarray(beta, reference_log_probs.dtype)


def soft_advantages(
    reference_log_probs: Float[Array, "*n responses"],
    rewards: Float[Array, "*n responses"],
    strings: Strings,
    *,
    beta: Numeric,
) -> Float[Array, "*n prefixes choices"]:
    r"""How much each next token is worth: the optimal value after it, minus that before it.

    .. math:: A(s, v) = Q(s, v) - V(s) = \beta \log \frac{\pi^*(v|s)}{\pi_{ref}(v|s)}

    Along a string they add up to :math:`r - \beta \log Z`. Source and arguments: those of `soft_values`; arXiv
    2404.12358, Eq. 7.
    """
    tokens = _soft_values_of_tokens(reference_log_probs, rewards, strings, beta)
    return tokens - soft_values(reference_log_probs, rewards, strings, beta=beta)[..., None]


def values(
    log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"], strings: Strings
) -> Float[Array, "*n prefixes"]:
    """The expected reward of each prefix, if a policy continues it."""
    return jnp.sum(
        jnp.exp(next_token_log_probs(log_probs, strings)) * _values_of_tokens(log_probs, rewards, strings), -1
    )


def advantages(
    log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"], strings: Strings
) -> Float[Array, "*n prefixes choices"]:
    """How much the expected reward rises by each next token, if a policy goes on from there."""
    tokens = _values_of_tokens(log_probs, rewards, strings)
    return tokens - values(log_probs, rewards, strings)[..., None]


def token_kl(
    log_probs: Float[Array, "*n responses"], reference_log_probs: Float[Array, "*n responses"], strings: Strings
) -> Float[Array, "*n prefixes"]:
    """The divergence (nats) of the next token after each prefix, KL(policy || reference)."""
    ratios = token_log_ratios(log_probs, reference_log_probs, strings)
    probs = jnp.exp(next_token_log_probs(log_probs, strings))
    return jnp.sum(jnp.where(probs > 0, probs * ratios, 0), axis=-1)


def kl_by_place(
    log_probs: Float[Array, "*n responses"], reference_log_probs: Float[Array, "*n responses"], strings: Strings
) -> Float[Array, "*n horizon"]:
    r"""What each place of the strings contributes to the divergence from the reference; they add up to it.

    .. math:: KL(\pi \| \pi_{ref}) = \sum_t E_{s \sim \pi, |s| = t}\, KL(\pi(\cdot|s) \| \pi_{ref}(\cdot|s))
    """
    reached = jnp.exp(prefix_log_probs(log_probs, strings))
    weighed = reached * token_kl(log_probs, reference_log_probs, strings)
    return jnp.stack([jnp.sum(weighed[..., first:last], axis=-1) for first, last in _levels(strings)], axis=-1)


def length_distribution(log_probs: Float[Array, "*n responses"], strings: Strings) -> Float[Array, "*n lengths"]:
    """The probability of each number of letters, `0 .. horizon`."""
    checked(strings, log_probs=log_probs)
    groups = np.eye(strings.horizon + 1, dtype=log_probs.dtype)[strings.lengths]
    return jnp.matmul(jnp.exp(log_probs), groups, precision="highest")


def expected_length(log_probs: Float[Array, "*n responses"], strings: Strings) -> Float[Array, "*n"]:
    """The expected number of letters of a policy's strings."""
    checked(strings, log_probs=log_probs)
    return jnp.matmul(jnp.exp(log_probs), strings.lengths.astype(log_probs.dtype), precision="highest")


def _levels(strings: Strings) -> list[tuple[int, int]]:
    """For each length of prefixes, the first id and the one behind the last."""
    return list(pairwise(strings.offsets.tolist()))


def _from_the_end(
    of_strings: Float[Array, "*n responses"],
    strings: Strings,
    combine: Callable[[Float[Array, "*n some choices"], int, int], Float[Array, "*n some"]],
) -> Float[Array, "*n prefixes choices"]:
    """Works from the ends of the strings to their beginning.

    Args:
      of_strings: a number for each string: that of its last choice.
      strings: which strings there are.
      combine: `(numbers of the choices after some prefixes, their first id, the one behind the last)` -> a number for
        each of these prefixes, which is that of the choice that led to it.

    Returns:
      A number for each choice.
    """
    checked(strings, table=of_strings)
    shape, levels = of_strings.shape[:-1], []
    ended = of_strings[..., : strings.num_responses - strings.num_letters**strings.horizon]
    below = of_strings[..., ended.shape[-1] :]
    for first, last in reversed(_levels(strings)):
        choices = below.reshape(*shape, last - first, strings.num_letters)
        if not strings.fixed_length:
            choices = jnp.concatenate([choices, ended[..., first:last, None]], axis=-1)
        levels.append(choices)
        below = combine(choices, first, last)
    return jnp.concatenate(levels[::-1], axis=-2)


@partial(as_one, static_argnames="strings")
def _totals(log_probs: Float[Array, "*n responses"], strings: Strings) -> Float[Array, "*n prefixes choices"]:
    """The log-probability that a string begins with each prefix and then has each token."""
    return _from_the_end(log_probs, strings, lambda choices, *_: jax.nn.logsumexp(choices, axis=-1))


def _soft_values_of_tokens(
    reference_log_probs: Float[Array, "*n responses"],
    rewards: Float[Array, "*n responses"],
    strings: Strings,
    beta: Numeric,
) -> Float[Array, "*n prefixes choices"]:
    checks.same_shape(reference_log_probs=reference_log_probs, rewards=rewards)
    reference = next_token_log_probs(reference_log_probs, strings)
    beta = jnp.asarray(beta, reference.dtype)

    def value(choices: Array, first: int, last: int) -> Array:
        return beta * log_partition(reference[..., first:last, :], choices, beta=beta)

    return _from_the_end(rewards, strings, value)


def _values_of_tokens(
    log_probs: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"], strings: Strings
) -> Float[Array, "*n prefixes choices"]:
    checks.same_shape(log_probs=log_probs, rewards=rewards)
    probs = jnp.exp(next_token_log_probs(log_probs, strings))
    return _from_the_end(
        rewards, strings, lambda choices, first, last: jnp.sum(probs[..., first:last, :] * choices, axis=-1)
    )
