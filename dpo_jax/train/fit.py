"""`fit`: one scan over epochs and minibatches, for any objective `(params, batch) -> (loss, metrics)`.

An objective may remember something from batch to batch (`StatefulObjective`); that, too, is carried by the scan.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, Key

from dpo_jax import checks, rows
from dpo_jax.shuffle import permutation
from dpo_jax.types import Metrics, Objective, Params, Scalar, StatefulObjective


class TrainState(NamedTuple):
    """What training carries from step to step.

    Attributes:
      params: parameters; the last good ones once something was not finite.
      opt_state: the state of the optimizer.
      step: how many optimizer steps have been applied.
      finite: whether every loss and every update so far was finite.
      memory: what the objective remembers; `None` if it is not a `StatefulObjective`.
    """

    params: Params
    opt_state: Any
    step: Int[Array, ""]
    finite: Bool[Array, ""]
    memory: Any = None


class NonFiniteError(FloatingPointError):
    """Training met a loss or an update that is NaN or infinite.

    Attributes:
      step: the optimizer step, counted from 0, that failed.
      params: the parameters before that step.
      history: the history; the objective's metrics are NaN from the epoch of the failure on.
    """

    def __init__(self, step: int, num_batches: int, params: Params, history: Metrics):
        super().__init__(
            f"loss or update not finite in step {step} (epoch {step // num_batches}, batch {step % num_batches}, "
            "counted from 0); the learning rate may be too high, or the data hold NaN or ids out of range. The error's "
            "attributes `params` and `history` keep what was learnt before."
        )
        self.step, self.params, self.history = step, params, history


def init_state(params: Params, *, objective: Objective, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    memory = objective.memory if isinstance(objective, StatefulObjective) else None
    memory = jax.tree.map(jnp.asarray, memory)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.ones((), jnp.bool), memory)


def update(
    state: TrainState, batch: Any, *, objective: Objective, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimizer step; no step from the first loss or update on that is not finite.

    Returns:
      The next state, and the metrics of the batch before the step, `loss` among them (NaN once training has stopped).
    """

    def evaluate(params: Params) -> tuple[Array, tuple[Metrics, Any]]:
        if not isinstance(objective, StatefulObjective):
            loss, metrics = objective(params, batch)
            return loss, (metrics, None)
        loss, metrics, memory = objective.apply(params, batch, state.memory)
        return loss, (metrics, memory)

    (loss, (metrics, memory)), gradient = jax.value_and_grad(evaluate, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = state.finite & jnp.isfinite(loss)
    for leaf in jax.tree.leaves(params):
        finite &= jnp.all(jnp.isfinite(leaf))
    params, memory = jax.tree.map(
        lambda old, new: jnp.where(finite, new, old), (state.params, state.memory), (params, memory)
    )
    metrics = {name: jnp.where(finite, metric, jnp.nan) for name, metric in {"loss": loss, **metrics}.items()}
    return TrainState(params, opt_state, state.step + finite, finite, memory), metrics


def run_epoch(
    state: TrainState,
    data: Any,
    order: Int[Array, " n"],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> tuple[TrainState, Metrics]:
    """One pass over the data in a given order; the last batch holds what is left, and may be short.

    Returns:
      The next state, and each metric's mean over the batches (each batch counts equally, a short one too).

    Raises:
      TypeError, ValueError: `order` does not hold numbers of rows, from 0. Where it is traced nobody looks.
    """
    checks.ids("order", order, checks.rows("data", data))
    step = partial(update, objective=objective, optimizer=optimizer)
    num_full = len(order) // batch_size
    full, left = jnp.split(order, [num_full * batch_size])
    full = full.reshape(num_full, batch_size)
    state, metrics = jax.lax.scan(step, state, jax.tree.map(lambda leaf: rows.take(leaf, full), data))
    metrics = {name: jnp.sum(metric, axis=0) for name, metric in metrics.items()}
    if len(left):
        state, last = step(state, jax.tree.map(lambda leaf: rows.take(leaf, left), data))
        metrics = {name: metrics[name] + last[name] for name in metrics}
    return state, {name: metric / (num_full + bool(len(left))) for name, metric in metrics.items()}


def fit(
    key: Key[Array, ""],
    params: Params,
    data: Any,
    *,
    objective: Objective,
    learning_rate: Scalar | optax.Schedule,
    num_epochs: int,
    batch_size: int,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    evaluate: Callable[[Params], Metrics] | None = None,
    report: Callable[[int, Metrics], None] | None = None,
    epochs_per_report: int = 10,
) -> tuple[Params, Metrics]:
    """Minimises an objective over a data set by shuffled minibatches: one compiled scan.

    A pure function, to be used inside `jit` and `vmap` or on its own. Whatever the objective closes over may be traced
    (beta, label smoothing, the world), and so may `learning_rate`: one compiled program serves all their values.

    Args:
      key: typed PRNG key; each epoch is shuffled by its own part of it.
      params: where to start.
      data: pytree of arrays that share their leading axis, for instance `Demonstrations` or `Preferences`.
      objective: `(params, batch) -> (loss, metrics)`, or a `StatefulObjective`.
      learning_rate: positive; a number, or an Optax schedule.
      num_epochs: passes over the data; static.
      batch_size: rows per optimizer step; static. An epoch's last batch is short where this does not divide the data.
      optimizer: from a learning rate to an Optax optimizer, for instance `optax.adam` or
        `lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))`.
      evaluate: from parameters to further entries of the history, computed after each epoch.
      report: called as `report(epochs_done, metrics)` between compiled pieces of `epochs_per_report` epochs, never
        inside one. It changes no result. Not possible under `jit` or `vmap`.
      epochs_per_report: how many epochs to run between two reports.

    Returns:
      The trained parameters, and the history: for each metric an array `[num_epochs]` of means over batches; `loss` and
      `step`, the optimizer steps applied by the end of the epoch, are always among them.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NonFiniteError: a loss or an update was NaN or infinite. Under `jit` nothing can be raised: there, training also
        stops with the last good parameters, `step` ceases to grow and the objective's metrics become NaN.
    """
    checks.key(key)
    checks.size("num_epochs", num_epochs)
    checks.size("batch_size", batch_size)
    check_learning_rate(learning_rate)
    num_rows = checks.rows("data", data)
    data = jax.tree.map(jnp.asarray, data)
    transformation = optimizer(learning_rate)

    def epoch(state: TrainState, epoch_key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        return run_epoch(
            state,
            data,
            permutation(epoch_key, num_rows),
            objective=objective,
            optimizer=transformation,
            batch_size=min(batch_size, num_rows),
        )

    state = init_state(params, objective=objective, optimizer=transformation)
    state, history = run_epochs(
        key, epoch, state, num_epochs=num_epochs, evaluate=evaluate, report=report, epochs_per_report=epochs_per_report
    )
    if not checks.is_traced(state) and not state.finite:
        raise NonFiniteError(int(state.step), -(-num_rows // batch_size), state.params, history)
    return state.params, history


def check_learning_rate(learning_rate: Scalar | optax.Schedule) -> None:
    """It is one positive number, unless it is a schedule."""
    if not callable(learning_rate):
        checks.positive("learning_rate", learning_rate)
        checks.broadcasts("learning_rate", learning_rate, ())


def run_epochs(
    key: Key[Array, ""],
    epoch: Callable[[TrainState, Key[Array, ""]], tuple[TrainState, Metrics]],
    state: TrainState,
    *,
    num_epochs: int,
    evaluate: Callable[[Params], Metrics] | None,
    report: Callable[[int, Metrics], None] | None,
    epochs_per_report: int,
) -> tuple[TrainState, Metrics]:
    """One scan over epochs, with evaluations and reports as `fit` describes them.

    Args:
      key: typed PRNG key; each epoch has its own part of it.
      epoch: `(state, key) -> (state, metrics)`.
      state: where to start.
      num_epochs, evaluate, report, epochs_per_report: see `fit`.
    """

    def recorded(state: TrainState, epoch_key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        state, metrics = epoch(state, epoch_key)
        evaluated = evaluate(state.params) if evaluate else {}
        if taken := evaluated.keys() & {*metrics, "step"}:
            raise ValueError(f"evaluate must not return {', '.join(sorted(taken))}: training has metrics of that name")
        return state, {**metrics, **evaluated, "step": state.step}

    run, keys = partial(jax.lax.scan, recorded), jax.random.split(key, num_epochs)
    if report is None:
        return run(state, keys)
    return _run_with_reports(run, state, keys, report, epochs_per_report)


def _run_with_reports(
    run: Callable[..., Any],
    state: TrainState,
    keys: Key[Array, " epochs"],
    report: Callable[[int, Metrics], None],
    epochs_per_report: int,
) -> tuple[TrainState, Metrics]:
    checks.size("epochs_per_report", epochs_per_report)
    if checks.is_traced((state, keys)):
        raise ValueError("report cannot be called under jit or vmap: leave it out, or call fit outside of them")
    run = jax.jit(run)
    pieces: list[Metrics] = []
    for start in range(0, len(keys), epochs_per_report):
        state, piece = run(state, keys[start : start + epochs_per_report])
        pieces.append(jax.device_get(piece))
        if not state.finite:
            break
        report(min(start + epochs_per_report, len(keys)), {name: metric[-1] for name, metric in pieces[-1].items()})
    return state, {name: jnp.asarray(np.concatenate([piece[name] for piece in pieces])) for name in pieces[0]}
