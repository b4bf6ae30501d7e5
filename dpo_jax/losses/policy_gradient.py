r"""Surrogate losses whose gradients are policy gradients, and estimates of KL.

.. math:: \ell = \log \pi(y|x), \qquad \rho = \frac{\pi(y|x)}{\pi_{old}(y|x)}

The responses are samples of :math:`\pi_{old}`, the policy at sampling time, and :math:`A` is the advantage of a
response. Every function is elementwise, and to be minimised: pass log-probabilities of whole responses (sums over
tokens) or of tokens, and take a mean (`dpo_jax.losses.aggregation`). No gradient should flow through anything but
`logps`. Errors are those of `reinforce_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.losses.ratios import bounded_exp, difference, fitted, square, times
from dpo_jax.types import Numeric

KLEstimate: TypeAlias = Callable[[Any, Any], Array]
"""An estimate of KL(policy || reference) from samples: `(logps, reference) -> [batch]`."""


def reinforce_loss(logps: Float[Array, "*batch"], advantages: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""REINFORCE: its gradient is the policy gradient if the policy sampled the responses.

    .. math:: -A\, \ell

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".

    >>> import jax.numpy as jnp
    >>> print(reinforce_loss(jnp.array([-1.0]), jnp.array([0.5])))
    [0.5]

    Args:
      logps: log-probabilities (nats) of the responses.
      advantages: of the responses, in units of reward.

    Raises:
      TypeError: an array does not hold floating-point numbers, or they differ in dtype.
      ValueError: shapes differ, a hyperparameter is out of its range, or a log-probability is positive (checked unless
        they are traced).
    """
    _check(logps=logps, advantages=advantages)
    checks.log_probabilities(logps=logps)
    return -times(advantages, logps)


def ppo_loss(
    logps: Float[Array, "*batch"],
    old_logps: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    clip: Numeric,
    clip_high: Numeric | None = None,
) -> Float[Array, "*batch"]:
    r"""Proximal Policy Optimization: no gain from changing probability ratios by more than the clip.

    .. math:: -\min(\rho A,\; \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_{high})\, A)

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347, Eq. 7; a higher
    :math:`\epsilon_{high}` is "Clip-Higher" of Yu et al. 2025, "DAPO", arXiv 2503.14476. To stay finite, the ratio
    continues along its tangent where its logarithm exceeds 22 (177 in float64).

    >>> import jax.numpy as jnp
    >>> logps, old_logps = jnp.log(jnp.array([0.6, 0.6])), jnp.log(jnp.array([0.4, 0.4]))
    >>> print(ppo_loss(logps, old_logps, jnp.array([1.0, -1.0]), clip=0.2))  # a ratio of 1.5, clipped to 1.2 if it pays
    [-1.2 1.5]

    Args:
      logps: log-probabilities (nats) of the responses.
      old_logps: the same under the policy that responded.
      advantages: of the responses, in units of reward.
      clip: :math:`\epsilon`; positive, perhaps infinite.
      clip_high: :math:`\epsilon_{high}`; `None` means the same.
    """
    high = clip if clip_high is None else clip_high
    checks.interval("clip", clip, "(0, inf]")
    checks.interval("clip_high", high, "(0, inf]")
    _check(logps=logps, old_logps=old_logps, advantages=advantages)
    checks.log_probabilities(logps=logps, old_logps=old_logps)
    clip, high = fitted(logps, clip=clip, clip_high=high)
    ratio = bounded_exp(difference(logps, old_logps))
    return -jnp.minimum(times(advantages, ratio), times(advantages, jnp.clip(ratio, 1 - clip, 1 + high)))


