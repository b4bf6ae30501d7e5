"""Advantages: how much better than usual a response was, from the rewards of a group of responses to one prompt.

Rewards have a row for each prompt and a column for each response to it. Where the responses of a group are not samples
but all that there are, `weights` says how probable each one is (up to a factor): then means are expectations.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.types import Scalar


def centred_advantages(
    rewards: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None = None
) -> Float[Array, "*n group"]:
    r"""Dr. GRPO's advantages: rewards minus the mean of their group.

    .. math:: A_i = r_i - \text{mean}_j\, r_j

    Every response counts in its own baseline, so the gradient is :math:`(K - 1) / K` times the policy gradient, where
    :math:`K` is the size of the group. Source: Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv
    2503.20783.

    Args:
      rewards: of responses to one prompt each row; two at least, unless they have weights.
      weights: of the responses; `None` means equally.
    """
    _check(rewards, weights, at_least=2 if weights is None else 1)
    return rewards - _mean(rewards, weights)


def grpo_advantages(
    rewards: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None = None, *, epsilon: Scalar = 1e-4
) -> Float[Array, "*n group"]:
    r"""GRPO's advantages: rewards in standard deviations of their group from its mean.

    .. math:: A_i = \frac{r_i - \text{mean}_j\, r_j}{\text{std}_j\, r_j + \epsilon}

    Prompts whose rewards vary little count as much as those where they vary much; the estimate of the policy gradient
    is biased. Source: Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, Sec. 4.1.2; the paper has no
    :math:`\epsilon`, TRL has 1e-4. The standard deviation of samples is that of TRL, with :math:`K - 1` in its
    denominator; with `weights` it is that of the distribution.

    Args:
      rewards: of responses to one prompt each row; two at least.
      weights: of the responses; `None` means equally.
      epsilon: keeps the advantages of equal rewards finite; positive.
    """
    checks.positive("epsilon", epsilon)
    _check(rewards, weights, at_least=2)
    centred = rewards - _mean(rewards, weights)
    return centred / (jnp.sqrt(_variance(centred, weights)) + epsilon)


def rloo_advantages(
    rewards: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None = None
) -> Float[Array, "*n group"]:
    r"""REINFORCE leave-one-out: rewards minus the mean of the *others* in their group. Unbiased.

    .. math:: A_i = r_i - \frac{1}{K - 1} \sum_{j \neq i} r_j

    Source: Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740 (after Kool et al. 2019). With `weights` the group
    is infinite, and one response more or less does not count.

    Args:
      rewards: of responses to one prompt each row; two at least.
      weights: of the responses; `None` means equally.
    """
    _check(rewards, weights, at_least=2)
    size = rewards.shape[-1]
    return (rewards - _mean(rewards, weights)) * (size / (size - 1) if weights is None else 1.0)


def whitened(advantages: Float[Array, "*n"], weights: Float[Array, "*n"] | None = None) -> Float[Array, "*n"]:
    r"""Advantages with mean 0 and variance 1 over the whole batch, as PPO implementations have it.

    Args:
      advantages: of all responses, two at least.
      weights: of the responses; `None` means equally.
    """
    checks.floating("advantages", advantages)
    checks.size("the number of advantages", advantages.size, at_least=2)
    if weights is not None:
        checks.same_shape(advantages=advantages, weights=weights)
    flat = advantages.ravel()[None]
    weights = None if weights is None else weights.ravel()[None]
    centred = flat - _mean(flat, weights)
    return (centred / jnp.sqrt(_variance(centred, weights) + 1e-8)).reshape(advantages.shape)


def _mean(values: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None) -> Float[Array, "*n 1"]:
    if weights is None:
        return jnp.mean(values, axis=-1, keepdims=True)
    return jnp.sum(weights * values, axis=-1, keepdims=True) / jnp.sum(weights, axis=-1, keepdims=True)


def _variance(centred: Float[Array, "*n group"], weights: Float[Array, "*n group"] | None) -> Float[Array, "*n 1"]:
    """Of samples, with one less than their number in the denominator; of a distribution where there are weights."""
    size = centred.shape[-1]
    return _mean(centred**2, weights) * (size / (size - 1) if weights is None else 1.0)


def _check(rewards: Array, weights: Array | None, *, at_least: int = 1) -> None:
    checks.floating("rewards", rewards)
    checks.batch("rewards", rewards)
    checks.size("the number of responses in a group", rewards.shape[-1], at_least=at_least)
    if weights is not None:
        checks.same_shape(rewards=rewards, weights=weights)
