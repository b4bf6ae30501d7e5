"""`grid`: a pure function over a product of axes and seeds, as few programs as there are discrete values."""

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.sweep.axes import Axes, read_axes
from dpo_jax.sweep.processes import barrier
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
from dpo_jax.sweep.store import FORMAT, Block, DamagedStoreError, Folder, Memory, Store, locked, read_manifest

if TYPE_CHECKING:
    import xarray

RUNS_AT_ONCE = {"cpu": 128}
"""How many runs a device makes at once, if memory allows: on a CPU, what its caches hold."""

RUNS_AT_ONCE_ON_ACCELERATORS = 16384


class Progress(NamedTuple):
    """How far a sweep is.

    Attributes:
      done: runs that are complete, those of an earlier start among them.
      total: runs of the whole share of this process.
      resumed: runs that were complete at the start.
      compile_seconds: time spent waiting for the compiler.
      run_seconds: time spent running programs and storing results.
    """

    done: int
    total: int
    resumed: int
    compile_seconds: float
    run_seconds: float


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

    @property
    def memory(self) -> int:
        """Bytes that programs take on each device."""
        return _memory(self.first, self.common)

    def estimated_seconds(self) -> float:
        """Makes a block on each device, twice, and tells how long the whole grid takes if every block takes as long."""
        seeds, points = _seeds(self, [0]), _points(self, slice(0, self.shape.points))
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
    runs_at_once: int | None = None,
    memory_limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    **axes: Iterable[Any],
) -> Plan:
    """What `grid` would do: how many runs, programs and bytes. See `grid` for arguments and errors."""
    return _plan(run, key, axes, num_seeds, runs_at_once, memory_limit, devices)


