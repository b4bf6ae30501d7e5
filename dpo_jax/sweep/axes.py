"""Axes: what a sweep varies. Numbers are traced, one program for all of them; anything else is static.

An axis is *traced* if its values are numbers, or a pytree of arrays with a common leading axis. It is *static*, with
one program for each value, if its values are anything else (names, functions, Booleans), or if it says so:
`static([8, 16])`.
"""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
      names: of its values in a folder: numbers, names of static values, rows of a table.
      coordinate: by what its values are selected in results.
      traced: whether one program serves all its values.
      columns: further coordinates, of tables: the leaves, by name.
    """

    values: Any
    names: tuple[Any, ...]
    coordinate: np.ndarray
    traced: bool
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


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
        return int(np.prod([len(axis) for axis in self.traced.values()], dtype=int))

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
        sizes = [len(axis) for axis in axes.values()]
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


def coordinate(values: Iterable[Any], *, floats: bool = False) -> np.ndarray:
    """By what values are selected in results: themselves, or what they are called.

    A float32 that is 0.1 up to rounding is found by 0.1, though 0.1 is no float32: an axis of float32 has float32
    coordinates, and a value within four units in the last place of a number of at most four digits has that number as
    its coordinate. (`jnp.geomspace(0.01, 10, 4)` holds 0.100000024; it is selected by 0.1, not by itself. `run` still
    gets 0.100000024.) Narrower floats are selected by the shortest number that rounds to them.

    Args:
      values: of an axis.
      floats: whether all of them shall be floats.
    """
    values = list(values)
    called = [float(value) if floats else label(_plain(value)) for value in values]
    narrow = [_is_narrow(value) for value in values]
    written = [_written(value) if narrow[i] else called[i] for i, value in enumerate(values)]
    if len(set(written)) < len(written):
        written = called
    if all(narrow):
        return np.array(written, np.float32)
    array = np.array(written) if len(set(map(type, written))) == 1 else np.array(written, object)
    return array if array.tolist() == written else np.array(written, object)  # integers that are no int64


def name_run(problem: Exception, combination: Mapping[str, Any], points: Mapping[str, Any]) -> None:
    """Adds to an error which run it came from: its discrete values, and what is known of traced ones."""
    values = [f"{name}={_shortened(label(value))}" for name, value in combination.items()]
    values += [f"{name}={value}" for name, value in points.items()]
    problem.add_note(f"This came from run with {', '.join(values) or 'no axes'}.")


def _is_narrow(value: Any) -> bool:
    """Whether a value is a float of NumPy's or JAX's with 32 bits or less."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize <= 4


def _written(value: Any) -> float:
    """The shortest number that a float32 or narrower float stands for."""
    value = np.asarray(value)[()]
    near = 4 * float(np.spacing(abs(value))) if value.dtype == np.float32 else 0.0
    for digits in range(1, 10):
        written = float(f"{float(value):.{digits}g}")
        if value.dtype.type(written) == value or (digits <= 4 and abs(written - float(value)) <= near):
            return written
    return float(value)


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
    names = tuple(label(value) for value in values)
    _check_distinct(name, values, names)
    return Axis(values, names, coordinate(names), traced=False)


def _number_axis(name: str, given: tuple[Any, ...]) -> Axis:
    """Whole numbers stay whole if all of them are; others are as precise as the programs."""
    values = tuple(_plain(value) for value in given)
    _check_finite(name, values)
    _check_distinct(name, values, values)
    whole = all(isinstance(value, int) for value in values)
    dtype = np.dtype(jnp.result_type(int if whole else float))
    if whole and not all(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max for value in values):
        raise ValueError(f"axis {name} must fit into {dtype}, got {_shortened(max(values, key=abs))}")
    array = np.array(values, dtype)
    if not whole:
        _check_told_apart(name, values, array)
    return Axis(array, values if whole else tuple(map(float, values)), coordinate(given, floats=not whole), traced=True)


def _table_axis(name: str, values: PyTree) -> Axis:
    leaves = jax.tree_util.tree_leaves_with_path(values)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in arrays.values()}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(f"{leaf} {array.shape}" for leaf, array in arrays.items()) or "no arrays"
        raise ValueError(f"axis {name} must be arrays with a common leading axis, got {shapes}")
    (num,) = sizes
    if not num:
        raise ValueError(f"axis {name} has no values")
    for leaf, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise TypeError(f"axis {name}: {leaf} must hold numbers, got {array.dtype}")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"axis {name}: {leaf} must be finite")
    columns = {f"{name}.{leaf}" if leaf else f"{name}.value": array for leaf, array in arrays.items()}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    names = tuple(dict(zip(columns, row, strict=True)) for row in rows)
    _check_distinct(name, names, tuple(json.dumps(each) for each in names))
    held = jax.tree.map(lambda leaf: np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)), values)
    return Axis(held, names, np.arange(num), traced=True, columns=columns)


def _is_table(values: Any) -> bool:
    """Whether these are a pytree of arrays, and not a list of values."""
    if isinstance(values, Mapping) or hasattr(values, "_fields"):
        return True
    if hasattr(values, "dtype"):
        return getattr(values, "ndim", 1) > 1
    return not isinstance(values, list | tuple | str) and not jax.tree_util.all_leaves([values])


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | set | frozenset) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"axis {name} must be a list of values, got {values!r}")
    listed = tuple(np.asarray(values) if hasattr(values, "dtype") else values)
    if not listed:
        raise ValueError(f"axis {name} has no values")
    return listed


def _check_told_apart(name: str, values: tuple[Any, ...], array: np.ndarray) -> None:
    """Raises ValueError if numbers become one, or zero, in the dtype of the programs."""
    smallest = float(np.finfo(array.dtype).smallest_normal)
    _, firsts, places = np.unique(array, return_index=True, return_inverse=True)
    for value, first in zip(values, (values[i] for i in firsts[places]), strict=True):
        if value != first:
            raise ValueError(f"axis {name} has values that {array.dtype} does not tell apart: {first} and {value}")
    for value in values:
        if 0 < abs(value) < smallest:
            raise ValueError(
                f"axis {name} has {value}, which becomes 0 in {array.dtype}: it keeps no less than {smallest:.3g}"
            )


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


def _shortened(value: Any) -> str:
    text = repr(value)
    if len(text) <= 40:
        return text
    return f"a number of {len(text)} digits" if isinstance(value, int) else f"{text[:37]}..."


def _is_number(value: Any) -> bool:
    return isinstance(_plain(value), int | float) and not isinstance(_plain(value), bool)


def _plain(value: Any) -> Any:
    """A number of Python's for one of NumPy's or JAX's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
