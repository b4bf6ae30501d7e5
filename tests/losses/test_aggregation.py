from functools import partial

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dpo_jax.losses import mean_of_responses, mean_of_tokens, mean_per_length

SHAPE = 4, 5


def by_responses(values, lengths):
    return np.mean([row[:length].mean() if length else 0 for row, length in zip(values, lengths, strict=True)])


def by_tokens(values, lengths):
    tokens = np.concatenate([row[:length] for row, length in zip(values, lengths, strict=True)])
    return tokens.mean() if tokens.size else 0.0


def by_length(values, lengths):
    return np.mean([row[:length].sum() / 7 for row, length in zip(values, lengths, strict=True)])


EQUATIONS = {
    "mean_of_responses": (mean_of_responses, by_responses),
    "mean_of_tokens": (mean_of_tokens, by_tokens),
    "mean_per_length": (partial(mean_per_length, max_length=7), by_length),
}
every_one = pytest.mark.parametrize(("aggregate", "equation"), EQUATIONS.values(), ids=EQUATIONS)


def mask_of(lengths):
    return np.arange(SHAPE[1]) < np.asarray(lengths)[:, None]


@every_one
@given(
    values=hnp.arrays(float, SHAPE, elements=st.floats(-10, 10)),
    lengths=hnp.arrays(int, SHAPE[0], elements=st.integers(0, SHAPE[1])),
)
@settings(deadline=None, max_examples=15)
def test_it_is_as_in_plain_loops(aggregate, equation, values, lengths):
    expected = np.float64(equation(np.asarray(values, np.longdouble), lengths))
    with jax.enable_x64(True):
        for dtype in (bool, int, float):
            total = aggregate(jnp.asarray(values), jnp.asarray(mask_of(lengths), dtype))
            np.testing.assert_allclose(total, expected, rtol=1e-12, atol=1e-13)


@every_one
def test_its_gradient_is_how_much_a_token_counts(aggregate, equation):
    lengths = [3, 5, 0, 1]
    gradient = jax.jit(jax.grad(aggregate))(jnp.zeros(SHAPE), jnp.asarray(mask_of(lengths)))
    tokens = np.eye(SHAPE[0] * SHAPE[1]).reshape(-1, *SHAPE)
    np.testing.assert_allclose(gradient.ravel(), [equation(token, lengths) for token in tokens], rtol=1e-6)


@every_one
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("mask_dtype", [bool, int, jnp.float32])
def test_what_stands_behind_the_end_does_not_count(aggregate, equation, rubbish, mask_dtype):
    mask = jnp.asarray(mask_of([3, 5, 0, 1]), mask_dtype)
    values = jnp.arange(20.0).reshape(SHAPE)
    spoilt = jnp.where(mask > 0, values, rubbish)
    clean, polluted = (jax.value_and_grad(aggregate)(x, mask) for x in (values, spoilt))
    chex.assert_trees_all_equal(clean, polluted)


@every_one
def test_a_token_that_is_not_a_number_shows(aggregate, equation):
    assert jnp.isnan(aggregate(jnp.ones(SHAPE).at[0, 2].set(jnp.nan), jnp.asarray(mask_of([3, 5, 0, 1]))))


def test_all_agree_where_all_responses_have_one_token():
    values, mask = np.random.default_rng(0).normal(size=SHAPE), jnp.asarray(mask_of([1, 1, 1, 1]))
    for aggregate in (mean_of_responses, mean_of_tokens, partial(mean_per_length, max_length=1)):
        np.testing.assert_allclose(aggregate(jnp.asarray(values, jnp.float32), mask), values[:, 0].mean(), rtol=1e-6)


@every_one
def test_dtypes_stay_and_vmap_is_a_loop(aggregate, equation):
    values = jax.random.normal(jax.random.key(0), (3, *SHAPE), jnp.bfloat16)
    mask = jnp.asarray([mask_of(lengths) for lengths in ([3, 5, 0, 1], [1, 2, 3, 4], [5, 5, 5, 5])])
    totals = jax.jit(jax.vmap(aggregate))(values, mask)
    assert totals.dtype == jnp.bfloat16
    for total, *batch in zip(totals, values, mask, strict=True):
        np.testing.assert_allclose(np.float32(total), aggregate(batch[0].astype(jnp.float32), batch[1]), atol=0.02)


