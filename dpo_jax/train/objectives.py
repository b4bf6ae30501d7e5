"""Objectives: from a loss of log-probabilities to a function of parameters and batches.

An objective scores responses by a `LogProbFn`, takes the mean of a loss, and adds metrics. A row of a batch is one
comparison, label or demonstration, and has one log-probability for each response; arrays with an axis of tokens are
rejected. A hyperparameter of the loss may be

- a number or an array, possibly traced;
- a function `(params, batch, logps) -> value`, called for each batch, through which no gradient flows: a statistic of
  the batch, or a column of the data (`lengths=lambda params, batch, logps: batch.columns["lengths"]`);
- a `Running` value, which also depends on the batches before. It makes the objective a `StatefulObjective`.

The data may have weights, relative to 1. The loss of a batch is then the mean of weight times loss over its rows, not
divided by the weights, so that a row counts equally in every batch; losses that compare whole batches are rejected.
Metrics are means over the batch. If their denominator differs between batches, they are a `Ratio`: with weights, whose
sum is the denominator, and for the good or the bad ones of `Labels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dpo_jax import checks
from dpo_jax.losses.ratios import difference, times
from dpo_jax.losses.structure import name_of, refuse_weights_if_rows_mix
from dpo_jax.train.families import arrays_of, check_call
from dpo_jax.types import (
    Demonstrations,
    Labels,
    LogProbFn,
    Metrics,
    Numeric,
    Objective,
    Pair,
    Params,
    PolicyGradientLoss,
    PreferenceLoss,
    Preferences,
    Ratio,
    ReferenceFreeLoss,
    Rollouts,
    StatefulObjective,
    TokenRollouts,
    UnpairedLoss,
)

Batchwise: TypeAlias = Callable[[Params, Any, Any], Any]
"""A hyperparameter that depends on the batch: `(params, batch, logps) -> value`, where `logps` are the
log-probabilities that the objective has computed anyway."""


class Running(NamedTuple):
    """A hyperparameter that depends on the current and earlier batches.

    Attributes:
      memory: initial memory: any pytree of numbers or arrays.
      update: `(memory, params, batch, logps) -> (value, memory)`.
    """

    memory: Any
    update: Callable[[Any, Params, Any, Any], tuple[Any, Any]]


Hyperparameter: TypeAlias = Numeric | Batchwise | Running


def sft_objective(log_prob: LogProbFn) -> Objective:
    """Supervised fine-tuning: the mean negative log-likelihood (nats) of demonstrated responses.

    Args:
      log_prob: scores responses.

    Returns:
      An objective on batches of `Demonstrations`, without metrics.
    """

    def objective(params: Params, batch: Demonstrations) -> tuple[Array, Metrics]:
        check_type(batch, Demonstrations)
        logps = log_prob(params, batch.prompts, batch.responses)
        checks.one_per_row("log_prob(params, prompts, responses)", logps, len(batch.prompts))
        return -_mean(logps, batch.weights), {}

    return objective


def preference_objective(
    log_prob: LogProbFn, loss: PreferenceLoss, *, beta: Hyperparameter, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean of a preference loss, with metrics.

    Args:
      log_prob: scores responses.
      loss: of policy and reference, for instance `losses.dpo_loss`; for rankings, `losses.plackett_luce_loss`.
      beta: strength of the pull towards the reference; positive. It also scales the implicit rewards of the metrics.
      **hyperparameters: further hyperparameters of the loss.

    Returns:
      An objective on batches of `Preferences` that carry their reference (`with_reference`). Its metrics are means over
      the batch, weighted where it has weights: `chosen_reward` and `rejected_reward`, the implicit rewards
      `beta * log(pi / pi_ref)` (in rankings, of the first and the last); `reward_margin`, their difference; and
      `accuracy`, the share of comparisons with a positive margin. A tie counts as wrong, so a policy that equals its
      reference has an accuracy of 0, not 1/2.

    Raises:
      TypeError, ValueError: the loss is of another family (the message names the objective that fits) or refuses the
        hyperparameters (checked unless they are traced, or functions); or a batch has no reference.
    """
    hyperparameters = {"beta": beta, **hyperparameters}
    check_call(loss, ("policy", "reference"), hyperparameters)
    refuse_now(lambda logps, **h: loss(Pair(logps, logps), Pair(logps, logps), **h), hyperparameters)

    def arguments(logps: Any, batch: Preferences) -> tuple[Any, ...]:
        return logps, reference_of(batch)

    def metrics(logps: Any, batch: Preferences, values: dict[str, Any]) -> Metrics:
        return _comparison("reward", *(values["beta"] * difference(logps[i], reference_of(batch)[i]) for i in (0, -1)))

    return _objective(log_prob, loss, Preferences, arguments, metrics, hyperparameters)


