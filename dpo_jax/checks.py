"""Checks of arguments, made outside of `jit`.

Each check raises an error that names the argument, its value and, for arrays, the row. Traced values (under `jit`,
`vmap` or `grad`) are unknown: only their shapes and dtypes are checked.
"""

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.types import Ratio


def is_traced(tree: Any) -> bool:
    """Whether any leaf of a pytree is traced, so that its values are unknown."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def key(value: Any, name: str = "key") -> None:
    """`value` is one typed PRNG key, as made by `jax.random.key`."""
    if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"{name} must be a typed key made by jax.random.key(seed), got {_describe(value)}")
    if value.shape:
        raise ValueError(f"{name} must be a single key, got an array of keys of shape {value.shape}")


def interval(name: str, value: Any, bounds: str) -> None:
    """`value` lies in an interval, in every entry.

    >>> interval("label_smoothing", 0.7, "[0, 0.5)")
    Traceback (most recent call last):
    ValueError: label_smoothing must be in [0, 0.5), got 0.7

    Args:
      name: of the argument, for the message.
      value: a number or an array.
      bounds: the interval as in mathematics: "(0, inf)" is positive and finite, "(0, inf]" also allows infinity.
    """
    low, high, low_included, high_included = _parse(bounds)

    def holds(x: Any) -> Any:
        return (x >= low if low_included else x > low) & (x <= high if high_included else x < high)

    _require(name, value, holds, f"in {bounds}")


@lru_cache
def _parse(bounds: str) -> tuple[float, float, bool, bool]:
    """Lower and upper bound of an interval, and whether each belongs to it."""
    low, high = bounds[1:-1].split(",")
    if bounds[0] not in "([" or bounds[-1] not in ")]":
        raise ValueError(f'an interval must be written like "[0, 1)", got {bounds!r}')
    return float(low), float(high), bounds[0] == "[", bounds[-1] == "]"


def zero_or_within(name: str, value: Any, low: float, high: float) -> None:
    """`value` is zero, or `low <= value <= high`, in every entry."""
    holds = lambda x: (x == 0) | ((low <= x) & (x <= high))  # noqa: E731
    _require(name, value, holds, f"zero or positive, and if positive between {low:g} and {high:g}")


def log_probabilities(**arrays: Any) -> None:
    """No entry is positive, except for rounding; NaN passes, and makes the loss NaN.

    A sum over the tokens of a response with probability near 1 may round to a little above 0. The square root of the
    dtype's epsilon is allowed: 3e-4 in float32, 0.09 in bfloat16, 1.5e-8 in float64.
    """
    for name, value in arrays.items():
        rounding = float(jnp.finfo(_dtype(name, value)).eps) ** 0.5
        _require(name, value, partial(_not_above, rounding), "zero or negative, as a log-probability is")


def finite(name: str, value: Any) -> None:
    """`value` is finite in every entry."""
    _require(name, value, np.isfinite, "finite")


def not_nan(name: str, value: Any) -> None:
    """`value` is not NaN in any entry; infinity is allowed."""
    _require(name, value, lambda x: ~np.isnan(x), "a number, not NaN")


def size(name: str, value: Any, *, at_least: int = 1) -> None:
    """`value` is a static whole number, and not too small."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number known before tracing, got {_describe(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def integers(name: str, value: Any) -> None:
    """`value` is an array of integers."""
    if not jnp.issubdtype(_dtype(name, value), jnp.integer):
        raise TypeError(f"{name} must hold integers, got {_describe(value)}")


def ids(name: str, value: Any, num: int) -> None:
    """`value` is an array of integers, each in `0 .. num - 1`. JAX would clamp others silently."""
    integers(name, value)
    _require(name, value, lambda x: (x >= 0) & (x < num), f"between 0 and {num - 1}")


def choices(name: str, weights: Any, *, at_least: int = 1) -> None:
    """Each row of `weights` has no negative entry and no NaN, and enough positive entries."""
    interval(name, weights, "[0, inf)")
    if is_traced(weights):
        return
    num_possible = np.sum(np.asarray(weights) > 0, axis=-1)
    too_few = np.argwhere(num_possible < at_least)
    if too_few.size:
        index = tuple(int(i) for i in too_few[0])
        raise ValueError(
            f"{name} must give at least {at_least} responses of each prompt a positive weight, "
            f"got {num_possible[index]} in row {_position(index)}"
        )


def floating(name: str, value: Any) -> None:
    """`value` is an array of floating-point numbers."""
    if not jnp.issubdtype(_dtype(name, value), jnp.floating):
        raise TypeError(f"{name} must hold floating-point numbers, got {_describe(value)}")


