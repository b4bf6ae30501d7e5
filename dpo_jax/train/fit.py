"""`fit`: one scan over epochs and minibatches, for any objective `(params, batch) -> (loss, metrics)`.

The scan also carries the memory of an objective, if it has one (`StatefulObjective`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, Key

from dpo_jax import checks
from dpo_jax.fast import rows
from dpo_jax.fast.shuffle import permutation
from dpo_jax.types import Metrics, Objective, Params, Ratio, StatefulObjective


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
      params: parameters; after a failure, the last ones before it.
      opt_state: the state of the optimizer.
      step: number of optimizer steps so far.
      finite: whether all losses and updates so far were finite.
      memory: of the objective; `None` if it is not a `StatefulObjective`.
    """

    params: Params
    opt_state: Any
    step: Int[Array, ""]
    finite: Bool[Array, ""]
    memory: Any = None


class Evaluated(NamedTuple):
    """An objective at some parameters, on one batch.

    Attributes:
      loss: a number.
      metrics: of the objective.
      memory: of the objective, after the batch.
      gradient: of the loss, in the structure of the parameters.
    """

    loss: Array
    metrics: Metrics
    memory: Any
    gradient: Params


class NonFiniteError(FloatingPointError):
    """A loss or an update is NaN or infinite.

    Attributes:
      step: the optimizer step, counted from 0, that failed.
      params: the parameters before that step.
      history: the history; the objective's metrics are NaN from the epoch of the failure on.
    """

    def __init__(self, step: int, num_batches: int, params: Params, history: Metrics):
        super().__init__(
            f"loss or update not finite in step {step} (epoch {step // num_batches}, batch {step % num_batches}, "
            "counted from 0); the learning rate or a hyperparameter of the loss, such as beta, may be too high, or "
            f"{'the data' if step else 'the initial parameters or the data'} hold NaN, negative weights or ids out of "
            "range. The error's attributes `params` and `history` hold the results before that step."
        )
        self.step, self.params, self.history = step, params, history


def init_state(params: Params, *, objective: Objective, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Raises:
      ValueError: the optimizer accumulates gradients over several calls, such as `optax.MultiSteps`.
    """
    memory = objective.memory if isinstance(objective, StatefulObjective) else None
    memory = jax.tree.map(jnp.asarray, memory)
    opt_state = optimizer.init(params)
    _refuse_accumulation(opt_state)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.ones((), jnp.bool), memory)


def update(
    state: TrainState, batch: Any, *, objective: Objective, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimizer step. After a loss or an update that is not finite, parameters no longer change.

    Optimizers that take them get the loss and its gradient as `value` and `grad`, and `value_fn`, from parameters to
    the loss of this batch (`optax.lbfgs`, `optax.polyak_sgd`, `optax.contrib.reduce_on_plateau`).

    Returns:
      The next state, and the metrics of the batch before the step, `loss` among them (NaN once training has stopped).

    Raises:
      TypeError, ValueError: the objective returned invalid values.
    """
    found = evaluate(state.params, state.memory, batch, objective=objective)
    again = lambda params: evaluate(params, state.memory, batch, objective=objective).loss  # noqa: E731
    return advance(state, found, optimizer=optimizer, value_fn=again)


def evaluate(params: Params, memory: Any, batch: Any, *, objective: Objective) -> Evaluated:
    """The loss of a batch and its gradient: the first half of `update`.

    Raises:
      TypeError, ValueError: the objective returned invalid values.
    """

    def loss_of(params: Params) -> tuple[Array, tuple[Metrics, Any]]:
        if not isinstance(objective, StatefulObjective):
            checks.outcome(outcome := objective(params, batch), parts=("loss", "metrics"))
            return outcome[0], (outcome[1], None)
        checks.outcome(new := objective.apply(params, batch, memory), parts=("loss", "metrics", "memory"))
        return new[0], (new[1], memory_like(memory, new[2], "objective"))

    (loss, (metrics, memory_after)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    return Evaluated(loss, metrics, memory_after, gradient)


def advance(
    state: TrainState,
    found: Evaluated,
    *,
    optimizer: optax.GradientTransformation,
    value_fn: Callable[[Params], Array] | None = None,
) -> tuple[TrainState, Metrics]:
    """The second half of `update`: what the optimizer makes of a gradient.

    Args:
      state: before the step.
      found: at its parameters.
      optimizer: as for `update`.
      value_fn: for optimizers that evaluate the loss elsewhere.
    """
    known = {"value": found.loss, "grad": found.gradient}
    if value_fn is not None:
        known["value_fn"] = value_fn
    updates, opt_state = optimizer.update(found.gradient, state.opt_state, state.params, **_asked_for(optimizer, known))
    params = optax.apply_updates(state.params, updates)
    each = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    finite = state.finite & jnp.isfinite(found.loss) & jnp.all(jnp.stack([jnp.ones((), jnp.bool), *each]))
    params, memory = jax.tree.map(
        lambda old, new: jnp.where(finite, new, old), (state.params, state.memory), (params, found.memory)
    )
    metrics = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), {"loss": found.loss, **found.metrics})
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
    """One pass over the data in a given order; the last batch may be short.

    Returns:
      The next state, and each metric's mean over the batches (each batch counts equally, a short one too). A `Ratio`
      becomes the sum of its numerators over that of its denominators.

    Raises:
      TypeError, ValueError: `order` does not hold indices of rows, or weights are negative or all zero (checked unless
        traced).
    """
    state, metrics = pass_over(state, data, order, objective=objective, optimizer=optimizer, batch_size=batch_size)
    return state, numbers(metrics)


