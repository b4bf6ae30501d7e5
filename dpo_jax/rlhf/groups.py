"""The first step of every on-policy learner: draw prompts, sample responses, and score them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dpo_jax import checks
from dpo_jax.types import AskFn, LogProbFn, Params, RespondFn, RewardFn, Rollouts


class Groups(NamedTuple):
    """Groups of responses, each to one prompt: a row for each prompt, a column for each response.

    Attributes:
      prompts: repeated in each column.
      responses: responses of the policy.
      logps: log-probabilities under the policy that responded.
      reference_logps: the same under the reference policy.
      weights: probabilities of the responses, up to a factor, if a group holds all responses.
    """

    prompts: Int[Array, "prompts group ..."]
    responses: Int[Array, "prompts group ..."]
    logps: Float[Array, "prompts group"]
    reference_logps: Float[Array, "prompts group"]
    weights: Float[Array, "prompts group"] | None


def collect_groups(
    key: Key[Array, ""],
    params: Params,
    *,
    ask: AskFn,
    respond: RespondFn,
    log_prob: LogProbFn,
    reference_params: Params,
) -> Groups:
    """Draws prompts, and samples and scores responses.

    Args:
      key: typed PRNG key.
      params: parameters of the policy that responds.
      ask: draws prompts.
      respond: responds to them.
      log_prob: scores responses.
      reference_params: parameters of the reference policy.
    """
    ask_key, respond_key = jax.random.split(key)
    return score_groups(
        respond_key, params, ask(ask_key), respond=respond, log_prob=log_prob, reference_params=reference_params
    )


def score_groups(
    key: Key[Array, ""],
    params: Params,
    prompts: Array,
    *,
    respond: RespondFn,
    log_prob: LogProbFn,
    reference_params: Params,
) -> Groups:
    """Samples and scores responses to given prompts."""
    responses, weights = respond(key, params, prompts)
    num, size = responses.shape[:2]
    repeated = jnp.broadcast_to(prompts[:, None], (num, size, *prompts.shape[1:]))
    logps, reference_logps = (log_prob(policy, repeated, responses) for policy in (params, reference_params))
    return Groups(repeated, responses, logps, reference_logps, weights)


def as_rollouts(
    groups: Groups, rewards: Float[Array, "prompts group"], advantages: Float[Array, "prompts group"], **columns: Array
) -> Rollouts:
    """Training data: groups with rewards and advantages, one response per row.

    Advantages are rounded to the dtype of the log-probabilities: rewards and hyperparameters may have a wider one.
    """
    advantages = advantages.astype(groups.logps.dtype)
    rollouts = Rollouts(*groups[:4], rewards, advantages, groups.weights, **columns)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rollouts)


def best_of_n(key: Key[Array, ""], params: Params, prompts: Array, *, respond: RespondFn, reward: RewardFn) -> Any:
    """The response of each group with the highest reward; the first one in case of a tie. No training.

    Args:
      key: typed PRNG key.
      params: parameters of the policy that responds.
      prompts: what to respond to.
      respond: gives n responses to each prompt.
      reward: the criterion: the true reward, or a reward model.

    Returns:
      One response to each prompt.

    Raises:
      ValueError: `respond` does not sample, or a reward is NaN. Under `jit` and `vmap`, where rewards are traced, a
        response whose reward is NaN is not chosen unless all rewards of its prompt are NaN.
    """
    responses, weights = respond(key, params, prompts)
    if weights is not None:
        raise ValueError("respond must sample: the best of all responses does not depend on their probabilities")
    num, size = responses.shape[:2]
    repeated = jnp.broadcast_to(prompts[:, None], (num, size, *prompts.shape[1:]))
    rewards = reward(repeated, responses)
    checks.not_nan("reward(prompts, responses)", rewards)
    best = jnp.argmax(jnp.where(jnp.isnan(rewards), -jnp.inf, rewards), axis=-1)
    return responses[jnp.arange(num), best]
