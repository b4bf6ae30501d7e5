"""The objective of policy gradients by token: each token has its own ratio, advantage and share of the loss."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpo_jax import checks
from dpo_jax.losses.aggregation import mean_of_tokens
from dpo_jax.losses.structure import name_of
from dpo_jax.train.families import check_call
from dpo_jax.train.objectives import Batchwise, average, check_type, refuse_now
from dpo_jax.types import Metrics, Numeric, Objective, Params, PolicyGradientLoss, TokenLogProbFn, TokenRollouts

Aggregate = Callable[..., Array]
"""From a loss for each token to one number: `(values, mask, weights=...)`, for instance `losses.mean_of_tokens`."""


def token_policy_gradient_objective(
    token_log_prob: TokenLogProbFn,
    loss: PolicyGradientLoss,
    *,
    aggregate: Aggregate = mean_of_tokens,
    **hyperparameters: Numeric | Batchwise,
) -> Objective:
    """A surrogate loss of single tokens, aggregated over the tokens of a batch.

    Args:
      token_log_prob: scores the tokens of responses.
      loss: of current log-probabilities, those at sampling time, and advantages, all by token: `losses.ppo_loss`.
      aggregate: `losses.mean_of_tokens` (DAPO, PPO), `losses.mean_of_responses` (GRPO), or
        `partial(losses.mean_per_length, max_length=...)` (Dr. GRPO).
      **hyperparameters: of the loss: numbers, or functions `(params, batch, logps) -> value`, through which no gradient
        flows. `losses.grpo_loss` needs `reference=lambda params, batch, logps: batch.reference_logps`.

    Returns:
      An objective on batches of `TokenRollouts`. What stands behind the end of a response has no effect, even NaN. Its
      metrics are means over responses, weighted where the batch has weights: `sampled_reward`, `sampled_kl` (nats, of
      whole responses, at sampling time) and `ratio_change`, the mean over tokens of the absolute difference from 1 of
      the ratio of current probabilities to those at sampling time.

    Raises:
      TypeError, ValueError: the loss is of another family, or the batch is; or the loss refuses the hyperparameters
        (checked unless they are traced, or functions).
    """
    check_call(loss, ("logps", "old_logps", "advantages"), hyperparameters)
    refuse_now(lambda logps, **h: loss(logps, logps, logps, **h), hyperparameters, betas="[0, inf)")

    def objective(params: Params, batch: TokenRollouts) -> tuple[Array, Metrics]:
        check_type(batch, TokenRollouts)
        mask = batch.mask
        logps = inside(token_log_prob(params, batch.prompts, batch.responses).values, mask)
        old, advantages = inside(batch.logps, mask), inside(batch.advantages, mask)
        known = jax.lax.stop_gradient(logps)
        values = {
            name: jax.lax.stop_gradient(value(params, batch, known)) if callable(value) else value
            for name, value in hyperparameters.items()
        }
        of_tokens = loss(logps, old, advantages, **values)
        checks.same_shape(**{name_of(loss): of_tokens, "mask": mask})
        kl = jnp.sum(inside(batch.logps - batch.reference_logps, mask), axis=-1)
        change = jnp.sum(jnp.abs(jnp.expm1(known - old)), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
        metrics = {"sampled_reward": batch.rewards, "sampled_kl": kl, "ratio_change": change}
        value = aggregate(of_tokens, mask, weights=batch.weights)
        if batch.weights is not None:
            value = jnp.where(jnp.any(batch.weights < 0), jnp.nan, value)  # so that training stops
        return value, {name: average(metric, batch.weights) for name, metric in metrics.items()}

    return objective


def inside(values: Array, mask: Array) -> Array:
    """Values of the tokens of a response; zero, without a gradient, behind its end."""
    return jnp.where(mask, values, 0)
