"""Adaptive KL coefficient: it rises while the KL to the reference is above its target, and falls while it is below."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.types import Numeric


class AdaptiveKL(NamedTuple):
    """Controls the KL to the reference: a value for `beta` of `rlhf.ppo`.

    Attributes:
      initial: KL coefficient of the first round, in units of reward per nat; positive.
      target: target KL (nats); positive.
      gain: step size of the coefficient's logarithm in a round; positive.
    """

    initial: Numeric
    target: Numeric
    gain: Numeric = 0.1


def update_coefficient(coefficient: Float[Array, ""], kl: Float[Array, ""], *, control: AdaptiveKL) -> Float[Array, ""]:
    r"""The coefficient of the next round, by proportional control of its logarithm.

    .. math:: \beta' = \beta\, (1 + K e), \qquad e = \mathrm{clip} \left( \frac{KL - T}{T}, -0.2, 0.2 \right)

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, Sec. 2.2, with
    :math:`K = 0.1`.

    Args:
      coefficient: that of this round.
      kl: the KL (nats) measured in this round.
      control: target and gain.
    """
    check_control(control)
    error = jnp.clip(kl / control.target - 1, -0.2, 0.2)
    return coefficient * (1 + control.gain * error)


def check_control(control: AdaptiveKL) -> None:
    """Coefficient, target and gain are positive (checked unless traced)."""
    for name, value in control._asdict().items():
        checks.interval(name, value, "(0, inf)")
