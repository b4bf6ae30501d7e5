import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.fast import rows


def plain_take(array, index):
    return array[index]


def plain_accumulate(values, index, *, num_rows):
    return jnp.zeros((num_rows, *values.shape[index.ndim :])).at[index].add(values)


BOTH = {
    rows.take: plain_take,
    partial(rows.accumulate, num_rows=5): partial(plain_accumulate, num_rows=5),
}


@pytest.fixture(params=BOTH, ids=["take", "accumulate"])
def function(request):
    return request.param


def make(function, row=(), index=(7,), stacked=(), num_rows=5):
    """What the function takes: an array of rows or of values, and numbers of rows."""
    rng = np.random.default_rng(0)
    leading = (num_rows,) if function is rows.take else index
    array = jnp.asarray(rng.normal(size=(*stacked, *leading, *row)), jnp.float32)
    return array, jnp.asarray(rng.integers(0, num_rows, (*stacked, *index)), jnp.int32)


@pytest.mark.parametrize("row", [(), (3,), (2, 3)])
@pytest.mark.parametrize("index", [(), (7,), (4, 2), (0,)])
def test_they_do_what_indexing_does(function, row, index):
    args = make(function, row, index)
    chex.assert_trees_all_close(function(*args), BOTH[function](*args), rtol=1e-6)


@pytest.mark.parametrize("axes", [(0, 0), (1, 0), (-1, -1), (0, None), (None, 1), (None, -1)])
def test_stacked_runs_are_runs_one_by_one(function, axes):
    stacks = make(function, (3,), (4, 2), stacked=(6,))
    each = [[stack[0 if axis is None else i] for stack, axis in zip(stacks, axes, strict=True)] for i in range(6)]
    args = [
        stack[0] if axis is None else jnp.moveaxis(stack, 0, axis) for stack, axis in zip(stacks, axes, strict=True)
    ]
    stacked = jax.vmap(function, in_axes=axes)(*args)
    chex.assert_trees_all_close(stacked, jnp.stack([function(*arguments) for arguments in each]), rtol=1e-6)


def test_stacks_of_stacks(function):
    args = make(function, (2,), stacked=(3, 4))
    twice, plain = (jax.vmap(jax.vmap(f)) for f in (function, BOTH[function]))
    chex.assert_trees_all_close(twice(*args), plain(*args), rtol=1e-6)


@pytest.mark.parametrize("stacked", [(), (3,)])
def test_derivatives_forwards_backwards_and_twice(function, stacked):
    array, index = make(function, (2,), stacked=stacked)

    def derivatives(function):
        mapped = jax.vmap(function) if stacked else function
        curved = lambda array: jnp.sum(jnp.sin(mapped(array, index)))  # noqa: E731
        twice = {name: mode(jax.grad(curved)) for name, mode in (("forward", jax.jacfwd), ("reverse", jax.jacrev))}
        return jax.jit(lambda array: [f(array) for f in (jax.grad(curved), jax.jacfwd(curved), *twice.values())])(array)

    chex.assert_trees_all_close(derivatives(function), derivatives(BOTH[function]), atol=1e-6)


def test_numbers_that_their_type_cannot_count_through_are_kept_apart(function):
    if function is not rows.take:
        function = partial(rows.accumulate, num_rows=100)
    array, index = make(function, num_rows=100, stacked=(3,))
    small = index.astype(jnp.int8)  # there are 300 rows
    chex.assert_trees_all_equal(jax.vmap(function)(array, small), jax.vmap(function)(array, index))


def test_indices_do_not_name_the_run():
    args = make(rows.take, stacked=(3,))

    def stated(take):
        gradient = jax.vmap(jax.grad(lambda array, index: jnp.sum(jnp.sin(take(array, index)))))
        return jax.jit(gradient).lower(*args).as_text()

    assert "batching_dims" in stated(plain_take)
    assert "batching_dims" not in stated(rows.take)


def test_rows_of_any_kind(key):
    index = jnp.array([2, 0])
    keys = jax.random.split(key, 3)
    taken = jax.vmap(rows.take)(jnp.stack([keys, keys]), jnp.stack([index, index]))
    chex.assert_trees_all_equal(jax.random.key_data(taken[1]), jax.random.key_data(keys[index]))
    assert rows.take(jnp.array([True, False, False]), index).tolist() == [False, True]


SPREAD = """
import jax, jax.numpy as jnp, numpy as np
from dpo_jax.fast import rows

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("devices")
index = jnp.array([1, 4, 4, 0])

def total(array, values, index):
    taken = rows.take(array, index)
    sums = rows.accumulate(values, index, num_rows=5)
    return jax.lax.psum(jnp.sum(jnp.sin(taken)) + jnp.sum(jnp.cos(sums)), "devices")

def gradient(in_specs):
    spread = jax.shard_map(total, mesh=mesh, in_specs=in_specs, out_specs=whole)
    return jax.jit(jax.grad(spread, argnums=(0, 1)))(jnp.arange(5.0), jnp.arange(4.0), index)

of_array, of_values = gradient((whole, split, split))
np.testing.assert_allclose(of_array, [np.cos(0), np.cos(1), 0, 0, 2 * np.cos(4)], rtol=1e-5)
np.testing.assert_allclose(of_values, -np.sin([0, 1, 2, 3]), rtol=1e-5)
"""


@pytest.mark.slow
def test_gradients_are_summed_over_devices():
    subprocess.run([sys.executable, "-c", SPREAD], check=True)
