from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from dpo_jax import rows

ROW_SHAPES = ((), (3,), (2, 3))
INDEX_SHAPES = ((), (7,), (4, 2), (0,))


def make(seed, row, index, num_rows=5, stacked=()):
    rng = np.random.default_rng(seed)
    array = jnp.asarray(rng.normal(size=(*stacked, num_rows, *row)))
    return array, jnp.asarray(rng.integers(0, num_rows, (*stacked, *index)))


@pytest.mark.parametrize("row", ROW_SHAPES)
@pytest.mark.parametrize("index", INDEX_SHAPES)
def test_take_and_accumulate_do_what_numpy_does(row, index):
    array, numbers = make(0, row, index)
    taken = rows.take(array, numbers)
    np.testing.assert_array_equal(taken, np.asarray(array)[numbers])
    sums = np.zeros(array.shape)
    np.add.at(sums, np.asarray(numbers), np.asarray(taken))
    np.testing.assert_allclose(rows.accumulate(taken, numbers, num_rows=5), sums, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    row=st.sampled_from(ROW_SHAPES),
    index=st.sampled_from(INDEX_SHAPES[1:3]),
    array_axis=st.sampled_from([None, 0, 1, -1]),
    index_axis=st.sampled_from([None, 0, 1, -1]),
)
def test_stacked_runs_are_the_runs_one_by_one(row, index, array_axis, index_axis):
    if array_axis is None and index_axis is None:
        return
    arrays, numbers = make(1, row, index, stacked=(6,))
    taken = jnp.stack([jnp.asarray(np.asarray(array)[number]) for array, number in zip(arrays, numbers, strict=True)])
    args = place(arrays, array_axis), place(numbers, index_axis)
    stacked = jax.vmap(rows.take, in_axes=(array_axis, index_axis))(*args)
    one_by_one = [
        rows.take(arrays[i if array_axis is not None else 0], numbers[i if index_axis is not None else 0])
        for i in range(6)
    ]
    chex.assert_trees_all_equal(stacked, jnp.stack(one_by_one))
    args = place(taken, array_axis), place(numbers, index_axis)
    stacked = jax.vmap(partial(rows.accumulate, num_rows=5), in_axes=(array_axis, index_axis))(*args)
    one_by_one = [
        rows.accumulate(
            taken[i if array_axis is not None else 0], numbers[i if index_axis is not None else 0], num_rows=5
        )
        for i in range(6)
    ]
    chex.assert_trees_all_close(stacked, jnp.stack(one_by_one), rtol=1e-6)


def place(stack, axis):
    """The stack with its runs on an axis; the first of its runs if there is none."""
    return stack[0] if axis is None else jnp.moveaxis(stack, 0, axis)


def test_stacks_of_stacks(key):
    arrays, numbers = make(2, (), (7,), stacked=(3, 4))
    stacked = jax.vmap(jax.vmap(rows.take))(arrays, numbers)
    np.testing.assert_array_equal(stacked, np.take_along_axis(np.asarray(arrays), np.asarray(numbers), axis=-1))


@pytest.mark.parametrize("stacked", [(), (3,)])
def test_derivatives_of_both_modes_and_both_orders(stacked):
    arrays, numbers = make(3, (2,), (7,), stacked=stacked)
    take, accumulate = rows.take, partial(rows.accumulate, num_rows=5)
    for function, values in ((take, arrays), (accumulate, make(4, (2,), (7,), num_rows=7, stacked=stacked)[0])):
        mapped = jax.jit(jax.vmap(function) if stacked else function)
        check_grads(
            lambda values, mapped=mapped: jnp.sin(mapped(values, numbers)), (values,), order=2, atol=0.02, rtol=0.02
        )


def test_stacked_numbers_too_large_for_their_type_are_kept_apart():
    arrays, numbers = make(5, (), (7,), num_rows=100, stacked=(3,))
    small = numbers.astype(jnp.int8)  # 3 x 100 rows cannot be counted through
    np.testing.assert_array_equal(jax.vmap(rows.take)(arrays, small), jax.vmap(rows.take)(arrays, numbers))
    sums = jax.vmap(partial(rows.accumulate, num_rows=100))
    values = jnp.ones(numbers.shape)
    np.testing.assert_array_equal(sums(values, small), sums(values, numbers))


def test_indices_do_not_name_the_run():
    arrays, numbers = make(6, (), (7,), stacked=(3,))
    stated = {}
    for take in (rows.take, lambda array, index: array[index]):
        gradient = jax.vmap(jax.grad(lambda array, index, take=take: jnp.sum(jnp.sin(take(array, index)))))
        stated[take] = jax.jit(gradient).lower(arrays, numbers).as_text()
    assert ["batching_dims" in text for text in stated.values()] == [False, True]
    assert all("gather" in text and "scatter" in text for text in stated.values())


def test_rows_of_any_kind(key):
    numbers = jnp.array([2, 0])
    keys = jax.random.split(key, 3)
    taken = jax.vmap(rows.take)(jnp.stack([keys, keys]), jnp.stack([numbers, numbers]))
    chex.assert_trees_all_equal(jax.random.key_data(taken[1]), jax.random.key_data(keys[numbers]))
    assert rows.take(jnp.array([True, False, False]), numbers).tolist() == [False, True]
