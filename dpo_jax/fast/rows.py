"""Array rows by index, fast when runs are stacked: `take`, and its transpose `accumulate`.

`array[index]` under `vmap` is a gather whose indices contain the run, too: XLA on a CPU writes these pairs to memory
and reads them back, and the same for the gradient. Here stacked arrays become one long array, in which one number
identifies a row. Both functions are JAX primitives, because only a primitive can define its behaviour under `vmap` and
remain differentiable in both modes, to any order.

Split runs over devices by `jax.shard_map`, as sweeps do. `jit` with shardings does not see that stacked runs are
independent, and makes the devices exchange rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Int, Shaped

Axes = tuple[int | None, int | None]

_take, _accumulate = Primitive("take_rows"), Primitive("accumulate_rows")


def take(array: Shaped[Array, " n *row"], index: Int[Array, "*m"]) -> Shaped[Array, "..."]:
    """`array[index]`, for indices in range. The caller must ensure that they are; they are not checked."""
    return _take.bind(*_varying_alike(array, index))


def accumulate(values: Shaped[Array, "..."], index: Int[Array, "*m"], *, num_rows: int) -> Shaped[Array, " n *row"]:
    """The sum of the values for each row, zero for rows without values; the transpose of `take`, also unchecked."""
    return _accumulate.bind(*_varying_alike(values, index), num_rows=num_rows)


def _varying_alike(*args: Array) -> list[Array]:
    """Inside `jax.shard_map`, arguments that vary over the same axes of the mesh; JAX then sums gradients over them."""
    axes = [jax.typeof(arg).manual_axis_type.varying for arg in args]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    return [jax.lax.pcast(arg, names, to="varying") if names else arg for arg, names in zip(args, missing, strict=True)]


def _gather(array: Array, index: Array) -> Array:
    return array.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _scatter(values: Array, index: Array, *, num_rows: int) -> Array:
    zeros = jnp.zeros((num_rows, *values.shape[index.ndim :]), values.dtype)
    return zeros.at[index].add(values, mode="promise_in_bounds", wrap_negative_indices=False)


def _take_stacked(args: tuple[Any, Any], axes: Axes) -> tuple[Array, int]:
    if axes[0] is None:  # all runs have one array
        return take(jnp.asarray(args[0]), jnp.moveaxis(args[1], axes[1] or 0, 0)), 0
    array, index = _one_each(args, axes)
    num_runs, num_rows, *row = array.shape
    if not _countable(num_runs * num_rows, index):
        return jax.vmap(_gather)(array, index), 0
    return take(array.reshape(num_runs * num_rows, *row), _counted_through(index, num_rows)), 0


def _accumulate_stacked(args: tuple[Array, Array], axes: Axes, *, num_rows: int) -> tuple[Array, int]:
    values, index = _one_each(args, axes)
    num_runs = len(index)
    if not _countable(num_runs * num_rows, index):
        return jax.vmap(lambda values, index: _scatter(values, index, num_rows=num_rows))(values, index), 0
    sums = accumulate(values, _counted_through(index, num_rows), num_rows=num_runs * num_rows)
    return sums.reshape(num_runs, num_rows, *sums.shape[1:]), 0


def _one_each(args: tuple[Any, Any], axes: Axes) -> list[Array]:
    """Arguments with the axis of runs first; arguments without one are repeated."""
    num_runs = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    return [
        jnp.broadcast_to(arg, (num_runs, *arg.shape)) if axis is None else jnp.moveaxis(arg, axis, 0)
        for arg, axis in zip(args, axes, strict=True)
    ]


def _countable(num: int, index: Array) -> bool:
    """Whether the dtype of the index can count that many rows."""
    return num <= jnp.iinfo(index.dtype).max


def _counted_through(index: Array, num_rows: int) -> Array:
    """Indices into one long array of the arrays of all runs."""
    return index + num_rows * jax.lax.broadcasted_iota(index.dtype, index.shape, 0)


_take.def_impl(jax.jit(_gather))
_take.def_abstract_eval(lambda *args: jax.make_jaxpr(_gather)(*args).out_avals[0])
mlir.register_lowering(_take, mlir.lower_fun(_gather, multiple_results=False))
batching.primitive_batchers[_take] = _take_stacked
ad.deflinear2(_take, lambda sums, array, index: (accumulate(sums, index, num_rows=array.aval.shape[0]), None))
ad.defjvp(_take, lambda tangent, _, index: take(tangent, index), None)

_accumulate.def_impl(jax.jit(_scatter, static_argnames="num_rows"))
_accumulate.def_abstract_eval(lambda *args, **sizes: jax.make_jaxpr(partial(_scatter, **sizes))(*args).out_avals[0])
mlir.register_lowering(_accumulate, mlir.lower_fun(_scatter, multiple_results=False))
batching.primitive_batchers[_accumulate] = _accumulate_stacked
ad.deflinear2(_accumulate, lambda rows, _, index, **__: (take(rows, index), None))
ad.defjvp(_accumulate, lambda tangent, _, index, **sizes: accumulate(tangent, index, **sizes), None)
