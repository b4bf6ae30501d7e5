"""What a sweep will do, before any of it is done: programs, blocks, memory, time."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.sweep.axes import Axes, label, read_axes
from dpo_jax.sweep.programs import (
    BlockShape,
    Programs,
    TracedRun,
    bytes_needed,
    compile_all,
    fingerprint,
    impatient,
    naming,
    share_work,
    trace,
)
from dpo_jax.sweep.stopping import stopping
from dpo_jax.sweep.store import FORMAT, Block, DamagedStoreError, check_place, read_manifest, refuse_other

RUNS_AT_ONCE = {"cpu": 128}
"""How many runs a device makes at once, if memory allows: on a CPU, what its caches hold."""

RUNS_AT_ONCE_ON_ACCELERATORS = 65536
"""Elsewhere. A kernel of a training step then moves an estimated 90 MB (`experiments.described_devices`)."""


@dataclass(frozen=True)
class Plan:
    """What there is to do, before any of it is done.

    Attributes:
      name: what `run` is called.
      axes: what is varied.
      key: the base key; seed `i` has `jax.random.fold_in(key, i)`.
      num_seeds: seeds for each point.
      runs: `run`, traced, for each combination of discrete values.
      shape: how many runs a device makes at once.
      devices: the devices of this process.
      memory_limit: bytes that programs may take on each device.
      fingerprints: of what `run` computes, for each combination of discrete values; none without a folder.
    """

    name: str
    axes: Axes
    key: Key[Array, ""]
    num_seeds: int
    runs: list[TracedRun]
    shape: BlockShape
    devices: Sequence[jax.Device]
    memory_limit: int
    fingerprints: tuple[str, ...] = ()

    @cached_property
    def programs(self) -> Programs:
        """All that there is to run, compiled when it is asked for."""
        return compile_all(self.runs, self.shape, self.devices)

    def values(self, seeds: np.ndarray) -> list[Array]:
        """What the runs of some seeds share."""
        return self.programs.common(self.key, seeds) if self.programs.common else []

    def seeds(self, firsts: Sequence[int]) -> np.ndarray:
        """The seeds that devices take, from the first one of each; those without one of their own repeat the last's."""
        firsts = [*firsts, *[firsts[-1]] * (len(self.devices) - len(firsts))]
        return np.concatenate([np.arange(first, first + self.shape.seeds, dtype=np.uint32) for first in firsts])

    def points(self, which: slice) -> dict[str, np.ndarray]:
        """The traced values of a block; the last point fills it up."""
        missing = (0, self.shape.points - (which.stop - which.start))
        points, dtype = self.axes.points(which), jnp.result_type(float)
        return {name: np.pad(values.astype(dtype), missing, "edge") for name, values in points.items()}

    @property
    def memory(self) -> int:
        """Bytes that the largest program takes on each device."""
        return max(bytes_needed(program) for program in (self.programs.common, *self.programs.runs) if program)

    def estimated_seconds(self) -> float:
        """Makes a block of each program on each device, and tells how long the whole grid takes at that pace."""
        seeds, points = self.seeds([0]), self.points(slice(0, self.shape.points))
        num_rounds = math.ceil(self._num_parts.seeds / (len(self.devices) * jax.process_count()))
        of_values = _seconds(partial(self.values, seeds))
        arguments = self.values(seeds), self.key, seeds, points
        of_runs = [_seconds(partial(program, *arguments)) for program in self.programs.runs]
        return num_rounds * (of_values + self._num_parts.points * sum(of_runs))

    @property
    def num_runs(self) -> int:
        """How many runs the grid has."""
        return self.num_points * self.num_seeds

    @property
    def num_points(self) -> int:
        """How many points the grid has."""
        return len(self.axes.combinations) * self.axes.num_points

    @property
    def result_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape, with axes (combination, point, seed) first, and dtype of each result."""
        grid = (len(self.axes.combinations), self.axes.num_points, self.num_seeds)
        return {name: ((*grid, *result.shape), np.dtype(result.dtype)) for name, result in self.runs[0].outputs.items()}

    @property
    def result_bytes(self) -> int:
        """How much space all results take."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.result_shapes.values())

    @property
    def num_blocks(self) -> int:
        """How many blocks the grid is cut into."""
        return len(self.runs) * math.prod(self._num_parts)

    @property
    def _num_parts(self) -> BlockShape:
        """How many parts seeds and points are cut into."""
        totals = self.num_seeds, self.axes.num_points
        return BlockShape(*(math.ceil(total / size) for total, size in zip(totals, self.shape, strict=True)))

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

    def known_at_once(self) -> dict[str, Any]:
        """What is known of the manifest before anything is traced."""
        device = self.devices[0]
        return {
            "format": FORMAT,
            "run": self.name,
            "versions": {package: version(package) for package in ("dpo_jax", "jax", "jaxlib")},
            "device": f"{device.platform} ({device.device_kind})",
            "key": [str(jax.random.key_impl(self.key)), *np.asarray(jax.random.key_data(self.key)).tolist()],
            "num_seeds": self.num_seeds,
            "axes": self.axes.labels,
            "order of axes": list(self.axes.names),
        }

    def manifest(self) -> dict[str, Any]:
        """What decides the results, to the last bit."""
        return {
            **self.known_at_once(),
            "runs_at_once": self.shape._asdict(),
            "results": {
                name: {"shape": list(shape), "dtype": dtype.str} for name, (shape, dtype) in self.result_shapes.items()
            },
            "programs": list(self.fingerprints),
        }


