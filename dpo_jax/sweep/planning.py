"""What a sweep will do, before any of it is done: axes, seeds, boxes, blocks, bytes."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.sweep.axes import Axes, label, read_axes
from dpo_jax.sweep.programs import (
    BlockShape,
    Programs,
    Struct,
    TracedPrepare,
    TracedRun,
    compile_all,
    naming,
    trace_prepare,
    trace_run,
)
from dpo_jax.sweep.starts import Starts
from dpo_jax.sweep.store import (
    FORMAT,
    Block,
    Box,
    Folder,
    blocks_of,
    check_place,
    locked,
    missing_boxes,
    packed,
    refuse_other,
)

RUNS_AT_ONCE = {"cpu": 128}
"""How many runs a device makes at once, if memory allows: on a CPU, what its caches hold."""

RUNS_AT_ONCE_ON_ACCELERATORS = 65536
"""Elsewhere; estimated from compiled programs, not measured."""


@dataclass(frozen=True)
class Plan:
    """What there is to do. Nothing is compiled until `programs` is asked for.

    Attributes:
      run: what is swept.
      axes: what is varied.
      source: the base key, of which seed `i` has `jax.random.fold_in(key, i)`; or what `prepare` made of it.
      prepare: what a seed's runs share is made by, traced; `None` if it is given.
      seeds: the seeds of each point.
      first: `run`, traced for the first combination of static values.
      shape: how many runs a device makes at once.
      boxes: what is to be computed, and what a folder holds.
      devices: the devices of this process.
      memory_limit: bytes that programs may take on each device.
      folder: where results are kept, if they are.
    """

    run: Callable[..., Any]
    axes: Axes
    source: "Key[Array, ''] | Starts"
    prepare: TracedPrepare | None
    seeds: Sequence[int]
    first: TracedRun
    shape: BlockShape
    boxes: Sequence[Box]
    devices: Sequence[jax.Device]
    memory_limit: int
    folder: Folder | None

    @cached_property
    def runs(self) -> list[TracedRun]:
        """`run`, traced for each combination of static values."""
        return list(self.traced_one_by_one())

    def traced_one_by_one(self) -> Iterator[TracedRun]:
        """`run`, traced for each combination of static values, when it is asked for.

        Raises:
          ValueError: results differ from those of the first combination.
        """
        combinations = self.axes.combinations
        for combination in combinations:
            with naming(combination, list(self.axes.traced)):
                traced = trace_run(self.run, self.first.start, self.first.point, combination)
            if traced.outputs != self.first.outputs:
                both = {*traced.outputs, *self.first.outputs}
                names = sorted(name for name in both if traced.outputs.get(name) != self.first.outputs.get(name))
                raise ValueError(f"results {names} differ between {combination} and {combinations[0]}")
            yield traced

    @cached_property
    def programs(self) -> Programs:
        """All that there is to run, compiled when it is asked for."""
        return compile_all(self.prepare, self.runs, self.shape, self.devices)

    @property
    def result_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Each result's own shape, and dtype."""
        return {name: (tuple(result.shape), np.dtype(result.dtype)) for name, result in self.first.outputs.items()}

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """How many combinations of static values, of traced values, and seeds."""
        return len(self.axes.combinations), self.axes.num_points, len(self.seeds)

    @property
    def num_runs(self) -> int:
        """How many runs the grid has."""
        return math.prod(self.grid_shape)

    @property
    def result_bytes(self) -> int:
        """How much space all results take."""
        return self.num_runs * sum(math.prod(own) * dtype.itemsize for own, dtype in self.result_shapes.values())

    @property
    def num_blocks(self) -> int:
        """How many blocks there are, those that are done among them."""
        return sum(box.num_blocks(self.shape) for box in self.boxes)

    def blocks(self) -> list[Block]:
        """All blocks, in the order in which they are computed."""
        return list(blocks_of(self.boxes, self.shape))

    def points(self, which: Sequence[int]) -> list[np.ndarray]:
        """The traced values of a block, leaf by leaf; the last point fills it up."""
        filled = [*which, *[which[-1]] * (self.shape.points - len(which))]
        return jax.tree.leaves(self.axes.points(filled))

    @property
    def traced_axes(self) -> str:
        """Which axes are traced, in words."""
        return f"traced: {', '.join(self.axes.traced) or 'nothing'}; static: {', '.join(self.axes.static) or 'nothing'}"

    def __str__(self) -> str:
        """What there is to do, for people to read."""
        num_combinations, num_points, num_seeds = self.grid_shape
        done = len(self.folder.done()) if self.folder and self.folder.manifest else 0
        return (
            f"{self.num_runs:,} runs: {num_combinations * num_points:,} points, {num_seeds:,} seeds each\n"
            f"{num_combinations:,} programs ({self.traced_axes})\n"
            f"{self.num_blocks:,} blocks of up to {self.shape.seeds * self.shape.points:,} runs, "
            f"{len(self.devices)} at once; {done:,} are done already\n"
            f"{self.result_bytes / 1e6:,.1f} MB of results"
        )


