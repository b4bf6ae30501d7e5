"""Properties of a loss, found from the function: whether its rows depend on each other, and its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array

_MIN_DRAWS = 6


def name_of(loss: Any) -> str:
    """The name of a loss, also if it is wrapped by `functools.partial`."""
    return name_of(loss.func) if isinstance(loss, partial) else getattr(loss, "__name__", repr(loss))


def refuse_weights_if_rows_mix(loss: Callable[..., Array], *args: Any, **hyperparameters: Any) -> None:
    """Rejects losses that compare whole batches, in which single comparisons cannot have weights.

    Args:
      loss, *args, **hyperparameters: see `mixes_rows`.

    Raises:
      ValueError: the loss of one row depends on other rows.
    """
    if mixes_rows(loss, *args, **hyperparameters):
        raise ValueError(
            f"comparisons cannot have weights in {name_of(loss)}, which compares whole batches: "
            "the loss of one row depends on other rows"
        )


def mixes_rows(loss: Callable[..., Array], *args: Any, **hyperparameters: Any) -> bool:
    """Whether the loss of one row depends on other rows, as in `aot_loss`.

    The loss is traced once, which sees through partials, wrappers and closures. The traced operations are evaluated on
    random batches. Half of the rows are replaced: the losses of the other half must not change, bit for bit. The halves
    are chosen such that each pair of rows is separated at least once. Traced hyperparameters, also those in closures,
    are replaced by random numbers, so the function works under `vmap`, `grad` and `jit` (also of `shard_map`). It costs
    nothing at run time. It misses a dependence that none of these batches shows: for instance beyond a threshold
    outside of log-probabilities between about -100 and 0.

    >>> import jax.numpy as jnp
    >>> from dpo_jax.losses import aot_loss, dpo_loss
    >>> pair = jnp.zeros(4), jnp.zeros(4)
    >>> mixes_rows(dpo_loss, pair, pair, beta=0.1), mixes_rows(partial(aot_loss, beta=0.1), pair, pair)
    (False, True)

    Args:
      loss: elementwise, or of a whole batch.
      *args: arguments of the loss: pytrees of arrays whose first axes are the rows. Only shapes and dtypes matter.
      **hyperparameters: of the loss; held fixed.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), args))
    program = jax.make_jaxpr(lambda *leaves: loss(*jax.tree.unflatten(structure, leaves), **hyperparameters))(*leaves)
    shape = program.out_avals[0].shape
    num_rows = int(np.prod(shape)) if shape else max(leaf.shape[0] if leaf.shape else 1 for leaf in leaves)
    if not shape or num_rows == 1:
        return num_rows > 1
    num_bits = (num_rows - 1).bit_length()
    run = jax.jit(partial(_run, program.jaxpr))
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
        for draw in range(max(num_bits, _MIN_DRAWS)):
            generator = np.random.default_rng(draw)
            consts = [_stand_in(generator, const) for const in program.consts]
            evaluate = partial(_evaluate, run, consts)
            half = (np.arange(num_rows).reshape(shape) >> draw % num_bits) % 2 == 1
            first, second = ([_random_rows(generator, leaf, draw) for leaf in leaves] for _ in range(2))
            mixed = evaluate([_chosen(half, *rows) for rows in zip(second, first, strict=True)])
            if not np.array_equal(mixed, np.where(half, evaluate(second), evaluate(first)), equal_nan=True):
                return True
    return False


def _evaluate(run: Callable[..., Any], consts: Sequence[Any], rows: Sequence[np.ndarray]) -> np.ndarray:
    (losses,) = run(consts, rows)
    return np.asarray(losses.astype(jnp.promote_types(losses.dtype, jnp.float32)))


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Like `jax.core.eval_jaxpr`, but skips prints and the operations of `jax.shard_map`, which fail outside of it."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    for equation in jaxpr.eqns:
        inputs, name, params = _read(values, equation.invars), equation.primitive.name, equation.params
        inner = params["jaxpr"] if name == "jit" else params.get("call_jaxpr")
        if name in ("pvary", "pcast") or not equation.outvars:
            outputs = inputs[: len(equation.outvars)]
        elif inner is not None:
            outputs = _run(inner.jaxpr, inner.consts, inputs)
        else:
            outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= zip(equation.outvars, outputs, strict=True)
    return _read(values, jaxpr.outvars)


def _read(values: dict[Any, Any], atoms: Sequence[Any]) -> list[Any]:
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]


def _stand_in(generator: np.random.Generator, const: Any) -> Any:
    """A value for a traced constant: floats are small and positive, which most hyperparameters allow."""
    if not isinstance(const, jax.core.Tracer):
        return const
    if jnp.issubdtype(const.dtype, jax.dtypes.prng_key):
        key = jax.random.key(int(generator.integers(2**31)), impl=jax.random.key_impl(const))
        return jnp.broadcast_to(key, const.shape)
    if jnp.issubdtype(const.dtype, jnp.floating):
        return jnp.asarray(generator.uniform(0.1, 0.45, const.shape), const.dtype)
    return jnp.asarray(generator.integers(0, 2, const.shape) if const.dtype == bool else 1, const.dtype)


def _random_rows(generator: np.random.Generator, leaf: jax.ShapeDtypeStruct, draw: int) -> np.ndarray:
    """Numbers of a random magnitude: in even draws negative, as log-probabilities are; in every third with ties."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return generator.integers(0, 2, leaf.shape).astype(leaf.dtype)
    numbers = generator.normal(size=leaf.shape) if draw % 2 else -generator.exponential(size=leaf.shape)
    numbers = numbers * 10 ** generator.uniform(-2, 2)
    return (np.ceil(numbers) if draw % 3 == 2 else numbers).astype(leaf.dtype)


def _chosen(half: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """Rows of `yes` in one half, of `no` in the other; arrays without such rows are unchanged."""
    if no.shape[: half.ndim] != half.shape:
        return no
    return np.where(half.reshape(*half.shape, *(1,) * (no.ndim - half.ndim)), yes, no)
