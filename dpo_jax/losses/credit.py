"""Credit of tokens: from one reward for a whole response to rewards, advantages and returns of its tokens.

The last axis is that of tokens, and `mask` is 1 for the tokens of a response, 0 elsewhere. What stands elsewhere is
ignored, even NaN, in values and in gradients; results are 0 there. Padding may be on either side, and between tokens,
such as the output of a tool: advantages pass over it. To whiten advantages, pass the mask as the weights of `whitened`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.losses.ratios import difference, fitted, times
from dpo_jax.types import Numeric

Mask = Bool[Array, "*batch tokens"] | Int[Array, "*batch tokens"] | Float[Array, "*batch tokens"]


def token_rewards(
    rewards: Float[Array, "*batch"],
    logps: Float[Array, "*batch tokens"],
    reference_logps: Float[Array, "*batch tokens"],
    mask: Mask,
    *,
    beta: Numeric,
) -> Float[Array, "*batch tokens"]:
    r"""RLHF's rewards of tokens: each pays for its log-ratio, and the last one earns the reward of the response.

    .. math:: r_t = -\beta \log \frac{\pi(y_t|x, y_{<t})}{\pi_{ref}(y_t|x, y_{<t})} + [t = |y|]\, r(x, y)

    Their sum is the reward minus beta times `k1_estimate` of the response. Source: Ziegler et al. 2019, "Fine-Tuning
    Language Models from Human Preferences", arXiv 1909.08593, Eq. 2, and Ouyang et al. 2022, "Training language models
    to follow instructions with human feedback", arXiv 2203.02155. TRL's PPO gives the reward to the place behind the
    last token, if the array has one.

    >>> import jax.numpy as jnp
    >>> logps, reference_logps = jnp.array([[-1.0, -2.0, 0.0]]), jnp.array([[-2.0, -1.5, 0.0]])
    >>> print(token_rewards(jnp.array([3.0]), logps, reference_logps, jnp.array([[1, 1, 0]]), beta=0.5))
    [[-0.5 3.25 0. ]]

    Args:
      rewards: of the responses. The reward of a response without tokens is dropped.
      logps: log-probabilities (nats) of the tokens under the policy that sampled them.
      reference_logps: the same under the reference policy.
      mask: true, or positive, where a token belongs to the response.
      beta: price of KL, zero or positive. A scalar, or one value for each response.

    Raises:
      TypeError: an array does not hold floating-point numbers, or they differ in dtype.
      ValueError: shapes do not fit, beta is out of its range, or a log-probability is positive (checked unless they are
        traced).
    """
    for name, array in {"rewards": rewards, "logps": logps, "reference_logps": reference_logps}.items():
        checks.floating(name, array)
    checks.batch("logps", logps)
    checks.same_shape(logps=logps, reference_logps=reference_logps, mask=mask)
    checks.same_shape(logps_of_one_token=logps[..., 0], rewards=rewards)
    checks.same_dtype(rewards=rewards, logps=logps, reference_logps=reference_logps)
    checks.interval("beta", beta, "[0, inf)")
    counts = mask > 0
    logps, reference_logps = jnp.where(counts, logps, 0), jnp.where(counts, reference_logps, 0)
    checks.log_probabilities(logps=logps, reference_logps=reference_logps)
    price = _of_responses(rewards, beta=beta)[0][..., None]
    earned = jnp.where(_is_last(counts), rewards[..., None], 0)
    return earned - times(price, difference(logps, reference_logps))


def generalized_advantages(
    rewards: Float[Array, "*batch tokens"],
    values: Float[Array, "*batch tokens"],
    mask: Mask,
    *,
    decay: Numeric,
    discount: Numeric = 1.0,
) -> tuple[Float[Array, "*batch tokens"], Float[Array, "*batch tokens"]]:
    r"""Generalized advantage estimation (GAE), and the returns that a value function should predict.

    .. math:: A_t = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{t+l}, \qquad \delta_t = r_t + \gamma V_{t+1} - V_t

    The value after the last token is 0, and returns are :math:`A_t + V_t`. With :math:`\lambda = 1` they are the sums
    of the rewards still to come, without bias; with :math:`\lambda = 0` the advantage is :math:`\delta_t`, which varies
    least. Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv 1506.02438, Eq. 16. Sums are taken in float32 at least.

    >>> import jax.numpy as jnp
    >>> rewards, values = jnp.array([[0.0, 1.0, 0.0]]), jnp.array([[0.5, 0.25, 9.0]])
    >>> for estimate in generalized_advantages(rewards, values, jnp.array([[1, 1, 0]]), decay=0.5):
    ...     print(estimate)  # 0.25 - 0.5 + 0.5 * 0.75, then 1 - 0.25
    [[0.125 0.75 0. ]]
    [[0.625 1. 0. ]]

    Args:
      rewards: of the tokens (`token_rewards`).
      values: of the value function before each token, in units of reward.
      mask: true, or positive, where a token belongs to the response.
      decay: :math:`\lambda`, between 0 and 1. A scalar, or one value for each response.
      discount: :math:`\gamma`, likewise; 1 in RLHF.

    Returns:
      Advantages and returns of the tokens. Hold both constant (`jax.lax.stop_gradient`) if `values` are being trained.

    Raises:
      TypeError: an array does not hold floating-point numbers, or they differ in dtype.
      ValueError: shapes do not fit, or decay or discount is out of its range.
    """
    checks.floating("rewards", rewards)
    checks.floating("values", values)
    checks.batch("values", values)
    checks.same_shape(rewards=rewards, values=values, mask=mask)
    checks.same_dtype(rewards=rewards, values=values)
    checks.interval("decay", decay, "[0, 1]")
    checks.interval("discount", discount, "[0, 1]")
    dtype, counts = values.dtype, mask > 0
    wide = jnp.promote_types(dtype, jnp.float32)
    rewards, values = (jnp.where(counts, array, 0).astype(wide) for array in (rewards, values))
    decay, discount = _of_responses(values[..., 0], decay=decay, discount=discount)

    def step(later: tuple[Array, Array], token: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        reward, value, is_token = token
        advantage = reward + discount * later[1] - value + discount * decay * later[0]
        here = jnp.where(is_token, advantage, later[0]), jnp.where(is_token, value, later[1])
        return here, advantage

    tokens_first = tuple(jnp.moveaxis(array, -1, 0) for array in (rewards, values, counts))
    end = jnp.zeros_like(values[..., 0]), jnp.zeros_like(values[..., 0])
    _, advantages = jax.lax.scan(step, end, tokens_first, reverse=True, unroll=8)  # no loop where tokens are few
    advantages = jnp.where(counts, jnp.moveaxis(advantages, 0, -1), 0)
    return advantages.astype(dtype), (advantages + values).astype(dtype)


@as_one
def _is_last(counts: Bool[Array, "*batch tokens"]) -> Bool[Array, "*batch tokens"]:
    """Which tokens are the last ones of their responses."""
    place = jax.lax.broadcasted_iota(jnp.int32, counts.shape, counts.ndim - 1)
    return counts & (place == jnp.max(jnp.where(counts, place, -1), axis=-1, keepdims=True))


def _of_responses(like: Float[Array, "*batch"], **hyperparameters: Numeric) -> tuple[Float[Array, "*batch"], ...]:
    """Hyperparameters in their order, one value for each response."""
    return tuple(
        jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape) for value in fitted(like, **hyperparameters)
    )