def grpo_loss(
    logps: Float[Array, "*batch"],
    old_logps: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    reference: Float[Array, "*batch"],
    beta: Numeric,
    clip: Numeric = 0.2,
    clip_high: Numeric | None = None,
    kl: KLEstimate | None = None,
) -> Float[Array, "*batch"]:
    r"""Group Relative Policy Optimization: PPO's surrogate plus beta times an estimate of the KL to the reference.

    .. math:: -\min(\rho A,\; \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_{high})\, A) + \beta\, k

    Source: Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, Eq. 3 and 4, where :math:`k` is `k3_estimate` of each
    token. Note: the *value* of :math:`k_3` estimates KL(policy || reference), but its *gradient* is that of
    KL(reference || policy), so GRPO does not converge to the optimum of the RLHF objective. With `k2_estimate` and
    `rloo_advantages` it does. Advantages are `grpo_advantages`, or `centred_advantages` in Dr. GRPO.

    >>> import jax.numpy as jnp
    >>> same = jnp.log(jnp.array([0.4]))
    >>> print(grpo_loss(same, same, jnp.array([1.0]), reference=same - 1, beta=0.1))  # -1 + 0.1 * (exp(-1) + 1 - 1)
    [-0.9632]

    Args:
      logps: log-probabilities (nats) of the responses.
      old_logps: the same under the policy that responded.
      advantages: of the responses.
      reference: log-probabilities under the reference policy.
      beta: strength of the pull towards the reference; zero or positive.
      clip, clip_high: see `ppo_loss`.
      kl: `k3_estimate` unless given.
    """
    checks.interval("beta", beta, "[0, inf)")
    _check(logps=logps, reference=reference)
    (beta,) = fitted(logps, beta=beta)
    surrogate = ppo_loss(logps, old_logps, advantages, clip=clip, clip_high=clip_high)
    return surrogate + times(beta, (kl or k3_estimate)(logps, reference))


def value_loss(
    values: Float[Array, "*batch"],
    old_values: Float[Array, "*batch"],
    returns: Float[Array, "*batch"],
    *,
    clip: Numeric = jnp.inf,
) -> Float[Array, "*batch"]:
    r"""Half the squared error of a value function, with changes clipped.

    .. math::
        \frac{1}{2} \max \left( (V - R)^2,\; (V_{old} + \mathrm{clip}(V - V_{old}, -\epsilon, \epsilon) - R)^2 \right)

    Source: the value loss of OpenAI's PPO implementation (Baselines, `ppo2`), which TRL follows.

    >>> import jax.numpy as jnp
    >>> print(value_loss(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), clip=0.2))  # right, but moved too far
    [0.32]

    Args:
      values: predictions of the value function, in units of reward.
      old_values: its predictions at sampling time.
      returns: observed returns.
      clip: :math:`\epsilon`; positive, infinite for no clip.
    """
    checks.interval("clip", clip, "(0, inf]")
    _check(values=values, old_values=old_values, returns=returns)
    (clip,) = fitted(values, clip=clip)
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def k1_estimate(logps: Float[Array, "*batch"], reference: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""An unbiased estimate of KL(policy || reference); for use in the reward.

    .. math:: k_1 = \log \frac{\pi}{\pi_{ref}}

    Averaged over responses of the policy, its expected gradient is zero: as a term of a loss it has no effect. Source:
    Schulman 2020, "Approximating KL Divergence".

    Args:
      logps: log-probabilities (nats) of responses that the policy gave.
      reference: the same under the reference policy.
    """
    return _log_ratio(logps, reference)


def k2_estimate(logps: Float[Array, "*batch"], reference: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""A biased estimate of KL(policy || reference), whose gradient is unbiased; for use in the loss.

    .. math:: k_2 = \frac{1}{2} \left( \log \frac{\pi}{\pi_{ref}} \right)^2

    Source and arguments: those of `k1_estimate`.
    """
    return 0.5 * square(_log_ratio(logps, reference))


def k3_estimate(logps: Float[Array, "*batch"], reference: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    r"""An unbiased estimate of KL(policy || reference), never negative; useful for monitoring.

    .. math:: k_3 = \frac{\pi_{ref}}{\pi} - 1 - \log \frac{\pi_{ref}}{\pi}

    Averaged over responses of the policy, its expected gradient is that of KL(reference || policy). Source and
    arguments: those of `k1_estimate`. The exponential is bounded as in `ppo_loss`.
    """
    gap = -_log_ratio(logps, reference)
    return bounded_exp(gap) - 1 - jnp.where(gap == jnp.inf, 0, gap)


def _log_ratio(logps: Any, reference: Any) -> Float[Array, "*batch"]:
    _check(logps=logps, reference=reference)
    checks.log_probabilities(logps=logps, reference=reference)
    return difference(logps, reference)


def _check(**arrays: Any) -> None:
    for name, array in arrays.items():
        checks.floating(name, array)
    checks.same_shape(**arrays)
    checks.same_dtype(**arrays)
