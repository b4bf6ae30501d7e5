"""What losses are made of: log-ratios, checked at the border, and functions that stay finite."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.types import Pair, PairLike, Scalar


def log_ratios(policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]]) -> Pair:
    """Log-probability ratios of policy to reference, `log pi(y|x) - log pi_ref(y|x)`, for chosen and rejected.

    Args:
      policy: log-probabilities (nats) of the chosen and the rejected responses under the policy.
      reference: the same under the reference policy.

    Raises:
      TypeError: an argument is not a pair of floating-point arrays, or the four differ in dtype.
      ValueError: the four arrays differ in shape.
    """
    return checked_log_ratios(policy, reference)


def checked_log_ratios(policy: Any, reference: Any, **hyperparameters: Scalar) -> Pair:
    """`log_ratios`, after a look at the shapes of hyperparameters too: each a scalar, or one value per comparison."""
    checks.pair("policy", policy)
    checks.reference(reference)
    checks.pair("reference", reference)
    arrays = {
        "policy_chosen": policy[0],
        "policy_rejected": policy[1],
        "reference_chosen": reference[0],
        "reference_rejected": reference[1],
    }
    checks.same_shape(**arrays)
    checks.same_dtype(**arrays)
    checks.hyperparameters(policy[0].shape, **hyperparameters)
    return Pair(policy[0] - reference[0], policy[1] - reference[1])


def checked_margin(policy: Any, reference: Any, **hyperparameters: Scalar) -> Float[Array, "*batch"]:
    r"""The margin :math:`\Delta` (nats): log-ratio of the chosen minus log-ratio of the rejected response; checked."""
    ratios = checked_log_ratios(policy, reference, **hyperparameters)
    return ratios.chosen - ratios.rejected


def smoothed_logistic(logits: Float[Array, "*batch"], label_smoothing: Scalar) -> Float[Array, "*batch"]:
    """Minus the log-likelihood (nats) of a label that is flipped with a given probability."""
    return label_smoothing * logits - jax.nn.log_sigmoid(logits)


def bounded_exp(exponent: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The exponential, continued along its tangent beyond a quarter of the exponents that the dtype can hold.

    That is beyond 22 in float32 and bfloat16, 177 in float64, 2.8 in float16. So values, their squares and their
    gradients stay finite for every exponent that occurs, and gradients do not vanish.
    """
    limit = jnp.log(jnp.finfo(exponent.dtype).max) / 4
    limit = limit.astype(exponent.dtype)
    return jnp.exp(jnp.minimum(exponent, limit)) * (1 + jnp.maximum(exponent - limit, 0))


def power_score(logp: Float[Array, "*batch"], power: Scalar) -> Float[Array, "*batch"]:
    r""":math:`(e^{a x} - 1) / a`, accurate near its limit :math:`x` at :math:`a = 0`, in value and in slope.

    The exponential is bounded (`bounded_exp`).
    """
    power = jnp.asarray(power, logp.dtype)
    exponent = power * logp
    near_limit = jnp.abs(exponent) < 1e-3
    series = logp * (1 + exponent / 2 * (1 + exponent / 3 * (1 + exponent / 4)))
    safe = jnp.where(near_limit, 1, exponent)
    small = jnp.expm1(jnp.clip(safe, -1, 1))
    change = jnp.where(jnp.abs(safe) < 1, small, bounded_exp(safe) - 1)
    return jnp.where(near_limit, series, change / jnp.where(near_limit, 1, power))


def log1mexp(logp: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`log(1 - exp(logp))` for log-probabilities, accurate at both ends; finite at 0, read as the next number below.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))", Eq. 7.
    """
    logp = jnp.minimum(logp, -jnp.finfo(logp.dtype).tiny)
    near_zero = logp > -jnp.log(2.0).astype(logp.dtype)
    small = jnp.log(-jnp.expm1(jnp.where(near_zero, logp, -1.0)))
    large = jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, logp)))
    return jnp.where(near_zero, small, large)
