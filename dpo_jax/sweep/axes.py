"""Axes: what a sweep varies. Floats are traced, one program for them all; anything else is discrete."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Axes(NamedTuple):
    """The axes of a grid, in the order in which they were given.

    Attributes:
      traced: values of the axes that may differ within one compiled program: arrays of floats.
      discrete: values of the axes that decide which program is compiled: names, sizes, functions.
      names: of all axes.
      coordinates: by what each axis's values are selected in results (see `coordinate`).
    """

    traced: dict[str, np.ndarray]
    discrete: dict[str, tuple[Any, ...]]
    names: tuple[str, ...]
    coordinates: dict[str, np.ndarray]

    @property
    def shape(self) -> dict[str, int]:
        """How many values each axis has."""
        return {name: len(values) for name, values in self.labels.items()}

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """All combinations of discrete values: one program each; the last axis varies fastest."""
        return [dict(zip(self.discrete, values, strict=True)) for values in itertools.product(*self.discrete.values())]

    def points(self, which: slice) -> dict[str, np.ndarray]:
        """Some combinations of traced values, as one flat array for each axis; the last axis varies fastest."""
        if not self.traced:
            return {}
        places = np.unravel_index(np.arange(which.start, which.stop), [len(values) for values in self.traced.values()])
        return {name: values[place] for (name, values), place in zip(self.traced.items(), places, strict=True)}

    @property
    def num_points(self) -> int:
        """How many combinations of traced values there are."""
        return int(np.prod([len(values) for values in self.traced.values()], dtype=int))

    @property
    def labels(self) -> dict[str, list[Any]]:
        """Each axis's values, exactly: floats, or what discrete values are called."""
        traced = {name: values.tolist() for name, values in self.traced.items()}
        discrete = {name: [label(value) for value in values] for name, values in self.discrete.items()}
        return {name: {**traced, **discrete}[name] for name in self.names}


def read_axes(run: Callable[..., Any], axes: Mapping[str, Iterable[Any]]) -> Axes:
    """Sorts axes into traced and discrete ones.

    Args:
      run: the function that is to be swept, `run(key, **point)`.
      axes: by name, the values to try.

    Raises:
      TypeError: `run` does not take an axis, or needs an argument that is no axis; or an axis is no list of values.
      ValueError: an axis has no values, or one twice, or one that is not finite; or it is called `seed`.
    """
    _check_names(run, tuple(axes))
    traced: dict[str, np.ndarray] = {}
    discrete: dict[str, tuple[Any, ...]] = {}
    coordinates: dict[str, np.ndarray] = {}
    for name, values in axes.items():
        given = _listed(name, values)
        listed = tuple(map(_plain, given))
        if all(_is_number(value) for value in listed) and any(isinstance(value, float) for value in listed):
            traced[name] = _floats(name, listed)
        else:
            discrete[name] = listed
            _check_finite(name, [value for value in listed if isinstance(value, float)])
        _check_distinct(name, listed)
        coordinates[name] = coordinate(given, floats=name in traced)
    return Axes(traced, discrete, tuple(axes), coordinates)


def label(value: Any) -> str | int | float | bool:
    """What a value is called in results."""
    if isinstance(value, str | int | float | bool):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", str(getattr(value, "__name__", value)))  # another one in each process


def coordinate(values: Sequence[Any], *, floats: bool) -> np.ndarray:
    """By what values are selected in results: themselves, or what they are called.

    A float32 that is 0.1 up to rounding is found by 0.1, though 0.1 is no float32: an axis of float32 has float32
    coordinates, and a value within four units in the last place of a number of at most four digits has that number as
    its coordinate. (`jnp.geomspace(0.01, 10, 4)` holds 0.100000024; it is selected by 0.1, not by itself. `run` still
    gets 0.100000024.) Narrower floats are selected by the shortest number that rounds to them.

    Args:
      values: of an axis.
      floats: whether all of them shall be floats, as those of traced axes are.
    """
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


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | set | frozenset) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"axis {name} must be a list of values, got {values!r}")
    if getattr(values, "ndim", 1) > 1:
        raise ValueError(f"axis {name} must have one dimension, got {values!r}")
    listed = tuple(np.asarray(values) if hasattr(values, "dtype") else values)
    if not listed:
        raise ValueError(f"axis {name} has no values")
    return listed


def _floats(name: str, values: tuple[Any, ...]) -> np.ndarray:
    _check_finite(name, values)
    floats = np.array(values, np.float64)
    dtype = np.dtype(jnp.result_type(float))
    _, firsts, places = np.unique(floats.astype(dtype), return_index=True, return_inverse=True)
    for value, first in zip(floats, floats[firsts[places]], strict=True):
        if value != first:
            raise ValueError(f"axis {name} has values that {dtype} does not tell apart: {first} and {value}")
    smallest = float(jnp.finfo(dtype).tiny)
    for value in floats:
        if 0 < abs(value) < smallest:
            raise ValueError(
                f"axis {name} has {value}, which becomes 0 in {dtype}: it keeps no less than {smallest:.3g}"
            )
    return floats


def _check_finite(name: str, values: Sequence[int | float]) -> None:
    largest = float(jnp.finfo(jnp.result_type(float)).max)
    for value in values:
        if not abs(value) <= largest:
            raise ValueError(f"axis {name} must be finite, got {_shortened(value)}")


def _check_distinct(name: str, values: Sequence[Any]) -> None:
    seen: dict[Any, Any] = {}
    for value in values:
        called = label(value)
        if called in seen and seen[called] is not value and not isinstance(value, str | int | float | bool):
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
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A number of Python's for one of NumPy's or JAX's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
