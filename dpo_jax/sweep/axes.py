"""Axes: what a sweep varies. Numbers are traced, one program for all of them; anything else is static.

An axis is *traced* if its values are numbers, or a pytree of arrays with a common leading axis. It is *static*, with one
program for each value, if its values are anything else (names, functions, Booleans), or if it says so: `static([8, 16])`.
"""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class Static(NamedTuple):
    """Values that are compiled in: what `static` makes."""

    values: tuple[Any, ...]


def static(values: Iterable[Any]) -> Static:
    """An axis whose values are compiled in, one program for each: for numbers that decide a shape.

    >>> static([8, 16])
    Static(values=(8, 16))
    """
    return Static(tuple(values))


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
      values: of a traced axis, a pytree of arrays with a leading axis; of a static one, a tuple.
      labels: what its values are called in results.
      traced: whether one program serves all its values.
      coordinates: further numbers that belong to each value, by name: the leaves of a pytree.
    """

    values: Any
    labels: tuple[Any, ...]
    traced: bool
    coordinates: Mapping[str, np.ndarray]

    @property
    def names(self) -> tuple[Any, ...]:
        """What tells a value from others in a folder: its label, or the leaves of its pytree."""
        if not self.coordinates:
            return self.labels
        rows = zip(*(column.tolist() for column in self.coordinates.values()), strict=True)
        return tuple(dict(zip(self.coordinates, row, strict=True)) for row in rows)


class Axes(NamedTuple):
    """The axes of a grid, in the order in which they were given."""

    axes: dict[str, Axis]

    @property
    def traced(self) -> dict[str, Axis]:
        """The axes that one program serves."""
        return {name: axis for name, axis in self.axes.items() if axis.traced}

    @property
    def static(self) -> dict[str, Axis]:
        """The axes that are compiled in."""
        return {name: axis for name, axis in self.axes.items() if not axis.traced}

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """All combinations of static values: one program each; the last axis varies fastest."""
        values = itertools.product(*(axis.values for axis in self.static.values()))
        return [dict(zip(self.static, each, strict=True)) for each in values]

    @property
    def num_points(self) -> int:
        """How many combinations of traced values there are."""
        return int(np.prod([len(axis.labels) for axis in self.traced.values()], dtype=int))

    def points(self, which: Iterable[int]) -> dict[str, PyTree]:
        """Some combinations of traced values, arrays with a row for each; the last axis varies fastest."""
        places = self._places(self.traced, which)
        return {
            name: jax.tree.map(lambda leaf, place=place: leaf[place], self.axes[name].values)
            for name, place in zip(self.traced, places, strict=True)
        }

    @property
    def names_of_combinations(self) -> list[dict[str, Any]]:
        """Each combination of static values as a folder calls it."""
        return self._names(self.static)

    @property
    def names_of_points(self) -> list[dict[str, Any]]:
        """Each combination of traced values as a folder calls it."""
        return self._names(self.traced)

    @staticmethod
    def _names(axes: dict[str, Axis]) -> list[dict[str, Any]]:
        return [dict(zip(axes, each, strict=True)) for each in itertools.product(*(a.names for a in axes.values()))]

    @staticmethod
    def _places(axes: dict[str, Axis], which: Iterable[int]) -> tuple[np.ndarray, ...]:
        sizes = [len(axis.labels) for axis in axes.values()]
        return np.unravel_index(np.asarray(which, int), sizes) if sizes else ()


def read_axes(run: Callable[..., Any], axes: Mapping[str, Any]) -> Axes:
    """Sorts axes into traced and static ones.

    Args:
      run: the function that is to be swept, `run(key, **point)`.
      axes: by name, the values to try.

    Raises:
      TypeError: `run` does not take an axis, or needs an argument that is no axis; or an axis is no list of values.
      ValueError: an axis has no values, or one twice, or one that is not finite or that the dtype of the programs
        cannot hold; or it is called `seed`.
    """
    _check_names(run, tuple(axes))
    return Axes({name: _axis(name, values) for name, values in axes.items()})


def label(value: Any) -> str | int | float | bool:
    """What a value is called in results."""
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, partial):
        arguments = [repr(label(each)) for each in value.args]
        arguments += [f"{name}={label(each)}" for name, each in value.keywords.items()]
        return f"{label(value.func)}({', '.join(arguments)})"
    return re.sub(r" at 0x[0-9a-f]+", "", str(getattr(value, "__name__", value)))  # another one in each process


def _axis(name: str, values: Any) -> Axis:
    if isinstance(values, Static):
        return _static_axis(name, values.values)
    if _is_table(values):
        return _table_axis(name, values)
    listed = _listed(name, values)
    if all(_is_number(value) for value in listed):
        return _number_axis(name, listed)
    return _static_axis(name, listed)


def _static_axis(name: str, values: tuple[Any, ...]) -> Axis:
    values = tuple(_plain(value) for value in values)
    if not values:
        raise ValueError(f"axis {name} has no values")
    _check_finite(name, [value for value in values if isinstance(value, float)])
    labels = tuple(label(value) for value in values)
    _check_distinct(name, values, labels)
    return Axis(values, labels, traced=False, coordinates={})


def _number_axis(name: str, values: tuple[Any, ...]) -> Axis:
    """Whole numbers stay whole if all of them are; others are as precise as the programs."""
    labels = tuple(_decimal(value) for value in values)
    _check_finite(name, labels)
    _check_distinct(name, labels, labels)
    dtype = jnp.result_type(int if all(isinstance(value, int) for value in labels) else float)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        for value in labels:
            if not limits.min <= value <= limits.max:
                raise ValueError(f"axis {name} has the value {_shortened(value)}, which {dtype} cannot hold")
    exact = [_plain(value) for value in values]
    array = np.array(exact, dtype)
    _check_told_apart(name, exact, array)
    return Axis(array, labels, traced=True, coordinates={})


def _table_axis(name: str, values: PyTree) -> Axis:
    leaves = jax.tree_util.tree_leaves_with_path(values)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in arrays.values()}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(f"{leaf} {array.shape}" for leaf, array in arrays.items()) or "no arrays"
        raise ValueError(f"axis {name} must be arrays with a common leading axis, got {shapes}")
    for leaf, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise TypeError(f"axis {name}: {leaf} must hold numbers, got {array.dtype}")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"axis {name}: {leaf} must be finite")
    (num,) = sizes
    if not num:
        raise ValueError(f"axis {name} has no values")
    canonical = jax.tree.map(lambda leaf: np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)), values)
    axis = Axis(canonical, tuple(range(num)), traced=True, coordinates={f"{name}.{leaf}": a for leaf, a in arrays.items()})
    _check_distinct(name, axis.names, tuple(json.dumps(each) for each in axis.names))
    return axis


def _is_table(values: Any) -> bool:
    """Whether these are a pytree of arrays, and not a list of values."""
    if isinstance(values, Mapping) or hasattr(values, "_fields"):
        return True
    if isinstance(values, list | tuple | str) or hasattr(values, "dtype") and getattr(values, "ndim", 1) < 2:
        return False
    return hasattr(values, "dtype") or not jax.tree_util.all_leaves([values])


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | set | frozenset) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"axis {name} must be a list of values, got {values!r}")
    listed = tuple(np.asarray(values) if hasattr(values, "dtype") else values)
    if not listed:
        raise ValueError(f"axis {name} has no values")
    return listed


def _check_told_apart(name: str, values: list[Any], array: np.ndarray) -> None:
    """Raises ValueError if numbers become one, or zero, in the dtype of the programs."""
    smallest = 0 if array.dtype.kind == "i" else np.finfo(array.dtype).smallest_normal
    for value, held in zip(values, array, strict=True):
        if value != 0 and abs(held) < smallest:
            raise ValueError(f"axis {name} has the value {value}, which is 0 in {array.dtype}")
    _, firsts, places = np.unique(array, return_index=True, return_inverse=True)
    for value, first in zip(values, (values[i] for i in firsts[places]), strict=True):
        if value != first:
            raise ValueError(f"axis {name} has values that {array.dtype} does not tell apart: {first} and {value}")


def _check_finite(name: str, values: Iterable[int | float]) -> None:
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    for value in values:
        if not abs(value) <= largest:
            raise ValueError(f"axis {name} must be finite, got {_shortened(value)}")


def _check_distinct(name: str, values: Iterable[Any], labels: tuple[Any, ...]) -> None:
    seen: dict[Any, Any] = {}
    for value, called in zip(values, labels, strict=True):
        if called in seen and seen[called] is not value and not isinstance(value, str | int | float | bool | dict):
            raise ValueError(f"axis {name} has the value {called!r} twice, or two that are called so: name them apart")
        if called in seen:
            raise ValueError(f"axis {name} has the value {called!r} twice")
        seen[called] = value


def _check_names(run: Callable[..., Any], names: tuple[str, ...]) -> None:
    parameters = list(inspect.signature(run).parameters.values())[1:]  # the first one is the key
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if "seed" in names:
        raise ValueError("no axis can be called seed: that is what num_seeds makes")
    for name in names:
        if not takes_any and name not in [parameter.name for parameter in by_name]:
            takes = ", ".join(parameter.name for parameter in by_name) or "none"
            raise TypeError(f"run takes no argument {name!r}; it takes, besides the key: {takes}")
    for parameter in by_name:
        if parameter.default is parameter.empty and parameter.name not in names:
            raise TypeError(f"run also needs {parameter.name!r}: give it as an axis, of one value perhaps")


def _shortened(value: float) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a number of {len(text)} digits"


def _is_number(value: Any) -> bool:
    return isinstance(_plain(value), int | float) and not isinstance(_plain(value), bool)


def _decimal(value: Any) -> int | float:
    """The shortest decimal number that is this value in its own dtype: 0.1 for the float32 next to it."""
    plain = _plain(value)
    return float(str(np.asarray(value))) if isinstance(plain, float) and hasattr(value, "dtype") else plain


def _plain(value: Any) -> Any:
    """A number of Python's for one of NumPy's or JAX's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
