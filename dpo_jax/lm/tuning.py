"""Tuning: a model, or adapters of it, on preferences; one run, or many runs in one program."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Key

from dpo_jax import checks, train
from dpo_jax.lm.adapters import LoRA, adapted, init_adapter
from dpo_jax.lm.batches import check_rows, prices_of, shuffled, sizes_of
from dpo_jax.lm.checkpoints import fingerprint, load_checkpoint, save_checkpoint
from dpo_jax.lm.evaluation import as_given
from dpo_jax.lm.folder import LanguageModel
from dpo_jax.lm.model import Decoder
from dpo_jax.lm.processes import is_first
from dpo_jax.lm.scoring import log_prob_fn
from dpo_jax.lm.sharding import mesh_of, on_mesh, shardings
from dpo_jax.lm.stream import Capacity
from dpo_jax.types import LogProbFn, Metrics, Objective, Params

MakeObjective = Callable[..., Objective]
"""Makes an objective of a scoring function and hyperparameters: `objective(log_prob, beta=0.1)`."""

MakeOptimizer = Callable[..., optax.GradientTransformation]
"""Makes an optimizer of hyperparameters: `optimizer(learning_rate=1e-5)`."""

SEEN_AFTER = 3
"""After so many steps, each trained array must have had a gradient, and have changed; shorter runs are not checked."""


class Step(NamedTuple):
    """What `report` is told after each step.

    Attributes:
      done: steps so far.
      planned: steps of the whole run.
      metrics: of the batch, before the step; one number for each run if there are several.
      seconds: that it took.
      compiling: seconds that compiling its program took before, 0 if there was one.
      tokens: that were computed.
      params: of the model, or of the adapters, after the step. The next step writes over them: copy what is to be kept.
    """

    done: int
    planned: int
    metrics: dict[str, np.ndarray]
    seconds: float
    compiling: float
    tokens: int
    params: Params


class Tuned(NamedTuple):
    """The outcome of `tune`.

    Attributes:
      params: of the model (variables), or of the adapter.
      history: each metric, `[steps]`; `[runs, steps]` if there are several.
    """

    params: Params
    history: dict[str, np.ndarray]


class UntrainedError(RuntimeError):
    """Training does not do what it should, as the first steps show."""


def tune(
    key: Key[Array, ""],
    model: LanguageModel,
    data: Any,
    *,
    objective: MakeObjective,
    optimizer: MakeOptimizer,
    num_epochs: int = 1,
    batch_size: int = 8,
    lora: LoRA | None = None,
    points: Mapping[str, Any] | None = None,
    mean: bool = False,
    rows_at_once: int | None = None,
    folder: str | Path | None = None,
    steps_per_checkpoint: int = 50,
    about: Mapping[str, Any] | None = None,
    preflight: bool = True,
    report: Callable[[Step], None] | None = None,
) -> Tuned:
    """Minimises an objective over tokens, in a loop of compiled steps.

    Batches are computed in at most `MOST_SHAPES` shapes. With `points`, several adapters are trained by one program:
    each has its own hyperparameters, all see the same batches, and layers below the lowest adapter are computed once.

    Args:
      key: typed PRNG key: of the order of the data, and of new adapters.
      model: where training starts.
      data: `Preferences`, `Labels` or `Demonstrations` of tokens; with their reference (`with_reference`) if the loss
        needs one.
      objective: makes an objective of a scoring function, for instance
        `partial(train.preference_objective, loss=losses.dpo_loss, beta=0.1)`.
      optimizer: makes an Optax optimizer, for instance `lambda: optax.adamw(1e-6)`.
      num_epochs: passes over the data.
      batch_size: rows per step; the last batch of an epoch may be short.
      lora: trains an adapter in place of the model's parameters.
      points: hyperparameters by name, each an array `[runs]`; `objective` and `optimizer` get those that they take.
        `seed` is that of a new adapter. Needs `lora`.
      mean: log-probabilities are means over tokens; the reference must be so, too.
      rows_at_once: computes batches in parts of so many rows, with the result of the whole batch (`train.in_chunks`).
      folder: for checkpoints and `metrics.jsonl`. The same call goes on where it was stopped, with the same result.
      steps_per_checkpoint: how often the state is kept.
      about: further options on which the result depends, as JSON can hold them: a run only goes on from checkpoints
        with the same ones. Data, model, batches, adapters, points and `mean` are always compared; the objective and
        the optimizer cannot be.
      preflight: stop if the first loss is not that of a policy that equals the reference, or if an array has no
        gradient in the first three steps, or does not change.
      report: called after every step.

    Raises:
      NonFiniteError: a loss or an update was NaN or infinite. With `points`, the other runs go on instead.
      UntrainedError: see `preflight`.
      ValueError: an argument is out of range, rows are longer than the model's context, or the folder belongs to
        another run.
    """
    checks.key(key)
    checks.size("steps_per_checkpoint", steps_per_checkpoint)
    check_rows(model.decoder.config, data)
    if points is not None and lora is None:
        raise ValueError("several runs in one program share the model: give lora, too")
    data = jax.tree.map(np.asarray, data)
    order_key, init_key = jax.random.split(key)
    mesh = mesh_of(model.params)
    sizes = sizes_of(data.prompts, data.responses)
    batches = shuffled(
        order_key,
        sizes,
        num_epochs=num_epochs,
        batch_size=batch_size,
        rows_at_once=rows_at_once,
        prices=prices_of(model.decoder.config),
        multiple=mesh.size if mesh else 1,
    )
    runs = _Runs(model.decoder, lora, objective, optimizer, _arrays(points), mean, rows_at_once, mesh)
    initial = on_mesh(runs.initial(init_key, model.params), mesh)
    state, base = on_mesh((runs.start(initial), model.params if lora else None), mesh)
    log = _Log(folder, _about(model, data, batches, runs, about) if folder else {})
    state = log.resume(state)
    for done in range(len(log.lines), len(batches)):
        rows, capacity = _rows(data, batches[done].rows), batches[done].capacity
        clock, compiled_before = time.perf_counter(), runs.compiling
        found = runs.evaluate(state, rows, base, capacity)
        if preflight and done == 0:
            runs.check_first_loss(found.loss, rows, _tolerance(model))
        state, metrics = runs.advance(state, found)
        del found  # or its gradient would be kept until the next one is there
        metrics = {name: np.asarray(value) for name, value in metrics.items()}
        compiling = runs.compiling - compiled_before
        seconds = time.perf_counter() - clock - compiling
        log.add(metrics)
        if points is None and not state.finite:
            raise train.NonFiniteError(done, len(batches) // num_epochs, state.params, log.history())
        if preflight and done + 1 == SEEN_AFTER:
            _check_training(state, initial)
        if folder and ((done + 1) % steps_per_checkpoint == 0 or done + 1 == len(batches)):
            log.save(state)
        if report:
            tokens = capacity.tokens * -(-len(batches[done].rows) // (rows_at_once or batch_size))
            report(Step(done + 1, len(batches), metrics, seconds, compiling, tokens, state.params))
    return Tuned(state.params, log.history())


@dataclass
class _Runs:
    """One run, or several stacked: how each starts, and makes a step.

    A step is two programs: one for the gradient, compiled for each shape of batches, and one for the optimizer.
    """

    decoder: Decoder
    lora: LoRA | None
    objective: MakeObjective
    optimizer: MakeOptimizer
    points: Mapping[str, Array] | None
    mean: bool
    rows_at_once: int | None
    mesh: Mesh | None
    compiling: float = 0.0
    """Seconds that compiling has taken so far."""

    @cached_property
    def _programs(self) -> dict[Any, Any]:
        return {}

    def initial(self, key: Key[Array, ""], params: Params) -> Params:
        """What is trained, at the start."""
        if self.lora is None:
            return params
        seeds = jnp.zeros((), jnp.int32) if self.points is None else self.points.get("seed", self._zeros)
        make = lambda seed: init_adapter(jax.random.fold_in(key, seed), self.decoder, self.lora)  # noqa: E731
        return make(seeds) if self.points is None else jax.vmap(make)(seeds)

    def start(self, initial: Params) -> train.TrainState:
        """The state before the first step, in memory of its own."""

        def one(params: Params, point: Mapping[str, Array]) -> train.TrainState:
            return train.init_state(
                params, objective=self._objective(_unknown, point), optimizer=self._optimizer(point)
            )

        start = jax.tree.map(jnp.copy, initial)
        return one(start, {}) if self.points is None else jax.vmap(one)(start, self.points)

    def evaluate(self, state: train.TrainState, batch: Any, base: Params | None, capacity: Capacity) -> train.Evaluated:
        """The loss of a batch and its gradient."""

        def one(
            params: Params, memory: Any, point: Mapping[str, Array], batch: Any, base: Params | None
        ) -> train.Evaluated:
            objective = self._objective(self._log_prob(base, capacity), point)
            return train.evaluate(params, memory, batch, objective=objective)

        placed = train.Evaluated(None, None, None, shardings(state.params))  # type: ignore[arg-type]
        over_runs = one if self.points is None else jax.vmap(one, (0, 0, 0, None, None))
        arguments = state.params, state.memory, self.points or {}, batch, base
        return self._run((capacity, len(batch.prompts)), over_runs, arguments, out_shardings=placed)

    def advance(self, state: train.TrainState, found: train.Evaluated) -> tuple[train.TrainState, Metrics]:
        """What the optimizer makes of a gradient."""

        def one(state: Any, found: train.Evaluated, point: Mapping[str, Array]) -> tuple[Any, Metrics]:
            state, metrics = train.advance(state, found, optimizer=self._optimizer(point))
            return state, {name: jnp.asarray(metric) for name, metric in metrics.items()}

        over_runs = one if self.points is None else jax.vmap(one)
        arguments = state, found, self.points or {}
        return self._run("advance", over_runs, arguments, donate_argnums=0, out_shardings=(shardings(state), None))

    def check_first_loss(self, found: Array, batch: Any, tolerance: float) -> None:
        """Compares the first loss with that of a policy that gives the reference's log-probabilities."""
        if getattr(batch, "reference_logps", None) is None:
            return

        def one(point: Mapping[str, Array], batch: Any) -> Array:
            return self._objective(as_given, point)(batch.reference_logps, batch)[0]

        over_runs = one if self.points is None else jax.vmap(one, (0, None))
        expected = np.asarray(jax.jit(over_runs)(self.points or {}, batch))
        if np.any(np.abs(found - expected) > tolerance * (1 + np.abs(expected))):  # what is not finite shows later
            raise UntrainedError(
                f"the first loss is {found}, but of a policy that equals the reference it is {expected}: the "
                "reference's log-probabilities are of another model, of other data, or sums where means are needed"
            )

    def _run(self, name: Any, function: Callable[..., Any], arguments: tuple[Any, ...], **options: Any) -> Any:
        """Runs a program, which is compiled when it is needed for the first time."""
        if name not in self._programs:
            clock = time.perf_counter()
            self._programs[name] = jax.jit(function, **options).lower(*arguments).compile()
            self.compiling += time.perf_counter() - clock
        return self._programs[name](*arguments)

    def _log_prob(self, base: Params | None, capacity: Capacity) -> LogProbFn:
        log_prob = log_prob_fn(self.decoder, capacity=capacity, mean=self.mean, mesh=self.mesh)
        log_prob = log_prob if self.rows_at_once is None else train.in_chunks(log_prob, self.rows_at_once)
        return log_prob if self.lora is None else adapted(log_prob, base, self.lora)

    def _objective(self, log_prob: LogProbFn, point: Mapping[str, Array]) -> Objective:
        names = set(point) - {"seed"} - (_named_by(self.optimizer) - _named_by(self.objective))
        return self.objective(log_prob, **{name: point[name] for name in sorted(names)})

    def _optimizer(self, point: Mapping[str, Array]) -> optax.GradientTransformation:
        names = _named_by(self.optimizer) & set(point)
        return optax.chain(_watch(), self.optimizer(**{name: point[name] for name in sorted(names)}))

    @property
    def _zeros(self) -> Array:
        return jnp.zeros(len(jax.tree.leaves(self.points)[0]), jnp.int32)


