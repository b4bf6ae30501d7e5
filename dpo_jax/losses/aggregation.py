"""From a loss per token to one number: where GRPO, DAPO and Dr. GRPO differ.

`values` has a row for each response and a column for each token, and `mask` is 1 for the tokens of a response, 0 after
its end. If all responses have one token, the three are the same. Values after the end are ignored, even NaN, and have
no gradient. Log-probabilities there must be finite, because otherwise their gradients are NaN.

`weights` say how much each response counts, relative to 1: weights with a mean of 1 act as if each response were there
so many times. If the rows are all responses that there can be, weights are their probabilities times the number of
rows.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax import checks
from dpo_jax.losses.ratios import times

Mask = Bool[Array, "responses tokens"] | Int[Array, "responses tokens"] | Float[Array, "responses tokens"]


def mean_of_responses(
    values: Float[Array, "responses tokens"], mask: Mask, weights: Float[Array, " responses"] | None = None
) -> Float[Array, ""]:
    r"""GRPO's: the mean over responses of the mean over their tokens. A token of a long response counts less.

    .. math:: \frac{1}{n} \sum_i w_i \frac{1}{|y_i|} \sum_t v_{i,t}

    Source: Shao et al. 2024, arXiv 2402.03300, Eq. 3. A response without a token counts as zero.

    >>> import jax.numpy as jnp
    >>> values, mask = jnp.array([[1.0, 3.0], [6.0, 0.0]]), jnp.array([[1, 1], [1, 0]])
    >>> print(mean_of_responses(values, mask), mean_of_responses(values, mask, jnp.array([0.5, 1.5])))
    4.0 5.0

    Args:
      values, mask: see above.
      weights: of the responses, zero or positive; `None` means 1.
    """
    _check(values, mask, weights)
    lengths = jnp.maximum(jnp.sum(mask > 0, axis=-1), 1)
    return jnp.mean(_weighted(_sums(values, mask) / lengths, weights))


def mean_of_tokens(
    values: Float[Array, "responses tokens"], mask: Mask, weights: Float[Array, " responses"] | None = None
) -> Float[Array, ""]:
    r"""DAPO's: the mean over all tokens of the batch.

    .. math:: \frac{\sum_i w_i \sum_t v_{i,t}}{\sum_i w_i |y_i|}

    Source: Yu et al. 2025, "DAPO", arXiv 2503.14476. A batch without tokens, or without weight, has a mean of zero.

    >>> import jax.numpy as jnp
    >>> values, mask = jnp.array([[1.0, 3.0], [6.0, 0.0]]), jnp.array([[1, 1], [1, 0]])
    >>> print(mean_of_tokens(values, mask), mean_of_tokens(values, mask, jnp.array([0.5, 1.5])))  # 10 / 3, 11 / 2.5
    3.33 4.40

    Args:
      values, mask: see above.
      weights: of the responses, zero or positive, up to a factor; `None` means equally.
    """
    _check(values, mask, weights)
    lengths = jnp.sum(mask > 0, axis=-1)
    total = jnp.sum(lengths if weights is None else weights * lengths)
    return jnp.sum(_weighted(_sums(values, mask), weights)) / jnp.where(total > 0, total, 1).astype(values.dtype)


def mean_per_length(
    values: Float[Array, "responses tokens"],
    mask: Mask,
    weights: Float[Array, " responses"] | None = None,
    *,
    max_length: int,
) -> Float[Array, ""]:
    r"""Dr. GRPO's: sums over tokens, divided by the same length for all responses.

    .. math:: \frac{1}{n} \sum_i w_i \frac{1}{L} \sum_t v_{i,t}

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv 2503.20783.

    >>> import jax.numpy as jnp
    >>> values, mask = jnp.array([[1.0, 3.0], [6.0, 0.0]]), jnp.array([[1, 1], [1, 0]])
    >>> print(mean_per_length(values, mask, max_length=2))
    2.5

    Args:
      values, mask: see above.
      weights: of the responses, zero or positive; `None` means 1.
      max_length: :math:`L`, the longest that a response may be.
    """
    _check(values, mask, weights)
    checks.size("max_length", max_length)
    return jnp.mean(_weighted(_sums(values, mask), weights)) / max_length


def _check(values: Array, mask: Array, weights: Array | None) -> None:
    checks.same_shape(values=values, mask=mask)
    if weights is not None:
        checks.same_shape(values_of_one_token=values[:, 0], weights=weights)
        checks.interval("weights", weights, "[0, inf)")


def _sums(values: Array, mask: Array) -> Array:
    """Sums over tokens; values after the end are ignored."""
    return jnp.sum(jnp.where(mask > 0, values, 0), axis=-1)


def _weighted(values: Array, weights: Array | None) -> Array:
    """Weight times value, in the dtype of the values."""
    return values if weights is None else times(weights, values)
