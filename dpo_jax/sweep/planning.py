"""What a sweep will do, before any of it is done: programs, blocks, memory, time."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.sweep.axes import Axes, read_axes
from dpo_jax.sweep.programs import (
    BlockShape,
    TracedRun,
    bytes_needed,
    compile_fast,
    fingerprint,
    lower,
    lower_common,
    share_work,
    trace,
)
from dpo_jax.sweep.store import FORMAT, Block

RUNS_AT_ONCE = {"cpu": 128}
"""How many runs a device makes at once, if memory allows: on a CPU, what its caches hold."""

RUNS_AT_ONCE_ON_ACCELERATORS = 16384


@dataclass(frozen=True)
class Plan:
    """What there is to do, before any of it is done.

    Attributes:
      axes: what is varied.
      key: the base key; seed `i` has `jax.random.fold_in(key, i)`.
      num_seeds: seeds for each point.
      runs: `run`, traced, for each combination of discrete values.
      shape: how many runs a device makes at once.
      devices: the devices of this process.
      first: the compiled program of the first combination.
      common: the compiled program of what all runs do with the key alone, if there is any such thing.
    """

    axes: Axes
    key: Key[Array, ""]
    num_seeds: int
    runs: list[TracedRun]
    shape: BlockShape
    devices: Sequence[jax.Device]
    first: jax.stages.Compiled = field(repr=False)
    common: jax.stages.Compiled | None = field(repr=False)

    def program(self, combination: int) -> jax.stages.Compiled:
        """The compiled program of a combination of discrete values."""
        return self.first if combination == 0 else compile_fast(lower(self.runs[combination], self.shape, self.devices))

    def values(self, seeds: np.ndarray) -> list[Array]:
        """What the runs of some seeds share."""
        return self.common(self.key, seeds) if self.common else []

    def seeds(self, firsts: Sequence[int]) -> np.ndarray:
        """The seeds that devices take, from the first one of each; those without one of their own repeat the last's."""
        firsts = [*firsts, *[firsts[-1]] * (len(self.devices) - len(firsts))]
        return np.concatenate([np.arange(first, first + self.shape.seeds, dtype=np.uint32) for first in firsts])

    def points(self, which: slice) -> dict[str, np.ndarray]:
        """The traced values of a block; the last point fills it up."""
        missing = (0, self.shape.points - (which.stop - which.start))
        dtype = jnp.result_type(float)
        return {name: np.pad(values[which].astype(dtype), missing, "edge") for name, values in self.axes.points.items()}

    @property
    def memory(self) -> int:
        """Bytes that programs take on each device."""
        return _memory(self.first, self.common)

    def estimated_seconds(self) -> float:
        """Makes a block on each device, twice, and tells how long the whole grid takes if every block takes as long."""
        seeds, points = self.seeds([0]), self.points(slice(0, self.shape.points))
        num_slices = math.ceil(self.num_seeds / self.shape.seeds)
        num_rounds = math.ceil(num_slices / (len(self.devices) * jax.process_count()))
        blocks_each = len(self.blocks()) // num_slices
        for _ in range(2):
            start = time.perf_counter()
            values = jax.block_until_ready(self.values(seeds))
            shared = time.perf_counter()
            jax.block_until_ready(self.first(values, self.key, seeds, points))
            seconds = shared - start, time.perf_counter() - shared
        return num_rounds * (seconds[0] + blocks_each * seconds[1])

    @property
    def num_runs(self) -> int:
        """How many runs the grid has."""
        return len(self.runs) * self.axes.num_points * self.num_seeds

    @property
    def result_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape, with axes (combination, point, seed) first, and dtype of each result."""
        grid = (len(self.runs), self.axes.num_points, self.num_seeds)
        return {name: ((*grid, *result.shape), np.dtype(result.dtype)) for name, result in self.runs[0].outputs.items()}

    @property
    def result_bytes(self) -> int:
        """How much space all results take."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.result_shapes.values())

    def blocks(self) -> list[Block]:
        """The whole grid, in the order in which it is computed."""
        product = itertools.product(
            _slices(self.num_seeds, self.shape.seeds),
            range(len(self.runs)),
            _slices(self.axes.num_points, self.shape.points),
        )
        return [
            Block(number, combination, points, seeds) for number, (seeds, combination, points) in enumerate(product)
        ]

    def manifest(self) -> dict[str, Any]:
        """What decides the results, to the last bit."""
        device = self.devices[0]
        return {
            "format": FORMAT,
            "versions": {package: version(package) for package in ("dpo_jax", "jax", "jaxlib")},
            "device": f"{device.platform} ({device.device_kind})",
            "key": [str(jax.random.key_impl(self.key)), *np.asarray(jax.random.key_data(self.key)).tolist()],
            "num_seeds": self.num_seeds,
            "axes": self.axes.labels,
            "order of axes": list(self.axes.names),
            "runs_at_once": self.shape._asdict(),
            "results": {
                name: {"shape": list(shape), "dtype": dtype.str} for name, (shape, dtype) in self.result_shapes.items()
            },
            "programs": [fingerprint(run.jaxpr) for run in self.runs],
        }