def reference_free_objective(score: LogProbFn, loss: ReferenceFreeLoss, **hyperparameters: Hyperparameter) -> Objective:
    """The mean of a loss of one pair of scores: a preference loss without a reference, or a loss of a reward model.

    Args:
      score: scores responses: log-probabilities, as sums or means over tokens as the loss says; or the rewards of a
        reward model (`toy.score_fn`).
      loss: `(policy, *, ...)`, for instance `losses.simpo_loss`, or `(rewards, *, ...)`, such as
        `losses.bradley_terry_loss`.
      **hyperparameters: of the loss.

    Returns:
      An objective on batches of `Preferences`. Its metrics are means over the batch, weighted if the batch has weights,
      and are named after the loss's parameter. For `policy`: `chosen_logp` and `rejected_logp` (nats), and
      `logp_margin`, their difference. For `rewards`: `chosen_reward`, `rejected_reward` and `reward_margin`. For both
      `accuracy`, the share of comparisons whose chosen response has the higher score (a tie counts as wrong).

    Raises:
      TypeError, ValueError: the loss is of another family (the message names the objective that fits) or refuses the
        hyperparameters (checked unless they are traced, or functions).
    """
    of_rewards = callable(loss) and arrays_of(loss, hyperparameters) == ("rewards",)
    check_call(loss, ("rewards",) if of_rewards else ("policy",), hyperparameters)
    refuse_now(lambda scores, **h: loss(Pair(scores, scores), **h), hyperparameters)

    def arguments(scores: Any, _: Preferences) -> tuple[Pair]:
        checks.pair("the rewards" if of_rewards else "the policy's log-probabilities", scores)
        return (Pair(*scores),)

    def metrics(scores: Any, *_: Any) -> Metrics:
        return _comparison("reward" if of_rewards else "logp", *scores)

    return _objective(score, loss, Preferences, arguments, metrics, hyperparameters)


