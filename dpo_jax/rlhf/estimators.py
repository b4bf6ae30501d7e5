"""Policy-gradient estimates on a table: their exact mean and variance, by enumerating all groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dpo_jax import checks
from dpo_jax.rlhf.reinforcement import Advantages
from dpo_jax.types import Learner, Params


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
    checks.same_shape(logits=logits, rewards=rewards)
    log_probs = jax.nn.log_softmax(logits)

    def estimate(group: Int[Array, " group"]) -> Array:
        score = jnp.eye(len(logits), dtype=logits.dtype)[group] - jnp.exp(log_probs)[None]
        return jnp.mean(advantages(rewards[group][None], None)[0, :, None] * score, axis=0)

    return group_moments(log_probs, estimate, group_size=group_size)


def group_moments(
    log_probs: Float[Array, " responses"],
    estimate: Callable[[Int[Array, " group"]], Any],
    *,
    group_size: int,
    groups_at_once: int = 1024,
) -> tuple[Any, Any]:
    r"""Exact mean and variance of any function of a group of samples, for one prompt.

    Enumerates all :math:`R^K` groups, where R is the number of responses and K the size of the group.

    Args:
      log_probs: log-probabilities of the policy that samples, for one prompt.
      estimate: from the ids of a group to an array, or a pytree of arrays: for instance the gradient that a learner
        takes from this group (`learner_gradient`).
      group_size: static.
      groups_at_once: how many groups are evaluated at once; static.

    Returns:
      Mean and variance, each of the structure of the estimate.
    """
    checks.size("group_size", group_size)
    groups = jnp.asarray(np.indices((len(log_probs),) * group_size).reshape(group_size, -1).T)
    probability = jnp.exp(jnp.sum(log_probs[groups], axis=-1))
    estimates = jax.lax.map(estimate, groups, batch_size=groups_at_once)
    mean = jax.tree.map(lambda values: jnp.tensordot(probability, values, 1), estimates)
    variance = jax.tree.map(
        lambda values, centre: jnp.tensordot(probability, (values - centre[None]) ** 2, 1), estimates, mean
    )
    return mean, variance


def learner_gradient(key: Key[Array, ""], params: Params, learner: Learner) -> Params:
    """The direction in which a learner's first optimizer step of a round moves the parameters, before the optimizer.

    It is minus the gradient of the learner's objective on all data of the round: an estimate of the policy gradient, up
    to the learner's bias. With a `respond` that returns a given group, `group_moments` has its exact mean and variance.

    Args:
      key: typed PRNG key, for collecting data.
      params: of the policy, or an `ActorCritic`.
      learner: for instance `rlhf.rloo(...)`.
    """
    data, _ = learner.collect(key, params, jax.tree.map(jnp.asarray, learner.memory))
    gradient = jax.grad(lambda params: learner.objective(params, data)[0])(params)
    return jax.tree.map(jnp.negative, gradient)