def plan(
    run: Callable[..., Any],
    key: "Key[Array, ''] | Starts",
    *,
    num_seeds: int | None = None,
    seeds: Sequence[int] | None = None,
    prepare: Callable[[Key[Array, ""]], Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    runs_at_once: int | tuple[int, int] | None = None,
    memory_limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    **axes: Any,
) -> Plan:
    """What `grid` would do: how many runs, programs, blocks and bytes. It compiles nothing.

    `print(plan(...))` shows it. See `grid` for arguments and errors.
    """
    read = read_axes(run, axes)
    _check_sizes(runs_at_once, memory_limit)
    devices = list(jax.local_devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices names none")
    if isinstance(key, Starts):
        if prepare is not None:
            raise ValueError("prepare was already applied: these starts are what it made")
        chosen, traced, start = key.chosen(num_seeds, seeds), None, key.struct
    else:
        check_key(key)
        chosen = check_seeds(num_seeds, seeds)
        traced = trace_prepare(prepare, key)
        start = traced.start
    if out is not None:
        check_place(Path(out))
    folder = None if out is None else Folder(Path(out))
    if folder and folder.manifest:
        _refuse_others_inputs(folder, run, key, read)
    work = Plan(
        run=run,
        axes=read,
        source=key,
        prepare=traced,
        seeds=chosen,
        first=_trace_first(run, start, read),
        shape=BlockShape(1, 1),
        boxes=[Box(range(len(read.combinations)), range(read.num_points), chosen)],
        devices=devices,
        memory_limit=memory_limit or free_memory(devices),
        folder=folder,
    )
    if folder and folder.manifest:
        return _grown(work, folder, runs_at_once)
    return replace(work, shape=_block_shape(work, runs_at_once))


def fitted(work: Plan) -> Plan:
    """The plan with blocks that fit into memory, its programs compiled.

    Raises:
      ValueError: not even one run fits, or the blocks of a folder do not.
    """
    kept = work.folder is not None and work.folder.manifest is not None
    while work.programs.memory > work.memory_limit:
        num = work.shape.seeds * work.shape.points
        if num == 1 or kept:
            what = "one run takes" if num == 1 else f"{num} runs at once take"
            raise ValueError(
                f"{what} {work.programs.memory:,} bytes of memory on each device, and only {work.memory_limit:,} may "
                "be used"
            )
        fewer = max(1, min(num // 2, int(0.9 * num * work.memory_limit / work.programs.memory)))
        work = replace(work, shape=_block_shape(work, fewer))
    return work


def agreed(work: Plan, dims: Mapping[str, Sequence[str]]) -> Plan:
    """The plan on which all that compute into its folder agree: what the folder lacks is added to its boxes.

    Raises:
      ValueError: the folder holds another sweep.
    """
    assert work.folder is not None
    with locked(work.folder.path, "lock", wait=True):
        folder = Folder(work.folder.path)
        wanted = manifest(work, dims)
        if folder.manifest is None:
            folder.write_manifest(wanted)
            return replace(work, folder=folder)
        fixed = [name for name in wanted if name not in ("block", "programs", "boxes")]
        stored = {name: folder.manifest.get(name) for name in fixed}
        refuse_other(folder.path, stored, {name: wanted[name] for name in fixed})
        check_same_programs(folder, work)
        grown = _grown(replace(work, folder=folder), folder, None)
        num_old = len(folder.manifest["boxes"])
        if len(grown.boxes) > num_old:
            folder.write_manifest(
                folder.manifest
                | {"programs": folder.manifest["programs"] | wanted["programs"]}
                | {"boxes": folder.manifest["boxes"] + manifest(grown, dims)["boxes"][num_old:]}
            )
    return grown if grown.shape == work.shape else fitted(grown)


def manifest(work: Plan, dims: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What decides the results, to the last bit, and what there is of them."""
    combinations, points = work.axes.names_of_combinations, work.axes.names_of_points
    return {
        "format": FORMAT,
        **_inputs(work.run, work.source, work.axes, work.devices),
        "block": work.shape._asdict(),
        "dims": {name: list(own) for name, own in dims.items()},
        "results": {
            name: {"shape": list(own), "dtype": dtype.str} for name, (own, dtype) in work.result_shapes.items()
        },
        "programs": dict(program_names(work)),
        "boxes": [
            {
                "combinations": [combinations[i] for i in box.combinations],
                "points": [points[i] for i in box.points],
                "seeds": packed(box.seeds),
            }
            for box in work.boxes
        ],
    }


def program_names(work: Plan) -> Iterator[tuple[str, str]]:
    """What each program is for, and its fingerprint."""
    if work.prepare:
        yield "prepare", work.prepare.fingerprint
    for combination, traced in zip(work.axes.combinations, work.traced_one_by_one(), strict=True):
        values = ", ".join(f"{name}={label(value)!r}" for name, value in combination.items())
        yield f"run with {values}" if values else "run", traced.fingerprint


def check_same_programs(folder: Folder, work: Plan) -> None:
    """Raises ValueError if what `run` or `prepare` computes has changed since a folder was made."""
    assert folder.manifest is not None
    stored = folder.manifest["programs"]
    for name, fingerprint in program_names(work):
        if stored.get(name, fingerprint) != fingerprint:
            what, _, where = name.partition(" ")
            raise ValueError(
                f"{folder.path} holds another sweep: what {what} computes{where and ' ' + where} has changed since the "
                "folder was made; choose another folder"
            )


def usual_runs_at_once(devices: Sequence[jax.Device]) -> int:
    """How many runs suit a device."""
    return RUNS_AT_ONCE.get(devices[0].platform, RUNS_AT_ONCE_ON_ACCELERATORS)


def check_seeds(num_seeds: int | None, seeds: Sequence[int] | None) -> Sequence[int]:
    """The seeds, given by their number or one by one."""
    if (num_seeds is None) == (seeds is None):
        raise ValueError("give num_seeds or seeds, one of the two")
    if seeds is None:
        checks.size("num_seeds", num_seeds)
        assert num_seeds is not None
        if num_seeds > 2**32:
            raise ValueError(f"num_seeds must be at most 2**32, got {num_seeds}")
        return range(int(num_seeds))
    chosen = seeds if isinstance(seeds, range) else [int(seed) for seed in seeds]
    if not len(chosen):
        raise ValueError("seeds names none")
    if min(chosen) < 0 or max(chosen) >= 2**32:
        raise ValueError(f"seeds must be at least 0 and below 2**32, got {min(chosen)} to {max(chosen)}")
    if not isinstance(chosen, range) and len(set(chosen)) < len(chosen):
        raise ValueError("seeds has a seed twice")
    return chosen


def free_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that a sweep may take on each device: most of what is free."""
    statistics = devices[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(0.9 * (statistics["bytes_limit"] - statistics["bytes_in_use"]))
    return free_host_memory() // (2 * len(devices))


def free_host_memory() -> int:
    """Bytes of this machine's memory that are free."""
    return int(psutil.virtual_memory().available)


def _trace_first(run: Callable[..., Any], start: Struct, axes: Axes) -> TracedRun:
    point = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), axis.values)
        for name, axis in axes.traced.items()
    }
    combination = axes.combinations[0]
    try:
        with naming(combination, list(axes.traced)):
            return trace_run(run, start, Struct.of(point), combination)
    except TypeError as problem:  # so are JAX's errors of concretization
        if axes.traced:
            problem.add_note(f"Wrap what decides a shape or a branch in sweep.static; traced: {', '.join(axes.traced)}")
        raise


def _inputs(
    run: Callable[..., Any], source: "Key[Array, ''] | Starts", axes: Axes, devices: Sequence[jax.Device]
) -> dict[str, Any]:
    """What is known before anything is traced."""
    if isinstance(source, Starts):
        key: list[Any] = ["starts", source.checksum]
    else:
        key = [str(jax.random.key_impl(source)), *np.asarray(jax.random.key_data(source)).tolist()]
    return {
        "run": str(label(run)),
        "versions": {package: version(package) for package in ("dpo_jax", "jax", "jaxlib")},
        "device": f"{devices[0].platform} ({devices[0].device_kind})",
        "key": key,
        "axes": {name: "traced" if axis.traced else "static" for name, axis in axes.axes.items()},
        "order of axes": list(axes.axes),
        "dtypes": {name: str(axis.coordinate.dtype) for name, axis in axes.traced.items()},
    }


def _refuse_others_inputs(folder: Folder, run: Callable[..., Any], source: Any, axes: Axes) -> None:
    """Refuses another sweep before anything is traced."""
    assert folder.manifest is not None
    wanted = _inputs(run, source, axes, jax.local_devices())
    refuse_other(folder.path, {name: folder.manifest.get(name) for name in wanted}, wanted)


def _grown(work: Plan, folder: Folder, runs_at_once: int | tuple[int, int] | None) -> Plan:
    """The plan whose boxes are those of a folder and others that hold what is missing."""
    assert folder.manifest is not None
    shape = folder.shape
    limit = math.prod(runs_at_once) if isinstance(runs_at_once, tuple) else runs_at_once
    if limit is not None and math.prod(shape) > limit:
        raise ValueError(
            f"{folder.path} holds another sweep: {math.prod(shape)} runs at once, not {limit}; choose another folder"
        )
    results = {name: {"shape": list(own), "dtype": dtype.str} for name, (own, dtype) in work.result_shapes.items()}
    refuse_other(folder.path, {"results": folder.manifest["results"]}, {"results": results})
    stored = folder.boxes(work.axes.names_of_combinations, work.axes.names_of_points)
    covered = np.zeros(work.grid_shape, bool)
    places = {seed: place for place, seed in enumerate(work.seeds)}
    for box in stored:
        inside = (
            [i for i in box.combinations if i >= 0],
            [i for i in box.points if i >= 0],
            [places[seed] for seed in box.seeds if seed in places],
        )
        covered[np.ix_(*inside)] = True
    return replace(work, shape=shape, boxes=[*stored, *missing_boxes(covered, work.seeds)])


def _block_shape(work: Plan, runs_at_once: int | tuple[int, int] | None) -> BlockShape:
    """The largest blocks of so many runs at most, as even as can be."""
    if isinstance(runs_at_once, tuple):
        return BlockShape(*runs_at_once)
    num = int(runs_at_once or usual_runs_at_once(work.devices))
    seeds_each = math.ceil(len(work.seeds) / (len(work.devices) * jax.process_count()))
    points = even(work.axes.num_points, num)
    return BlockShape(even(seeds_each, num // points), points)


def even(total: int, most: int) -> int:
    """The size of parts of a total, as even as can be, if none may be larger than `most`."""
    return math.ceil(total / math.ceil(total / most))


def _check_sizes(runs_at_once: Any, memory_limit: Any) -> None:
    for number in runs_at_once if isinstance(runs_at_once, tuple) else (runs_at_once,):
        if number is not None:
            checks.size("runs_at_once", number)
    if memory_limit is not None:
        checks.size("memory_limit", memory_limit)


def check_key(key: Any) -> None:
    """It is one typed key, of a kind that draws the same numbers whatever stands beside it."""
    checks.key(key)
    if "rbg" in (kind := str(jax.random.key_impl(key))):
        raise ValueError(
            f"key is of the kind {kind}, with which a run draws other numbers if others are made beside it: "
            "make it with jax.random.key(..., impl='threefry2x32')"
        )
