"""Programs: `run`, traced once for each combination of discrete values, stacked over points and seeds, compiled."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Key, UInt32

from dpo_jax.sweep.axes import name_run
from dpo_jax.sweep.sharing import share

SPLIT, WHOLE = PartitionSpec("seeds"), PartitionSpec()

Seeds = UInt32[Array, " seeds"]


class BlockShape(NamedTuple):
    """How many runs a device makes at once.

    Attributes:
      seeds: how many seeds.
      points: how many combinations of traced values, for each seed.
    """

    seeds: int
    points: int


class Programs(NamedTuple):
    """What a sweep runs.

    Attributes:
      runs: the program of each combination of discrete values (see `lower`).
      common: the program of what all runs do with the key alone (see `lower_common`), if there is any such thing.
      seconds: how long it took to lower and compile them.
    """

    runs: list[jax.stages.Compiled]
    common: jax.stages.Compiled | None
    seconds: float


@dataclass(frozen=True, eq=False)
class TracedRun:
    """`run` for one combination of discrete values.

    Attributes:
      jaxpr: what it does to a key and one value of each traced axis.
      outputs: the shape and dtype of each result, by name.
      traced: names of the traced axes.
      discrete: the discrete values.
      rest: what is left to do with the values that `common` made; the whole, with no such values, if nothing is shared.
      common: what all runs of a grid do with the key alone, each of them the same.
    """

    jaxpr: ClosedJaxpr
    outputs: dict[str, jax.ShapeDtypeStruct]
    traced: tuple[str, ...]
    discrete: dict[str, Any]
    rest: ClosedJaxpr
    common: ClosedJaxpr | None = None

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """The dtype of its key."""
        return jax.ShapeDtypeStruct((), self.jaxpr.in_avals[0].dtype)

    def points(self, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays of points."""
        return {name: jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for name in self.traced}

    def values(self, *shape: int) -> list[jax.ShapeDtypeStruct]:
        """Arrays of what `common` makes."""
        values = self.common.out_avals if self.common else []
        return [jax.ShapeDtypeStruct((*shape, *value.shape), value.dtype) for value in values]

    def __call__(
        self, values: list[Array], key: Key[Array, ""], point: dict[str, Float[Array, ""]]
    ) -> dict[str, Array]:
        results = jaxpr_as_fun(self.rest)(*values, key, *(point[name] for name in self.traced))
        outputs = zip(self.outputs.items(), results, strict=True)
        return {name: jnp.asarray(result, output.dtype) for (name, output), result in outputs}


def trace(run: Callable[..., Any], key: Key[Array, ""], traced: Sequence[str], discrete: dict[str, Any]) -> TracedRun:
    """Traces `run`, once.

    Raises:
      TypeError: a result is not an array of numbers, or there are none.
      ValueError: two results have the same name.
    """

    def flat(key: Key[Array, ""], *values: Array) -> dict[str, Array]:
        results = run(key, **discrete, **dict(zip(traced, values, strict=True)))
        leaves = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(results)]
        if len(dict(leaves)) < len(leaves):
            raise ValueError(f"two of run's results have the same name: {sorted(name for name, _ in leaves)}")
        return {name: jnp.asarray(leaf) for name, leaf in leaves}

    number = jax.ShapeDtypeStruct((), jnp.result_type(float))
    jaxpr, outputs = jax.make_jaxpr(flat, return_shape=True)(key, *[number] * len(traced))
    if not outputs:
        raise TypeError("run returned nothing")
    for name, output in outputs.items():
        if jnp.issubdtype(output.dtype, jax.dtypes.extended):
            raise TypeError(f"result {name!r} is a {output.dtype}; return numbers (jax.random.key_data for a key)")
        if np.dtype(output.dtype).kind == "V":
            raise TypeError(f"result {name!r} is a {output.dtype}, which files of arrays do not know; return float32")
    names = sorted(outputs)  # as a dictionary's leaves are
    shapes = {name: jax.ShapeDtypeStruct(outputs[name].shape, outputs[name].dtype) for name in names}
    return TracedRun(jaxpr, shapes, tuple(traced), discrete, rest=jaxpr)


def share_work(runs: Sequence[TracedRun]) -> list[TracedRun]:
    """The same runs, which leave to a program of its own what all of them do with the key alone."""
    commons, rests = share([run.jaxpr for run in runs])
    if not commons[0].jaxpr.outvars or len(set(map(fingerprint, commons))) > 1:
        return list(runs)
    return [replace(run, common=commons[0], rest=rest) for run, rest in zip(runs, rests, strict=True)]


def compile_all(runs: Sequence[TracedRun], shape: BlockShape, devices: Sequence[jax.Device]) -> Programs:
    """Compiles what a sweep runs, as many programs at a time as there are cores."""
    start = time.perf_counter()
    with impatient(os.cpu_count()) as compilers:
        commons = [compilers.submit(compile_fast, lower_common(run, shape, devices)) for run in runs[:1] if run.common]
        programs = []
        for run in runs:
            with naming(run.discrete, run.traced):
                programs.append(compilers.submit(compile_fast, lower(run, shape, devices)))
        compiled = [program.result() for program in programs]
        common = commons[0].result() if commons else None
    return Programs(compiled, common, time.perf_counter() - start)


