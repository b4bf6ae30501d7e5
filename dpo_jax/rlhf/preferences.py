r"""Online DPO, XPO and Nash-MD: learners from comparisons of the current policy's responses.

Each function returns a `Learner` for `train.fit_online`. Their common arguments:

- `ask`, `respond`: draw prompts, and responses to them (`toy.ask_uniformly`, `toy.respond_fn`). If `respond` gives all
responses and their probabilities (`toy.enumerate_fn`), learners use exact expectations.
- `log_prob`: scores responses.
- `prefer`: the probability that the first of two responses is preferred: by people (`toy.preference_fn` of the true
rewards), by a reward model (the same of its rewards), or any other preference, even a cyclic one
(`toy.general_preference_fn`).
- `reference_params`: parameters of the reference policy, usually those that training starts with.
"""

from __future__ import annotations

from functools import partial

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
        if groups.weights is not None:
            return compare_all(prefer, groups, groups)[0], memory
        _check_size(groups, 2)
        return compare(label_key, prefer, _column(groups, 0), _column(groups, 1))[0], memory

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
        score = partial(
            score_groups, prompts=prompts, respond=respond, log_prob=log_prob, reference_params=reference_params
        )
        own, other = score(own_key, params), score(other_key, reference_params)
        if own.weights is not None:
            preferences, own_won = compare_all(prefer, own, other)
        else:
            _check_size(own, 1)
            preferences, own_won = compare(label_key, prefer, _column(own, 0), _column(other, 0))
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
) -> tuple[Preferences, Bool[Array, " n"]]:
    """Samples a comparison of each response with its counterpart.

    Args:
      key: typed PRNG key.
      prefer: the probability that the first is preferred.
      first, second: scored responses to the same prompts, one in each row.

    Returns:
      Comparisons that carry their reference, and whether the first was preferred. If a value is not a probability, such
      as NaN, the reference is NaN, so that training stops.
    """
    probability = _probability(prefer, first, second)
    first_won = jax.random.bernoulli(key, probability)

    def ordered(one: Array, other: Array) -> Pair:
        wins = first_won.reshape(-1, *(1,) * (one.ndim - 1))
        return Pair(jnp.where(wins, one, other), jnp.where(wins, other, one))

    responses = ordered(first.responses, second.responses)
    reference = ordered(first.reference_logps, second.reference_logps)
    return Preferences(first.prompts, responses, reference_logps=_if_possible(probability, reference)), first_won


def compare_all(prefer: PreferenceFn, first: Groups, second: Groups) -> tuple[Preferences, Bool[Array, " n"]]:
    """Both outcomes of comparing each of the first responses with each of the second, weighted by their probability.

    Args:
      prefer: the probability that the first is preferred.
      first, second: groups of all responses to the same prompts, with their probabilities.

    Returns:
      As `compare`: a row for each prompt, first response, second response and outcome.
    """
    one, other = _crossed(first, second)
    probability = _probability(prefer, one, other)
    drawn = 2 * jnp.asarray(one.weights) * jnp.asarray(other.weights)

    def outcome(chosen: Groups, rejected: Groups, probability: Array) -> Preferences:
        reference = _if_possible(probability, Pair(chosen.reference_logps, rejected.reference_logps))
        responses, weights = Pair(chosen.responses, rejected.responses), (drawn * probability).astype(drawn.dtype)
        return Preferences(chosen.prompts, responses, weights, reference)

    both = outcome(one, other, probability), outcome(other, one, 1 - probability)
    first_won = jnp.arange(2 * len(drawn)) < len(drawn)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *both), first_won


def _probability(prefer: PreferenceFn, first: Groups, second: Groups) -> Array:
    """That the first is preferred. In float32 at least: uniform numbers of bfloat16 are multiples of 1/128."""
    probability = prefer(first.prompts, first.responses, second.responses)
    checks.interval("prefer(prompts, responses, others)", probability, "[0, 1]")
    return probability.astype(jnp.promote_types(probability.dtype, jnp.float32))


def _if_possible(probability: Array, logps: Pair) -> Pair:
    """Log-probabilities, NaN where a comparison has no probability."""
    return jax.tree.map(lambda leaf: jnp.where((probability >= 0) & (probability <= 1), leaf, jnp.nan), logps)


def _column(groups: Groups, i: int) -> Groups:
    """One response to each prompt."""
    return jax.tree.map(lambda leaf: leaf[:, i], groups)


def _crossed(first: Groups, second: Groups) -> tuple[Groups, Groups]:
    """Each response of the first groups beside each of the second, a row for each two."""
    sizes = first.responses.shape[1], second.responses.shape[1]

    def rows(leaf: Array, axis: int) -> Array:
        wide = jnp.expand_dims(leaf, axis)
        return jnp.broadcast_to(wide, (len(leaf), *sizes, *leaf.shape[2:])).reshape(-1, *leaf.shape[2:])

    return jax.tree.map(lambda leaf: rows(leaf, 2), first), jax.tree.map(lambda leaf: rows(leaf, 1), second)


def _repeat(other: Array, groups: Groups) -> Array:
    """Repeats the opponent's response to each prompt for every response of the group."""
    return jnp.broadcast_to(other[:, None], groups.responses.shape)


def _check_size(groups: Groups, size: int) -> None:
    """`respond` returned the right number of samples."""
    if groups.responses.shape[1] != size:
        raise ValueError(f"respond must give {size} to each prompt, got groups of {groups.responses.shape[1]}")
