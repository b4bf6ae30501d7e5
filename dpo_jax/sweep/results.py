"""Results with names: a data set with a dimension for each axis, the seeds and the results' own dimensions."""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_jax.sweep.axes import Axis, coordinate
from dpo_jax.sweep.planning import Plan
from dpo_jax.sweep.store import Arrays, Block, Box, DamagedStoreError, Folder, blocks_of

if TYPE_CHECKING:
    import xarray

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Each result's own shape, and dtype."""


class Results:
    """Results of a grid in memory, filled block by block.

    Attributes:
      arrays: by name, with axes (combination, point, seed) before their own.
      done: which of these cells are filled.
    """

    def __init__(self, grid: tuple[int, int, int], seeds: Sequence[int], shapes: Shapes) -> None:
        self.arrays = {name: np.zeros((*grid, *own), dtype) for name, (own, dtype) in shapes.items()}
        self.done = np.zeros(grid, bool)
        self._places = {int(seed): place for place, seed in enumerate(seeds)}

    def fill(self, block: Block, arrays: Arrays) -> None:
        """Takes from a block what belongs to the grid."""
        points = [(i, point) for i, point in enumerate(block.points) if point >= 0]
        seeds = [(i, self._places[seed]) for i, seed in enumerate(block.seeds) if seed in self._places]
        if block.combination < 0 or not points or not seeds:
            return
        (from_points, to_points), (from_seeds, to_seeds) = zip(*points, strict=True), zip(*seeds, strict=True)
        for name, array in arrays.items():
            self.arrays[name][block.combination][np.ix_(to_points, to_seeds)] = array[np.ix_(from_points, from_seeds)]
        self.done[block.combination][np.ix_(to_points, to_seeds)] = True


def open_results(path: str | os.PathLike[str]) -> "xarray.Dataset":
    """The results that a folder holds, without the function that made them.

    Axes have all values that the folder was ever asked for. What is not computed (yet) is NaN; the attribute
    `complete` says whether there is any such thing.

    Args:
      path: the folder: `out` of `grid`, or `--out` of the command, which keeps its sweep in `runs`.

    Raises:
      FileNotFoundError: the folder holds no sweep.
      DamagedStoreError: the folder holds a sweep that is not what was written.
    """
    places = [place for place in (Path(path), Path(path, "runs")) if (place / "sweep.json").exists()]
    folder = Folder(places[0]) if places else None
    if folder is None or folder.manifest is None:
        raise FileNotFoundError(f"{path} holds no sweep")
    axes, combinations, points, seeds = _contents(folder.manifest)
    shapes = {
        name: (tuple(result["shape"]), np.dtype(result["dtype"])) for name, result in folder.manifest["results"].items()
    }
    results = Results((len(combinations), len(points), len(seeds)), seeds, shapes)
    read_blocks(folder, folder.boxes(combinations, points), results, shapes)
    return labelled(results, axes, seeds, folder.manifest["dims"])


def read_blocks(
    folder: Folder, boxes: Sequence[Box], results: Results, shapes: Shapes, *, repair: bool = False
) -> set[int]:
    """Fills in what a folder holds; returns the numbers of these blocks.

    Args:
      folder: the folder.
      boxes: its boxes.
      results: what is filled.
      shapes: each result's own shape, and dtype.
      repair: whether damaged blocks are removed, so that they are made again.

    Raises:
      DamagedStoreError: blocks are not what was written; all of them are named.
    """
    done, read, damaged = folder.done(), set(), []
    for block in blocks_of(boxes, folder.shape):
        if block.number in done:
            try:
                results.fill(block, folder.read(block, shapes))
                read.add(block.number)
            except DamagedStoreError as problem:
                damaged.append((block, problem))
    if damaged and repair:
        folder.forget([block for block, _ in damaged])
    elif damaged:
        numbers = ", ".join(str(block.number) for block, _ in damaged[:10])
        more = f", ... ({len(damaged)} in all)" if len(damaged) > 10 else ""
        which = f"blocks {numbers}{more} are" if len(damaged) > 1 else f"block {numbers} is"
        raise DamagedStoreError(
            f"{folder.path} is damaged: {which} not what was written ({damaged[0][1]}). With repair=True (--repair) it "
            "is made again"
        )
    return read