def plan(
    run: Callable[..., Any],
    key: Key[Array, ""],
    *,
    num_seeds: int,
    runs_at_once: int | BlockShape | None = None,
    memory_limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    **axes: Iterable[Any],
) -> Plan:
    """What `grid` would do: how many runs, programs and bytes. See `grid` for arguments and errors."""
    checks.key(key)
    checks.size("num_seeds", num_seeds)
    if memory_limit is not None:
        checks.size("memory_limit", memory_limit)
    if runs_at_once is not None and not isinstance(runs_at_once, BlockShape):
        checks.size("runs_at_once", runs_at_once)
        runs_at_once = int(runs_at_once)
    num_seeds = int(num_seeds)
    read = read_axes(run, axes)
    devices = list(jax.local_devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices names none")
    runs = [trace(run, key, tuple(read.traced), combination) for combination in read.combinations]
    _check_same_results(read, runs)
    if len(runs) * read.num_points > 1:
        runs = share_work(runs)
    shape, first, common = _block_shape(read, runs[0], num_seeds, runs_at_once, memory_limit, devices)
    return Plan(read, key, num_seeds, runs, shape, devices, first, common)


def _block_shape(
    axes: Axes,
    run: TracedRun,
    num_seeds: int,
    runs_at_once: int | BlockShape | None,
    memory_limit: int | None,
    devices: Sequence[jax.Device],
) -> tuple[BlockShape, jax.stages.Compiled, jax.stages.Compiled | None]:
    """The largest block that is wanted and fits into memory, its program, and that of what runs share."""

    def compiled(shape: BlockShape) -> tuple[jax.stages.Compiled, jax.stages.Compiled | None]:
        common = compile_fast(lower_common(run, shape, devices)) if run.common else None
        return compile_fast(lower(run, shape, devices)), common

    if isinstance(runs_at_once, BlockShape):
        return runs_at_once, *compiled(runs_at_once)
    limit = memory_limit or free_memory(devices)
    num_runs = runs_at_once or RUNS_AT_ONCE.get(devices[0].platform, RUNS_AT_ONCE_ON_ACCELERATORS)
    seeds_each = math.ceil(num_seeds / (len(devices) * jax.process_count()))
    while True:
        points = min(axes.num_points, num_runs)
        shape = BlockShape(max(1, min(num_runs // points, seeds_each)), points)
        programs = compiled(shape)
        needed = _memory(*programs)
        if needed <= limit:
            return shape, *programs
        if shape == (1, 1):
            raise ValueError(f"one run takes {needed:,} bytes of memory on each device, and only {limit:,} may be used")
        num_runs = max(1, min(shape.seeds * shape.points // 2, int(0.9 * shape.seeds * shape.points * limit / needed)))


def _memory(first: jax.stages.Compiled, common: jax.stages.Compiled | None) -> int:
    return max(bytes_needed(program) for program in (first, common) if program)


def free_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that a sweep may take on each device: most of what is free."""
    statistics = devices[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(0.9 * (statistics["bytes_limit"] - statistics["bytes_in_use"]))
    return _free_host_memory() // (2 * len(devices))


def _free_host_memory() -> int:
    return int(psutil.virtual_memory().available)


def check_fits(work: Plan, memory_limit: int | None) -> None:
    """Raises ValueError if the results would not fit into this machine's memory."""
    limit = memory_limit or _free_host_memory()
    if work.result_bytes > limit:
        raise ValueError(
            f"the results take {work.result_bytes:,} bytes of memory, and only {limit:,} may be used: let run return "
            "less, or give a folder for them (out)"
        )


def _check_same_results(axes: Axes, runs: list[TracedRun]) -> None:
    for combination, run in zip(axes.combinations, runs, strict=True):
        if run.outputs != runs[0].outputs:
            names = sorted({**run.outputs, **runs[0].outputs})
            differing = [name for name in names if run.outputs.get(name) != runs[0].outputs.get(name)]
            raise ValueError(f"run's results {differing} differ between {combination} and {axes.combinations[0]}")


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