def plan(
    run: Callable[..., Any],
    key: Key[Array, ""],
    *,
    num_seeds: int,
    out: str | os.PathLike[str] | None = None,
    runs_at_once: int | None = None,
    memory_limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    **axes: Iterable[Any],
) -> Plan:
    """What `grid` would do: how many runs, programs and bytes. See `grid` for arguments and errors.

    What a folder does not fit is told as soon as it can be: axes and sizes first, then each program once it is traced.
    """
    _check_key(key)
    for name, number in {"num_seeds": num_seeds, "runs_at_once": runs_at_once, "memory_limit": memory_limit}.items():
        if name == "num_seeds" or number is not None:
            checks.size(name, number)
    if num_seeds > 2**32:
        raise ValueError(f"num_seeds must be at most 2**32, got {num_seeds}")
    read = read_axes(run, axes)
    devices = list(jax.local_devices() if devices is None else devices)
    if not devices:
        raise ValueError("devices names none")
    limit = memory_limit or free_memory(devices)
    work = Plan(str(label(run)), read, key, int(num_seeds), [], BlockShape(1, 1), devices, limit)
    folder = None if out is None else Path(out)
    stored = None if folder is None else _stored(folder, work, runs_at_once)
    if folder and stored:
        work = replace(work, shape=stored_shape(folder, stored))
    with stopping():
        for combination in read.combinations:
            with naming(combination, tuple(read.traced)):
                traced = trace(run, key, tuple(read.traced), combination)
            work = replace(work, runs=[*work.runs, traced])
            _check_same_results(work)
            if folder:
                work = replace(work, fingerprints=(*work.fingerprints, fingerprint(traced.jaxpr)))
            if folder and stored:
                _refuse_changed(folder, work, stored)
        if work.num_points > 1:
            work = replace(work, runs=share_work(work.runs))
        if folder and stored:
            refuse_other(folder, {**stored, "dims": None}, {**work.manifest(), "dims": None})
            return work
        wanted = runs_at_once or RUNS_AT_ONCE.get(devices[0].platform, RUNS_AT_ONCE_ON_ACCELERATORS)
        return _in_largest_blocks(work, int(wanted))


def _stored(folder: Path, work: Plan, runs_at_once: int | None) -> dict[str, Any] | None:
    """What a folder says of its sweep, if it holds one; refuses another one as far as it is known without tracing."""
    check_place(folder)
    stored = read_manifest(folder)
    if stored is not None:
        known = work.known_at_once()
        refuse_other(folder, {name: stored.get(name) for name in known}, known)
        number = math.prod(stored_shape(folder, stored))
        if runs_at_once is not None and number > runs_at_once:
            raise ValueError(
                f"{folder} holds another sweep: {number} runs at once, not {runs_at_once}; choose another folder"
            )
    return stored