def dimension_names(work: Plan, dims: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Names of each result's own dimensions."""
    names = {}
    for name, (own, _) in work.result_shapes.items():
        matching = [prefix for prefix in dims if name == prefix or name.startswith(f"{prefix}.")]
        given = tuple(dims[max(matching, key=len)]) if matching else ()
        if matching and len(given) != len(own):
            raise ValueError(f"dims names {len(given)} dimensions of {name!r}, which has {len(own)}")
        names[name] = given or tuple(f"{name}_{i}" for i in range(len(own)))
    unknown = [name for name in dims if not any(other == name or other.startswith(f"{name}.") for other in names)]
    if unknown:
        raise ValueError(f"dims names {unknown}, and the results are {sorted(names)}")
    for name, own_names in names.items():
        taken = [*work.axes.axes, "seed", *own_names]
        if repeated := sorted(other for other in own_names if taken.count(other) > 1):
            raise ValueError(f"dims of {name!r} must not be those of axes or each other, got {repeated[0]!r}")
    _check_labels(work, names)
    return names


def labelled(
    results: Results, axes: Mapping[str, Axis], seeds: Sequence[int], dims: Mapping[str, Sequence[str]]
) -> "xarray.Dataset":
    """Results as a data set, its dimensions in the order of the axes, then `seed`, then the results' own."""
    import xarray

    stored = sorted(axes, key=lambda name: axes[name].traced)  # stable: static axes first
    sizes = tuple(len(axes[name]) for name in stored)
    done = results.done.reshape(*sizes, len(seeds))
    variables = {}
    for name, array in results.arrays.items():
        shaped = array.reshape(*sizes, *array.shape[2:])
        if not done.all():
            shaped = np.where(done.reshape(*done.shape, *(1,) * (shaped.ndim - done.ndim)), shaped, np.nan)
        variables[name] = xarray.Variable((*stored, "seed", *dims[name]), shaped)
    coordinates: dict[str, Any] = {"seed": np.asarray(seeds)}
    for name, axis in axes.items():
        coordinates[name] = axis.coordinate
        for leaf, column in axis.columns.items():
            own = tuple(f"{leaf}_{i}" for i in range(column.ndim - 1))
            coordinates[leaf] = ((name, *own), column)
    made = xarray.Dataset(variables, coords=coordinates, attrs={"complete": bool(done.all())})
    return made.transpose(*axes, "seed", ...)


def _check_labels(work: Plan, names: Mapping[str, Sequence[str]]) -> None:
    """Fails early on names that a data set cannot have."""
    combinations, points, _ = work.grid_shape
    one_seed = Results((combinations, points, 0), [], {})
    one_seed.arrays = {
        name: np.broadcast_to(np.zeros((), dtype), (combinations, points, 0, *own))
        for name, (own, dtype) in work.result_shapes.items()
    }
    try:
        labelled(one_seed, work.axes.axes, [], names)
    except ValueError as problem:
        raise ValueError(f"results cannot be called as they are: {problem}") from problem


def _contents(manifest: dict[str, Any]) -> tuple[dict[str, Axis], list[Any], list[Any], list[int]]:
    """Axes, combinations, points and seeds of all boxes; values in the order in which they were asked for."""
    values: dict[str, dict[str, Any]] = {name: {} for name in manifest["axes"]}
    seeds: dict[int, None] = {}
    for box in manifest["boxes"]:
        for names in (*box["combinations"], *box["points"]):
            for axis, name in names.items():
                values[axis].setdefault(json.dumps(name), name)
        span = box["seeds"]
        seeds.update(dict.fromkeys(range(span["from"], span["below"]) if isinstance(span, dict) else span))
    axes = {name: _read_axis(name, list(found.values()), manifest) for name, found in values.items()}

    def product(kind: str) -> list[Any]:
        chosen = [name for name in axes if manifest["axes"][name] == kind]
        listed = itertools.product(*(axes[name].names for name in chosen))
        return [dict(zip(chosen, each, strict=True)) for each in listed]

    return axes, product("static"), product("traced"), sorted(seeds)


def _read_axis(name: str, names: list[Any], manifest: dict[str, Any]) -> Axis:
    traced = manifest["axes"][name] == "traced"
    if isinstance(names[0], dict):
        columns = {leaf: np.array([row[leaf] for row in names]) for leaf in names[0]}
        return Axis((), tuple(names), np.arange(len(names)), traced, columns)
    values: Any = np.array(names, manifest["dtypes"][name]) if traced else names
    return Axis((), tuple(names), coordinate(values, floats=traced and values.dtype.kind == "f"), traced)


def check_results_fit(work: Plan, limit: int) -> None:
    """Raises ValueError if the results would not fit into this machine's memory."""
    if work.result_bytes > limit:
        raise ValueError(
            f"the results take {work.result_bytes:,} bytes of memory, and only {limit:,} may be used: let run return "
            "less"
        )
