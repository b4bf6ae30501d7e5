r"""PPO and GRPO by token: each token has its own ratio, and in PPO its own value and advantage.

REINFORCE, RLOO, online DPO and the others take whole responses, and serve responses of tokens as they are.

Each function returns a `Learner` for `train.fit_online`. Their common arguments:

- `ask`, `respond`: draw prompts, and responses to them. If `respond` returns all responses with their probabilities
(`toy.enumerate_fn`), the learner uses exact expectations.
- `token_log_prob`: scores the tokens of responses (`strings.token_log_prob_fn`).
- `reward`: any function `(prompts, responses) -> rewards` of whole responses.
- `reference_params`: parameters of the reference policy, usually those that training starts with.
- `beta`: penalty per nat of KL to the reference, in units of reward; zero or positive.
- `aggregate`: from a loss for each token to one number.

All raise TypeError or ValueError if an argument is not as described (traced values are not checked).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.losses import (
    generalized_advantages,
    grpo_advantages,
    grpo_loss,
    k3_estimate,
    mean_of_responses,
    mean_of_tokens,
    ppo_loss,
    token_rewards,
    value_loss,
    whitened,
)
from dpo_jax.losses.policy_gradient import KLEstimate
from dpo_jax.rlhf.reinforcement import ActorCritic, Advantages, refuse_actor_critic
from dpo_jax.train.tokens import Aggregate, inside, token_policy_gradient_objective
from dpo_jax.types import (
    AskFn,
    Learner,
    Metrics,
    Numeric,
    Params,
    RespondFn,
    RewardFn,
    TokenLogProbFn,
    TokenRollouts,
    TokenValueFn,
)


def token_ppo(
    *,
    ask: AskFn,
    respond: RespondFn,
    token_log_prob: TokenLogProbFn,
    reward: RewardFn,
    token_value: TokenValueFn,
    reference_params: Params,
    beta: Numeric,
    decay: Numeric = 0.95,
    clip: Numeric = 0.2,
    value_clip: Numeric = 0.2,
    value_weight: Numeric = 0.1,
    advantages: Advantages = whitened,
    aggregate: Aggregate = mean_of_tokens,
) -> Learner:
    r"""Proximal Policy Optimization of language models: a value, a KL penalty and an advantage for each token.

    .. math::
        \delta_t = r_t - \beta \log \frac{\pi_{old}(y_t|\cdot)}{\pi_{ref}(y_t|\cdot)} + V_{t+1} - V_t, \qquad
        A_t = \sum_{k \ge 0} \lambda^k \delta_{t+k}

    The reward belongs to the last token. Source: Schulman et al. 2017, arXiv 1707.06347; Schulman et al. 2016, arXiv
    1506.02438, Eq. 16; Ziegler et al. 2019, arXiv 1909.08593. The constants are TRL's. Parameters are an `ActorCritic`.

    Args:
      ask, respond, token_log_prob, reward, reference_params, beta, aggregate: see above.
      token_value: predicts rewards for each token, from the tokens before it (`strings.token_value_fn`).
      decay: :math:`\lambda`, between 0 and 1. With 1 advantages are unbiased, whatever the values. So is the estimate
        of the gradient, up to a constant factor, if advantages are not transformed and `aggregate` is
        `mean_per_length`; the defaults divide by a number of tokens and a standard deviation that depend on the sample.
      clip: see `losses.ppo_loss`.
      value_clip: see `losses.value_loss`.
      value_weight: of the value loss.
      advantages: transforms the advantages of a round, given the weights of its tokens: `losses.whitened`.
    """
    checks.interval("beta", beta, "[0, inf)")
    checks.interval("decay", decay, "[0, 1]")
    checks.interval("value_clip", value_clip, "(0, inf]")
    checks.interval("value_weight", value_weight, "[0, inf)")
    refuse_actor_critic(reference_params)

    def collect(key: Key[Array, ""], params: ActorCritic, memory: None) -> tuple[TokenRollouts, None]:
        if not isinstance(params, ActorCritic):
            raise TypeError(
                f"token_ppo trains an ActorCritic(policy, value), got parameters of type {type(params).__name__}"
            )
        rollouts = _rollouts(key, params.policy, ask, respond, token_log_prob, reward, reference_params)
        mask = rollouts.mask
        values = inside(token_value(params.value, rollouts.prompts, rollouts.responses), mask)
        shaped = token_rewards(rollouts.rewards, rollouts.logps, rollouts.reference_logps, mask, beta=beta)
        gains, returns = generalized_advantages(shaped.astype(values.dtype), values, mask, decay=decay)
        gains = advantages(gains, _token_weights(rollouts))
        return rollouts._replace(advantages=inside(gains, mask), values=values, returns=returns), memory

    surrogate = token_policy_gradient_objective(token_log_prob, ppo_loss, aggregate=aggregate, clip=clip)

    def objective(params: ActorCritic, batch: TokenRollouts) -> tuple[Array, Metrics]:
        loss, metrics = surrogate(params.policy, batch)
        assert batch.values is not None and batch.returns is not None
        values = inside(token_value(params.value, batch.prompts, batch.responses), batch.mask)
        errors = value_loss(
            values, inside(batch.values, batch.mask), inside(batch.returns, batch.mask), clip=value_clip
        )
        error = aggregate(errors, batch.mask, weights=batch.weights)
        return loss + value_weight * error, {**metrics, "value_loss": error}

    return Learner(collect, objective)


def token_grpo(
    *,
    ask: AskFn,
    respond: RespondFn,
    token_log_prob: TokenLogProbFn,
    reward: RewardFn,
    reference_params: Params,
    beta: Numeric,
    clip: Numeric = 0.2,
    clip_high: Numeric | None = None,
    advantages: Advantages = grpo_advantages,
    kl: KLEstimate = k3_estimate,
    aggregate: Aggregate = mean_of_responses,
) -> Learner:
    r"""Group Relative Policy Optimization with tokens: ratios and KL by token, one advantage for all of a response.

    Three methods differ in advantages and in what a token counts:

    - GRPO (Shao et al. 2024, arXiv 2402.03300, Eq. 3): the defaults; a token counts one over the length of its
      response.
    - Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): `advantages=losses.centred_advantages` and
      `aggregate=partial(losses.mean_per_length, max_length=...)`.
    - DAPO (Yu et al. 2025, arXiv 2503.14476): `clip_high=0.28`, `beta=0` and `aggregate=losses.mean_of_tokens`.

    With a positive beta and several tokens none of them finds the optimum of the RLHF objective: the gradient of the KL
    of each token misses that earlier tokens decide which prefixes occur. With `rloo_advantages`, `k2_estimate` and
    `mean_of_tokens` or `mean_per_length`, exact expectations stop at

    .. math:: \pi(v|s) \propto \pi_{ref}(v|s) \exp(Q_\pi(s, v) / \beta)

    where :math:`Q_\pi` is the expected reward after prefix s and token v; at the optimum, a soft value is in its place.
    With `mean_of_responses`, each reward and each log-ratio behind s also counts one over the length of its response,
    so that even at beta = 0 right responses get shorter and wrong ones longer. `token_ppo` has its KL in the reward,
    and finds the optimum.

    Args:
      ask, respond, token_log_prob, reward, reference_params, beta, aggregate: see above.
      clip, clip_high: see `losses.ppo_loss`.
      advantages: of whole responses, from the rewards of a group: `losses.grpo_advantages`, or another.
      kl: estimate for each token: `losses.k3_estimate`, or another.
    """
    checks.interval("beta", beta, "[0, inf)")
    checks.interval("clip", clip, "(0, inf]")
    checks.interval("clip_high", clip if clip_high is None else clip_high, "(0, inf]")
    refuse_actor_critic(reference_params)

    def collect(key: Key[Array, ""], params: Params, memory: None) -> tuple[TokenRollouts, None]:
        rollouts = _rollouts(key, params, ask, respond, token_log_prob, reward, reference_params, advantages)
        return rollouts, memory

    def loss(logps: Array, old_logps: Array, advantages: Array, **hyperparameters: Any) -> Array:
        return grpo_loss(
            logps, old_logps, advantages, beta=beta, clip=clip, clip_high=clip_high, kl=kl, **hyperparameters
        )

    objective = token_policy_gradient_objective(
        token_log_prob, loss, aggregate=aggregate, reference=lambda _params, batch, _logps: batch.reference_logps
    )
    return Learner(collect, objective)


def _rollouts(
    key: Key[Array, ""],
    params: Params,
    ask: AskFn,
    respond: RespondFn,
    token_log_prob: TokenLogProbFn,
    reward: RewardFn,
    reference_params: Params,
    advantages: Advantages | None = None,
) -> TokenRollouts:
    """Draws prompts, samples responses and scores them; each token has the advantage of its response, if any."""
    ask_key, respond_key = jax.random.split(key)
    prompts = ask(ask_key)
    responses, weights = respond(respond_key, params, prompts)
    num, size = responses.shape[:2]
    repeated = jnp.broadcast_to(prompts[:, None], (num, size, *prompts.shape[1:]))
    rewards = reward(repeated, responses)
    gains = jnp.zeros_like(rewards) if advantages is None else advantages(rewards, weights)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (repeated, responses, rewards, gains, weights))
    repeated, responses, rewards, gains, weights = flat
    values, mask = token_log_prob(params, repeated, responses)
    logps = inside(values, mask)
    reference_logps = inside(token_log_prob(reference_params, repeated, responses).values, mask)
    spread = inside(gains[:, None].astype(logps.dtype), mask)
    return TokenRollouts(repeated, responses, mask, logps, reference_logps, rewards, spread, weights)


def _token_weights(rollouts: TokenRollouts) -> Array:
    """How much each token counts: zero behind the end."""
    mask = rollouts.mask.astype(rollouts.logps.dtype)
    return mask if rollouts.weights is None else mask * rollouts.weights[:, None].astype(mask.dtype)
