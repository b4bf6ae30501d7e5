"""Losses of fresh comparisons, made of responses of the current policy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo_jax import checks
from dpo_jax.losses.margin import dpo_loss
from dpo_jax.losses.ratios import fitted, times
from dpo_jax.types import Numeric, PairLike


def xpo_loss(
    policy: PairLike[Float[Array, "*batch"]],
    reference: PairLike[Float[Array, "*batch"]],
    *,
    beta: Numeric,
    alpha: Numeric,
    reference_won: Bool[Array, "*batch"],
) -> Float[Array, "*batch"]:
    r"""Exploratory Preference Optimization: DPO plus an exploration bonus away from the reference's responses.

    .. math:: -\log \sigma(\beta \Delta) + \alpha \log \pi(\tilde y|x)

    One response of each comparison comes from the policy and the other, :math:`\tilde y`, from the reference. Source:
    Xie et al. 2024, "Exploratory Preference Optimization", arXiv 2405.21046, Algorithm 1. With alpha 0 this is
    `dpo_loss`. Where `dpo_loss` is infinite, so is this loss.

    >>> import jax.numpy as jnp
    >>> policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    >>> print(xpo_loss(policy, reference, beta=0.5, alpha=0.1, reference_won=jnp.array([False])))  # DPO's minus 0.3
    [0.0133]

    Args:
      policy, reference: pairs of log-probabilities (sums).
      beta: strength of the pull towards the reference; positive.
      alpha: :math:`\alpha`, weight of the exploration bonus; zero or positive.
      reference_won: whether the chosen response comes from the reference.

    Raises:
      TypeError, ValueError: see `dpo_loss`; `reference_won` does not hold Booleans.
    """
    checks.interval("alpha", alpha, "[0, inf)")
    checks.boolean("reference_won", reference_won)
    loss = dpo_loss(policy, reference, beta=beta)
    checks.hyperparameters(loss.shape, reference_won=reference_won)
    (alpha,) = fitted(loss, alpha=alpha)
    optimism = times(alpha, jnp.where(reference_won, policy[0], policy[1]))
    return loss + jnp.where(jnp.isinf(loss), 0, optimism)