def unpaired_objective(
    log_prob: LogProbFn, loss: UnpairedLoss, *, beta: Hyperparameter, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean of a loss of single responses, good or bad.

    Args:
      log_prob: scores responses.
      loss: of policy, reference and labels, for instance `losses.kto_loss`.
      beta: strength of the pull towards the reference; positive. It also scales the implicit rewards of the metrics.
      **hyperparameters: further hyperparameters of the loss.

    Returns:
      An objective on batches of `Labels` that carry their reference (`with_reference`). Its metrics are
      `desirable_reward` and `undesirable_reward`, the mean implicit rewards of the good and of the bad responses, and
      `reward_margin`, their difference; all weighted where the batch has weights. Each is a `Ratio`, so the mean of an
      epoch does not depend on the batch size; it is NaN without such responses.

    Raises:
      TypeError, ValueError: the loss is of another family (the message names the objective that fits) or refuses the
        hyperparameters (checked unless they are traced, or functions); or a batch has no reference.
    """
    hyperparameters = {"beta": beta, **hyperparameters}
    check_call(loss, ("policy", "reference", "desirable"), hyperparameters)
    refuse_now(lambda logps, **h: loss(logps, logps, logps > 0, **h), hyperparameters)

    def arguments(logps: Any, batch: Labels) -> tuple[Any, ...]:
        return logps, reference_of(batch), batch.desirable

    def metrics(logps: Any, batch: Labels, values: dict[str, Any]) -> Metrics:
        rewards = values["beta"] * difference(logps, reference_of(batch))
        good, bad = (_ratio(rewards, batch.weights, side) for side in (batch.desirable, ~batch.desirable))
        margin = Ratio(good.numerator, good.denominator, minus=bad)
        return {"desirable_reward": good, "undesirable_reward": bad, "reward_margin": margin}

    return _objective(log_prob, loss, Labels, arguments, metrics, hyperparameters)


def policy_gradient_objective(
    log_prob: LogProbFn, loss: PolicyGradientLoss, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean of a surrogate loss whose gradient is a policy gradient.

    Args:
      log_prob: scores responses.
      loss: of current log-probabilities, log-probabilities at sampling time, and advantages: for instance
        `losses.ppo_loss`.
      **hyperparameters: further hyperparameters of the loss. `losses.grpo_loss` needs
        `reference=lambda params, batch, logps: batch.reference_logps`.

    Returns:
      An objective on batches of `Rollouts`. Its metrics are means over the batch, weighted where it has weights:
      `sampled_reward`; `sampled_kl`, the log-ratio to the reference (nats) at sampling time; and `ratio_change`, the
      absolute difference from 1 of the ratio of current probabilities to those at sampling time.

    Raises:
      TypeError, ValueError: the loss is of another family (the message names the objective that fits) or refuses the
        hyperparameters (checked unless they are traced, or functions).
    """
    check_call(loss, ("logps", "old_logps", "advantages"), hyperparameters)
    refuse_now(lambda logps, **h: loss(logps, logps, logps, **h), hyperparameters, betas="[0, inf)")

    def arguments(logps: Any, batch: Rollouts) -> tuple[Any, ...]:
        return logps, batch.logps, batch.advantages

    def metrics(logps: Any, batch: Rollouts, _: dict[str, Any]) -> Metrics:
        return {
            "sampled_reward": batch.rewards,
            "sampled_kl": batch.logps - batch.reference_logps,
            "ratio_change": jnp.abs(jnp.expm1(logps - batch.logps)),
        }

    return _objective(log_prob, loss, Rollouts, arguments, metrics, hyperparameters)


def with_reference(log_prob: LogProbFn, reference_params: Params, data: Any) -> Any:
    """`Preferences` or `Labels` that carry the log-probabilities of their responses under a reference policy.

    Args:
      log_prob: scores responses.
      reference_params: parameters of the reference policy; no gradient flows into them.
      data: comparisons, rankings or labels; an existing reference is replaced.

    Raises:
      TypeError: `log_prob` returned another structure than that of the responses.
      ValueError: `log_prob` did not return one number for each response, but for instance one for each token.
    """
    logps = log_prob(reference_params, data.prompts, data.responses)
    checks.same_structure("log_prob(params, prompts, responses)", logps, data.responses)
    checks.one_per_row("log_prob(params, prompts, responses)", logps, len(data.prompts))
    return data._replace(reference_logps=jax.lax.stop_gradient(logps))


def refuse_now(
    loss: Callable[..., Array], hyperparameters: Mapping[str, Hyperparameter], *, betas: str = "(0, inf)"
) -> None:
    """Calls the loss once, so that invalid hyperparameters raise when the objective is made, not in the first step."""
    beta = hyperparameters.get("beta", 1.0)
    if not callable(beta) and not isinstance(beta, Running):
        checks.interval("beta", beta, betas)
    if any(callable(value) or isinstance(value, Running) for value in hyperparameters.values()):
        return
    shape = np.broadcast_shapes((1,), *(jnp.shape(value) for value in jax.tree.leaves(hyperparameters)))
    jax.eval_shape(lambda logps: loss(logps, **hyperparameters), jax.ShapeDtypeStruct(shape, jnp.float32))


def _objective(
    log_prob: LogProbFn,
    loss: Callable[..., Array],
    batch_type: type,
    arguments: Callable[[Any, Any], tuple[Any, ...]],
    metrics: Callable[[Any, Any, dict[str, Any]], Metrics],
    hyperparameters: dict[str, Hyperparameter],
) -> Objective:
    """Scores a batch, computes the hyperparameters, evaluates losses and metrics, and takes their means."""

    def apply(params: Params, batch: Any, memory: dict[str, Any]) -> tuple[Array, Metrics, dict[str, Any]]:
        check_type(batch, batch_type)
        logps = log_prob(params, batch.prompts, batch.responses)
        checks.one_per_row("log_prob(params, prompts, responses)", logps, len(batch.prompts))
        called_with = arguments(logps, batch)
        values, memory = _values(hyperparameters, memory, params, batch, jax.lax.stop_gradient(logps))
        if batch.weights is not None:
            refuse_weights_if_rows_mix(loss, *called_with, **values)
        of_loss = loss(*called_with, **values)
        checks.one_per_row(name_of(loss), of_loss, len(batch.prompts), "the objective takes their mean")
        mean = _mean(of_loss, batch.weights)
        of_rows = metrics(logps, batch, values)
        means = {name: x if isinstance(x, Ratio) else average(x, batch.weights) for name, x in of_rows.items()}
        return mean, means, memory

    memory = {name: value.memory for name, value in hyperparameters.items() if isinstance(value, Running)}
    if memory:
        return StatefulObjective(memory, apply)

    def objective(params: Params, batch: Any) -> tuple[Array, Metrics]:
        loss, metrics, _ = apply(params, batch, {})
        return loss, metrics

    return objective


def _values(
    hyperparameters: dict[str, Hyperparameter], memory: dict[str, Any], params: Params, batch: Any, logps: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hyperparameters of the loss, and the new memory; no gradient flows through statistics of the batch."""
    values: dict[str, Any] = {}
    for name, value in hyperparameters.items():
        if isinstance(value, Running):
            values[name], new = jax.lax.stop_gradient(value.update(memory[name], params, batch, logps))
            memory = {**memory, name: new}
        else:
            values[name] = jax.lax.stop_gradient(value(params, batch, logps)) if callable(value) else value
    return values, memory


def check_type(batch: Any, expected: type) -> None:
    """Rejects batches of the wrong type."""
    others = {
        Demonstrations: "train.sft_objective",
        Preferences: "train.preference_objective or train.reference_free_objective",
        Labels: "train.unpaired_objective",
        Rollouts: "train.policy_gradient_objective",
        TokenRollouts: "train.token_policy_gradient_objective",
    }
    if type(batch) in others and not isinstance(batch, expected):
        raise TypeError(
            f"this objective is for {expected.__name__}, got {type(batch).__name__}: use {others[type(batch)]}"
        )


def reference_of(batch: Any) -> Any:
    """The log-probabilities of a batch under the reference; an error if it has none."""
    if batch.reference_logps is None:
        raise ValueError("the data carry no reference log-probabilities: add them by train.with_reference")
    return batch.reference_logps


def _comparison(name: str, chosen: Float[Array, " batch"], rejected: Float[Array, " batch"]) -> Metrics:
    """Metrics of comparisons, row by row."""
    margin = chosen - rejected
    accuracy = (margin > 0).astype(margin.dtype)
    return {f"chosen_{name}": chosen, f"rejected_{name}": rejected, f"{name}_margin": margin, "accuracy": accuracy}


def average(values: Float[Array, " batch"], weights: Array | None) -> Array | Ratio:
    """The mean over the batch, weighted if there are weights."""
    if weights is None:
        return jnp.mean(values)
    return _ratio(values, weights, jnp.ones_like(values, bool))


def _ratio(values: Float[Array, " batch"], weights: Array | None, part: Bool[Array, " batch"]) -> Ratio:
    """The mean over a part of the batch, weighted if there are weights."""
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    shares = part.astype(dtype) if weights is None else jnp.where(part, weights, 0).astype(dtype)
    return Ratio(jnp.sum(shares * jnp.where(part, values, 0).astype(dtype)), jnp.sum(shares))


def _mean(values: Float[Array, " batch"], weights: Array | None) -> Float[Array, ""]:
    """The mean of weight times value; NaN, so that training stops, if a weight is negative."""
    if weights is None:
        return jnp.mean(values)
    checks.same_shape(losses=values, weights=weights)
    checks.interval("weights", weights, "[0, inf)")
    return jnp.where(jnp.any(weights < 0), jnp.nan, jnp.mean(times(weights, values)))
