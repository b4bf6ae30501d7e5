"""Objectives: what a loss of log-probabilities becomes when there are parameters and batches.

An objective scores responses through the `LogProbFn` it is given, takes the mean of a loss, and adds the metrics that
tell how training goes. A row of a batch is one comparison, label or demonstration, and has one log-probability for each
response: numbers of tokens are refused. A hyperparameter of the loss may be

- a number or an array, traced perhaps;
- a function `(params, batch, logps) -> value`, called for each batch, through which no gradient flows: a statistic of
  the batch, or a column of the data (`lengths=lambda params, batch, logps: batch.columns["lengths"]`);
- a `Running` value, which also depends on the batches before. It makes the objective a `StatefulObjective`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dpo_jax import checks
from dpo_jax.losses import aot_loss, aot_unpaired_loss, beta_dpo_loss, bradley_terry_loss
from dpo_jax.types import (
    Demonstrations,
    Labels,
    LogProbFn,
    Metrics,
    Objective,
    Pair,
    Params,
    PolicyGradientLoss,
    PreferenceLoss,
    Preferences,
    ReferenceFreeLoss,
    Rollouts,
    Scalar,
    StatefulObjective,
    UnpairedLoss,
)

Batchwise: TypeAlias = Callable[[Params, Any, Any], Any]
"""A hyperparameter that depends on the batch: `(params, batch, logps) -> value`, where `logps` are the
log-probabilities that the objective has computed anyway."""


class Running(NamedTuple):
    """A hyperparameter that depends on the batch and on those before it.

    Attributes:
      memory: before the first batch: any pytree of numbers or arrays.
      update: `(memory, params, batch, logps) -> (value, memory)`.
    """

    memory: Any
    update: Callable[[Any, Params, Any, Any], tuple[Any, Any]]


Hyperparameter: TypeAlias = Scalar | Batchwise | Running


def sft_objective(log_prob: LogProbFn) -> Objective:
    """Supervised fine-tuning: the mean negative log-likelihood (nats) of demonstrated responses.

    Args:
      log_prob: scores responses.

    Returns:
      An objective on batches of `Demonstrations`, without metrics.
    """

    def objective(params: Params, batch: Demonstrations) -> tuple[Array, Metrics]:
        _check_noun(batch, Demonstrations)
        logps = log_prob(params, batch.prompts, batch.responses)
        checks.one_per_row("log_prob(params, prompts, responses)", logps, len(batch.prompts))
        return -_mean(logps, batch.weights), {}

    return objective


def preference_objective(
    log_prob: LogProbFn, loss: PreferenceLoss, *, beta: Hyperparameter, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean of a preference loss, with the metrics that tell how training goes.

    Args:
      log_prob: scores responses.
      loss: of policy and reference, for instance `losses.dpo_loss`; for rankings, `losses.plackett_luce_loss`.
      beta: strength of the pull towards the reference; positive. It also scales the implicit rewards of the metrics.
      **hyperparameters: what else the loss takes.

    Returns:
      An objective on batches of `Preferences` that carry their reference (`with_reference`). Its metrics are means over
      the batch, weighted where it has weights: `chosen_reward` and `rejected_reward`, the implicit rewards
      `beta * log(pi / pi_ref)` (in rankings, of the first and the last); `reward_margin`, their difference; and
      `accuracy`, the share of comparisons with a positive margin.

    Raises:
      TypeError, ValueError: the loss refuses the hyperparameters (checked unless they are traced, or functions); or
        a batch has no reference.
    """
    _refuse_now(lambda logps, **h: loss(Pair(logps, logps), Pair(logps, logps), **h), beta=beta, **hyperparameters)

    def evaluate(logps: Any, batch: Preferences, arguments: dict[str, Any]) -> tuple[Array, Metrics]:
        _refuse_weights(loss, batch)
        values = loss(logps, reference_of(batch), **arguments)
        chosen, rejected = (arguments["beta"] * (logps[i] - reference_of(batch)[i]) for i in (0, -1))
        metrics = {"chosen_reward": chosen, "rejected_reward": rejected, "reward_margin": chosen - rejected}
        return values, {**metrics, "accuracy": _share(chosen - rejected)}

    return _objective(log_prob, Preferences, evaluate, {"beta": beta, **hyperparameters})


