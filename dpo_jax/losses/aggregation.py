"""From a loss per token to one number: where GRPO, DAPO and Dr. GRPO differ.

`values` has a row for each response and a column for each token, and `mask` is 1 for the tokens of a response, 0 after
its end. If all responses have one token, the three are the same. Values after the end are ignored. Log-probabilities
there must be finite, because otherwise their gradients are NaN.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax import checks

Mask = Bool[Array, "responses tokens"] | Int[Array, "responses tokens"] | Float[Array, "responses tokens"]


def mean_of_responses(values: Float[Array, "responses tokens"], mask: Mask) -> Float[Array, ""]:
    """GRPO's: the mean over responses of the mean over their tokens. A token of a long response counts less.

    Source: Shao et al. 2024, arXiv 2402.03300, Eq. 3. A response without a token counts as zero.
    """
    checks.same_shape(values=values, mask=mask)
    lengths = jnp.maximum(jnp.sum(mask > 0, axis=-1), 1)
    return jnp.mean(_sums(values, mask) / lengths)


def mean_of_tokens(values: Float[Array, "responses tokens"], mask: Mask) -> Float[Array, ""]:
    """DAPO's: the mean over all tokens of the batch.

    Source: Yu et al. 2025, "DAPO", arXiv 2503.14476.
    """
    checks.same_shape(values=values, mask=mask)
    return jnp.sum(_sums(values, mask)) / jnp.maximum(jnp.sum(mask > 0), 1)


def mean_per_length(values: Float[Array, "responses tokens"], mask: Mask, *, max_length: int) -> Float[Array, ""]:
    """Dr. GRPO's: sums over tokens, divided by the same length for all responses.

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv 2503.20783.

    Args:
      values, mask: see above.
      max_length: the longest that a response may be.
    """
    checks.same_shape(values=values, mask=mask)
    checks.size("max_length", max_length)
    return jnp.mean(_sums(values, mask)) / max_length


def _sums(values: Array, mask: Array) -> Array:
    """Sums over tokens; values after the end are ignored."""
    return jnp.sum(jnp.where(mask > 0, values, 0), axis=-1)
