"""Programs: `prepare` and `run`, traced once, stacked over seeds and points, compiled.

What a seed's runs start from is made by `prepare`, in a program of its own, once for each seed; `run` takes it from
there, in one program for each combination of static values.
"""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree, UInt32

from dpo_jax.fast.compiling import compile_fast
from dpo_jax.sweep.axes import name_run
from dpo_jax.sweep.stopping import result_of

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


class Struct(NamedTuple):
    """The structure of a pytree of arrays, and the shape and dtype of each; it can be hashed.

    Attributes:
      tree: the structure.
      leaves: shape and dtype of each leaf.
    """

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, values: PyTree) -> "Struct":
        """The structure of arrays, or of anything that has shapes and dtypes."""
        leaves, tree = jax.tree.flatten(values)
        return cls(tree, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves))

    def stacked(self, *axes: int) -> list[jax.ShapeDtypeStruct]:
        """Its leaves with further leading axes."""
        return [jax.ShapeDtypeStruct((*axes, *shape), dtype) for shape, dtype in self.leaves]

    @property
    def example(self) -> PyTree:
        """A pytree of this structure, of shapes and dtypes."""
        return jax.tree.unflatten(self.tree, self.stacked())


@dataclass(eq=False)
class TracedPrepare:
    """What makes the start of a seed from its key.

    Attributes:
      jaxpr: from a key to the leaves of the start.
      start: their structure.
    """

    jaxpr: ClosedJaxpr
    start: Struct
    programs: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Tells one program from another."""
        return fingerprint(self.jaxpr)

    def lower(
        self, shape: BlockShape, devices: Sequence[jax.Device], platforms: tuple[str, ...] | None = None
    ) -> jax.stages.Lowered:
        """The program `(key, seeds) -> leaves` that makes the starts of a block on each device; see `TracedRun`."""

        def block(key: Key[Array, ""], seeds: Seeds) -> list[Array]:
            return jax.vmap(lambda seed: jaxpr_as_fun(self.jaxpr)(jax.random.fold_in(key, seed)))(seeds)

        key = jax.ShapeDtypeStruct((), self.jaxpr.in_avals[0].dtype)
        seeds = jax.ShapeDtypeStruct((len(devices) * shape.seeds,), jnp.uint32)
        return _split_over(devices, block, (WHOLE, SPLIT)).trace(key, seeds).lower(lowering_platforms=platforms)


@dataclass(eq=False)
class TracedRun:
    """`run` for one combination of static values.

    Attributes:
      jaxpr: from the leaves of a start and of one value of each traced axis to the results.
      outputs: the shape and dtype of each result, by name.
      start, point: the structure of its arguments.
      combination: the static values.
    """

    jaxpr: ClosedJaxpr
    outputs: dict[str, jax.ShapeDtypeStruct]
    start: Struct
    point: Struct
    combination: dict[str, Any]
    programs: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)

    @property
    def traced(self) -> list[str]:
        """Names of the traced axes."""
        return list(self.point.example)

    def lower(
        self, shape: BlockShape, devices: Sequence[jax.Device], platforms: tuple[str, ...] | None = None
    ) -> jax.stages.Lowered:
        """The program `(starts, points) -> results` that makes a block of runs on each device.

        Its arguments are the leaves of starts, `[devices * shape.seeds]`, and of points, `[shape.points]`. Its results
        have axes (seed, point) before their own. It is lowered for the platform of the devices unless others are named.
        """

        def one(start: list[Array], point: list[Array]) -> dict[str, Array]:
            results = jaxpr_as_fun(self.jaxpr)(*start, *point)
            outputs = zip(self.outputs.items(), results, strict=True)
            return {name: jnp.asarray(result, output.dtype) for (name, output), result in outputs}

        def block(starts: list[Array], points: list[Array]) -> dict[str, Array]:
            if shape.points == 1:  # products of arrays with one axis of runs are faster than with two
                results = jax.vmap(one, in_axes=(0, None), axis_size=shape.seeds)(starts, [leaf[0] for leaf in points])
                return {name: result[:, None] for name, result in results.items()}
            over_points = jax.vmap(one, in_axes=(None, 0), axis_size=shape.points)
            return jax.vmap(over_points, in_axes=(0, None), axis_size=shape.seeds)(starts, points)

        arguments = self.start.stacked(len(devices) * shape.seeds), self.point.stacked(shape.points)
        return _split_over(devices, block, (SPLIT, WHOLE)).trace(*arguments).lower(lowering_platforms=platforms)

    @cached_property
    def fingerprint(self) -> str:
        """Tells one program from another."""
        return fingerprint(self.jaxpr)


class Programs(NamedTuple):
    """What a sweep runs.

    Attributes:
      prepare: makes starts, unless they are given.
      runs: the program of each combination of static values.
    """

    prepare: jax.stages.Compiled | None
    runs: list[jax.stages.Compiled]

    @property
    def memory(self) -> int:
        """Bytes that the largest program takes on each device."""
        return max(bytes_needed(program) for program in (self.prepare, *self.runs) if program)


def trace_prepare(prepare: Callable[[Key[Array, ""]], PyTree] | None, key: Key[Array, ""]) -> TracedPrepare:
    """Traces `prepare`, or the function that returns the key if there is none."""
    return _remembered(_trace_prepare, prepare or _the_key, jax.random.key_impl(key))


def trace_run(run: Callable[..., Any], start: Struct, point: Struct, combination: dict[str, Any]) -> TracedRun:
    """Traces `run` for one combination of static values, once for each function and structure of arguments.

    Raises:
      TypeError: a result is not an array of numbers, or there are none.
      ValueError: two results have the same name.
    """
    told_apart = tuple((name, type(value), repr(value), value) for name, value in combination.items())  # 1 == True
    return _remembered(_trace_run, run, start, point, told_apart)


def compile_all(
    prepare: TracedPrepare | None, runs: Sequence[TracedRun], shape: BlockShape, devices: Sequence[jax.Device]
) -> Programs:
    """Compiles what a sweep runs, as many programs at a time as there are cores; what is compiled already is kept."""
    place = shape, tuple(devices)
    todo = [each for each in (prepare, *runs) if each is not None]
    with interruptible_threads(os.cpu_count()) as compilers:
        started = {}
        for each in todo:
            if place not in each.programs:
                with naming(each.combination, each.traced) if isinstance(each, TracedRun) else nullcontext():
                    started[id(each)] = compilers.submit(compile_fast, each.lower(shape, devices))
        for each in todo:
            if id(each) in started:
                each.programs[place] = result_of(started[id(each)])
    return Programs(prepare.programs[place] if prepare else None, [run.programs[place] for run in runs])


@contextmanager
def naming(combination: dict[str, Any], traced: Sequence[str]) -> Iterator[None]:
    """Adds to an error of `run` for which combination of static values it was traced."""
    try:
        yield
    except Exception as problem:
        name_run(problem, combination, dict.fromkeys(traced, "any"))
        raise


@contextmanager
def interruptible_threads(num_threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads for work that the main thread waits for by `result_of`, so that Ctrl-C reaches it meanwhile.

    After an error no more work is started, and running work is not waited for until the process ends: XLA can cancel
    neither a compilation nor a program.
    """
    executor = ThreadPoolExecutor(num_threads)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def fingerprint(program: ClosedJaxpr) -> str:
    """Tells one program from another: a hash of all that it does, constants included."""
    arguments = [jax.ShapeDtypeStruct(argument.shape, argument.dtype) for argument in program.in_avals]
    lowered = jax.jit(jaxpr_as_fun(program)).lower(*arguments)
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def bytes_needed(program: jax.stages.Compiled) -> int:
    """How much memory a program takes on each device while it runs, and its last results wait to be fetched."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    return int(memory.temp_size_in_bytes + memory.argument_size_in_bytes + 2 * memory.output_size_in_bytes)


def place(leaves: Sequence[Any], devices: Sequence[jax.Device]) -> list[Array]:
    """Arrays whose leading axis, of seeds, is split over devices."""
    return jax.device_put(list(leaves), NamedSharding(Mesh(np.array(devices), ("seeds",)), SPLIT))


def joined(parts: Sequence[Array]) -> np.ndarray | Array:
    """Arrays one after another, on the host; typed keys stay where they are."""
    return jnp.concatenate(parts) if is_key(parts[0].dtype) else np.concatenate([np.asarray(part) for part in parts])


def is_key(dtype: Any) -> bool:
    """Whether these are typed keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _remembered(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of these arguments returned last time, if they can be told from others (as `jax.jit` does)."""
    flags = jax.config.read("jax_enable_x64")
    try:
        hash(args)
    except TypeError:
        return function(*args)
    return _cached(function, flags, *args)


@lru_cache(maxsize=256)
def _cached(function: Callable[..., Any], _: bool, *args: Any) -> Any:
    return function(*args)


def _the_key(key: Key[Array, ""]) -> Key[Array, ""]:
    return key


def _trace_prepare(prepare: Callable[[Key[Array, ""]], PyTree], implementation: Any) -> TracedPrepare:
    key = jax.eval_shape(lambda: jax.random.key(0, impl=implementation))
    jaxpr, start = jax.make_jaxpr(lambda key: jax.tree.map(jnp.asarray, prepare(key)), return_shape=True)(key)
    return TracedPrepare(jaxpr, Struct.of(start))


def _trace_run(run: Callable[..., Any], start: Struct, point: Struct, combination: tuple[Any, ...]) -> TracedRun:
    def flat(start: PyTree, point: dict[str, PyTree]) -> dict[str, Array]:
        results = run(start, **{name: value for name, *_, value in combination}, **point)
        leaves = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(results, _is_array_like)]
        if len(dict(leaves)) < len(leaves):
            raise ValueError(f"two of run's results have the same name: {sorted(name for name, _ in leaves)}")
        return {name: jnp.asarray(leaf) for name, leaf in leaves}

    jaxpr, outputs = jax.make_jaxpr(flat, return_shape=True)(start.example, point.example)
    if not outputs:
        raise TypeError("run returned nothing")
    for name, output in outputs.items():
        if jnp.issubdtype(output.dtype, jax.dtypes.extended):
            raise TypeError(f"result {name!r} is a {output.dtype}; return numbers (jax.random.key_data for a key)")
        if np.dtype(output.dtype).kind == "V":
            raise TypeError(f"result {name!r} is a {output.dtype}, which files of arrays do not know; return float32")
    names = sorted(outputs)  # as a dictionary's leaves are
    shapes = {name: jax.ShapeDtypeStruct(outputs[name].shape, outputs[name].dtype) for name in names}
    return TracedRun(jaxpr, shapes, start, point, {name: value for name, *_, value in combination})


def _split_over(devices: Sequence[jax.Device], block: Callable[..., Any], arguments: tuple[PartitionSpec, ...]) -> Any:
    """A function whose seeds are split over devices, each of which makes a block."""
    mesh = Mesh(np.array(devices), ("seeds",))
    return jax.jit(jax.shard_map(block, mesh=mesh, in_specs=arguments, out_specs=SPLIT, check_vma=False))


def _is_array_like(value: Any) -> bool:
    """Whether a value turns itself into an array, as a `types.Ratio` does."""
    return hasattr(value, "__jax_array__")


def _name(path: tuple[Any, ...]) -> str:
    """A result's name: its place in what `run` returned, joined by dots."""
    parts = [str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry)))) for entry in path]
    return ".".join(parts) or "result"
