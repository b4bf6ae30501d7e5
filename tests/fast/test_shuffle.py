import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpo_jax.fast.shuffle import _grid, permutation

one = jax.jit(permutation, static_argnums=1)


def permutations(num, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: permutation(key, num)))(keys))


@given(
    num=st.one_of(st.integers(1, 40), st.integers(250, 260), st.sampled_from([1800, 1801, 10_007])),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_every_index_comes_once(num, seed):
    assert sorted(one(jax.random.key(seed), num).tolist()) == list(range(num))


@pytest.mark.parametrize("num", [2, 3, 4, 5])
def test_small_permutations_are_all_equally_frequent(num):
    places = permutations(num, 60_000)
    assert set(np.ravel(places)) == {*range(num)}
    _, counts = np.unique(places @ 10 ** np.arange(num), return_counts=True)
    assert len(counts) == math.factorial(num)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("num", [30, 290])
def test_any_two_indices_are_placed_independently(num):
    places = permutations(num, 300_000)
    columns = _grid(num)[1]
    for first, second in ((0, 1), (0, columns), (num // 2, num - 1)):
        blocks = places[:, [first, second]] * 10 // num  # tenths of the range
        counts = np.zeros((10, 10))
        np.add.at(counts, (blocks[:, 0], blocks[:, 1]), 1)
        size = num // 10
        expected = np.full((10, 10), size * size) - size * np.eye(10)
        expected *= len(places) / expected.sum()
        assert stats.chisquare(counts.ravel(), expected.ravel()).pvalue > 1e-3, (first, second)


def test_every_index_goes_everywhere():
    places = permutations(300, 30_000)
    for index in (0, 17, 299):
        assert stats.chisquare(np.bincount(places[:, index], minlength=300)).pvalue > 1e-3


def test_a_grid_is_tight_and_one_side_is_even():
    for num in range(2, 3000):
        rows, columns = _grid(num)
        assert num <= rows * columns < num + 2 * rows + 2
        assert rows * columns % 2 == 0


def test_keys_decide():
    key = jax.random.key(0)
    chex.assert_trees_all_equal(permutation(key, 500), permutation(key, 500))
    keys = jax.random.split(key, 3)
    swept = jax.jit(jax.vmap(lambda key: permutation(key, 500)))(keys)
    chex.assert_trees_all_equal(swept, jnp.stack([permutation(key, 500) for key in keys]))
    assert len({tuple(row) for row in swept.tolist()}) == 3