def same_shape(**arrays: Any) -> None:
    """All arrays have the same shape."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must be equal, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def same_structure(name: str, value: Any, expected: Any) -> None:
    """`value`, which a function returned, is a pytree of floating-point arrays with as many leaves as expected."""
    found, wanted = len(jax.tree.leaves(value)), len(jax.tree.leaves(expected))
    if found != wanted:
        raise TypeError(f"{name} must return {wanted} arrays, one for each of the responses, got {found}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        floating(f"{name}{jax.tree_util.keystr(path)}", leaf)


def same_dtype(**arrays: Any) -> None:
    """All arrays have the same dtype."""
    dtypes = {name: _dtype(name, array) for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        raise TypeError("dtypes must be equal, got " + ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items()))


def broadcasts(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """`value` is a scalar or an array that broadcasts to `shape` without changing it."""
    try:
        fits = np.broadcast_shapes(jnp.shape(value), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to the shape {shape}, got shape {jnp.shape(value)}")


def pair(name: str, value: Any) -> None:
    """`value` is a 2-tuple (chosen, rejected) of floating-point arrays."""
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(f"{name} must be a pair, a tuple (chosen, rejected), got {_describe(value)}")
    floating(f"{name}.chosen", value[0])
    floating(f"{name}.rejected", value[1])


def reference(value: Any) -> None:
    """The reference is not `None`."""
    if value is None:
        raise ValueError(
            "reference is missing: this loss compares with log-probabilities under a reference policy "
            "(train.with_reference computes them); losses.simpo_loss and others in reference_free need none"
        )


def boolean(name: str, value: Any) -> None:
    """`value` is an array of Booleans."""
    if _dtype(name, value) != np.bool_:
        raise TypeError(f"{name} must hold Booleans, got {_describe(value)}")


def hyperparameters(shape: tuple[int, ...], **values: Any) -> None:
    """Each value is a scalar, or has one entry for each loss."""
    for name, value in values.items():
        broadcasts(name, value, shape)


def lengths(value: Any, shape: tuple[int, ...]) -> None:
    """`value` is a 2-tuple (chosen, rejected) of arrays of the given shape whose entries are 1 or more."""
    if not (isinstance(value, tuple) and len(value) == 2):
        raise TypeError(f"lengths must be a pair (chosen, rejected), got {_describe(value)}")
    for name, side in zip(("lengths.chosen", "lengths.rejected"), value, strict=True):
        _dtype(name, side)
        if jnp.shape(side) != shape:
            raise ValueError(f"{name} must have the shape {shape} of the log-probabilities, got {jnp.shape(side)}")
        interval(name, side, "[1, inf)")


def rankings(policy: Any, reference: Any) -> None:
    """Two sequences of the same number of arrays of log-probabilities, at least two, with equal shapes and dtypes."""
    for name, value in (("policy", policy), ("reference", reference)):
        if not isinstance(value, tuple | list) or len(value) < 2:
            raise TypeError(f"{name} must be a sequence of two or more arrays, best first, got {_describe(value)}")
        for place, logps in enumerate(value):
            floating(f"{name}[{place}]", logps)
    if len(policy) != len(reference):
        raise ValueError(f"policy ranks {len(policy)} responses, but reference ranks {len(reference)}")
    places = {
        f"{name}[{k}]": x for name, value in (("policy", policy), ("reference", reference)) for k, x in enumerate(value)
    }
    same_shape(**places)
    same_dtype(**places)
    log_probabilities(**places)


def batch(name: str, value: Any) -> None:
    """`value` has at least one axis, the last of which is the batch."""
    if not jnp.shape(value):
        raise ValueError(f"{name} must be a batch, with at least one axis, got a scalar")


def rows(name: str, data: Any) -> int:
    """The number of rows of a data set: a pytree whose leaves share a leading axis that is not empty."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name} holds no arrays")
    shapes = {f"{name}{jax.tree_util.keystr(path)}": jnp.shape(leaf) for path, leaf in leaves}
    for leaf_name, shape in shapes.items():
        if not shape or shape[0] == 0:
            raise ValueError(f"{leaf_name} has no rows: its shape is {shape}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        listing = ", ".join(f"{leaf_name} {shape}" for leaf_name, shape in shapes.items())
        raise ValueError(f"{name} is ragged: its arrays must have equally many rows, got {listing}")
    return next(iter(shapes.values()))[0]


def one_per_row(
    name: str, value: Any, num_rows: int, hint: str = "take sums or means over tokens (losses.sequence_logps)"
) -> None:
    """Each leaf of `value` has one number for each row, and no axis of tokens; otherwise the error gives a hint."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if jnp.shape(leaf) != (num_rows,):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must have one number for each of the {num_rows} rows of the "
                f"batch, got shape {jnp.shape(leaf)}: {hint}"
            )


def weights(data: Any) -> None:
    """The weights of a data set, if it has any, are finite, none is negative, and at least one is positive."""
    value = getattr(data, "weights", None)
    if value is None or is_traced(value):
        return
    interval("data.weights", value, "[0, inf)")
    if not np.any(np.asarray(value) > 0):
        raise ValueError("data.weights must not all be zero")


def outcome(value: Any, *, parts: tuple[str, ...]) -> None:
    """`value`, which an objective returned, is a tuple of a scalar loss, a dict of numbers, and possibly a memory."""
    wanted = f"objective must return ({', '.join(parts)})"
    if not isinstance(value, tuple) or len(value) != len(parts):
        hint = " (without metrics, an empty dict)" if hasattr(value, "shape") or isinstance(value, float) else ""
        raise TypeError(f"{wanted}{hint}, got {_describe(value)}")
    loss, metrics = value[:2]
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(f"{wanted}, where loss is one floating-point number, got {_describe(loss)}: take its mean")
    metric_names("objective", metrics, taken={"loss", "step"})
    for name, metric in metrics.items():
        for leaf in jax.tree.leaves(metric) if isinstance(metric, Ratio) else [metric]:
            if not _is_numeric(leaf) or jnp.shape(leaf) != ():
                raise TypeError(f"metrics[{name!r}] must be one number for each batch, got {_describe(leaf)}")


def metric_names(function: str, metrics: Any, *, taken: Any) -> None:
    """`metrics`, which a function returned, is a dict without names that are taken."""
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(f"{function} must return metrics as a dict from names to numbers, got {_describe(metrics)}")
    if both := sorted(metrics.keys() & taken):
        raise ValueError(f"{function} must not return {', '.join(both)}: training has metrics of that name")


def evaluation(metrics: Any, *, taken: Any) -> None:
    """`metrics`, which `evaluate` returned, is a dict of arrays without names that are taken."""
    metric_names("evaluate", metrics, taken=taken)
    for name, metric in metrics.items():
        if not (isinstance(metric, Ratio) or _is_numeric(metric)):
            raise TypeError(f"evaluate must return arrays, got {_describe(metric)} for {name!r}")


def distinct(name: str, first: Any, second: Any) -> None:
    """The two arrays differ in every row."""
    if is_traced((first, second)):
        return
    equal = np.flatnonzero(np.asarray(first) == np.asarray(second))
    if equal.size:
        row = int(equal[0])
        raise ValueError(
            f"{name}: chosen and rejected must differ, but both are {np.asarray(first).flat[row]} in row {row}"
        )


def _not_above(high: float, x: Any) -> Any:
    return ~(x > high)


def _require(name: str, value: Any, holds: Any, what: str) -> None:
    if is_traced(value):
        return
    array = np.asarray(value)
    if array.dtype == object or not np.issubdtype(array.dtype, np.number):
        array = np.asarray(value, dtype=np.float64) if _is_extended_float(value) else array
        if not np.issubdtype(array.dtype, np.number):
            raise TypeError(f"{name} must be {what}, got {_describe(value)}")
    if np.issubdtype(array.dtype, np.complexfloating):
        raise TypeError(f"{name} must be {what}, got {_describe(value)}")
    wrong = np.argwhere(~holds(array))
    if wrong.size or (array.ndim == 0 and not holds(array)):
        index = tuple(int(i) for i in wrong[0])
        where = f" in row {_position(index)}" if index else ""
        raise ValueError(f"{name} must be {what}, got {array[index]}{where}")


def _is_numeric(value: Any) -> bool:
    """Whether it is a number or an array of numbers."""
    return isinstance(value, bool | int | float) or (
        hasattr(value, "dtype") and (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool)
    )


def _position(index: tuple[int, ...]) -> int | tuple[int, ...]:
    return index[0] if len(index) == 1 else index


def _dtype(name: str, value: Any) -> Any:
    """The dtype that JAX would give to the array."""
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} must be an array, got {_describe(value)}")
    return jax.dtypes.canonicalize_dtype(value.dtype) if np.issubdtype(value.dtype, np.number) else value.dtype


def _is_extended_float(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)


def _describe(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, list | tuple) and any(hasattr(part, "shape") for part in value):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)
