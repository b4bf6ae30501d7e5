"""Advantages: how much better than usual a response was, from the rewards of a group of responses to one prompt.

Rewards have a row for each prompt and a column for each response to it. If a group holds all possible responses instead
of samples, `weights` are their probabilities (up to a factor), and means are expectations.

Advantages of equal rewards are exactly 0, and so are those of a group whose weights are all 0. Sums are taken in
float32 at least; the dtype of the result is that of the rewards.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.losses.ratios import fitted
from dpo_jax.types import Numeric


def centred_advantages(
    rewards: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None = None
) -> Float[Array, "*n group"]:
    r"""Dr. GRPO's advantages: rewards minus the mean of their group.

    .. math:: A_i = r_i - \text{mean}_j\, r_j

    The baseline of a response includes the response, so the gradient is :math:`(K - 1) / K` times the policy gradient,
    where :math:`K` is the size of the group. Source: Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv
    2503.20783.

    Args:
      rewards: of responses to one prompt each row; two at least, unless they have weights.
      weights: of the responses; `None` means equally.
    """
    _check(rewards, weights, at_least=2 if weights is None else 1)
    return _centred(rewards, weights).astype(rewards.dtype)


def grpo_advantages(
    rewards: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None = None, *, epsilon: Numeric = 1e-4
) -> Float[Array, "*n group"]:
    r"""GRPO's advantages: rewards, standardised within their group.

    .. math:: A_i = \frac{r_i - \text{mean}_j\, r_j}{\text{std}_j\, r_j + \epsilon}

    Prompts count equally, however little their rewards vary; the estimate of the policy gradient is biased. Source:
    Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, Sec. 4.1.2; the paper has no :math:`\epsilon`, TRL has 1e-4. The
    standard deviation of samples is that of TRL, with :math:`K - 1` in its denominator; with `weights` it is that of
    the distribution.

    Args:
      rewards: of responses to one prompt each row; two at least.
      weights: of the responses; `None` means equally.
      epsilon: keeps the advantages of nearly equal rewards small; positive.
    """
    checks.interval("epsilon", epsilon, "(0, inf)")
    _check(rewards, weights, at_least=2)
    centred = _centred(rewards, weights)
    (floor,) = fitted(centred, epsilon=epsilon)
    size, variance = _spread(centred, weights)
    return (centred / (size * jnp.sqrt(variance) + floor)).astype(rewards.dtype)


def rloo_advantages(
    rewards: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None = None
) -> Float[Array, "*n group"]:
    r"""REINFORCE leave-one-out: rewards minus the mean of the *others* in their group. Unbiased.

    .. math:: A_i = r_i - \frac{1}{K - 1} \sum_{j \neq i} r_j

    Source: Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740 (after Kool et al. 2019). With `weights`, means are
    expectations, and leaving out one sample has no effect.

    Args:
      rewards: of responses to one prompt each row; two at least.
      weights: of the responses; `None` means equally.
    """
    _check(rewards, weights, at_least=2)
    num = rewards.shape[-1]
    return (_centred(rewards, weights) * (num / (num - 1) if weights is None else 1.0)).astype(rewards.dtype)


def whitened(advantages: Float[Array, "*n"], weights: Float[Array, "*n"] | None = None) -> Float[Array, "*n"]:
    r"""Advantages with mean 0 and variance 1 over the whole batch, as in PPO implementations.

    For advantages of tokens, the weights are the mask, as floating-point numbers. What stands where they are 0 is
    ignored; where it is not finite, the result is 0. TRL's `masked_whiten` takes the variance of samples: its results
    are :math:`\sqrt{(n - 1) / n}` times these, where :math:`n` is the number of tokens that count.

    Args:
      advantages: of all responses, or of all tokens; two at least.
      weights: of the responses or tokens; `None` means equally.
    """
    checks.floating("advantages", advantages)
    checks.size("the number of advantages", advantages.size, at_least=2)
    if weights is not None:
        checks.same_shape(advantages=advantages, weights=weights)
        checks.interval("weights", weights, "[0, inf)")
    return _white(advantages, weights)


@as_one
def _white(advantages: Float[Array, "*batch"], weights: Float[Array, "*batch"] | None) -> Float[Array, "*batch"]:
    flat = advantages.ravel()
    weights = None if weights is None else weights.ravel()
    ignored = False if weights is None else (weights == 0) & ~jnp.isfinite(flat)
    centred = _centred(jnp.where(ignored, 0, flat), weights)
    size, variance = _spread(centred, weights)
    white = jnp.where(ignored, 0, centred / size / jnp.sqrt(variance + 1e-8 / size**2))
    return white.reshape(advantages.shape).astype(advantages.dtype)


@as_one
def _centred(values: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None) -> Float[Array, "*n group"]:
    """Subtracts the mean twice: the residual of a rounded mean is small, so its mean is accurate."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    shifted = values - _mean(values, weights)
    centred = shifted - _mean(shifted, weights)
    return centred if weights is None else jnp.where(jnp.any(weights > 0, axis=-1, keepdims=True), centred, 0)


@as_one
def _mean(values: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None) -> Float[Array, "*n 1"]:
    """The result is clipped to the range of the values; values of weight 0 have no effect, even infinite ones."""
    if weights is None:
        mean, low, high = (of(values, axis=-1, keepdims=True) for of in (jnp.mean, jnp.min, jnp.max))
        return jnp.clip(mean, low, high)
    counts, largest = weights > 0, jnp.max(weights, axis=-1, keepdims=True)
    shares = (weights / jnp.where(largest > 0, largest, 1)).astype(values.dtype)  # so that their sum is 1 at least
    total = jnp.sum(jnp.where(counts, shares * values, 0), axis=-1, keepdims=True)
    mean = total / jnp.maximum(jnp.sum(shares, axis=-1, keepdims=True), 1)
    low = jnp.min(values, axis=-1, keepdims=True, where=counts, initial=jnp.inf)
    high = jnp.max(values, axis=-1, keepdims=True, where=counts, initial=-jnp.inf)
    return jnp.where(largest > 0, jnp.clip(mean, low, high), 0)


@as_one
def _spread(
    centred: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None
) -> tuple[Float[Array, "*n 1"], Float[Array, "*n 1"]]:
    """The largest of the values, 1 at least, and their variance in units of its square, which does not overflow.

    The variance of samples has n - 1 in its denominator; with weights it is that of the distribution.
    """
    counts = True if weights is None else weights > 0
    size = jnp.max(jnp.abs(centred), axis=-1, keepdims=True, where=counts, initial=1.0)
    num = centred.shape[-1]
    return size, _mean(jnp.square(centred / size), weights) * (num / (num - 1) if weights is None else 1.0)


def _check(rewards: Array, weights: Array | None, *, at_least: int = 1) -> None:
    checks.floating("rewards", rewards)
    checks.batch("rewards", rewards)
    checks.size("the number of responses in a group", rewards.shape[-1], at_least=at_least)
    if weights is not None:
        checks.same_shape(rewards=rewards, weights=weights)
        checks.interval("weights", weights, "[0, inf)")