@every_one
def test_nothing_at_all_counts_as_zero(aggregate, equation):
    empty = jnp.zeros(SHAPE, bool)
    total, gradient = jax.value_and_grad(aggregate)(jnp.ones(SHAPE), empty)
    assert total == 0
    np.testing.assert_array_equal(gradient, 0)


# Weights


@every_one
@pytest.mark.parametrize("lengths", [[3, 5, 2, 1], [3, 0, 5, 5]])
def test_weights_count_as_often(aggregate, equation, lengths):
    """Weights with a mean of 1: each response is there so many times, or not at all, as by its probability."""
    numbers, counts = np.random.default_rng(0).normal(size=SHAPE), np.array([2, 0, 1, 5])
    expected = equation(np.repeat(numbers, counts, axis=0), np.repeat(lengths, counts))
    values, mask = jnp.asarray(numbers), jnp.asarray(mask_of(lengths))
    total = aggregate(values, mask, jnp.asarray(counts / counts.mean(), jnp.float32))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_array_equal(aggregate(values, mask, jnp.ones(4)), aggregate(values, mask))


@every_one
@pytest.mark.parametrize("rubbish", [np.nan, -np.inf])
def test_weighted_or_not_what_stands_behind_the_end_has_no_gradient(aggregate, equation, rubbish):
    mask, weights = jnp.asarray(mask_of([3, 5, 0, 1])), jnp.array([0.5, 0.0, 1.5, 2.0])
    measured = jax.jit(jax.value_and_grad(aggregate))
    values = jnp.arange(1.0, 21.0).reshape(SHAPE)
    clean, polluted = (measured(jnp.where(mask, values, other), mask, weights) for other in (0, rubbish))
    chex.assert_trees_all_equal(clean, polluted)
    np.testing.assert_array_equal(clean[1] > 0, mask & (weights > 0)[:, None])


@every_one
def test_without_weight_nothing_counts_not_even_infinity(aggregate, equation):
    mask = jnp.asarray(mask_of([3, 5, 0, 1]))
    total, gradient = jax.value_and_grad(aggregate)(jnp.ones(SHAPE), mask, jnp.zeros(4))
    assert total == 0
    np.testing.assert_array_equal(gradient, 0)
    weights = jnp.array([1.0, 0.0, 1.0, 1.0])
    infinite = jnp.ones(SHAPE).at[1, 2].set(jnp.inf)
    np.testing.assert_array_equal(aggregate(infinite, mask, weights), aggregate(jnp.ones(SHAPE), mask, weights))


@every_one
def test_weights_do_not_change_the_dtype(aggregate, equation):
    values = jnp.ones(SHAPE, jnp.bfloat16)
    assert aggregate(values, jnp.asarray(mask_of([3, 5, 0, 1])), jnp.ones(4)).dtype == jnp.bfloat16


# Bad input


@every_one
@pytest.mark.usefixtures("as_users_have_it")
def test_weights_that_make_no_sense_are_refused(aggregate, equation):
    mask = jnp.ones(SHAPE, bool)
    for shape in ((4, 1), (5,), ()):
        with pytest.raises(ValueError, match=r"shapes must be equal, got values_of_one_token \(4,\), weights"):
            aggregate(jnp.ones(SHAPE), mask, jnp.ones(shape))
    for weight in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"weights must be in .0, inf., got {weight} in row 2"):
            aggregate(jnp.ones(SHAPE), mask, jnp.ones(4).at[2].set(weight))


@every_one
@pytest.mark.usefixtures("as_users_have_it")
def test_a_mask_of_another_shape_is_refused(aggregate, equation):
    for shape in ((4, 1), (5, 4), (4,)):
        with pytest.raises(ValueError, match=r"shapes must be equal, got values \(4, 5\), mask"):
            aggregate(jnp.ones(SHAPE), jnp.ones(shape, bool))


@pytest.mark.usefixtures("as_users_have_it")
def test_the_longest_length_is_a_size():
    values, mask = jnp.ones(SHAPE), jnp.ones(SHAPE, bool)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        mean_per_length(values, mask, max_length=0)
    with pytest.raises(TypeError, match="max_length must be a whole number"):
        mean_per_length(values, mask, max_length=5.0)