class _Log:
    """The history of a run, and its checkpoints: in memory, and in a folder if there is one."""

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any]):
        self.folder, self.about = None if folder is None else Path(folder), about
        self.lines: list[dict[str, np.ndarray]] = []

    def resume(self, state: Any) -> Any:
        """The state of the last checkpoint, if there is one; metrics behind it are dropped."""
        if self.folder is None:
            return state
        self.folder.mkdir(parents=True, exist_ok=True)
        found = load_checkpoint(self.folder, state, self.about)
        done, state = found if found else (0, state)
        known = self._path.read_text().splitlines()[:done] if self._path.exists() else []
        if len(known) < done:
            raise ValueError(
                f"{self._path} lacks steps before the last checkpoint: remove {self.folder} to start again"
            )
        self.lines = [
            {k: np.asarray(v, jnp.result_type(float)) for k, v in json.loads(line).items() if k != "step"}
            for line in known
        ]
        if is_first():
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in known))
            partial.replace(self._path)
        return state

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds the metrics of a step."""
        self.lines.append(metrics)
        if self.folder is not None and is_first():
            entry = {"step": len(self.lines), **{name: value.tolist() for name, value in metrics.items()}}
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def save(self, state: Any) -> None:
        """Keeps the state after the last step."""
        if self.folder is not None:
            save_checkpoint(self.folder, len(self.lines), state, self.about)

    def history(self) -> dict[str, np.ndarray]:
        """Each metric, its last axis that of steps."""
        names = self.lines[0] if self.lines else {}
        return {name: np.stack([line[name] for line in self.lines], axis=-1) for name in names}

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / "metrics.jsonl"


class _Watch(NamedTuple):
    """For each array, whether it has had a gradient."""

    seen: Bool[Array, " arrays"]


def _watch() -> optax.GradientTransformation:
    """Records which arrays have had a gradient, and changes nothing."""

    def init(params: Params) -> _Watch:
        return _Watch(jnp.zeros(len(jax.tree.leaves(params)), bool))

    def update(gradient: Any, state: _Watch, _: Params = None) -> tuple[Any, _Watch]:
        return gradient, _Watch(state.seen | jnp.stack([jnp.sum(leaf**2) > 0 for leaf in jax.tree.leaves(gradient)]))

    return optax.GradientTransformation(init, update)


def _tolerance(model: LanguageModel) -> float:
    """How far a first loss may be from what theory says: in few bits, log-probabilities of long responses differ."""
    dtype = model.decoder.dtype or jax.tree.leaves(model.params)[0].dtype
    return 1e-3 if jnp.finfo(dtype).bits >= 32 else 0.25


def _check_training(state: train.TrainState, initial: Params) -> None:
    """Whether each trained array has had a gradient and has changed."""
    if not np.any(state.finite):
        return
    where = jax.tree.flatten_with_path(state.params)[0]
    finite = np.asarray(state.finite).reshape(-1)
    seen = np.asarray(state.opt_state[0].seen).reshape(-1, len(where))[finite].all(axis=0)
    moved = [jnp.any(a != b) for a, b in zip(jax.tree.leaves(initial), (x for _, x in where), strict=True)]
    tests: list[tuple[str, Any]] = [("had no gradient", seen), ("did not change", moved)]
    for what, fine in tests:
        if wrong := [jax.tree_util.keystr(path) for (path, _), good in zip(where, fine, strict=True) if not good]:
            raise UntrainedError(
                f"in the first steps, {len(wrong)} of {len(where)} trained arrays {what}, such as {wrong[0]}: the "
                "learning rate is 0 or too small for the dtype of the parameters, or the loss does not depend on them"
            )


def _rows(data: Any, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), data)


def _arrays(points: Mapping[str, Any] | None) -> dict[str, Array] | None:
    """Hyperparameters as arrays of one length."""
    if points is None:
        return None
    arrays = {name: jnp.asarray(values) for name, values in points.items()}
    lengths = {name: jnp.shape(array) for name, array in arrays.items()}
    if (
        not arrays
        or len({*lengths.values()}) > 1
        or any(len(shape) != 1 or shape == (0,) for shape in lengths.values())
    ):
        raise ValueError(f"points must be arrays [runs] of one length, got {lengths}")
    return arrays


def _named_by(function: Callable[..., Any]) -> set[str]:
    """The arguments that a function names."""
    return set(inspect.signature(function).parameters)


def _about(
    model: LanguageModel, data: Any, batches: Any, runs: _Runs, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What results depend on."""
    json.dumps(about or {})  # or the first checkpoint would fail
    return {
        **(about or {}),
        "model": fingerprint((repr(model.decoder), model.params)),
        "data": fingerprint(data),
        "batches": fingerprint([batch.rows for batch in batches]),
        "steps": len(batches),
        "lora": repr(runs.lora),
        "mean": runs.mean,
        "points": {name: np.asarray(values).tolist() for name, values in (runs.points or {}).items()},
    }


def _unknown(*_: Any) -> Any:
    """Stands for scores that are not needed."""
    raise AssertionError
