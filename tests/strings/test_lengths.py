"""What losses are told of lengths, against NumPy."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses, strings, toy, train
from dpo_jax.types import Pair, Preferences
from tests.strings import naive

SIZES = [(2, 3, False), (3, 2, True), (3, 1, False)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def next_tokens(space, prompts=2):
    """Log-probabilities of the next tokens of a random policy."""
    logits = np.random.default_rng(3).normal(size=(prompts, space.num_prefixes, space.num_choices))
    return np.float32(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@sizes
def test_tokens_are_looked_up_along_strings(size):
    space = strings.Strings(*size)
    table = next_tokens(space)
    prompts, responses = np.indices((2, space.num_responses))
    found = jax.jit(lambda table: strings.token_lookup(table, space, jnp.asarray(prompts), jnp.asarray(responses)))(
        table
    )
    prefixes = naive.listed(size[0], size[1] - 1)
    expected, mask = np.zeros((*prompts.shape, size[1])), np.zeros((*prompts.shape, size[1]), bool)
    for row, string in enumerate(naive.listed(*size)):
        for place, token in enumerate(naive.tokens_of(string, *size[:2])):
            expected[:, row, place] = table[:, prefixes.index(string[:place]), token]
            mask[:, row, place] = True
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    np.testing.assert_allclose(found.values.sum(-1), strings.string_log_probs(jnp.asarray(table), space), rtol=1e-5)


def test_gradients_of_tokens_go_where_they_were_looked_up():
    space = strings.Strings(2, 3)
    prompts, responses = jnp.array([1, 0]), jnp.array([0, 5])  # the empty string, and "ba"

    def total(table):
        return jnp.sum(strings.token_lookup(table, space, prompts, responses).values)

    gradient = jax.jit(jax.grad(total))(jnp.asarray(next_tokens(space)))
    expected = np.zeros(gradient.shape)
    expected[1, 0, 2] = expected[0, 0, 1] = expected[0, 2, 0] = expected[0, 5, 2] = 1
    np.testing.assert_array_equal(gradient, expected)


def test_tokens_of_what_is_no_string_are_nan_or_an_error(as_users_have_it):
    space = strings.Strings(2, 2)
    table = jnp.asarray(next_tokens(space))
    prompts, responses = jnp.array([0, 0, 0, 2, -1, 1]), jnp.array([6, 7, -1, 0, 0, 3])
    found = jax.jit(lambda *ids: strings.token_lookup(table, space, *ids))(prompts, responses)
    assert np.isnan(found.values).all(-1).tolist() == [False, True, True, True, True, False]
    assert np.isfinite(found.values[jnp.array([0, 5])]).all()
    for ids, message in (
        ((prompts[:1], responses[1:2]), "responses must be between 0 and 6"),
        ((prompts[3:4], responses[3:4]), "prompts must be between 0 and 1"),
        ((prompts[:2], responses[:1]), "shapes must be equal"),
    ):
        with pytest.raises(ValueError, match=message):
            strings.token_lookup(table, space, *ids)


@sizes
def test_numbers_of_tokens_and_of_letters(size):
    space = strings.Strings(*size)
    every = naive.listed(*size)
    ids = jnp.arange(-1, space.num_responses + 1)
    tokens, letters = jax.jit(lambda ids: (strings.num_tokens_of(space, ids), strings.lengths_of(space, ids)))(ids)
    assert tokens.tolist() == [0, *(len(naive.tokens_of(string, *size[:2])) for string in every), 0]
    assert letters.tolist() == [0, *(len(string) + 1 for string in every), 0]
    assert tokens.dtype == letters.dtype == jnp.int32


def test_lengths_have_the_structure_of_the_responses():
    space = strings.Strings(2, 2)
    pair = Pair(jnp.array([[0, 1]]), jnp.array([[3, 6]]))
    chex.assert_trees_all_equal(strings.num_tokens_of(space, pair), Pair(jnp.array([[1, 2]]), jnp.array([[2, 2]])))
    chex.assert_trees_all_equal(strings.lengths_of(space, pair), Pair(jnp.array([[1, 2]]), jnp.array([[3, 3]])))


def test_means_of_sums_are_means_over_tokens():
    """Of the policy and, by `with_reference`, of the reference; gradients, too."""
    space, embeddings = strings.Strings(2, 3), jnp.eye(2)
    policy = strings.PrefixTable(space)
    rng = np.random.default_rng(4)
    own, other = ({"params": {"logits": jnp.asarray(rng.normal(size=(2, 7, 3)), jnp.float32)}} for _ in range(2))
    prompts = jnp.asarray(rng.integers(2, size=9))
    pairs = Preferences(prompts, Pair(*(jnp.asarray(rng.integers(15, size=9)) for _ in range(2))))
    means = strings.log_prob_fn(policy, embeddings, mean=True)
    of_paths = strings.on_means(strings.log_prob_fn(policy, embeddings), space)
    of_table = strings.on_means(toy.log_prob_fn(policy, embeddings), space)

    @partial(jax.jit, static_argnums=0)
    def found(log_prob):
        data = train.with_reference(log_prob, other, pairs)
        objective = train.preference_objective(log_prob, losses.ipo_loss, beta=0.5)
        return (
            data.reference_logps,
            log_prob(own, prompts, pairs.responses),
            jax.grad(lambda p: objective(p, data)[0])(own),
        )

    expected = found(means)
    for log_prob in (of_paths, of_table):
        chex.assert_trees_all_close(found(log_prob), expected, rtol=1e-5, atol=1e-6)
