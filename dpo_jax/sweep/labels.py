"""Results with names: a data set with a dimension for each axis, the seeds and the results' own dimensions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpo_jax.sweep.planning import Plan

if TYPE_CHECKING:
    import xarray


def dimension_names(work: Plan, dims: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
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
        labelled(one_seed, work.axes.coordinates, tuple(work.axes.discrete), names)
    except ValueError as problem:
        raise ValueError(f"results cannot be called as they are: {problem}") from problem


def labelled(
    arrays: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    discrete: tuple[str, ...],
    names: Mapping[str, Sequence[str]],
) -> "xarray.Dataset":
    """Results as a data set, its dimensions in the order of the axes, then `seed`, then the results' own.

    Args:
      arrays: results by name, with axes (combination, point, seed) before their own.
      labels: coordinates of the axes.
      discrete: which of the axes are discrete.
      names: the results' own dimensions.
    """
    import xarray

    stored = (*discrete, *(name for name in labels if name not in discrete))
    sizes = tuple(len(labels[name]) for name in stored)
    variables = {
        name: xarray.Variable((*stored, "seed", *names[name]), array.reshape(*sizes, *array.shape[2:]))
        for name, array in arrays.items()
    }
    num_seeds = next(iter(arrays.values())).shape[2]
    return xarray.Dataset(variables, coords={**labels, "seed": range(num_seeds)}).transpose(*labels, "seed", ...)
