from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import strings, toy
from tests.strings import naive

SPACES = [strings.Strings(3, 3), strings.Strings(2, 4, fixed_length=True), strings.Strings(2, 5), strings.Strings(1, 4)]
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda space: f"{space.num_letters}-{space.horizon}")


def listed(space):
    return naive.listed(space.num_letters, space.horizon, space.fixed_length)


@cache
def distance(first, second):
    """The recursion by which the distance is defined."""
    if not first or not second:
        return len(first) + len(second)
    changed = distance(first[1:], second[1:]) + (first[0] != second[0])
    return min(changed, distance(first[1:], second) + 1, distance(first, second[1:]) + 1)


@spaces
def test_edit_distances_are_those_of_the_recursion(space):
    every = listed(space)
    found = strings.edit_distances(space)
    assert found.tolist() == [[distance(first, second) for second in every] for first in every]


@spaces
def test_shared_prefixes_are_counted_token_by_token(space):
    every = [naive.tokens_of(string, space.num_letters, space.horizon) for string in listed(space)]

    def shared(first, second):
        same = [a == b for a, b in zip(first, second, strict=False)]
        return same.index(False) if False in same else len(same)

    assert strings.shared_prefixes(space).tolist() == [[shared(a, b) for b in every] for a in every]


def test_distances_count_beyond_a_hundred_letters():
    space = strings.Strings(1, 100)
    ids = np.arange(101)
    np.testing.assert_array_equal(strings.edit_distances(space), abs(ids[:, None] - ids))
    np.testing.assert_array_equal(strings.shared_prefixes(space)[100, :100], ids[:100])


def test_too_many_strings_are_not_compared():
    message = (
        "21,845 strings have too many pairs to list; at most 4,096 strings: take fewer letters or a shorter horizon"
    )
    for compare in (strings.shared_prefixes, strings.edit_distances):
        with pytest.raises(ValueError, match=message):
            compare(strings.Strings(4, 7))
    assert strings.shared_prefixes(strings.Strings(8, 4, fixed_length=True)).shape == (4096, 4096)


PROBS = np.random.default_rng(1).dirichlet(np.ones(15), 2)
SMALL = strings.Strings(2, 3)
sample_pairs = jax.jit(strings.sample_pairs, static_argnames="num")
NUM = 20_000


@pytest.mark.parametrize(
    "allowed",
    [
        strings.shared_prefixes(SMALL) == 1,
        strings.edit_distances(SMALL) == 1,
        np.ones((15, 15), bool),
    ],
    ids=["one shared letter", "one edit", "all"],
)
def test_pairs_are_independent_samples_given_that_they_are_allowed(key, allowed):
    prompts, (first, second) = sample_pairs(key, jnp.log(jnp.asarray(PROBS)), jnp.asarray(allowed), num=NUM)
    naive.assert_distributed(prompts, [0.5, 0.5])
    for prompt, probs in enumerate(PROBS):
        mine = np.asarray(prompts == prompt)
        expected = np.outer(probs, probs) * allowed * ~np.eye(15, dtype=bool)
        naive.assert_distributed(15 * first[mine] + second[mine], expected)


def test_zeros_draw_uniformly_from_what_is_allowed(key):
    allowed = strings.shared_prefixes(SMALL) == 2
    _, (first, second) = sample_pairs(key, jnp.zeros((1, 15)), jnp.asarray(allowed), num=4000)
    naive.assert_distributed(15 * first + second, allowed * ~np.eye(15, dtype=bool))
    texts = SMALL.text(first), SMALL.text(second)
    assert all(a != b and (a + "-")[:2] == (b + "-")[:2] for a, b in zip(*texts, strict=True))


def test_all_pairs_are_those_of_the_one_token_world(key):
    log_probs = jnp.log(jnp.asarray(PROBS))
    found = strings.sample_pairs(key, log_probs, jnp.ones((15, 15), bool), num=200)
    expected = toy.sample_policy_pairs(key, log_probs, num=200)
    assert [ids.tolist() for ids in jax.tree.leaves(found)] == [ids.tolist() for ids in jax.tree.leaves(expected)]


def test_pairs_can_be_compared(key):
    world = toy.World(jnp.zeros((2, 1)), jnp.tile(jnp.arange(15.0), (2, 1)))
    pairs = strings.sample_pairs(key, jnp.zeros((2, 15)), jnp.asarray(strings.edit_distances(SMALL) == 1), num=50)
    labelled = toy.label_pairs(key, world, *pairs, temperature=0.0)
    assert jnp.all(labelled.responses.chosen > labelled.responses.rejected)


def test_a_prompt_without_allowed_pair_gets_none(key):
    allowed = jnp.zeros((15, 15), bool).at[[1, 2, 13, 14], [2, 1, 14, 13]].set(True)
    log_probs = jnp.zeros((2, 15)).at[[0, 1, 1], [13, 2, 14]].set(-jnp.inf)
    with pytest.raises(ValueError, match="allowed must give at least 2 responses of each prompt .*, got 0 in row 1"):
        strings.sample_pairs(key, log_probs, allowed, num=10)
    prompts, pair = sample_pairs(key, log_probs, allowed, num=50)
    first, second = (np.asarray(ids) for ids in pair)
    assert set(first[prompts == 0]) == {1, 2}
    np.testing.assert_array_equal(second[prompts == 0], 3 - first[prompts == 0])
    assert set(first[prompts == 1]) == set(second[prompts == 1]) == {-1}


def test_equal_responses_are_never_paired(key):
    with pytest.raises(ValueError, match="allowed must give at least 2 responses"):
        strings.sample_pairs(key, jnp.zeros((1, 15)), jnp.eye(15, dtype=bool), num=10)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num": 0}, ValueError, "num must be at least 1, got 0"),
        ({"key": 0}, TypeError, "key must be a typed key"),
        ({"allowed": jnp.ones((15, 15))}, TypeError, "allowed must hold Booleans"),
        ({"allowed": jnp.ones((2, 15), bool)}, ValueError, r"row and a column for each response, got shape \(2, 15\)"),
        ({"allowed": jnp.tri(15, dtype=bool)}, ValueError, "allowed must be symmetric"),
        (
            {"log_probs": jnp.zeros((2, 15)).at[1, 3].set(jnp.nan)},
            ValueError,
            r"log_probs must be a number, not NaN, got nan in row \(1, 3\)",
        ),
    ],
)
def test_arguments_are_checked(key, as_users_have_it, changed, error, message):
    good = {"key": key, "log_probs": jnp.zeros((2, 15)), "allowed": jnp.ones((15, 15), bool), "num": 3}
    with pytest.raises(error, match=message):
        strings.sample_pairs(**good | changed)


def test_what_is_not_a_number_is_not_drawn(key):
    draw = partial(sample_pairs, key, num=30)
    prompts, pair = draw(jnp.zeros((2, 15)).at[1, 3].set(jnp.nan), jnp.ones((15, 15), bool))
    for ids in pair:
        np.testing.assert_array_equal(np.asarray(ids) == -1, np.asarray(prompts) == 1)