@contextmanager
def naming(discrete: dict[str, Any], traced: Sequence[str]) -> Iterator[None]:
    """Adds to an error of `run` for which combination of discrete values it was traced."""
    try:
        yield
    except Exception as problem:
        name_run(problem, discrete, dict.fromkeys(traced, "any"))
        raise


@contextmanager
def impatient(num_threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads to wait for: a Ctrl-C reaches the main thread while they work.

    After an error nothing more is begun and nobody waits for what has begun, but the end of the process does: what XLA
    compiles or runs cannot be cancelled.
    """
    executor = ThreadPoolExecutor(num_threads)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def lower(
    run: TracedRun, shape: BlockShape, devices: Sequence[jax.Device], platforms: tuple[str, ...] | None = None
) -> jax.stages.Lowered:
    """The program `(values, key, seeds, points) -> results` that makes a block of runs on each device.

    Its arguments are what the program of `lower_common` made; the base key; numbers of seeds,
    `[devices * shape.seeds]`; and traced values, each `[shape.points]`. Its results have axes (seed, point) before
    their own. It is lowered for the platform of the devices unless others are named.
    """
    over_points = jax.vmap(run, in_axes=(None, None, 0), axis_size=shape.points)

    def block(values: list[Array], key: Key[Array, ""], seeds: Seeds, points: dict[str, Array]) -> dict[str, Array]:
        over_seeds = jax.vmap(lambda values, seed: over_points(values, jax.random.fold_in(key, seed), points))
        return over_seeds(values, seeds)

    num_seeds = len(devices) * shape.seeds
    arguments = run.values(num_seeds), run.key, jax.ShapeDtypeStruct((num_seeds,), jnp.uint32), run.points(shape.points)
    traced = _split_over(devices, block, (SPLIT, WHOLE, SPLIT, WHOLE)).trace(*arguments)
    return traced.lower(lowering_platforms=platforms)


def lower_common(
    run: TracedRun, shape: BlockShape, devices: Sequence[jax.Device], platforms: tuple[str, ...] | None = None
) -> jax.stages.Lowered:
    """The program `(key, seeds) -> values` that makes what the runs of a block share; see `lower`."""

    def block(key: Key[Array, ""], seeds: Seeds) -> list[Array]:
        return jax.vmap(lambda seed: jaxpr_as_fun(run.common)(jax.random.fold_in(key, seed)))(seeds)

    seeds = jax.ShapeDtypeStruct((len(devices) * shape.seeds,), jnp.uint32)
    traced = _split_over(devices, block, (WHOLE, SPLIT)).trace(run.key, seeds)
    return traced.lower(lowering_platforms=platforms)


def fingerprint(program: ClosedJaxpr) -> str:
    """Tells one program from another: a hash of all that it does, constants included."""
    arguments = [jax.ShapeDtypeStruct(argument.shape, argument.dtype) for argument in program.in_avals]
    lowered = jax.jit(jaxpr_as_fun(program)).lower(*arguments)
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def compile_fast(lowered: jax.stages.Lowered, *, optimise: bool = True) -> jax.stages.Compiled:
    """Compiles; on a CPU, for its widest vectors, and without the optimisations that only cost time here.

    Args:
      lowered: the program.
      optimise: whether XLA shall spend time on fast code. A program that runs for milliseconds is not worth it.
    """
    if jax.default_backend() != "cpu":
        return lowered.compile()
    quick: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    usual: dict[str, str | bool] = {"xla_backend_optimization_level": "1", "xla_cpu_prefer_vector_width": "512"}
    try:
        return lowered.compile(compiler_options=usual if optimise else quick)
    except jax.errors.JaxRuntimeError:  # another version of XLA, which does not know these options
        return lowered.compile()


def bytes_needed(program: jax.stages.Compiled) -> int:
    """How much memory a program takes on each device while it runs, and its last results wait to be fetched."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    return int(memory.temp_size_in_bytes + memory.argument_size_in_bytes + 2 * memory.output_size_in_bytes)


def _split_over(devices: Sequence[jax.Device], block: Callable[..., Any], arguments: tuple[PartitionSpec, ...]) -> Any:
    """A function whose seeds are split over devices, each of which makes a block."""
    mesh = Mesh(np.array(devices), ("seeds",))
    return jax.jit(jax.shard_map(block, mesh=mesh, in_specs=arguments, out_specs=SPLIT, check_vma=False))


def _name(path: tuple[Any, ...]) -> str:
    """A result's name: its place in what `run` returned, joined by dots."""
    parts = [str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry)))) for entry in path]
    return ".".join(parts) or "result"