def reference_free_objective(
    log_prob: LogProbFn, loss: ReferenceFreeLoss, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean of a loss that needs no reference.

    Args:
      log_prob: scores responses; by means over tokens for the losses that eat these.
      loss: of the policy alone, for instance `losses.simpo_loss`.
      **hyperparameters: what the loss takes.

    Returns:
      An objective on batches of `Preferences`. Its metrics are means over the batch, weighted where it has weights:
      `chosen_logp` and `rejected_logp` (nats); `logp_margin`, their difference; and `accuracy`, the share of
      comparisons whose chosen response is the more likely one.

    Raises:
      TypeError, ValueError: the loss refuses the hyperparameters (checked unless they are traced, or functions).
    """
    _refuse_now(lambda logps, **h: loss(Pair(logps, logps), **h), **hyperparameters)

    def evaluate(logps: Any, _: Preferences, arguments: dict[str, Any]) -> tuple[Array, Metrics]:
        checks.pair("the policy's log-probabilities", logps)
        chosen, rejected = logps
        metrics = {"chosen_logp": chosen, "rejected_logp": rejected, "logp_margin": chosen - rejected}
        return loss(Pair(*logps), **arguments), {**metrics, "accuracy": _share(chosen - rejected)}

    return _objective(log_prob, Preferences, evaluate, hyperparameters)


def reward_objective(
    reward: LogProbFn, loss: Callable[..., Array] = bradley_terry_loss, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean loss of a reward model on comparisons.

    Args:
      reward: the rewards of responses, `(params, prompts, responses) -> rewards` (`toy.score_fn`).
      loss: of a pair of rewards.
      **hyperparameters: what the loss takes: `margin` and `centring`.

    Returns:
      An objective on batches of `Preferences`. Its metrics are means over the batch, weighted where it has weights:
      `chosen_reward` and `rejected_reward`; `reward_margin`, their difference; and `accuracy`, the share of
      comparisons whose chosen response has the higher reward.

    Raises:
      TypeError, ValueError: the loss refuses the hyperparameters (checked unless they are traced, or functions).
    """
    _refuse_now(lambda rewards, **h: loss(Pair(rewards, rewards), **h), **hyperparameters)

    def evaluate(rewards: Any, _: Preferences, arguments: dict[str, Any]) -> tuple[Array, Metrics]:
        checks.pair("the rewards", rewards)
        chosen, rejected = rewards
        metrics = {"chosen_reward": chosen, "rejected_reward": rejected, "reward_margin": chosen - rejected}
        return loss(Pair(*rewards), **arguments), {**metrics, "accuracy": _share(chosen - rejected)}

    return _objective(reward, Preferences, evaluate, hyperparameters)


def unpaired_objective(
    log_prob: LogProbFn, loss: UnpairedLoss, *, beta: Hyperparameter, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean of a loss of single responses, good or bad.

    Args:
      log_prob: scores responses.
      loss: of policy, reference and labels, for instance `losses.kto_loss`.
      beta: strength of the pull towards the reference; positive. It also scales the implicit rewards of the metrics.
      **hyperparameters: what else the loss takes.

    Returns:
      An objective on batches of `Labels` that carry their reference (`with_reference`). Its metrics are
      `desirable_reward` and `undesirable_reward`, the mean implicit rewards of the good and of the bad responses of a
      batch (zero where there are none), and `reward_margin`, their difference; all weighted where the batch has
      weights.

    Raises:
      TypeError, ValueError: the loss refuses the hyperparameters (checked unless they are traced, or functions); or
        a batch has no reference.
    """
    _refuse_now(lambda logps, **h: loss(logps, logps, logps > 0, **h), beta=beta, **hyperparameters)

    def evaluate(logps: Any, batch: Labels, arguments: dict[str, Any]) -> tuple[Array, Metrics]:
        values = loss(logps, reference_of(batch), batch.desirable, **arguments)
        rewards = arguments["beta"] * (logps - reference_of(batch))
        desirable, undesirable = (
            _portion(rewards, side, batch.weights) for side in (batch.desirable, ~batch.desirable)
        )
        metrics = {"desirable_reward": desirable, "undesirable_reward": undesirable}
        return values, {**metrics, "reward_margin": desirable - undesirable}

    return _objective(log_prob, Labels, evaluate, {"beta": beta, **hyperparameters})


def policy_gradient_objective(
    log_prob: LogProbFn, loss: PolicyGradientLoss, **hyperparameters: Hyperparameter
) -> Objective:
    """The mean of a surrogate whose gradient is a policy gradient.

    Args:
      log_prob: scores responses.
      loss: of log-probabilities now, log-probabilities when the policy responded, and advantages: for instance
        `losses.ppo_loss`.
      **hyperparameters: what else the loss takes. `losses.grpo_loss` wants
        `reference=lambda params, batch, logps: batch.reference`.

    Returns:
      An objective on batches of `Rollouts`. Its metrics are means over the batch, weighted where it has weights:
      `sampled_reward`; `sampled_kl`, the log-ratio to the reference (nats), when the policy responded; and
      `ratio_change`, how far the ratio of probabilities now to those then is from 1.

    Raises:
      TypeError, ValueError: the loss refuses the hyperparameters (checked unless they are traced, or functions).
    """
    _refuse_now(lambda logps, **h: loss(logps, logps, logps, **h), **hyperparameters)

    def evaluate(logps: Any, batch: Rollouts, arguments: dict[str, Any]) -> tuple[Array, Metrics]:
        metrics = {
            "sampled_reward": batch.rewards,
            "sampled_kl": batch.logps - batch.reference,
            "ratio_change": jnp.abs(jnp.expm1(logps - batch.logps)),
        }
        return loss(logps, batch.logps, batch.advantages, **arguments), metrics

    return _objective(log_prob, Rollouts, evaluate, hyperparameters)


def with_reference(log_prob: LogProbFn, reference: Params, data: Any) -> Any:
    """`Preferences` or `Labels` that carry the log-probabilities of their responses under a reference policy.

    Args:
      log_prob: scores responses.
      reference: parameters of the reference policy; no gradient flows into them.
      data: comparisons, rankings or labels; a reference they already carry is replaced.

    Raises:
      TypeError: `log_prob` did not return what it was given: a pair for a pair of responses.
      ValueError: `log_prob` did not return one number for each response; of tokens, for instance.
    """
    logps = log_prob(reference, data.prompts, data.responses)
    checks.same_structure("log_prob(params, prompts, responses)", logps, data.responses)
    checks.one_per_row("log_prob(params, prompts, responses)", logps, len(data.prompts))
    return data._replace(reference=jax.lax.stop_gradient(logps))


def _refuse_now(loss: Callable[..., Array], **hyperparameters: Hyperparameter) -> None:
    """Lets a loss refuse its hyperparameters when the objective is made, not in the first step of training."""
    beta = hyperparameters.get("beta", 1.0)
    if not callable(beta) and not isinstance(beta, Running):
        checks.positive("beta", beta)
    if any(callable(value) or isinstance(value, Running) for value in hyperparameters.values()):
        return
    shape = np.broadcast_shapes((1,), *(jnp.shape(value) for value in jax.tree.leaves(hyperparameters)))
    jax.eval_shape(lambda logps: loss(logps, **hyperparameters), jax.ShapeDtypeStruct(shape, jnp.float32))


def _objective(
    log_prob: LogProbFn,
    noun: type,
    evaluate: Callable[..., tuple[Array, Metrics]],
    hyperparameters: dict[str, Hyperparameter],
) -> Objective:
    """Scores a batch, works out the hyperparameters, evaluates losses and metrics, and takes their means."""

    def apply(params: Params, batch: Any, memory: dict[str, Any]) -> tuple[Array, Metrics, dict[str, Any]]:
        _check_noun(batch, noun)
        logps = log_prob(params, batch.prompts, batch.responses)
        checks.one_per_row("log_prob(params, prompts, responses)", logps, len(batch.prompts))
        arguments, memory = _arguments(hyperparameters, memory, params, batch, jax.lax.stop_gradient(logps))
        values, metrics = evaluate(logps, batch, arguments)
        shares = None if batch.weights is None else _shares(batch.weights)
        means = {name: _mean(metric, shares) for name, metric in metrics.items()}
        return _mean(values, batch.weights), means, memory

    memory = {name: value.memory for name, value in hyperparameters.items() if isinstance(value, Running)}
    if memory:
        return StatefulObjective(memory, apply)

    def objective(params: Params, batch: Any) -> tuple[Array, Metrics]:
        loss, metrics, _ = apply(params, batch, {})
        return loss, metrics

    return objective


def _arguments(
    hyperparameters: dict[str, Hyperparameter], memory: dict[str, Any], params: Params, batch: Any, logps: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the loss is called with, and what is remembered; no gradient flows through what depends on the batch."""
    arguments: dict[str, Any] = {}
    for name, value in hyperparameters.items():
        if isinstance(value, Running):
            argument, new = jax.lax.stop_gradient(value.update(memory[name], params, batch, logps))
            memory = {**memory, name: new}
        else:
            argument = jax.lax.stop_gradient(value(params, batch, logps)) if callable(value) else value
        arguments[name] = argument
    return arguments, memory


def _check_noun(batch: Any, noun: type) -> None:
    """A batch of another noun of this library is told from one that fits."""
    others = {
        Demonstrations: "train.sft_objective",
        Preferences: "train.preference_objective or train.reference_free_objective",
        Labels: "train.unpaired_objective",
        Rollouts: "train.policy_gradient_objective",
    }
    if type(batch) in others and not isinstance(batch, noun):
        raise TypeError(
            f"this objective is for {noun.__name__}, got {type(batch).__name__}, which go with {others[type(batch)]}"
        )


def _refuse_weights(loss: Any, batch: Preferences) -> None:
    """Where a loss does not belong to one comparison, neither can a weight."""
    if batch.weights is not None and loss in (aot_loss, aot_unpaired_loss, beta_dpo_loss):
        raise ValueError(f"comparisons cannot have weights in {loss.__name__}, which compares whole batches")


def _shares(weights: Array) -> Array:
    mean = jnp.mean(weights)
    return weights / jnp.where(mean > 0, mean, 1)


def reference_of(batch: Any) -> Any:
    """The log-probabilities under the reference that a batch carries; an error if it carries none."""
    if batch.reference is None:
        raise ValueError("the data carry no reference log-probabilities: add them by train.with_reference")
    return batch.reference


def _share(margin: Float[Array, " batch"]) -> Float[Array, " batch"]:
    return (margin > 0).astype(margin.dtype)


def _portion(values: Float[Array, " batch"], part: Bool[Array, " batch"], weights: Array | None) -> Array:
    """Values whose (weighted) mean over the batch is that of a part of it; zeros where that part is empty."""
    weights = jnp.ones_like(values) if weights is None else weights
    share = jnp.sum(weights * part) / jnp.sum(weights)
    return jnp.where(part, values, 0) / jnp.where(share > 0, share, 1)


def _mean(values: Float[Array, " batch"], weights: Array | None) -> Float[Array, ""]:
    if weights is None:
        return jnp.mean(values)
    checks.same_shape(losses=values, weights=weights)
    return jnp.mean(weights * values)
