"""Building blocks of losses: validated log-ratios, and functions that stay finite.

Log-probabilities of -inf are allowed: a response may be masked. A loss then equals its limit, often 0 or infinity, and
if it is finite, so are all gradients. The difference of two equal infinities is 0 and has no gradient: a response with
probability 0 under both policy and reference has a log-ratio of 0, and a comparison of two responses with probability 0
has a margin of 0. Neither affects training.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.types import Numeric, Pair, PairLike


def log_ratios(policy: PairLike[Float[Array, "*batch"]], reference: PairLike[Float[Array, "*batch"]]) -> Pair:
    """Log-probability ratios of policy to reference, `log pi(y|x) - log pi_ref(y|x)`, for chosen and rejected.

    Args:
      policy: log-probabilities (nats) of the chosen and the rejected responses under the policy.
      reference: the same under the reference policy.

    Returns:
      A pair; 0 for a response that has probability 0 (-inf) under both policy and reference.

    Raises:
      TypeError: an argument is not a pair of floating-point arrays, or the four differ in dtype.
      ValueError: the four arrays differ in shape, or a log-probability is positive (checked unless it is traced).
    """
    return Pair(*checked_log_ratios(policy, reference))


def checked_log_ratios(policy: Any, reference: Any, **hyperparameters: Numeric) -> tuple[Any, ...]:
    """The two `log_ratios`, and the hyperparameters in their order, `fitted` to them."""
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
    checks.log_probabilities(**arrays)
    ratios = (difference(logps, others) for logps, others in zip(policy, reference, strict=True))
    return (*ratios, *fitted(policy[0], **hyperparameters))


def checked_margin(policy: Any, reference: Any, **hyperparameters: Numeric) -> tuple[Any, ...]:
    r"""The margin :math:`\Delta` (nats), log-ratio of the chosen minus log-ratio of the rejected response, and the
    hyperparameters in their order, `fitted` to it.
    """
    chosen, rejected, *values = checked_log_ratios(policy, reference, **hyperparameters)
    return (difference(chosen, rejected), *values)


def fitted(like: Float[Array, "*batch"], **hyperparameters: Any) -> tuple[Any, ...]:
    """The hyperparameters in their order: each a number, or an array that broadcasts to `like`, in its dtype.

    This keeps arrays of another precision and NumPy numbers from promoting a loss.

    Raises:
      ValueError: one of them does not broadcast.
    """
    checks.hyperparameters(like.shape, **hyperparameters)
    return tuple(value.astype(like.dtype) if hasattr(value, "dtype") else value for value in hyperparameters.values())


@as_one
def difference(first: Float[Array, "*batch"], second: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`first - second`; where the two are the same infinity it is 0, without a gradient."""
    same = jnp.isinf(first) & (first == second)
    return jnp.where(same, 0, first) - jnp.where(same, 0, second)


@as_one
def times(factor: Numeric, value: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`factor * value`, in the dtype of the value, where 0 times infinity is 0.

    An infinite value gives the factor no gradient, which would be infinite or NaN.
    """
    infinite, factor = jnp.isinf(value), jnp.asarray(factor, value.dtype)
    factor = jnp.where(infinite, jax.lax.stop_gradient(factor), factor)
    return factor * jnp.where(infinite & (factor == 0), 0, value)


@as_one
def square(value: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The square; its slope is clipped to the largest finite number, so that a weight of 0 makes it 0."""
    return _square(value)


@jax.custom_jvp
def _square(value: Array) -> Array:
    return jnp.square(value)


@_square.defjvp
def _square_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (value,), (tangent,) = primals, tangents
    limit = jnp.finfo(value.dtype).max / 4
    return _square(value), 2 * jnp.clip(value, -limit, limit) * tangent


@as_one
def smoothed_logistic(logits: Float[Array, "*batch"], label_smoothing: Numeric) -> Float[Array, "*batch"]:
    r"""Minus the log-likelihood (nats) of a label that is flipped with a given probability.

    .. math:: -(1 - \epsilon) \log \sigma(z) - \epsilon \log \sigma(-z) = \epsilon z - \log \sigma(z)

    The right-hand side needs only one logarithm, but is NaN at -inf.
    """
    lost = logits == -jnp.inf
    kept = jnp.where(lost, 1 - label_smoothing, 1)
    return times(label_smoothing, jnp.where(lost, 0, logits)) - kept * jax.nn.log_sigmoid(logits)


@as_one
def bounded_exp(exponent: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The exponential, continued along its tangent beyond a quarter of the exponents that the dtype can hold.

    That is beyond 22 in float32 and bfloat16, 177 in float64, 2.8 in float16. Values, their squares and their gradients
    stay finite for every exponent that occurs, and gradients never vanish.
    """
    limit = jnp.log(jnp.finfo(exponent.dtype).max) / 4
    limit = limit.astype(exponent.dtype)
    beyond = exponent > limit
    return jnp.exp(jnp.where(beyond, limit, exponent)) * (1 + jnp.where(beyond, exponent - limit, 0))


@as_one
def power_score(logp: Float[Array, "*batch"], power: Numeric) -> Float[Array, "*batch"]:
    r""":math:`(e^{a x} - 1) / a`, accurate near its limit :math:`x` at :math:`a = 0`, in value and in slope.

    The exponential is bounded (`bounded_exp`).
    """
    power = jnp.asarray(power, logp.dtype)
    exponent = times(power, logp)
    near_limit = jnp.abs(exponent) < 1e-3
    little = jnp.where(near_limit, exponent, 0)
    series = jnp.where(near_limit, logp, 0) * (1 + little / 2 * (1 + little / 3 * (1 + little / 4)))
    safe = jnp.where(near_limit, 1, exponent)
    small = jnp.expm1(jnp.clip(safe, -1, 1))
    change = jnp.where(jnp.abs(safe) < 1, small, bounded_exp(safe) - 1)
    return jnp.where(near_limit, series, change / jnp.where(near_limit, 1, power))


@as_one
def log1mexp(logp: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`log(1 - exp(logp))` for log-probabilities, accurate at both ends; clamped just below 0, so that it stays finite.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))", Eq. 7.
    """
    logp = jnp.minimum(logp, -jnp.finfo(logp.dtype).tiny)
    near_zero = logp > -jnp.log(2.0).astype(logp.dtype)
    small = jnp.log(-jnp.expm1(jnp.where(near_zero, logp, -1.0)))
    large = jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, logp)))
    return jnp.where(near_zero, small, large)
