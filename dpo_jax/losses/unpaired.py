r"""Losses of single responses, labelled good or bad.

.. math:: u = \log \frac{\pi(y|x)}{\pi_{ref}(y|x)}

Every loss takes `policy` and `reference`, arrays of log-probabilities in nats, summed over the tokens of a response
(the reference is a constant to the caller), and `desirable`, the labels. Every loss returns one number per response.
Hyperparameters are scalars, or have one value per response. Errors are those of `kto_loss`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo_jax import checks
from dpo_jax.losses.ratios import difference, fitted, times
from dpo_jax.types import Numeric


def kto_loss(
    policy: Float[Array, "*batch"],
    reference: Float[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    *,
    beta: Numeric,
    reference_point: Numeric,
    desirable_weight: Numeric = 1.0,
    undesirable_weight: Numeric = 1.0,
) -> Float[Array, "*batch"]:
    r"""Kahneman-Tversky Optimization: gains and losses relative to a reference point, as in prospect theory.

    .. math::
        \lambda_D\, (1 - \sigma(\beta (u - z_0))) \text{ if desirable}, \qquad
        \lambda_U\, (1 - \sigma(\beta (z_0 - u))) \text{ otherwise}

    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, Sec.
    4.1.

    >>> import jax.numpy as jnp
    >>> policy, reference, desirable = jnp.array([-1.0, -1.0]), jnp.array([-3.0, -3.0]), jnp.array([True, False])
    >>> print(kto_loss(policy, reference, desirable, beta=0.5, reference_point=0.0).round(4))
    [0.2689 0.7311]

    Args:
      policy: log-probabilities (nats, sums over tokens) under the policy.
      reference: the same under the reference policy, constants to the caller.
      desirable: which responses are good.
      beta: strength of the pull towards the reference; positive.
      reference_point: :math:`z_0`, the KL divergence of policy from reference in nats, without gradient: the batch
        estimate (`kto_reference_point`), or the exact KL where it is known. Zero or positive.
      desirable_weight, undesirable_weight: :math:`\lambda_D, \lambda_U`; zero or positive.

    Raises:
      TypeError: arrays are not floating-point, differ in dtype, or the labels are not Booleans.
      ValueError: shapes differ, a hyperparameter is out of its range, or a log-probability is positive by more than
        rounding (checked unless they are traced).
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.interval("reference_point", reference_point, "[0, inf)")
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for name, weight in weights.items():
        checks.interval(name, weight, "[0, inf)")
    ratio, beta, reference_point, good, bad = _checked_log_ratio(
        policy, reference, desirable, beta=beta, reference_point=reference_point, **weights
    )
    gain = times(beta, ratio - reference_point)
    return jnp.where(desirable, good * jax.nn.sigmoid(-gain), bad * jax.nn.sigmoid(gain))


def bco_loss(
    policy: Float[Array, "*batch"],
    reference: Float[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    *,
    beta: Numeric,
    shift: Numeric,
) -> Float[Array, "*batch"]:
    r"""Binary Classifier Optimization: logistic regression of the label on the implicit reward.

    .. math::
        -\log \sigma(\beta u - \delta) \text{ if desirable}, \qquad -\log \sigma(-(\beta u - \delta)) \text{ otherwise}

    Source: Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656. If
    good and bad responses answer different prompts, the paper weights the bad ones by a density ratio (`with_weights`).

    >>> import jax.numpy as jnp
    >>> policy, reference, desirable = jnp.array([-1.0, -1.0]), jnp.array([-3.0, -3.0]), jnp.array([True, False])
    >>> print(bco_loss(policy, reference, desirable, beta=0.5, shift=1.0))
    [0.6931 0.6931]

    Args:
      policy, reference: log-probabilities (sums).
      desirable: which responses are good.
      beta: strength of the pull towards the reference; positive.
      shift: :math:`\delta`, the mean implicit reward so far (`Shift`), in units of reward, without gradient.
    """
    checks.interval("beta", beta, "(0, inf)")
    checks.finite("shift", shift)
    ratio, beta, shift = _checked_log_ratio(policy, reference, desirable, beta=beta, shift=shift)
    logits = times(beta, ratio) - shift
    return -jax.nn.log_sigmoid(jnp.where(desirable, logits, -logits))


def apo_zero_unpaired_loss(
    policy: Float[Array, "*batch"],
    reference: Float[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    *,
    beta: Numeric,
) -> Float[Array, "*batch"]:
    r"""Anchored Preference Optimization, zero, on single responses: KTO with the reference point at zero.

    .. math:: 1 - \sigma(\beta u) \text{ if desirable}, \qquad \sigma(\beta u) \text{ otherwise}

    Source: D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", arXiv 2408.06266,
    Eq. 7, one response at a time.

    >>> import jax.numpy as jnp
    >>> policy, reference, desirable = jnp.array([-1.0, -1.0]), jnp.array([-3.0, -3.0]), jnp.array([True, False])
    >>> print(apo_zero_unpaired_loss(policy, reference, desirable, beta=0.5).round(4))
    [0.2689 0.7311]

    Args:
      policy, reference: log-probabilities (sums).
      desirable: which responses are good.
      beta: strength of the pull towards the reference; positive.
    """
    checks.interval("beta", beta, "(0, inf)")
    ratio, beta = _checked_log_ratio(policy, reference, desirable, beta=beta)
    reward = times(beta, ratio)
    return jax.nn.sigmoid(jnp.where(desirable, -reward, reward))


def _checked_log_ratio(policy: Any, reference: Any, desirable: Any, **hyperparameters: Numeric) -> tuple[Any, ...]:
    """The log-ratio, and the hyperparameters in their order, `fitted` to it."""
    checks.floating("policy", policy)
    checks.reference(reference)
    checks.floating("reference", reference)
    checks.boolean("desirable", desirable)
    checks.same_shape(policy=policy, reference=reference, desirable=desirable)
    checks.same_dtype(policy=policy, reference=reference)
    checks.log_probabilities(policy=policy, reference=reference)
    return (difference(policy, reference), *fitted(policy, **hyperparameters))
