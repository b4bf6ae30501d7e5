"""Wrappers of losses: an SFT term, weighted sums, weights for off-policy data; and tokens that count for less."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dpo_jax import checks
from dpo_jax.losses.ratios import difference, fitted, times
from dpo_jax.losses.structure import name_of, refuse_weights_if_rows_mix
from dpo_jax.types import Numeric, PairLike


def with_sft(loss: Callable[..., Array], *, weight: Numeric) -> Callable[..., Array]:
    r"""A loss plus the negative log-likelihood of the chosen response, which keeps its probability from falling.

    .. math:: \mathcal{L} - \alpha \log \pi(y_w|x)

    With `dpo_loss` this is RPO. Source: Pang et al. 2024, "Iterative Reasoning Preference Optimization", arXiv
    2404.19733, Eq. 1, where the NLL is a mean over the tokens of prompt and response.

    >>> import jax.numpy as jnp
    >>> from dpo_jax.losses import dpo_loss
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(with_sft(dpo_loss, weight=2.0)(policy, reference, beta=0.5))  # 0.3133 + 2
    [2.3133]

    Args:
      loss: any loss whose first argument is the policy's pair of log-probabilities.
      weight: :math:`\alpha`, zero or positive. A scalar, or one value for each comparison.

    Returns:
      A loss with the same arguments.
    """
    checks.interval("weight", weight, "[0, inf)")

    def loss_with_sft(policy: PairLike[Float[Array, "*batch"]], *args: Any, **hyperparameters: Any) -> Array:
        if not isinstance(policy, tuple):
            raise TypeError(
                "with_sft needs a loss of pairs or rankings, because it adds the NLL of the chosen response"
            )
        values = loss(policy, *args, **hyperparameters)
        (factor,) = fitted(policy[0], weight=weight)
        return values - times(factor, policy[0])

    return _described(loss_with_sft, f"with_sft({name_of(loss)})", loss)


def weighted_sum(*terms: tuple[Numeric, Callable[..., Array]]) -> Callable[..., Array]:
    r"""A weighted sum of losses of the same data, as in Mixed Preference Optimization.

    .. math:: \sum_i w_i \mathcal{L}_i

    MPO adds 0.8 DPO, 0.2 BCO and 1 SFT: Wang et al. 2024, "Enhancing the Reasoning Ability of Multimodal Large Language
    Models via Mixed Preference Optimization", arXiv 2411.10442. The terms share hyperparameters by name; bind a
    hyperparameter of one term by `functools.partial`.

    >>> import jax.numpy as jnp
    >>> from functools import partial
    >>> from dpo_jax.losses import bco_pair_loss, dpo_loss
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> mpo = with_sft(weighted_sum((0.8, dpo_loss), (0.2, partial(bco_pair_loss, shift=0.0))), weight=1.0)
    >>> print(mpo(policy, reference, beta=0.5))  # 0.8 * 0.3133 + 0.2 * 0.9482 + 1
    [1.4402]

    Args:
      *terms: pairs (weight, loss); at least one. Weights are finite: scalars, or one value for each comparison.

    Returns:
      A loss with the same arguments.
    """
    if not terms:
        raise ValueError("weighted_sum needs at least one term (weight, loss)")
    for weight, _ in terms:
        checks.finite("weight", weight)

    def summed(*args: Any, **hyperparameters: Any) -> Array:
        first, *others = (_weighted(loss(*args, **hyperparameters), weight=weight) for weight, loss in terms)
        for other in others:
            checks.same_shape(one_term=first, another_term=other)
        return sum(others, first)

    return _described(summed, f"weighted_sum({', '.join(name_of(loss) for _, loss in terms)})", terms[0][1])


def wpo_weights(
    policy: PairLike[Float[Array, "*batch"]], alignment: PairLike[Float[Array, "*batch"]]
) -> Float[Array, "*batch"]:
    r"""Weighted Preference Optimization: weights comparisons by the probability of both responses under the policy.

    .. math::
        w(x, y_w)\, w(x, y_l), \qquad
        \log w(x, y) = \frac{1}{|y|} \sum_t \left( \log \pi(y_t|\cdot) - \log \sum_v \pi(v|\cdot)^2 \right)

    Source: Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv 2406.11827, Eq. 2
    (sampled alignment: a response sampled from the policy has an average weight of 1). No gradient flows through the
    weights.

    >>> import jax.numpy as jnp
    >>> probs = jnp.array([0.5, 0.25, 0.25])
    >>> alignment = jnp.log(jnp.sum(probs**2, keepdims=True))
    >>> print(wpo_weights((jnp.log(probs[:1]), jnp.log(probs[1:2])), (alignment, alignment)))  # 0.125 / 0.375^2
    [0.8889]

    Args:
      policy: log-probabilities (nats, means over tokens) of the chosen and the rejected responses.
      alignment: the logarithm of the sum of squared probabilities of all tokens, likewise a mean over the tokens of
        each response; zeros for weights without alignment. The authors' code clips the product at 1; the paper and TRL
        1.16 do not.

    Returns:
      The weight of each comparison.
    """
    checks.pair("policy", policy)
    checks.pair("alignment", alignment)
    sides = {"policy_chosen": policy[0], "policy_rejected": policy[1]}
    sides |= {"alignment_chosen": alignment[0], "alignment_rejected": alignment[1]}
    checks.same_shape(**sides)
    checks.same_dtype(**sides)
    checks.log_probabilities(**sides)
    chosen, rejected = (difference(logps, level) for logps, level in zip(policy, alignment, strict=True))
    return jax.lax.stop_gradient(jnp.exp(chosen + rejected))


def with_weights(loss: Callable[..., Array]) -> Callable[..., Array]:
    """A loss with a further hyperparameter `weights`, for instance `wpo_weights`.

    Raises ValueError if the loss compares whole batches, such as `aot_loss`, unless the weight is a scalar.

    >>> import jax.numpy as jnp
    >>> from dpo_jax.losses import dpo_loss
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(with_weights(dpo_loss)(policy, reference, beta=0.5, weights=jnp.array([2.0])))  # 2 * 0.3133
    [0.6265]
    """

    def weighted(*args: Any, weights: Numeric, **hyperparameters: Any) -> Array:
        checks.interval("weights", weights, "[0, inf)")
        values = _weighted(loss(*args, **hyperparameters), weights=weights)
        if jnp.ndim(weights):
            refuse_weights_if_rows_mix(loss, *args, **hyperparameters)
        return values

    return _described(weighted, f"with_weights({name_of(loss)})", loss)


def length_desensitized_logps(
    token_logps: Float[Array, "*batch tokens"],
    lengths: Int[Array, "*batch"],
    common_lengths: Int[Array, "*batch"],
    *,
    alpha: Numeric,
) -> Float[Array, "*batch"]:
    r"""LD-DPO's log-probabilities: tokens beyond the length of the shorter response have a smaller weight.

    .. math:: \sum_{t \le l} \log \pi(y_t|\cdot) + \alpha \sum_{l < t \le |y|} \log \pi(y_t|\cdot)

    Source: Liu et al. 2024, "Length Desensitization in Direct Preference Optimization", arXiv 2409.06411. Pass the
    results for policy and reference, for both responses, to `dpo_loss`. With alpha 1, or for responses of one token, it
    is the sum.

    >>> import jax.numpy as jnp
    >>> token_logps = jnp.array([[-1.0, -2.0, -4.0, -9.0]])
    >>> print(length_desensitized_logps(token_logps, jnp.array([3]), jnp.array([1]), alpha=0.5))  # -1 - 0.5 * 6
    [-4.]

    Args:
      token_logps: log-probabilities (nats) of the tokens of each response; values after its end are ignored.
      lengths: number of tokens of each response.
      common_lengths: :math:`l`, the length of the shorter response of its pair.
      alpha: weight of the tokens beyond that length; between 0 and 1. A scalar, or one value for each response.
    """
    checks.floating("token_logps", token_logps)
    checks.interval("alpha", alpha, "[0, 1]")
    checks.same_shape(token_logps=token_logps[..., 0], lengths=lengths, common_lengths=common_lengths)
    (alpha,) = fitted(token_logps[..., 0], alpha=alpha)
    place = jax.lax.broadcasted_iota(lengths.dtype, token_logps.shape, token_logps.ndim - 1)
    inside = place < lengths[..., None]
    token_logps = jnp.where(inside, token_logps, 0)
    checks.log_probabilities(token_logps=token_logps)
    share = jnp.broadcast_to(alpha, lengths.shape)[..., None]
    weights = jnp.where(place < common_lengths[..., None], 1, share)
    return jnp.sum(times(weights, token_logps), axis=-1)


def down_sampling_mask(
    key: Key[Array, ""], lengths: Int[Array, "*batch"], common_lengths: Int[Array, "*batch"], *, num_tokens: int
) -> Bool[Array, "*batch {num_tokens}"]:
    r"""SamPO's tokens: of each response as many as the shorter one of its pair has, drawn at random.

    .. math:: \sum_{t \in S} \log \frac{\pi(y_t|\cdot)}{\pi_{ref}(y_t|\cdot)}, \qquad |S| = l

    Every set of :math:`l` tokens is equally likely, so the expected sum is :math:`l` times the mean over all tokens.
    The shorter response keeps all of its tokens. Source: Lu et al. 2024, "Eliminating Biased Length Reliance of Direct
    Preference Optimization via Down-Sampled KL Divergence", arXiv 2406.10957. For each of the two responses, sum the
    log-probabilities of policy and reference over the *same* mask, and pass the sums to `dpo_loss`. The authors' code
    draws other tokens for the reference than for the policy. Drawn by selection sampling (Knuth, The Art of Computer
    Programming, vol. 2, Algorithm S), which needs no sort.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> token_logps = jnp.array([[-1.0, -1.0, -1.0, -9.0], [-2.0, -2.0, -9.0, -9.0]])
    >>> lengths, common_lengths = jnp.array([3, 2]), jnp.array([2, 2])
    >>> mask = down_sampling_mask(jax.random.key(0), lengths, common_lengths, num_tokens=4)
    >>> print(jnp.sum(token_logps, axis=-1, where=mask))  # two tokens each
    [-2. -4.]

    Args:
      key: a typed PRNG key, another one for each batch, and for each side of the pairs.
      lengths: number of tokens of each response, which come first in its row.
      common_lengths: :math:`l`, the length of the shorter response of its pair.
      num_tokens: length of the rows.

    Returns:
      Which tokens count.

    Raises:
      TypeError: lengths are not integers, or the key is not a typed key.
      ValueError: shapes differ, or a response is longer than the rows or shorter than the common length. Where lengths
        are traced, a shorter one keeps all of its tokens.
    """
    checks.key(key)
    checks.integers("lengths", lengths)
    checks.integers("common_lengths", common_lengths)
    checks.same_shape(lengths=lengths, common_lengths=common_lengths)
    checks.size("num_tokens", num_tokens)
    checks.interval("lengths", lengths, f"[0, {num_tokens}]")
    checks.interval("common_lengths", common_lengths, "[0, inf)")
    checks.interval("lengths - common_lengths", lengths - common_lengths, "[0, inf)")
    draws = jax.random.uniform(key, (*lengths.shape, num_tokens))

    def choose(left: tuple[Array, Array], draw: Array) -> tuple[tuple[Array, Array], Array]:
        tokens, wanted = left  # of so many tokens to come, so many are wanted
        taken = (tokens > 0) & (draw * tokens < wanted)
        return (jnp.maximum(tokens - 1, 0), wanted - taken), taken

    _, taken = jax.lax.scan(choose, (lengths, common_lengths), jnp.moveaxis(draws, -1, 0), unroll=8)
    return jnp.moveaxis(taken, 0, -1)


def _weighted(values: Float[Array, "*batch"], **weights: Numeric) -> Float[Array, "*batch"]:
    """Losses times their weights; an infinite loss of weight 0 counts as 0."""
    (factor,) = fitted(values, **weights)
    return times(factor, values)


def _described(wrapper: Callable[..., Array], name: str, loss: Callable[..., Array]) -> Callable[..., Array]:
    """A wrapper with a name for error messages, and the positional arguments of the loss inside."""
    positional = [p for p in inspect.signature(loss).parameters.values() if p.kind <= p.VAR_POSITIONAL]
    hyperparameters = inspect.Parameter("hyperparameters", inspect.Parameter.VAR_KEYWORD)
    wrapper.__name__ = name
    wrapper.__signature__ = inspect.Signature([*positional, hyperparameters])  # type: ignore[attr-defined]
    return wrapper