def pass_over(
    state: TrainState,
    data: Any,
    order: Int[Array, " n"],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> tuple[TrainState, Metrics]:
    """Like `run_epoch`, but does not divide each `Ratio`, so that further passes can be added."""
    checks.ids("order", order, checks.rows("data", data))
    checks.weights(data)
    step = partial(update, objective=objective, optimizer=optimizer)
    num_full = len(order) // batch_size
    full, left = jnp.split(order, [num_full * batch_size])
    full = full.reshape(num_full, batch_size)
    state, metrics = jax.lax.scan(step, state, jax.tree.map(lambda leaf: rows.take(leaf, full), data))
    metrics = jax.tree.map(partial(jnp.sum, axis=0), metrics)
    if len(left):
        state, last = step(state, jax.tree.map(lambda leaf: rows.take(leaf, left), data))
        metrics = jax.tree.map(jnp.add, metrics, last)
    num_batches = num_full + bool(len(left))
    return state, {name: x if isinstance(x, Ratio) else x / num_batches for name, x in metrics.items()}


def pooled(metrics: Metrics) -> Metrics:
    """Combines stacked metrics, each of the same number of batches."""
    return {
        name: jax.tree.map(partial(jnp.sum, axis=0), metric) if isinstance(metric, Ratio) else jnp.mean(metric, axis=0)
        for name, metric in metrics.items()
    }


def numbers(metrics: Metrics) -> Metrics:
    """Metrics in which each `Ratio` is replaced by its value."""
    return {name: metric.value if isinstance(metric, Ratio) else metric for name, metric in metrics.items()}


def fit(
    key: Key[Array, ""],
    params: Params,
    data: Any,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    num_epochs: int,
    batch_size: int,
    evaluate: Callable[[Params], Metrics] | None = None,
    report: Callable[[int, Metrics], None] | None = None,
    epochs_per_report: int = 10,
) -> tuple[Params, Metrics]:
    """Minimises an objective over a data set by shuffled minibatches: one compiled scan.

    A pure function: use it inside `jit` and `vmap`, or on its own. Whatever objective and optimizer close over may be
    traced (beta, label smoothing, the world, the learning rate), so that one compiled program serves all values:
    `jax.vmap(lambda rate: fit(..., optimizer=optax.adam(rate)))(rates)`.

    Args:
      key: typed PRNG key; each epoch is shuffled by its own part of it.
      params: initial parameters.
      data: pytree of arrays that share their leading axis, for instance `Demonstrations` or `Preferences`.
      objective: `(params, batch) -> (loss, metrics)`, or a `StatefulObjective`.
      optimizer: an Optax optimizer, for instance `optax.adam(1e-3)`, `optax.adam(optax.cosine_decay_schedule(...))` or
        `optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))`. Make it inside the function that is jitted or
        vmapped if its learning rate is traced; `optax.inject_hyperparams` keeps rates in the optimizer's state.
        If a batch does not fit into memory, wrap `log_prob` in `in_chunks` instead of using `optax.MultiSteps`.
      num_epochs: passes over the data; static.
      batch_size: rows per optimizer step; static. An epoch's last batch is short where this does not divide the data.
      evaluate: from parameters to further entries of the history, computed after each epoch.
      report: called as `report(epochs_done, metrics)` between compiled pieces of `epochs_per_report` epochs. It does
        not change results, and is not possible under `jit` or `vmap`.
      epochs_per_report: how many epochs to run between two reports.

    Returns:
      The trained parameters, and the history: for each metric an array `[num_epochs]`. `loss` and `step`, the optimizer
      steps applied by the end of the epoch, are always among them. The loss and other metrics are means over batches,
      each of which counts equally, a short last one too; only a `Ratio`, a metric whose denominator differs from batch
      to batch, is the sum of its numerators over that of its denominators, and NaN where the latter is zero.

    Raises:
      TypeError, ValueError: an argument is not as described, or a function returned invalid values.
      NonFiniteError: a loss or an update was NaN or infinite. Under `jit` no error can be raised: there, parameters and
        `step` stop changing, and the objective's metrics become NaN.
    """
    checks.key(key)
    checks.size("num_epochs", num_epochs)
    checks.size("batch_size", batch_size)
    check_optimizer(optimizer)
    num_rows = checks.rows("data", data)
    data = jax.tree.map(jnp.asarray, data)

    def epoch(state: TrainState, epoch_key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        return run_epoch(
            state,
            data,
            permutation(epoch_key, num_rows),
            objective=objective,
            optimizer=optimizer,
            batch_size=min(batch_size, num_rows),
        )

    state = init_state(params, objective=objective, optimizer=optimizer)
    state, history = run_epochs(
        key, epoch, state, num_epochs=num_epochs, evaluate=evaluate, report=report, epochs_per_report=epochs_per_report
    )
    if not checks.is_traced(state) and not state.finite:
        raise NonFiniteError(int(state.step), -(-num_rows // batch_size), state.params, history)
    return state.params, history


def check_optimizer(optimizer: Any) -> None:
    """It is an Optax optimizer, with its learning rate.

    Raises:
      TypeError: it is something else, such as the function `optax.adam` itself.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        what = f"the function {optimizer.__name__}" if hasattr(optimizer, "__name__") else repr(optimizer)
        raise TypeError(f"optimizer must be an Optax optimizer, got {what}: write optimizer=optax.adam(1e-3)")


def _asked_for(optimizer: optax.GradientTransformation, known: dict[str, Any]) -> dict[str, Any]:
    """The known arguments that an optimizer's `update` takes."""
    parameters = inspect.signature(optimizer.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return known if takes_all else {name: value for name, value in known.items() if name in parameters}


def _refuse_accumulation(opt_state: Any) -> None:
    """Rejects optimizers that accumulate gradients over batches."""
    kinds = (optax.MultiStepsState, optax.ApplyEvery)
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds)):
        if isinstance(node, kinds):
            raise ValueError(
                "optimizers that accumulate gradients over batches (optax.MultiSteps, optax.apply_every) are not "
                "supported: moving references, running shifts, losses of whole batches and history['step'] would treat "
                "each part as a batch. To get the same numbers as with the large batch in the memory of a small one, "
                "use the large batch_size and score it in chunks: log_prob = train.in_chunks(log_prob, rows_per_chunk)"
            )


def memory_like(old: Any, new: Any, name: str) -> Any:
    """The memory that a function returned, in the dtypes of its old memory.

    Raises:
      TypeError: structure or shapes differ, or a dtype cannot be cast to the old one.
    """
    new = jax.tree.map(jnp.asarray, new)
    wanted, found = (jax.tree.map(jnp.shape, memory) for memory in (old, new))
    if wanted != found or str(jax.tree.structure(old)) != str(jax.tree.structure(new)):
        raise TypeError(f"{name} must return a memory of the shapes that it was given, {wanted}, got {found}")
    return jax.tree.map(partial(_cast, name), old, new)


def _cast(name: str, old: Array, new: Array) -> Array:
    if getattr(old, "weak_type", False) or new.dtype == old.dtype:  # a Python number takes any dtype
        return new
    both_floating = jnp.issubdtype(old.dtype, jnp.floating) and jnp.issubdtype(new.dtype, jnp.floating)
    if both_floating or jnp.promote_types(old.dtype, new.dtype) == old.dtype:
        return new.astype(old.dtype)
    raise TypeError(f"{name} must return a memory of the dtypes that it was given, but made {new.dtype} of {old.dtype}")


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
      state: the initial state.
      num_epochs, evaluate, report, epochs_per_report: see `fit`.
    """

    def recorded(state: TrainState, epoch_key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        state, metrics = epoch(state, epoch_key)
        evaluated = evaluate(state.params) if evaluate else {}
        checks.evaluation(evaluated, taken={*metrics, "step"})
        return state, numbers({**metrics, **evaluated, "step": state.step})

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
