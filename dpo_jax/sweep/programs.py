"""Programs: `run`, traced once for each combination of discrete values, stacked over points and seeds, compiled."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Key, UInt32


class BlockShape(NamedTuple):
    """How many runs a device makes at once.

    Attributes:
      seeds: how many seeds.
      points: how many combinations of traced values, for each seed.
    """

    seeds: int
    points: int


@dataclass(frozen=True, eq=False)
class TracedRun:
    """`run` for one combination of discrete values.

    Attributes:
      jaxpr: what it does to a key and one value of each traced axis.
      outputs: the shape and dtype of each result, by name.
      traced: names of the traced axes.
    """

    jaxpr: ClosedJaxpr
    outputs: dict[str, jax.ShapeDtypeStruct]
    traced: tuple[str, ...]

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """The dtype of its key."""
        return jax.ShapeDtypeStruct((), self.jaxpr.in_avals[0].dtype)

    def points(self, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays of points."""
        return {name: jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for name in self.traced}

    def __call__(self, key: Key[Array, ""], point: dict[str, Float[Array, ""]]) -> dict[str, Array]:
        results = jaxpr_as_fun(self.jaxpr)(key, *(point[name] for name in self.traced))
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
    return TracedRun(jaxpr, shapes, tuple(traced))


def lower(run: TracedRun, shape: BlockShape, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """The program `(key, seeds, points) -> results` that makes a block of runs on each device.

    Its arguments are the base key; numbers of seeds, `[devices * shape.seeds]`; and traced values, each
    `[shape.points]`. Its results have axes (seed, point) before their own.
    """
    mesh = Mesh(np.array(devices), ("seeds",))
    over_points = jax.vmap(run, in_axes=(None, 0), axis_size=shape.points)

    def block(key: Key[Array, ""], seeds: UInt32[Array, " seeds"], points: dict[str, Array]) -> dict[str, Array]:
        return jax.vmap(lambda seed: over_points(jax.random.fold_in(key, seed), points))(seeds)

    split, whole = PartitionSpec("seeds"), PartitionSpec()
    program = jax.shard_map(block, mesh=mesh, in_specs=(whole, split, whole), out_specs=split, check_vma=False)
    seeds = jax.ShapeDtypeStruct((len(devices) * shape.seeds,), jnp.uint32)
    return jax.jit(program).lower(run.key, seeds, run.points(shape.points))


def fingerprint(run: TracedRun) -> str:
    """Tells one program from another: a hash of all that it does to one key and one point, constants included."""
    lowered = jax.jit(run).lower(run.key, run.points())
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
    """How much memory a program takes on each device while it runs."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    return int(memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)


def _name(path: tuple[Any, ...]) -> str:
    """A result's name: its place in what `run` returned, joined by dots."""
    parts = [str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry)))) for entry in path]
    return ".".join(parts) or "result"
