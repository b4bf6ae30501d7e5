"""Hyperparameters that are statistics of the batches, and a reference that moves towards the policy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dpo_jax import checks
from dpo_jax.losses import MarginMoments, Shift, kto_reference_point, log_ratios, update_margin_moments, update_shift
from dpo_jax.losses.ratios import difference
from dpo_jax.train.objectives import Batchwise, Running, reference_of, with_reference
from dpo_jax.types import Labels, LogProbFn, Metrics, Numeric, Objective, Params, Preferences, StatefulObjective


def batch_reference_point(log_prob: LogProbFn, reference_params: Params) -> Batchwise:
    """KTO's reference point, estimated as in the paper: pairs each prompt of a batch with the next response.

    If neighbours have the same prompt, the response answers that prompt; in a batch of one it is the row's response. It
    does not follow a `moving_reference`. If the batch has weights, the weight of a pair is the product of the weights
    of both rows.

    Args:
      log_prob: scores responses.
      reference_params: parameters of the reference policy.

    Returns:
      A value for `unpaired_objective(log_prob, losses.kto_loss, reference_point=...)`. If the exact KL to the reference
      can be computed, use it instead: `lambda params, batch, logps: kl(params)`.
    """

    def reference_point(params: Params, batch: Labels, _: Array) -> Float[Array, ""]:
        mismatched = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=0), batch.responses)
        scores = (log_prob(policy, batch.prompts, mismatched) for policy in (params, reference_params))
        if batch.weights is None:
            return kto_reference_point(*scores)
        weights = batch.weights * jnp.roll(batch.weights, -1)
        shares = weights / jnp.where(jnp.any(weights > 0), jnp.mean(weights), 1)
        return kto_reference_point(*(shares * score for score in scores))

    return reference_point


def running_shift(*, beta: Numeric) -> Running:
    """BCO's shift (`losses.update_shift`): a value for `shift` of `losses.bco_pair_loss` and `losses.bco_loss`.

    Args:
      beta: that of the loss.
    """
    checks.interval("beta", beta, "(0, inf)")

    def update(memory: Shift, _: Params, batch: Any, logps: Any) -> tuple[Array, Shift]:
        reference_logps, weights = reference_of(batch), batch.weights
        if isinstance(batch, Labels):
            rewards, desirable = beta * difference(logps, reference_logps), batch.desirable
        else:
            rewards = beta * jnp.concatenate(log_ratios(logps, reference_logps))
            desirable = jnp.arange(len(rewards)) < len(logps[0])
            weights = None if weights is None else jnp.tile(weights, 2)
        memory = update_shift(memory, rewards, desirable, weights)
        return jnp.asarray(memory.value, rewards.dtype), memory

    return Running(Shift(), update)


def running_margin_moments(key: Key[Array, ""], *, momentum: Numeric = 0.9) -> Running:
    """Statistics of beta-DPO (`losses.update_margin_moments`): a value for `moments` of `losses.beta_dpo_loss`.

    Args:
      key: typed PRNG key, for the filter.
      momentum: weight of the past; at least 0, below 1.
    """
    checks.key(key)
    checks.interval("momentum", momentum, "[0, 1)")

    def update(memory: MarginMoments, _: Params, batch: Preferences, logps: Any) -> tuple[Any, MarginMoments]:
        ratios = log_ratios(logps, reference_of(batch))
        memory = update_margin_moments(memory, difference(*ratios), momentum=momentum)
        return memory, memory

    return Running(MarginMoments(key), update)


class _Moving(NamedTuple):
    reference_params: Params
    step: Int[Array, ""]
    inner: Any


def moving_reference(
    objective: Objective,
    log_prob: LogProbFn,
    reference_params: Params,
    *,
    mix: Numeric = 0.6,
    steps_per_move: int = 512,
) -> StatefulObjective:
    r"""An objective whose reference moves towards the policy (TR-DPO).

    .. math:: \pi_{ref} \leftarrow \alpha\, \pi + (1 - \alpha)\, \pi_{ref} \quad \text{(of the parameters)}

    Source: Gorbatovski et al. 2024, "Learn Your Reference Model for Real Good Alignment", arXiv 2404.09656: soft
    updates have a small `mix` each step, hard updates have `mix` 1 and many steps in between. The defaults are those of
    TRL, which mixes a large part at long intervals. The policy is that before the update of the step.

    Args:
      objective: on data with a reference, for instance a `preference_objective`.
      log_prob: scores responses.
      reference_params: parameters of the reference policy at the start.
      mix: :math:`\alpha`, above 0, at most 1.
      steps_per_move: number of optimizer steps between two moves.
    """
    checks.interval("mix", mix, "(0, 1]")
    checks.size("steps_per_move", steps_per_move)
    memory = objective.memory if isinstance(objective, StatefulObjective) else None

    def apply(params: Params, batch: Any, memory: _Moving) -> tuple[Array, Metrics, _Moving]:
        batch, inner = with_reference(log_prob, memory.reference_params, batch), memory.inner
        if isinstance(objective, StatefulObjective):
            loss, metrics, inner = objective.apply(params, batch, inner)
        else:
            loss, metrics = objective(params, batch)
        step = memory.step + 1
        share = jnp.where(step % steps_per_move == 0, mix, 0.0)
        moved = jax.tree.map(
            lambda old, new: (old + share * (new - old)).astype(old.dtype), memory.reference_params, params
        )
        return loss, metrics, _Moving(jax.lax.stop_gradient(moved), step, inner)

    return StatefulObjective(_Moving(reference_params, jnp.zeros((), jnp.int32), memory), apply)
