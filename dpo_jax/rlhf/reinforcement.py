r"""REINFORCE, RLOO, GRPO and PPO: policy-gradient learners.

All but GRPO as published maximise :math:`E_\pi[r] - \beta\, KL(\pi \| \pi_{ref})`. They differ in the baseline of
rewards, in the place of the KL penalty, and in the limit on policy changes per batch. Each function returns a `Learner`
for `train.fit_online`. Their common arguments:

- `ask`, `respond`: draw prompts, and responses to them (`toy.ask_uniformly`, `toy.respond_fn`). If `respond` returns
all responses with their probabilities (`toy.enumerate_fn`), the learner uses exact expectations.
- `log_prob`: scores responses. - `reward`: any function `(prompts, responses) -> rewards`: true rewards, or a reward
model.
- `reference_params`: parameters of the reference policy, usually those that training starts with.
- `beta`: penalty per nat of KL to the reference, in units of reward; zero or positive.

All raise TypeError or ValueError if an argument is not as described (traced values are not checked).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dpo_jax import checks
from dpo_jax.losses import (
    grpo_advantages,
    grpo_loss,
    k3_estimate,
    ppo_loss,
    rloo_advantages,
    value_loss,
    whitened,
)
from dpo_jax.losses.policy_gradient import KLEstimate
from dpo_jax.rlhf.groups import Groups, as_rollouts, collect_groups
from dpo_jax.rlhf.kl_control import AdaptiveKL, check_control, update_coefficient
from dpo_jax.train import policy_gradient_objective
from dpo_jax.types import (
    AskFn,
    Learner,
    LogProbFn,
    Metrics,
    Numeric,
    Params,
    RespondFn,
    RewardFn,
    Rollouts,
    ValueFn,
)

Advantages: TypeAlias = Callable[[Any, Any], Array]
"""From rewards and weights (or `None`) of groups to advantages: `(rewards, weights) -> advantages`."""


class ActorCritic(NamedTuple):
    """Parameters of a policy and of a value function, trained together.

    Attributes:
      policy: of the policy.
      value: of the value function.
    """

    policy: Params
    value: Params


class Baseline(NamedTuple):
    """A moving average of rewards.

    Attributes:
      total: sum of mean rewards, with larger weights for later rounds.
      weight: sum of these weights.
    """

    total: Any = 0.0
    weight: Any = 0.0

    @property
    def value(self) -> Array:
        """The average, or zero before the first round."""
        return self.total / jnp.where(jnp.asarray(self.weight) > 0, self.weight, 1)


def reinforce(
    *,
    ask: AskFn,
    respond: RespondFn,
    log_prob: LogProbFn,
    reward: RewardFn,
    reference_params: Params,
    beta: Numeric,
    momentum: Numeric = 0.9,
    clip: Numeric = 0.2,
) -> Learner:
    r"""REINFORCE whose baseline is a moving average of the rewards of earlier rounds; the KL is part of the reward.

    .. math:: A = r - \beta \log \frac{\pi_{old}}{\pi_{ref}} - b

    Source: Williams 1992. With one optimizer step a round the gradient is REINFORCE's, and unbiased; PPO's clip limits
    further steps.

    Args:
      ask, respond, log_prob, reward, reference_params, beta: see above.
      momentum: weight of the past in the baseline; at least 0, below 1.
      clip: see `losses.ppo_loss`.
    """
    checks.interval("beta", beta, "[0, inf)")
    checks.interval("momentum", momentum, "[0, 1)")
    refuse_actor_critic(reference_params)

    def collect(key: Key[Array, ""], params: Params, memory: Baseline) -> tuple[Rollouts, Baseline]:
        groups = collect_groups(
            key, params, ask=ask, respond=respond, log_prob=log_prob, reference_params=reference_params
        )
        rewards = reward(groups.prompts, groups.responses)
        shaped = net_reward(groups, rewards, beta)
        advantages = shaped - memory.value
        mean = jnp.average(shaped.astype(_at_least_float32(shaped)), weights=groups.weights)
        memory = Baseline(momentum * memory.total + (1 - momentum) * mean, momentum * memory.weight + (1 - momentum))
        return as_rollouts(groups, rewards, advantages), memory

    return Learner(collect, policy_gradient_objective(log_prob, ppo_loss, clip=clip), Baseline())


def rloo(
    *,
    ask: AskFn,
    respond: RespondFn,
    log_prob: LogProbFn,
    reward: RewardFn,
    reference_params: Params,
    beta: Numeric,
    clip: Numeric = 0.2,
) -> Learner:
    r"""REINFORCE leave-one-out: the baseline is the mean of the other responses; the KL is part of the reward.

    .. math:: A_i = R_i - \frac{1}{K - 1} \sum_{j \neq i} R_j, \qquad R = r - \beta \log \frac{\pi_{old}}{\pi_{ref}}

    Source: Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740; the clip is TRL's. With one optimizer step a round
    the gradient is unbiased. At the optimum all responses to a prompt have the same R, so the noise vanishes there, and
    samples converge to it exactly.

    Args:
      ask, respond, log_prob, reward, reference_params, beta: see above.
      clip: see `losses.ppo_loss`.
    """
    checks.interval("beta", beta, "[0, inf)")
    refuse_actor_critic(reference_params)

    def collect(key: Key[Array, ""], params: Params, memory: None) -> tuple[Rollouts, None]:
        groups = collect_groups(
            key, params, ask=ask, respond=respond, log_prob=log_prob, reference_params=reference_params
        )
        rewards = reward(groups.prompts, groups.responses)
        return as_rollouts(groups, rewards, rloo_advantages(net_reward(groups, rewards, beta), groups.weights)), memory

    return Learner(collect, policy_gradient_objective(log_prob, ppo_loss, clip=clip))


def grpo(
    *,
    ask: AskFn,
    respond: RespondFn,
    log_prob: LogProbFn,
    reward: RewardFn,
    reference_params: Params,
    beta: Numeric,
    clip: Numeric = 0.2,
    clip_high: Numeric | None = None,
    advantages: Advantages = grpo_advantages,
    kl: KLEstimate = k3_estimate,
) -> Learner:
    r"""Group Relative Policy Optimization: advantages in standard deviations of the group; the KL is part of the loss.

    Source: Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300. As published it does **not** maximise expected reward
    minus beta times KL. The gradient of its KL term is that of the other divergence, KL(reference || policy), and
    rewards are measured in standard deviations, so with large groups its fixed point is

    .. math:: \pi(y|x) = \frac{\pi_{ref}(y|x)}{1 - A(x, y) / \beta}, \qquad A = \frac{r - E_\pi[r]}{\text{std}_\pi[r]}

    (Vojnovic and Yun 2025, "What is the Alignment Objective of GRPO?", arXiv 2502.18548). It maximises the objective of
    RLHF with `advantages=losses.rloo_advantages` and `kl=losses.k2_estimate`. With Dr. GRPO's `centred_advantages`
    instead, groups of K responses maximise that of a beta larger by :math:`K / (K - 1)`: the baseline of a response
    includes the response, which shrinks the gradient of the reward, but not that of the KL.

    Args:
      ask, respond, log_prob, reward, reference_params, beta: see above.
      clip: see `losses.ppo_loss`.
      clip_high: DAPO's, see `losses.ppo_loss`; `None` means the same as `clip`.
      advantages: `losses.grpo_advantages`, or `losses.centred_advantages` for Dr. GRPO.
      kl: `losses.k3_estimate`, or another estimate.
    """
    checks.interval("beta", beta, "[0, inf)")
    checks.interval("clip", clip, "(0, inf]")
    checks.interval("clip_high", clip if clip_high is None else clip_high, "(0, inf]")
    refuse_actor_critic(reference_params)

    def collect(key: Key[Array, ""], params: Params, memory: None) -> tuple[Rollouts, None]:
        groups = collect_groups(
            key, params, ask=ask, respond=respond, log_prob=log_prob, reference_params=reference_params
        )
        rewards = reward(groups.prompts, groups.responses)
        return as_rollouts(groups, rewards, advantages(rewards, groups.weights)), memory

    def loss(logps: Array, old_logps: Array, advantages: Array, **hyperparameters: Any) -> Array:
        return grpo_loss(
            logps, old_logps, advantages, beta=beta, clip=clip, clip_high=clip_high, kl=kl, **hyperparameters
        )

    objective = policy_gradient_objective(
        log_prob, loss, reference=lambda _params, batch, _logps: batch.reference_logps
    )
    return Learner(collect, objective)


def ppo(
    *,
    ask: AskFn,
    respond: RespondFn,
    log_prob: LogProbFn,
    reward: RewardFn,
    value: ValueFn,
    reference_params: Params,
    beta: Numeric | AdaptiveKL,
    clip: Numeric = 0.2,
    value_clip: Numeric = 0.2,
    value_weight: Numeric = 0.1,
    advantages: Advantages = whitened,
) -> Learner:
    r"""Proximal Policy Optimization as in RLHF: a learned baseline, clipped ratios; the KL is part of the reward.

    .. math:: A = r - \beta \log \frac{\pi_{old}}{\pi_{ref}} - V

    Source: Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, "Fine-Tuning Language Models from Human
    Preferences", arXiv 1909.08593. A response is one action here, without discounting or bootstrapping, so generalised
    advantage estimation reduces to this difference. The constants are TRL's. Parameters are an `ActorCritic`.

    Args:
      ask, respond, log_prob, reward, reference_params, beta: see above; beta may be an `AdaptiveKL`.
      value: predicts rewards (`toy.value_fn`).
      clip: see `losses.ppo_loss`.
      value_clip: see `losses.value_loss`.
      value_weight: of the value loss.
      advantages: transforms the advantages of a round, given the weights of its responses: `losses.whitened`.
    """
    if isinstance(beta, AdaptiveKL):
        check_control(beta)
    else:
        checks.interval("beta", beta, "[0, inf)")
    checks.interval("value_clip", value_clip, "(0, inf]")
    checks.interval("value_weight", value_weight, "[0, inf)")
    refuse_actor_critic(reference_params)

    def collect(key: Key[Array, ""], params: ActorCritic, memory: Any) -> tuple[Rollouts, Any]:
        if not isinstance(params, ActorCritic):
            raise TypeError(f"ppo trains an ActorCritic(policy, value), got parameters of type {type(params).__name__}")
        groups = collect_groups(
            key, params.policy, ask=ask, respond=respond, log_prob=log_prob, reference_params=reference_params
        )
        rewards = reward(groups.prompts, groups.responses)
        values = value(params.value, groups.prompts)
        returns = net_reward(groups, rewards, memory if isinstance(beta, AdaptiveKL) else beta).astype(values.dtype)
        if isinstance(beta, AdaptiveKL):
            kl = jnp.average(groups.logps - groups.reference_logps, weights=groups.weights)
            memory = update_coefficient(memory, kl, control=beta)
        rollouts = as_rollouts(
            groups, rewards, advantages(returns - values, groups.weights), values=values, returns=returns
        )
        return rollouts, memory

    surrogate = policy_gradient_objective(log_prob, ppo_loss, clip=clip)

    def objective(params: ActorCritic, batch: Rollouts) -> tuple[Array, Metrics]:
        loss, metrics = surrogate(params.policy, batch)
        assert batch.values is not None and batch.returns is not None
        errors = value_loss(value(params.value, batch.prompts), batch.values, batch.returns, clip=value_clip)
        error = jnp.mean(errors if batch.weights is None else batch.weights * errors)
        return loss + value_weight * error, {**metrics, "value_loss": error}

    if not isinstance(beta, AdaptiveKL):
        return Learner(collect, objective)
    return Learner(collect, objective, jnp.asarray(beta.initial, _at_least_float32(beta.initial)))


def net_reward(groups: Groups, rewards: Float[Array, "prompts group"], beta: Numeric) -> Float[Array, "prompts group"]:
    r"""Rewards less the KL penalty, :math:`r - \beta \log (\pi_{old} / \pi_{ref})`."""
    return rewards - beta * (groups.logps - groups.reference_logps)


def _at_least_float32(value: Numeric) -> Any:
    """The dtype of running values: small changes would be lost in a narrower one."""
    return jnp.promote_types(jnp.result_type(value), jnp.float32)


def refuse_actor_critic(reference_params: Params) -> None:
    """The reference is a policy, not an `ActorCritic`, whose attribute `policy` would be one."""
    if isinstance(reference_params, ActorCritic):
        raise TypeError("reference_params must be those of a policy, got an ActorCritic: use its attribute policy")
