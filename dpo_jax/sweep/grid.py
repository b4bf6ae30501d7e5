"""`grid`: a pure function over a product of axes and seeds, as few programs as there are static values."""

import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Key

from dpo_jax.sweep.axes import name_run
from dpo_jax.sweep.planning import (
    Plan,
    agreed,
    check_key,
    check_same_programs,
    check_seeds,
    even,
    fitted,
    free_host_memory,
    plan,
    usual_runs_at_once,
)
from dpo_jax.sweep.processes import Peers, remove_earlier_starts, watching_peers
from dpo_jax.sweep.programs import BlockShape, compile_all, interruptible_threads, joined, place, trace_prepare
from dpo_jax.sweep.progress import Progress, on_terminal
from dpo_jax.sweep.results import Results, check_results_fit, dimension_names, labelled, read_blocks
from dpo_jax.sweep.starts import Starts
from dpo_jax.sweep.stopping import Stop, result_of, stopping
from dpo_jax.sweep.store import Block, check_place, locked, refuse_other

if TYPE_CHECKING:
    import xarray


def grid(
    run: Callable[..., Any],
    key: "Key[Array, ''] | Starts",
    *,
    num_seeds: int | None = None,
    seeds: Sequence[int] | None = None,
    prepare: Callable[[Key[Array, ""]], Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    out: str | os.PathLike[str] | None = None,
    share: tuple[int, int] | None = None,
    repair: bool = False,
    runs_at_once: int | tuple[int, int] | None = None,
    memory_limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    report: Callable[[Progress], None] | None = None,
    **axes: Any,
) -> "xarray.Dataset":
    """Maps a pure function over a product of axes and seeds.

    Every point of the grid sees the same seeds (common random numbers), so differences between points are paired.

    An axis of numbers is *traced*: one program serves all its values. So is a pytree of arrays with a common leading
    axis, for instance `candidate={"beta": betas, "learning_rate": rates}`: its rows are the values of one dimension,
    and `run` gets one row. Any other axis is *static* (names, functions, Booleans, and numbers in `sweep.static`):
    `run` is traced and compiled once for each combination of static values.

    What all points of a seed share is made once, by `prepare`; then `run` gets its result in place of the key. The
    results are those of `grid(lambda key, **point: run(prepare(key), **point), key, ...)`.

    Work is cut into blocks of a fixed shape, each block made by one device, so memory and compile time do not grow with
    the grid. Results do not depend on how many devices, processes or shares do the work. They are bitwise equal if
    blocks have the same shape, as those of a folder always have, and equal within rounding otherwise.

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
        same structure and shapes for every point; with `prepare`, or on `Starts`, `run(start, **point)`. It is traced
        once for each function object, as by `jax.jit`. What it does on the host (`jax.pure_callback`) is called for
        runs that only fill a block, too, and a folder does not know if it changes.
      key: typed PRNG key, not of the kind rbg; seed `i` gets `jax.random.fold_in(key, i)`. Or the `Starts` that
        `sweep.prepare` made, where several sweeps have them in common.
      num_seeds: how many seeds each point gets: `0 .. num_seeds - 1`.
      seeds: instead, which seeds; on `Starts`, all of theirs by default.
      prepare: a pure function from the key of a seed to a pytree of arrays, which may hold typed keys.
      dims: names of the results' own dimensions, for instance `{"history": ["epoch"]}`: of a result, or of all results
        below a name.
      out: folder for the results, stored block by block. What it holds of the same sweep is kept, and the rest
        computed. Asked for more seeds, more values of an axis, or both, it grows. Required for several processes.
      share: `(3, 16)` computes the third of sixteen parts into `out` without waiting for the others: for job arrays.
        Each part can be started again on its own. What others have not computed yet is NaN in the results.
      repair: whether damaged blocks of a folder are made again, instead of raising an error.
      runs_at_once: how many runs a device makes at once at most; by default what suits the device. A pair says how
        many seeds, and how many points for each.
      memory_limit: bytes that programs may take on each device; by default most of what is free (of this machine's
        memory: half, shared by the devices).
      devices: devices of this process to share the work; all of them by default.
      report: called after every block; by default, a line on the terminal shows how far the sweep is.
      **axes: by name, the values to try. The names of this function's own arguments cannot be axes.

    Returns:
      A data set with a dimension for each axis, `seed`, and the results' own dimensions; results of nested structures
      have their names joined by dots. Its attributes say whether it is `complete`, and how many seconds it took.

    Raises:
      TypeError: `run` does not take an axis, or needs an argument that is no axis; or its results are not arrays.
      ValueError: an axis has no values, or one twice, or one that is not finite; results differ in structure between
        static values; not even one run fits into memory, or all results do not; the folder holds another sweep.
      FileExistsError: the folder holds other files.
      DamagedStoreError: the folder holds a sweep that is not what was written; all damaged blocks are named.
      BlockingIOError: another process computes the same share into the folder.
      RuntimeError: one of several processes failed.
      SystemExit: the process was asked to terminate (SIGTERM), and what was done is stored.
    """
    clock = _Clock()
    share = _checked_share(share, out)
    with ExitStack() as stack:
        stop = stack.enter_context(stopping())
        if out is not None:
            check_place(Path(out))
        peers = stack.enter_context(watching_peers(Path(out), stop)) if out is not None else None
        progress = stack.enter_context(nullcontext(report) if report else on_terminal())
        work = plan(
            run,
            key,
            num_seeds=num_seeds,
            seeds=seeds,
            prepare=prepare,
            out=out,
            runs_at_once=runs_at_once,
            memory_limit=memory_limit,
            devices=devices,
            **axes,
        )
        names = dimension_names(work, dims or {})
        check_results_fit(work, free_host_memory())
        results = Results(work.grid_shape, work.seeds, work.result_shapes)
        if work.folder is None:
            work = fitted(work)
            clock.compiled()
            _compute(work, work.blocks(), results, progress, clock, stop)
        else:
            _compute_in_folder(work, names, results, progress, clock, stop, share=share, repair=repair, peers=peers)
    made = labelled(results, work.axes.axes, work.seeds, names)
    return made.assign_attrs(compile_seconds=clock.compile_seconds, run_seconds=clock.run_seconds)


def prepare(
    make: Callable[[Key[Array, ""]], Any],
    key: Key[Array, ""],
    *,
    num_seeds: int | None = None,
    seeds: Sequence[int] | None = None,
    runs_at_once: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Starts:
    """What the runs of each seed share, made once for several sweeps.

    >>> import jax
    >>> starts = prepare(lambda key: jax.random.normal(key, (3,)), jax.random.key(0), num_seeds=5)
    >>> grid(lambda start, *, scale: scale * start.sum(), starts, scale=[1.0, 2.0]).result.shape
    (2, 5)

    Args:
      make: a pure function from the key of a seed to a pytree of arrays, which may hold typed keys.
      key, num_seeds, seeds, runs_at_once, devices: see `grid`.
    """
    check_key(key)
    chosen = check_seeds(num_seeds, seeds)
    devices = list(jax.local_devices() if devices is None else devices)
    traced = trace_prepare(make, key)
    size = even(math.ceil(len(chosen) / len(devices)), runs_at_once or usual_runs_at_once(devices))
    program = compile_all(traced, [], BlockShape(size, 1), devices).prepare
    assert program is not None
    at_once = size * len(devices)
    parts = []
    for first in range(0, len(chosen), at_once):
        rows = np.resize(np.asarray(chosen[first : first + at_once], np.uint32), at_once)
        parts.append(program(key, rows))
    leaves = [joined(columns)[: len(chosen)] for columns in zip(*parts, strict=True)]
    return Starts(jax.tree.unflatten(traced.start.tree, leaves), chosen)


@dataclass
class _Clock:
    """Tells the time of compiling from that of running."""

    start: float = field(default_factory=time.perf_counter)
    compile_seconds: float = 0.0

    def compiled(self) -> None:
        self.compile_seconds = time.perf_counter() - self.start

    @property
    def run_seconds(self) -> float:
        return time.perf_counter() - self.start - self.compile_seconds


def _compute_in_folder(
    work: Plan,
    names: Mapping[str, Sequence[str]],
    results: Results,
    report: Callable[[Progress], None],
    clock: _Clock,
    stop: Stop,
    *,
    share: tuple[int, int],
    repair: bool,
    peers: Peers | None,
) -> None:
    """Reads what a folder holds, and computes and stores what it lacks."""
    assert work.folder is not None
    path, lock = work.folder.path, "share-{}-of-{}.lock".format(*share)
    if work.folder.manifest:
        wanted = {name: list(own) for name, own in names.items()}
        refuse_other(path, {"dims": work.folder.manifest["dims"]}, {"dims": wanted})
        check_same_programs(work.folder, work)
        read_blocks(work.folder, work.boxes, results, work.result_shapes, repair=repair)
        if results.done.all():
            return
    _check_space(work, results)
    with ExitStack() as stack:
        if path.exists():
            stack.enter_context(locked(path, lock))
            work = agreed(fitted(work), names)
        else:
            work = agreed(fitted(work), names)
            stack.enter_context(locked(path, lock))
        clock.compiled()
        remove_earlier_starts(path, peers)
        folder = work.folder
        assert folder is not None
        folder.tidy()
        _compute(work, _share_of(work, share), results, report, clock, stop)
    if peers:
        _wait_for_peers(work, peers, stop)
    read_blocks(folder, work.boxes, results, work.result_shapes)  # what others have made in the meantime


def _wait_for_peers(work: Plan, peers: Peers, stop: Stop) -> None:
    """Waits until all blocks are done, or another process fails."""
    assert work.folder is not None
    while not work.folder.done() >= set(range(work.num_blocks)):
        stop.check()
        peers.check()
        time.sleep(0.2)


def _compute(
    work: Plan, blocks: list[Block], results: Results, report: Callable[[Progress], None], clock: _Clock, stop: Stop
) -> None:
    """Computes those of some blocks that are not done, and stores them."""
    done = work.folder.done() if work.folder else set()
    pending = [block for block in blocks if block.number not in done]
    total, left = sum(block.num_runs for block in blocks), sum(block.num_runs for block in pending)
    resumed = total - left
    with interruptible_threads(1) as waiting:
        for by_device, arrays in _one_ahead(_dispatched(work, pending)):
            with _naming_runs(work, next(iter(by_device.values()))):
                fetched = result_of(waiting.submit(jax.device_get, arrays))
            for block, part in _split_by_block(work, by_device, fetched):
                if work.folder:
                    work.folder.write(block, part)
                results.fill(block, part)
                left -= block.num_runs
            del arrays, fetched
            report(Progress(total - left, total, resumed, clock.compile_seconds, clock.run_seconds))
            stop.check()


@contextmanager
def _naming_runs(work: Plan, block: Block) -> Iterator[None]:
    """Adds to an error of a block which runs these were."""
    try:
        yield
    except Exception as problem:
        names = [work.axes.names_of_points[point] for point in block.points]
        ranges = {name: f"{names[0][name]} to {names[-1][name]}" for name in names[0]}
        name_run(problem, work.axes.combinations[block.combination], ranges)
        raise


def _dispatched(work: Plan, blocks: list[Block]) -> Iterator[tuple[dict[int, Block], dict[str, Array]]]:
    """Starts one block on each device, and yields the blocks by device, without waiting for the results."""
    for _, of_box in itertools.groupby(blocks, key=lambda block: block.box):
        by_seeds = [list(group) for _, group in itertools.groupby(of_box, key=lambda block: block.seeds[0])]
        for groups in _batched(by_seeds, len(work.devices)):
            starts = _starts(work, [group[0].seeds for group in groups])
            together: dict[tuple[int, tuple[int, ...]], dict[int, Block]] = {}
            for device, group in enumerate(groups):
                for block in group:
                    together.setdefault((block.combination, tuple(block.points)), {})[device] = block
            for (combination, points), by_device in together.items():
                with _naming_runs(work, next(iter(by_device.values()))):
                    results = work.programs.runs[combination](starts, work.points(points))
                yield by_device, results


def _starts(work: Plan, seeds: Sequence[Sequence[int]]) -> list[Array]:
    """What the runs of some seeds start from, laid over the devices, one list of seeds for each."""
    filled = [*seeds, *[seeds[-1]] * (len(work.devices) - len(seeds))]
    size = work.shape.seeds
    rows = np.array([[*each, *[each[-1]] * (size - len(each))] for each in filled], np.uint32).ravel()
    if isinstance(work.source, Starts):
        return place(work.source.leaves(rows.tolist()), work.devices)
    assert work.programs.prepare is not None
    return work.programs.prepare(work.source, rows)


def _split_by_block(
    work: Plan, by_device: dict[int, Block], results: Mapping[str, np.ndarray]
) -> Iterator[tuple[Block, dict[str, np.ndarray]]]:
    """What belongs to each block, with axes (point, seed) first, without what was only computed to fill the shape."""
    for device, block in by_device.items():
        first = device * work.shape.seeds
        seeds, points = slice(first, first + len(block.seeds)), slice(len(block.points))
        yield block, {name: np.moveaxis(result[seeds, points], 0, 1) for name, result in results.items()}


def _share_of(work: Plan, share: tuple[int, int]) -> list[Block]:
    """The blocks of a share: of each box, a part of its blocks that follow one another."""
    which, num_shares = share
    mine = []
    for _, of_box in itertools.groupby(work.blocks(), key=lambda block: block.box):
        blocks = list(of_box)
        mine += blocks[len(blocks) * (which - 1) // num_shares : len(blocks) * which // num_shares]
    done = work.folder.done() if work.folder else set()
    return [block for block in mine if _is_asked_for(work, block, done)]


def _is_asked_for(work: Plan, block: Block, done: set[int]) -> bool:
    """Whether a block of the folder belongs to what is asked for now, and can be made."""
    if block.combination < 0 or all(point < 0 for point in block.points):
        return False
    if any(point < 0 for point in block.points):
        if block.number in done:
            return False
        assert work.folder is not None
        raise ValueError(f"{work.folder.path} holds a sweep of more values, which is not complete: ask for them, too")
    return True


def _check_space(work: Plan, results: Results) -> None:
    """Raises ValueError if the disk has no room for the missing results."""
    assert work.folder is not None
    folder = work.folder.path
    missing = work.result_bytes // results.done.size * int(np.sum(~results.done))
    free = shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.exists())).free
    if missing > free:
        raise ValueError(f"the results need {missing:,} more bytes in {folder}, and only {free:,} are free")


def _checked_share(share: tuple[int, int] | None, out: Any) -> tuple[int, int]:
    """Which share of how many, counted from 1."""
    if jax.process_count() > 1:
        if share is not None:
            raise ValueError("processes that have joined each have their own share already: leave share out")
        share = jax.process_index() + 1, jax.process_count()
    if share is None:
        return 1, 1
    which, num_shares = share
    if not 1 <= which <= num_shares:
        raise ValueError(f"share must be (i, n) with i from 1 to n, got {share}")
    if out is None:
        raise ValueError("shares need a folder in which their results meet: give out")
    return which, num_shares


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
