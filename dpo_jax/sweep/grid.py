"""`grid`: a pure function over a product of axes and seeds, as few programs as there are discrete values."""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from dpo_jax.sweep.axes import name_run
from dpo_jax.sweep.labels import dimension_names, labelled
from dpo_jax.sweep.planning import Plan, check_programs_fit, check_results_fit, plan, stored_shape
from dpo_jax.sweep.processes import Others, forget_those_before, others
from dpo_jax.sweep.programs import BlockShape, impatient
from dpo_jax.sweep.stopping import Stop, stopping
from dpo_jax.sweep.store import Block, Folder, Memory, Store, check_place, locked, read_manifest

if TYPE_CHECKING:
    import xarray


class Progress(NamedTuple):
    """How far a sweep is.

    Attributes:
      done: runs that are complete, those of an earlier start among them.
      total: runs of the whole share of this process.
      resumed: runs that were complete at the start.
      compile_seconds: how long it took to compile all programs.
      run_seconds: time spent running programs and storing results.
    """

    done: int
    total: int
    resumed: int
    compile_seconds: float
    run_seconds: float


def grid(
    run: Callable[..., Any],
    key: Key[Array, ""],
    *,
    num_seeds: int,
    dims: Mapping[str, Sequence[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    repair: bool = False,
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
    or processes share the work: not in their last bit if blocks are of the same size, as those of a folder always are,
    and within rounding otherwise.

    Several processes (`sweep.join_processes`) each compute and store their share; all return the whole. If one fails or
    is stopped, the others end within seconds; if one dies, within half a minute. What is done is stored.

    Ctrl-C and SIGTERM stop a sweep in the main thread at once, whatever it does, unless the caller handles these
    signals. What is done is stored. XLA cannot be interrupted: the process itself ends when what is being compiled, or
    run, is done (`os._exit` does not wait).

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
        same structure and shapes for every point. What it does on the host (`jax.pure_callback`) is called for runs
        that only fill a block, too, and a folder does not know if it changes.
      key: typed PRNG key, not of the kind rbg; seed `i` gets `jax.random.fold_in(key, i)`, whatever `num_seeds` is.
      num_seeds: how many seeds each point gets.
      dims: names of the results' own dimensions, for instance `{"history": ["epoch"]}`: of a result, or of all results
        below a name.
      out: folder for the results, which are stored block by block. If it holds a part of the same sweep, that part is
        kept and the rest computed; the end is the same, bit by bit. A folder that is complete is only read. Several
        processes need one.
      repair: whether blocks of the folder that are damaged shall be made again, instead of an error that names them.
      runs_at_once: how many runs a device makes at once at most; by default what suits the device.
      memory_limit: bytes that programs may take on each device, and results without a folder in all; by default most of
        what is free (of this machine's memory: half, shared by the devices).
      devices: devices of this process to share the work; all of them by default.
      report: called after every block.
      **axes: by name, the values to try. The names of this function's own arguments cannot be axes.

    Returns:
      A data set with a dimension for each axis, `seed`, and the results' own dimensions; results of nested structures
      have their names joined by dots. With `out` it reads from the files there, and takes no memory until it is used.
      An axis given as float32 has float32 coordinates, so that 0.1 is found by 0.1, whatever it is in float32.

    Raises:
      TypeError: `run` does not take an axis, or needs an argument that is no axis; or its results are not arrays.
      ValueError: an axis has no values, or one twice, or one that is not finite, or so small that it becomes 0; results
        differ in structure between discrete values; not even one run fits into memory, or all results on the disk; the
        folder holds another sweep.
      FileExistsError: the folder holds other files.
      DamagedStoreError: the folder holds a sweep that is not what was written.
      BlockingIOError: another process writes to the folder.
      OtherProcessError: another one of several processes failed, was stopped, or died.
      KeyboardInterrupt: Ctrl-C.
      SystemExit: the process was asked to terminate (SIGTERM).

    What `run` raises has a note that says for which values.
    """
    if jax.process_count() > 1 and out is None:
        raise ValueError("several processes need a folder that they share for their results: give out")
    folder = None if out is None else Path(out)
    with ExitStack() as stack:
        stop, company = stack.enter_context(stopping()), None
        if folder is not None:
            check_place(folder)
            read_manifest(folder)
            company = stack.enter_context(others(folder, stop))
        work = plan(
            run,
            key,
            num_seeds=num_seeds,
            out=out,
            runs_at_once=runs_at_once,
            memory_limit=memory_limit,
            devices=devices,
            **axes,
        )
        names = dimension_names(work, dims or {})
        store: Store
        if folder is None:
            check_results_fit(work, memory_limit)
            store = Memory(work.result_shapes)
        else:
            work, store = stack.enter_context(_opened(folder, work, names, repair, company, stop))
        _compute(work, store, report, stop)
        if company:
            _until(lambda: store.is_done(work.num_blocks), company, stop)
    return labelled(store.arrays(), work.axes.coordinates, tuple(work.axes.discrete), names)


@contextmanager
def _opened(
    folder: Path, work: Plan, names: Mapping[str, Sequence[str]], repair: bool, company: Others | None, stop: Stop
) -> Iterator[tuple[Plan, Folder]]:
    """The folder, which holds this sweep and nothing else, and is this sweep's alone; and the plan, in its blocks."""
    dims = {"dims": {name: list(own) for name, own in names.items()}}
    store = Folder(folder, {**work.manifest(), **dims})
    with ExitStack() as stack:
        if repair or not store.is_done(work.num_blocks):
            if company and company.number > 0:
                _until(lambda: company.hear()[0] == "open", company, stop)
                work = replace(work, shape=stored_shape(folder, read_manifest(folder) or {}))
                store = Folder(folder, {**work.manifest(), **dims})
            else:
                _check_space(folder, work)
                stack.enter_context(locked(folder))
                store.create()
                if repair:
                    store.repair(_done_blocks(work, store))
                forget_those_before(folder, company)
                if company:
                    company.say("open")
        store.check()
        store.verify(_done_blocks(work, store))
        yield work, store


def _done_blocks(work: Plan, store: Store) -> list[Block]:
    done = store.done()
    return [block for block in work.blocks() if block.number in done]


def _until(is_so: Callable[[], bool], company: Others, stop: Stop) -> None:
    """Waits until something is so, or another process fails."""
    while not is_so():
        stop.check()
        company.hear()
        time.sleep(0.2)


def _check_space(folder: Path, work: Plan) -> None:
    """Raises ValueError if the disk has no room for the results that are still to come."""
    done = folder / "done"
    num_done = len(list(done.iterdir())) if done.exists() else 0
    missing = work.result_bytes * max(0, work.num_blocks - num_done) // work.num_blocks
    free = shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.exists())).free
    if missing > free:
        raise ValueError(f"the results need {missing:,} more bytes in {folder}, and only {free:,} are free")


def _compute(work: Plan, store: Store, report: Callable[[Progress], None] | None, stop: Stop) -> None:
    """Computes and stores the blocks of this process's share that are not done."""
    done, mine = store.done(), [block for block in work.blocks() if _is_mine(block, work.shape)]
    pending = [block for block in mine if block.number not in done]
    if not pending:
        return
    check_programs_fit(work)
    total, left = sum(map(_num_runs, mine)), sum(map(_num_runs, pending))
    resumed, start = total - left, time.perf_counter()
    with impatient(1) as waiting, _synced(store):
        for blocks, results in _one_ahead(_dispatched(work, pending)):
            with _naming_runs(work, next(iter(blocks.values()))):
                fetched = waiting.submit(jax.device_get, results).result()
            for block, arrays in _parts(work, blocks, fetched):
                store.write(block, arrays)
                left -= _num_runs(block)
            del results, fetched
            if report:
                seconds = work.programs.seconds, time.perf_counter() - start
                report(Progress(total - left, total, resumed, *seconds))
            stop.check()


@contextmanager
def _synced(store: Store) -> Iterator[None]:
    """What is written inside is on the disk in the end, however it ends."""
    try:
        yield
    finally:
        store.sync()


@contextmanager
def _naming_runs(work: Plan, block: Block) -> Iterator[None]:
    """Adds to an error of a block which runs these were."""
    try:
        yield
    except Exception as problem:
        points = {name: values.tolist() for name, values in work.axes.points(block.points).items()}
        ranges = {name: f"{min(values)} to {max(values)}" for name, values in points.items()}
        name_run(problem, work.axes.combinations[block.combination], ranges)
        raise


def _dispatched(work: Plan, blocks: list[Block]) -> Iterator[tuple[dict[int, Block], dict[str, Array]]]:
    """Starts one block on each device, and yields the blocks by device, without waiting for the results."""
    by_seeds = [list(group) for _, group in itertools.groupby(blocks, key=lambda block: block.seeds.start)]
    for groups in _batched(by_seeds, len(work.devices)):
        seeds = work.seeds([group[0].seeds.start for group in groups])
        values = work.values(seeds)
        together: dict[tuple[int, int, int], dict[int, Block]] = {}
        for device, group in enumerate(groups):
            for block in group:
                place = block.combination, block.points.start, block.points.stop
                together.setdefault(place, {})[device] = block
        for (combination, *points), by_device in sorted(together.items(), key=lambda item: item[0]):
            program = work.programs.runs[combination]
            with _naming_runs(work, next(iter(by_device.values()))):
                results = program(values, work.key, seeds, work.points(slice(*points)))
            yield by_device, results


def _parts(
    work: Plan, blocks: dict[int, Block], results: Mapping[str, np.ndarray]
) -> Iterator[tuple[Block, dict[str, np.ndarray]]]:
    """What belongs to each block, with axes (point, seed) first, without what was only computed to fill the shape."""
    for device, block in blocks.items():
        first = device * work.shape.seeds
        seeds = slice(first, first + block.seeds.stop - block.seeds.start)
        num_points = block.points.stop - block.points.start
        yield block, {name: np.moveaxis(result[seeds, :num_points], 0, 1) for name, result in results.items()}


def _is_mine(block: Block, shape: BlockShape) -> bool:
    return (block.seeds.start // shape.seeds) % jax.process_count() == jax.process_index()


def _num_runs(block: Block) -> int:
    return (block.points.stop - block.points.start) * (block.seeds.stop - block.seeds.start)


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
