"""Policy-gradient estimates on a table: their exact mean and variance, by enumerating all groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo_jax import checks
from dpo_jax.rlhf.reinforcement import Advantages


def policy_gradient(
    logits: Float[Array, "*n responses"], rewards: Float[Array, "*n responses"]
) -> Float[Array, "*n responses"]:
    r"""The exact gradient of the expected reward with respect to the logits.

    .. math:: \pi(y) (r(y) - E_\pi[r])

    Args:
      logits: of the policy.
      rewards: of the responses, less the KL penalty, if any.
    """
    checks.same_shape(logits=logits, rewards=rewards)
    probs = jax.nn.softmax(logits)
    return probs * (rewards - jnp.sum(probs * rewards, axis=-1, keepdims=True))


def estimate_moments(
    logits: Float[Array, " responses"],
    rewards: Float[Array, " responses"],
    *,
    group_size: int,
    advantages: Advantages,
) -> tuple[Float[Array, " responses"], Float[Array, " responses"]]:
    r"""Exact mean and variance of the gradient estimate from one group of samples, for one prompt.

    .. math:: \hat g = \frac{1}{K} \sum_i A_i \nabla \log \pi(y_i)

    Enumerates all :math:`R^K` groups, where R is the number of responses.

    Args:
      logits: of the policy, for one prompt.
      rewards: of the responses, less the KL penalty, if any.
      group_size: :math:`K`; static.
      advantages: from the rewards of groups to advantages, for instance `losses.rloo_advantages`.
    """
    checks.size("group_size", group_size)
    checks.same_shape(logits=logits, rewards=rewards)
    num_responses = len(logits)
    groups = np.indices((num_responses,) * group_size).reshape(group_size, -1).T
    log_probs = jax.nn.log_softmax(logits)
    probability = jnp.exp(jnp.sum(log_probs[groups], axis=-1))
    score = jnp.eye(num_responses, dtype=logits.dtype) - jnp.exp(log_probs)[None]
    estimate = jnp.mean(advantages(rewards[groups], None)[..., None] * score[groups], axis=-2)
    mean = probability @ estimate
    return mean, probability @ (estimate - mean[None]) ** 2