def _refuse_changed(folder: Path, work: Plan, stored: Mapping[str, Any]) -> None:
    """Raises ValueError if the last combination that was traced is not what made a folder."""
    results, programs = work.manifest()["results"], stored.get("programs")
    refuse_other(folder, {"results": stored.get("results")}, {"results": results})
    i = len(work.runs) - 1
    if not isinstance(programs, list) or programs[i : i + 1] != [work.fingerprints[i]]:
        values = ", ".join(f"{name}={label(value)!r}" for name, value in work.axes.combinations[i].items())
        raise ValueError(
            f"{folder} holds another sweep: what run computes{f' with {values}' if values else ''} has changed since "
            "the folder was made (its code, or numbers that it uses); choose another folder"
        )


def _in_largest_blocks(work: Plan, num_runs: int) -> Plan:
    """The plan with the largest blocks, of so many runs at most, that fit into memory."""
    seeds_each = math.ceil(work.num_seeds / (len(work.devices) * jax.process_count()))
    while True:
        points = _even(work.axes.num_points, num_runs)
        work = replace(work, shape=BlockShape(_even(seeds_each, num_runs // points), points))
        if work.memory <= work.memory_limit or num_runs == 1:
            check_programs_fit(work)
            return work
        made = work.shape.seeds * work.shape.points
        num_runs = max(1, min(made // 2, int(0.9 * made * work.memory_limit / work.memory)))


def _even(total: int, most: int) -> int:
    """The size of parts of a total, as even as can be, if none may be larger than `most`."""
    return math.ceil(total / math.ceil(total / most))


def check_programs_fit(work: Plan) -> None:
    """Raises ValueError if programs need more memory than they may take."""
    if work.memory > work.memory_limit:
        what = "one run takes" if work.shape == (1, 1) else f"{work.shape.seeds * work.shape.points} runs at once take"
        raise ValueError(
            f"{what} {work.memory:,} bytes of memory on each device, and only {work.memory_limit:,} may be used"
        )


def _seconds(make: Callable[[], Any]) -> float:
    """How long something takes, the second time."""
    with impatient(1) as waiting, stopping():
        waiting.submit(jax.block_until_ready, make()).result()
        start = time.perf_counter()
        waiting.submit(jax.block_until_ready, make()).result()
        return time.perf_counter() - start


def free_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that a sweep may take on each device: most of what is free."""
    statistics = devices[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(0.9 * (statistics["bytes_limit"] - statistics["bytes_in_use"]))
    return _free_host_memory() // (2 * len(devices))


def _free_host_memory() -> int:
    return int(psutil.virtual_memory().available)


def check_results_fit(work: Plan, memory_limit: int | None) -> None:
    """Raises ValueError if the results would not fit into this machine's memory."""
    limit = memory_limit or _free_host_memory()
    if work.result_bytes > limit:
        raise ValueError(
            f"the results take {work.result_bytes:,} bytes of memory, and only {limit:,} may be used: let run return "
            "less, or give a folder for them (out)"
        )


def _check_key(key: Key[Array, ""]) -> None:
    checks.key(key)
    if "rbg" in (kind := str(jax.random.key_impl(key))):
        raise ValueError(
            f"key is of the kind {kind}, with which a run draws other numbers if others are made beside it: "
            "make it with jax.random.key(..., impl='threefry2x32')"
        )


def _check_same_results(work: Plan) -> None:
    """Raises ValueError if the last combination that was traced has other results than the first."""
    first, last = work.runs[0].outputs, work.runs[-1].outputs
    if last != first:
        differing = [name for name in sorted({**last, **first}) if last.get(name) != first.get(name)]
        combination = work.axes.combinations[len(work.runs) - 1]
        raise ValueError(f"run's results {differing} differ between {combination} and {work.axes.combinations[0]}")


def stored_shape(folder: Path, stored: Mapping[str, Any]) -> BlockShape:
    """The block shape of the sweep that a folder holds: another one would give other last bits."""
    size = stored.get("runs_at_once")
    if (
        not isinstance(size, dict)
        or size.keys() != set(BlockShape._fields)
        or not all(isinstance(number, int) and number > 0 for number in size.values())
    ):
        raise DamagedStoreError(f"{folder} is damaged: sweep.json gives runs_at_once as {size}")
    return BlockShape(**size)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
