"""Losses of reward models, which RLHF fits to comparisons before reinforcement learning."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.losses.ratios import difference, fitted, square, times
from dpo_jax.types import Numeric, PairLike


def bradley_terry_loss(
    rewards: PairLike[Float[Array, "*batch"]], *, margin: Numeric = 0.0, centring: Numeric = 0.0
) -> Float[Array, "*batch"]:
    r"""The negative log-likelihood of a comparison under the Bradley-Terry model.

    .. math:: -\log \sigma(r_w - r_l - m) + c\, (r_w + r_l)^2

    Source: Rafailov et al. 2023, arXiv 2305.18290, Eq. 2; the margin is that of Touvron et al. 2023, "Llama 2", arXiv
    2307.09288, Eq. 2, and the centring that of Eisenstein et al. 2023, "Helping or Herding?", arXiv 2312.09244.
    Comparisons do not determine the mean of rewards; centring pulls it to zero.

    >>> import jax.numpy as jnp
    >>> print(bradley_terry_loss((jnp.array([2.0]), jnp.array([1.0])), centring=0.01))  # -log sigmoid(1) + 0.01 * 9
    [0.4033]

    Args:
      rewards: of the chosen and the rejected responses.
      margin: :math:`m`, by how much the chosen reward should exceed the other; finite.
      centring: :math:`c`; zero or positive.

    Raises:
      TypeError: `rewards` is not a pair of floating-point arrays, or they differ in dtype.
      ValueError: shapes differ, or a hyperparameter is out of its range (checked unless it is traced).
    """
    checks.finite("margin", margin)
    checks.interval("centring", centring, "[0, inf)")
    checks.pair("rewards", rewards)
    chosen, rejected = rewards
    checks.same_shape(rewards_chosen=chosen, rewards_rejected=rejected)
    checks.same_dtype(rewards_chosen=chosen, rewards_rejected=rejected)
    margin, centring = fitted(chosen, margin=margin, centring=centring)
    level = times(centring, square(chosen + rejected))
    return -jax.nn.log_sigmoid(difference(chosen, rejected) - margin) + level