def grid(
    run: Callable[..., Any],
    key: Key[Array, ""],
    *,
    num_seeds: int,
    dims: Mapping[str, Sequence[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    runs_at_once: int | None = None,
    memory_limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    report: Callable[[Progress], None] | None = None,
    **axes: Iterable[Any],
) -> "xarray.Dataset":
    """Maps a pure function over a product of axes and seeds.

    Every point of the grid sees the same seeds (common random numbers), so differences between points are paired. Axes
    of floats are traced: one program serves all their values. Any other axis is discrete (names, sizes, functions), and
    each combination of discrete values is traced and compiled once. What depends on the key alone is computed once for
    each seed, as far as all combinations begin with the same. Work is cut into blocks of a fixed shape, each block made
    by one device, so memory and compile time do not grow with the grid, and results do not depend on how many devices
    or processes share the work.

    Several processes (`sweep.join_processes`) each compute and store their share; all return the whole.

    >>> import jax
    >>> def run(key, *, scale):
    ...     return {"value": scale * jax.random.normal(key)}
    >>> results = grid(run, jax.random.key(0), num_seeds=100, scale=[1.0, 2.0])
    >>> dict(results.sizes)
    {'scale': 2, 'seed': 100}
    >>> bool((results.value.sel(scale=2.0) == 2 * results.value.sel(scale=1.0)).all())
    True

    Args:
      run: a pure function `run(key, **point)` from a typed key and one value of each axis to a pytree of arrays, the
        same structure and shapes for every point.
      key: typed PRNG key; seed `i` gets `jax.random.fold_in(key, i)`, whatever `num_seeds` is.
      num_seeds: how many seeds each point gets.
      dims: names of the results' own dimensions, for instance `{"history": ["epoch"]}`: of a result, or of all results
        below a name.
      out: folder for the results, which are stored block by block. If it holds a part of the same sweep, that part is
        kept and the rest computed; the end is the same, bit by bit. Required for several processes.
      runs_at_once: how many runs a device makes at once; by default what suits the device.
      memory_limit: bytes that programs may take on each device; by default most of what is free.
      devices: devices of this process to share the work; all of them by default.
      report: called after every block.
      **axes: by name, the values to try. The names of this function's own arguments cannot be axes.

    Returns:
      A data set with a dimension for each axis, `seed`, and the results' own dimensions; results of nested structures
      have their names joined by dots. With `out` it reads from the files there, and takes no memory until it is used.

    Raises:
      TypeError: `run` does not take an axis, or needs an argument that is no axis; or its results are not arrays.
      ValueError: an axis has no values, or one twice, or one that is not finite; results differ in structure between
        discrete values; not even one run fits into memory; the folder holds another sweep.
      DamagedStoreError: the folder holds a sweep that is not what was written.
      BlockingIOError: another process writes to the folder.
      SystemExit: the process was asked to terminate (SIGTERM), and what was done is stored.
    """
    if jax.process_count() > 1 and out is None:
        raise ValueError("several processes need a folder that they share for their results: give out")
    folder = None if out is None else Path(out)
    stored = _stored_size(folder)
    work = _plan(run, key, axes, num_seeds, stored if runs_at_once is None else runs_at_once, memory_limit, devices)
    names = _dimension_names(work, dims or {})
    with ExitStack() as stack:
        store: Store
        if folder is None:
            _check_fits(work, memory_limit)
            store = Memory(work.result_shapes)
        else:
            store = stack.enter_context(_opened(folder, work, names))
        _compute(work, store, report)
        if folder is not None:
            barrier("the end of the sweep")
    return labelled(store.arrays(), work.axes.labels, tuple(work.axes.discrete), names)


def labelled(
    arrays: Mapping[str, np.ndarray],
    labels: Mapping[str, Sequence[Any]],
    discrete: tuple[str, ...],
    names: Mapping[str, Sequence[str]],
) -> "xarray.Dataset":
    """Results as a data set, its dimensions in the order of the axes, then `seed`, then the results' own."""
    import xarray

    stored = (*discrete, *(name for name in labels if name not in discrete))
    sizes = tuple(len(labels[name]) for name in stored)
    variables = {
        name: xarray.Variable((*stored, "seed", *names[name]), array.reshape(*sizes, *array.shape[2:]))
        for name, array in arrays.items()
    }
    num_seeds = next(iter(arrays.values())).shape[2]
    data = xarray.Dataset(variables, coords={**{name: list(labels[name]) for name in labels}, "seed": range(num_seeds)})
    return data.transpose(*labels, "seed", ...)


def _plan(
    run: Callable[..., Any],
    key: Key[Array, ""],
    axes: Mapping[str, Iterable[Any]],
    num_seeds: int,
    runs_at_once: int | BlockShape | None,
    memory_limit: int | None,
    devices: Sequence[jax.Device] | None,
) -> Plan:
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
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_fits(work: Plan, memory_limit: int | None) -> None:
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


def _dimension_names(work: Plan, dims: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Names of each result's own dimensions."""
    names = {}
    for name, result in work.runs[0].outputs.items():
        matching = [prefix for prefix in dims if name == prefix or name.startswith(f"{prefix}.")]
        given = tuple(dims[max(matching, key=len)]) if matching else ()
        if matching and len(given) != len(result.shape):
            raise ValueError(f"dims names {len(given)} dimensions of {name!r}, which has {len(result.shape)}")
        names[name] = given or tuple(f"{name}_{i}" for i in range(len(result.shape)))
    unknown = [name for name in dims if not any(other == name or other.startswith(f"{name}.") for other in names)]
    if unknown:
        raise ValueError(f"dims names {unknown}, and the results are {sorted(names)}")
    _check_labels(work, names)
    return names


def _check_labels(work: Plan, names: Mapping[str, Sequence[str]]) -> None:
    """Results can have the names that they will have: better known now than in the end."""
    for name, own in names.items():
        if repeated := sorted(other for other in own if [*work.axes.names, "seed", *own].count(other) > 1):
            raise ValueError(f"dims of {name!r} must not be those of axes or each other, got {repeated[0]!r}")
    one_seed = {
        name: np.broadcast_to(np.zeros((), dtype), (*shape[:2], 1, *shape[3:]))
        for name, (shape, dtype) in work.result_shapes.items()
    }
    try:
        labelled(one_seed, work.axes.labels, tuple(work.axes.discrete), names)
    except ValueError as problem:
        raise ValueError(f"results cannot be called as they are: {problem}") from problem


def _stored_size(folder: Path | None) -> BlockShape | None:
    """The block shape of a sweep that is to be resumed: another one would give other last bits."""
    stored = None if folder is None else read_manifest(folder)
    if stored is None:
        return None
    size = stored.get("runs_at_once")
    if (
        not isinstance(size, dict)
        or size.keys() != set(BlockShape._fields)
        or not all(isinstance(number, int) and number > 0 for number in size.values())
    ):
        raise DamagedStoreError(f"{folder} is damaged: sweep.json gives runs_at_once as {size}")
    return BlockShape(**size)


@contextmanager
def _opened(folder: Path, work: Plan, names: Mapping[str, Sequence[str]]) -> Iterator[Folder]:
    """The folder, which holds this sweep and nothing else, and is this sweep's alone."""
    manifest = {**work.manifest(), "dims": {name: list(own) for name, own in names.items()}}
    store = Folder(folder, manifest)
    with locked(folder) if jax.process_index() == 0 else nullcontext():
        if jax.process_index() == 0:
            store.create()
        barrier("the folder is ready")
        store.check()
        done = store.done()
        store.verify([block for block in work.blocks() if block.number in done])
        yield store


def _compute(work: Plan, store: Store, report: Callable[[Progress], None] | None) -> None:
    """Computes and stores the blocks of this process's share that are not done."""
    done, mine = store.done(), [block for block in work.blocks() if _is_mine(block, work.shape)]
    pending = [block for block in mine if block.number not in done]
    total, left = sum(map(_num_runs, mine)), sum(map(_num_runs, pending))
    watch = _Watch()
    with ThreadPoolExecutor(max_workers=1) as compiler, _terminating() as asked_to_stop:
        x64 = jax.config.read("jax_enable_x64")  # a thread has its own

        def compiled(combination: int) -> jax.stages.Compiled:
            with jax.enable_x64(x64):
                return work.program(combination)

        executables = {
            combination: compiler.submit(compiled, combination)
            for combination in sorted({block.combination for block in pending})
        }

        def program(combination: int) -> jax.stages.Compiled:
            with watch.compiling():
                return executables[combination].result()

        try:
            for blocks, results in _one_ahead(_dispatched(work, pending, program)):
                for block, arrays in _parts(work, blocks, jax.device_get(results)):
                    store.write(block, arrays)
                    left -= _num_runs(block)
                if report:
                    report(Progress(total - left, total, total - sum(map(_num_runs, pending)), *watch.seconds()))
                if asked_to_stop.is_set():
                    raise SystemExit(128 + signal.SIGTERM)
        finally:
            compiler.shutdown(wait=False, cancel_futures=True)


def _dispatched(
    work: Plan, blocks: list[Block], program: Callable[[int], jax.stages.Compiled]
) -> Iterator[tuple[dict[int, Block], dict[str, Array]]]:
    """Starts one block on each device, and yields the blocks by device, without waiting for the results."""
    by_seeds = [list(group) for _, group in itertools.groupby(blocks, key=lambda block: block.seeds.start)]
    for groups in _batched(by_seeds, len(work.devices)):
        seeds = _seeds(work, [group[0].seeds.start for group in groups])
        values = work.values(seeds)
        together: dict[tuple[int, int, int], dict[int, Block]] = {}
        for device, group in enumerate(groups):
            for block in group:
                place = block.combination, block.points.start, block.points.stop
                together.setdefault(place, {})[device] = block
        for (combination, *points), by_device in sorted(together.items(), key=lambda item: item[0]):
            yield by_device, program(combination)(values, work.key, seeds, _points(work, slice(*points)))


def _seeds(work: Plan, firsts: list[int]) -> np.ndarray:
    """The seeds that devices take, from the first one of each; those that have none of their own repeat the last's."""
    firsts = firsts + firsts[-1:] * (len(work.devices) - len(firsts))
    return np.concatenate([np.arange(first, first + work.shape.seeds, dtype=np.uint32) for first in firsts])


def _points(work: Plan, which: slice) -> dict[str, np.ndarray]:
    """The traced values of a block; the last point fills it up."""
    points = {name: values[which].astype(jnp.result_type(float)) for name, values in work.axes.points.items()}
    return {name: np.pad(values, (0, work.shape.points - len(values)), mode="edge") for name, values in points.items()}


def _parts(
    work: Plan, blocks: dict[int, Block], results: Mapping[str, np.ndarray]
) -> Iterator[tuple[Block, dict[str, np.ndarray]]]:
    """What belongs to each block, with axes (point, seed) first, without what was only computed to fill the shape."""
    for device, block in blocks.items():
        first = device * work.shape.seeds
        seeds = slice(first, first + block.seeds.stop - block.seeds.start)
        num_points = block.points.stop - block.points.start
        yield block, {name: np.moveaxis(result[seeds, :num_points], 0, 1) for name, result in results.items()}


class _Watch:
    """Tells time spent waiting for the compiler from other time."""

    def __init__(self) -> None:
        self.start, self.compile = time.perf_counter(), 0.0

    @contextmanager
    def compiling(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.compile += time.perf_counter() - start

    def seconds(self) -> tuple[float, float]:
        return self.compile, time.perf_counter() - self.start - self.compile


@contextmanager
def _terminating() -> Iterator[threading.Event]:
    """An event that is set when the process is asked to terminate, which then happens when the caller chooses."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_mine(block: Block, shape: BlockShape) -> bool:
    return (block.seeds.start // shape.seeds) % jax.process_count() == jax.process_index()


def _num_runs(block: Block) -> int:
    return (block.points.stop - block.points.start) * (block.seeds.stop - block.seeds.start)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each asked for before the one before it is handed on: devices work while results are stored."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
