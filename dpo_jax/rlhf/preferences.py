r"""Online DPO, XPO and Nash-MD: learners from comparisons of the current policy's responses.

Each function returns a `Learner` for `train.fit_online`. Their common arguments:

- `ask`, `respond`: draw prompts, and responses to them (`toy.ask_uniformly`, `toy.respond_fn`). - `log_prob`: scores
responses. - `prefer`: the probability that the first of two responses is preferred: by people (`toy.preference_fn` of
the true rewards), by a reward model (the same of its rewards), or any other preference, even a cyclic one
(`toy.general_preference_fn`).
- `reference_params`: parameters of the reference policy, usually those that training starts with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from dpo_jax import checks
from dpo_jax.losses import dpo_loss, reinforce_loss, xpo_loss
from dpo_jax.rlhf.groups import Groups, as_rollouts, collect_groups, score_groups
from dpo_jax.train import policy_gradient_objective, preference_objective
from dpo_jax.types import (
    AskFn,
    Learner,
    LogProbFn,
    Numeric,
    Pair,
    Params,
    PreferenceFn,
    PreferenceLoss,
    Preferences,
    RespondFn,
    Rollouts,
)


def online_dpo(
    *,
    ask: AskFn,
    respond: RespondFn,
    log_prob: LogProbFn,
    prefer: PreferenceFn,
    reference_params: Params,
    beta: Numeric,
    loss: PreferenceLoss = dpo_loss,
) -> Learner:
    """DPO on fresh pairs: the policy responds twice, the responses are compared, and DPO takes a step.

    Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", arXiv 2402.04792, Algorithm 1.
    The two responses are independent; a pair of equal responses has no gradient.

    Args:
      ask, respond, log_prob, prefer, reference_params: see above; `respond` gives two responses to each prompt.
      beta: strength of the pull towards the reference; positive.
      loss: another preference loss, for instance `losses.ipo_loss`.
    """

    def collect(key: Key[Array, ""], params: Params, memory: None) -> tuple[Preferences, None]:
        group_key, label_key = jax.random.split(key)
        groups = collect_groups(
            group_key, params, ask=ask, respond=respond, log_prob=log_prob, reference_params=reference_params
        )
        _check_samples(groups, size=2)
        first, second = (jax.tree.map(lambda leaf, i=i: leaf[:, i], groups) for i in (0, 1))
        return compare(label_key, prefer, first, second)[0], memory

    return Learner(collect, preference_objective(log_prob, loss, beta=beta))


def xpo(
    *,
    ask: AskFn,
    respond: RespondFn,
    log_prob: LogProbFn,
    prefer: PreferenceFn,
    reference_params: Params,
    beta: Numeric,
    alpha: Numeric,
) -> Learner:
    """Exploratory Preference Optimization: compares responses of policy and reference, with an exploration bonus.

    Source: Xie et al. 2024, "Exploratory Preference Optimization", arXiv 2405.21046, Algorithm 1, but it learns only
    from the comparisons of the current round, not of all rounds so far.

    Args:
      ask, respond, log_prob, prefer, reference_params: see above; `respond` gives one response to each prompt.
      beta: strength of the pull towards the reference; positive.
      alpha: weight of the exploration bonus; zero or positive. See `losses.xpo_loss`.
    """

    def collect(key: Key[Array, ""], params: Params, memory: None) -> tuple[Preferences, None]:
        ask_key, own_key, other_key, label_key = jax.random.split(key, 4)
        prompts = ask(ask_key)
        score = partial(_answer, prompts=prompts, respond=respond, log_prob=log_prob, reference_params=reference_params)
        own, other = score(own_key, params), score(other_key, reference_params)
        preferences, own_won = compare(label_key, prefer, own, other)
        return preferences._replace(columns={"reference_won": ~own_won}), memory

    objective = preference_objective(
        log_prob,
        xpo_loss,
        beta=beta,
        alpha=alpha,
        reference_won=lambda _params, batch, _logps: batch.columns["reference_won"],
    )
    return Learner(collect, objective)


def nash_md(
    *,
    ask: AskFn,
    respond: RespondFn,
    opponent: RespondFn,
    log_prob: LogProbFn,
    prefer: PreferenceFn,
    reference_params: Params,
    tau: Numeric,
) -> Learner:
    r"""Nash-MD-PG: policy gradients of the probability of being preferred to an opponent derived from the policy.

    .. math:: A = P(y \succ y') - \frac{1}{2} - \tau \log \frac{\pi_{old}}{\pi_{ref}}

    Source: Munos et al. 2023, "Nash Learning from Human Feedback", arXiv 2312.00886, Sec. 7. If the opponent is the
    current policy (self-play), the only fixed point is the regularised equilibrium. An opponent mixed with the
    reference (`toy.respond_fn(..., reference_log_probs=..., mix=...)`) is more stable, and shifts the fixed point a
    little. Take one optimizer step per round, because the loss has no importance ratio.

    Args:
      ask, respond, log_prob, prefer, reference_params: see above.
      opponent: samples from the policy, or from a mixture of policy and reference.
      tau: penalty per nat of KL to the reference, in units of probability; zero or positive.
    """
    checks.interval("tau", tau, "[0, inf)")

    def collect(key: Key[Array, ""], params: Params, memory: None) -> tuple[Rollouts, None]:
        group_key, opponent_key = jax.random.split(key)
        groups = collect_groups(
            group_key, params, ask=ask, respond=respond, log_prob=log_prob, reference_params=reference_params
        )
        others, weights = opponent(opponent_key, params, groups.prompts[:, 0])
        rewards = jax.vmap(lambda other: prefer(groups.prompts, groups.responses, _repeat(other, groups)), 1, -1)(
            others
        )
        if weights is None:
            rewards = jnp.mean(rewards, axis=-1)
        else:
            rewards = jnp.sum(rewards * weights[:, None], axis=-1) / jnp.sum(weights, axis=-1)[:, None]
        advantages = rewards - 0.5 - tau * (groups.logps - groups.reference_logps)
        return as_rollouts(groups, rewards, advantages), memory

    def loss(logps: Array, _old_logps: Array, advantages: Array) -> Array:
        return reinforce_loss(logps, advantages)

    return Learner(collect, policy_gradient_objective(log_prob, loss))


def compare(
    key: Key[Array, ""], prefer: PreferenceFn, first: Groups, second: Groups
) -> tuple[Preferences, Bool[Array, " prompts"]]:
    """Samples a comparison of two responses to each prompt.

    Args:
      key: typed PRNG key.
      prefer: the probability that the first is preferred.
      first, second: one scored response to each prompt.

    Returns:
      Comparisons that carry their reference, and whether the first was preferred. If a value is not a probability, such
      as NaN, the reference is NaN, so that training stops.
    """
    probability = prefer(first.prompts, first.responses, second.responses)
    checks.interval("prefer(prompts, responses, others)", probability, "[0, 1]")
    wide = probability.astype(jnp.promote_types(probability.dtype, jnp.float32))
    first_won = jax.random.bernoulli(key, wide)  # uniform numbers of bfloat16 are multiples of 1/128
    possible = (probability >= 0) & (probability <= 1)

    def winner(wins: Array, one: Array, other: Array) -> Array:
        return jnp.where(wins.reshape(-1, *(1,) * (one.ndim - 1)), one, other)

    def ordered(one: Array, other: Array) -> Pair:
        return Pair(winner(first_won, one, other), winner(~first_won, one, other))

    responses = ordered(first.responses, second.responses)
    reference_logps = ordered(
        *(jnp.where(possible, logps, jnp.nan) for logps in (first.reference_logps, second.reference_logps))
    )
    return Preferences(first.prompts, responses, reference_logps=reference_logps), first_won


def _answer(key: Key[Array, ""], policy: Params, **scoring: Any) -> Groups:
    """One response of a policy to each prompt."""
    groups = score_groups(key, policy, **scoring)
    _check_samples(groups, size=1)
    return jax.tree.map(lambda leaf: leaf[:, 0], groups)


def _repeat(other: Array, groups: Groups) -> Array:
    """Repeats the opponent's response to each prompt for every response of the group."""
    return jnp.broadcast_to(other[:, None], groups.responses.shape)


def _check_samples(groups: Groups, *, size: int) -> None:
    """`respond` returned samples, and the right number of them."""
    if groups.weights is not None:
        raise ValueError("respond must sample: comparisons of all responses at once are not supported")
    if groups.responses.shape[1] != size:
        raise ValueError(f"respond must give {size} to each prompt, got groups of {groups.responses.shape[1]}")
