from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import strings, toy
from dpo_jax.types import Pair
from tests.strings import naive

SPACES = [strings.Strings(3, 3), strings.Strings(2, 4, fixed_length=True), strings.Strings(3, 1)]
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda space: f"{space.num_letters}-{space.horizon}")


def listed(space):
    return naive.listed(space.num_letters, space.horizon, space.fixed_length)


def automaton(space, num_states=3):
    """An automaton, and for two prompts its weights and numbers at the end."""
    rng = np.random.default_rng(11)
    transitions = rng.integers(num_states, size=(num_states, space.num_letters))
    return transitions, *(rng.normal(size=(2, num_states, *more)).astype("f") for more in ((space.num_letters,), ()))


reference_log_probs = jax.jit(strings.reference_log_probs, static_argnums=0)


# Paths


@spaces
@pytest.mark.parametrize("ends", [False, True])
def test_rewards_add_up_along_the_path(space, ends):
    transitions, weights, final = automaton(space)
    found = strings.path_rewards(space, transitions, jnp.asarray(weights), jnp.asarray(final) if ends else None)
    for prompt in range(2):
        expected = []
        for string in listed(space):
            states = naive.walk(string, transitions)
            letters = sum(weights[prompt, state, letter] for state, letter in zip(states, string, strict=False))
            expected.append(letters + ends * final[prompt, states[-1]])
        np.testing.assert_allclose(found[prompt], expected, rtol=1e-5, atol=1e-6)


def test_rewards_of_the_end_are_those_of_the_state_in_which_strings_end():
    space = SPACES[0]
    final = strings.path_rewards(
        space, strings.previous_letter(space), jnp.zeros((4, 3)), jnp.array([8.0, 1.0, 2.0, 3.0])
    )
    assert final.tolist() == [1.0 + string[-1] if string else 8.0 for string in listed(space)]


def test_an_automaton_may_be_a_list_and_weights_may_be_traced(as_users_have_it):
    space = SPACES[0]
    transitions, weights, final = automaton(space)
    path_rewards = partial(strings.path_rewards, space)
    expected = path_rewards(transitions, jnp.asarray(weights), jnp.asarray(final))
    np.testing.assert_array_equal(
        path_rewards(transitions.tolist(), jnp.asarray(weights), jnp.asarray(final)), expected
    )
    one_by_one = jax.jit(jax.vmap(partial(path_rewards, transitions)))(jnp.asarray(weights), jnp.asarray(final))
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "final", "message"),
    [
        ((2, 3), None, r"weights must have the shape of transitions, got \(2, 3\) and \(3, 3\)"),
        ((3, 2), None, r"weights must have the shape of transitions, got \(3, 2\) and \(3, 3\)"),
        ((3, 3), (2,), r"final must have a number for each state of weights, got \(2,\) and \(3, 3\)"),
        ((2, 3, 3), (3,), r"final must have a number for each state of weights, got \(3,\) and \(2, 3, 3\)"),
    ],
)
def test_weights_of_other_automata_are_refused(as_users_have_it, weights, final, message):
    with pytest.raises(ValueError, match=message):
        strings.path_rewards(
            SPACES[0], np.zeros((3, 3), int), jnp.ones(weights), None if final is None else jnp.ones(final)
        )


# Words


@spaces
@pytest.mark.parametrize("word", [[0], [1, 0], [1, 1], [0, 1, 0], [1, 1, 1, 1], [0] * 5])
def test_words_are_counted_where_they_overlap_too(space, word):
    text = "".join(map(str, word))
    every = ["".join(map(str, string)) for string in listed(space)]
    expected = [sum(string.startswith(text, start) for start in range(len(string))) for string in every]
    assert strings.word_counts(space, word).tolist() == expected


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ([0, 3], ValueError, "word must be between 0 and 2, got 3 in row 1"),
        ([-1], ValueError, "word must be between 0 and 2, got -1 in row 0"),
        ([0.5], TypeError, "word must hold integers"),
        ([], TypeError, "word must hold integers"),
    ],
)
def test_words_of_other_letters_are_refused(as_users_have_it, word, error, message):
    with pytest.raises(error, match=message):
        strings.word_counts(SPACES[0], word)


# Worlds


make_world = jax.jit(
    strings.make_world, static_argnums=1, static_argnames=("num_prompts", "num_words", "embedding_dim")
)
SILENT = dict.fromkeys(("letters", "order", "words"), 0.0)


def test_the_same_key_makes_the_same_world(key):
    first, second, other = (make_world(k, SPACES[0]) for k in (key, key, jax.random.key(1)))
    assert (first.embeddings.shape, first.rewards.shape) == ((2, 8), (2, 40))
    assert first.rewards.tolist() == second.rewards.tolist()
    assert first.embeddings.tolist() == second.embeddings.tolist()
    assert not np.any(np.isclose(first.embeddings, other.embeddings))
    assert not np.allclose(first.rewards[0], first.rewards[1])
    assert not np.allclose(first.rewards, other.rewards)


def test_strings_of_each_length_are_equally_good_on_average(key):
    rewards = np.float64(make_world(key, SPACES[0], num_prompts=3, length=0.0).rewards)
    for length in range(4):
        np.testing.assert_allclose(rewards[:, SPACES[0].lengths == length].mean(-1), 0, atol=1e-6)
    assert np.all(rewards[:, SPACES[0].lengths == 2].std(-1) > 0.1)
    longer = np.float64(make_world(key, SPACES[0], num_prompts=3, length=0.75).rewards)
    np.testing.assert_allclose(longer - rewards, np.tile(0.25 * SPACES[0].lengths, (3, 1)), atol=1e-6)


def test_each_term_has_its_structure(key):
    """Explained by counts of its features without rest, and not by those of other terms; it grows with its size."""
    space = SPACES[0]
    lengths = np.eye(4)[space.lengths]
    features = {
        "letters": [strings.word_counts(space, [a]) for a in range(3)],
        "order": [strings.word_counts(space, [a, b]) for a in range(3) for b in range(3)],
        "words": [strings.word_counts(space, [a, b, c]) for a in range(3) for b in range(3) for c in range(3)],
    }
    for name, columns in features.items():
        rewards = np.float64(make_world(key, space, **SILENT | {name: 1.0}).rewards)
        for other, others in {name: columns, **features}.items():
            known = np.column_stack([lengths, *others])
            rest = rewards.T - known @ np.linalg.lstsq(known, rewards.T, rcond=None)[0]
            assert np.all(np.abs(rest).max(0) < 1e-5) == (name == other), (name, other)
        twice = make_world(key, space, **SILENT | {name: 2.0}).rewards
        np.testing.assert_allclose(twice, 2 * rewards, rtol=1e-5, atol=1e-6)
    assert not make_world(key, space, **SILENT).rewards.any()


def test_weights_are_standard_normal(key):
    """The reward of one letter more than another is N(0, 2) over the horizon."""
    rewards = jax.jit(jax.vmap(lambda k: make_world(k, SPACES[0], **SILENT | {"letters": 1.0}).rewards))(
        jax.random.split(key, 400)
    )
    rewards = np.asarray(rewards)
    assert np.std((rewards[..., 1] - rewards[..., 2]).ravel() * np.sqrt(3 / 2)) == pytest.approx(1, abs=0.1)


def test_sizes_of_worlds_are_checked(key, as_users_have_it):
    make = partial(strings.make_world, key, SPACES[0])
    for name in ("letters", "order", "words"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, inf\), got -1"):
            make(**{name: -1.0})
    for name in ("num_prompts", "embedding_dim", "num_words", "letters_per_word"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make(**{name: 0})
    with pytest.raises(ValueError, match="length must be finite, got nan"):
        make(length=float("nan"))
    with pytest.raises(TypeError, match="key must be a typed key"):
        strings.make_world(0, SPACES[0])


def test_words_that_are_longer_than_strings_are_worth_nothing(key):
    assert not strings.make_world(key, SPACES[2], **SILENT | {"words": 1.0}, letters_per_word=2).rewards.any()


@pytest.mark.slow
def test_many_worlds_under_vmap_are_those_one_by_one(key):
    space, keys = SPACES[0], jax.random.split(key, 3)
    policy = strings.CausalMLP(space, hidden_dim=4)

    def run(key, length):
        world = strings.make_world(key, space, length=length)
        params = policy.init(key, world.embeddings)
        scores = strings.log_prob_fn(policy, world.embeddings)(params, jnp.array([0, 1]), jnp.array([0, 30]))
        tokens = strings.sample_fn(policy, world.embeddings)(key, params, jnp.array([0, 1, 1]))
        return world, toy.table_fn(policy, world.embeddings)(params), scores, space.ids(tokens)

    sizes = jnp.array([0.0, 1.0, -1.0])
    together = jax.jit(jax.vmap(run))(keys, sizes)
    alone = [jax.jit(run)(*each) for each in zip(keys, sizes, strict=True)]
    for found, *expected in zip(*map(jax.tree.leaves, (together, *alone)), strict=True):
        np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-5)


# Judges


def test_judges_add_what_they_like_to_the_truth(key):
    world = make_world(key, SPACES[0])
    judges = strings.judged(world, SPACES[0], liking=-1.5)
    np.testing.assert_allclose(judges.rewards - world.rewards, np.tile(-0.5 * SPACES[0].lengths, (2, 1)), atol=1e-6)
    assert judges.embeddings is world.embeddings
    np.testing.assert_allclose(strings.judged(world, SPACES[0], liking=0.0).rewards, world.rewards)


def test_comparisons_are_those_of_the_judges(key):
    world = make_world(key, SPACES[2], num_prompts=1)
    judges = strings.judged(world, SPACES[2], liking=2.0)
    drawn = jax.jit(partial(toy.sample_preferences, num=8000))(key, judges)
    rewards = np.float64(world.rewards[0]) + 2.0 * np.array([0, 1, 1, 1])
    wins = 1 / (1 + np.exp(rewards[None, :] - rewards[:, None])) * ~np.eye(4, dtype=bool)
    chosen, rejected = drawn.responses
    naive.assert_distributed(4 * chosen + rejected, wins)
    assert isinstance(drawn.responses, Pair)


def test_demonstrations_follow_a_table_of_strings(key):
    world = make_world(key, SPACES[0], num_prompts=1)
    reference = reference_log_probs(SPACES[0], expected_length=1.0, letter_logits=jnp.array([[1.0, 0.0, -1.0]]))
    demos = jax.jit(partial(toy.sample_demonstrations, num=8000))(key, world, log_probs=reference)
    naive.assert_distributed(demos.responses, np.exp(np.float64(reference)))


def test_liking_and_world_are_checked(key, as_users_have_it):
    world = make_world(key, SPACES[0])
    with pytest.raises(ValueError, match="liking must be finite, got inf"):
        strings.judged(world, SPACES[0], liking=float("inf"))
    with pytest.raises(ValueError, match=r"world.rewards must have an entry for each of the 16 strings, got shape"):
        strings.judged(world, SPACES[1], liking=1.0)


# References


@pytest.mark.parametrize("expected_length", [0.01, 1.0, 1.7, 2.99])
def test_references_have_the_expected_length(expected_length):
    logits = np.array([[0.5, 0.0, -1.0], [0.0, 0.0, 0.0]], np.float32)
    found = reference_log_probs(SPACES[0], expected_length=expected_length, letter_logits=jnp.asarray(logits))
    probs = np.exp(np.float64(found))
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(probs @ SPACES[0].lengths, expected_length, rtol=1e-5)
    letters = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    tokens = np.exp(np.float64(jax.jit(strings.next_token_log_probs, static_argnums=1)(found, SPACES[0])))
    going_on = 1 - tokens[:, 0, 3]
    for prompt in range(2):
        row = [*(going_on[prompt] * letters[prompt]), 1 - going_on[prompt]]
        np.testing.assert_allclose(tokens[prompt], np.tile(row, (13, 1)), rtol=2e-5, atol=1e-7)
    plain = reference_log_probs(SPACES[0], expected_length=expected_length)
    np.testing.assert_allclose(plain, found[1], rtol=1e-6)


def test_expected_lengths_may_be_traced():
    lengths = jnp.array([0.5, 2.0, 0.0, 3.0, jnp.nan])
    found = jax.jit(jax.vmap(lambda length: strings.reference_log_probs(SPACES[0], expected_length=length)))(lengths)
    np.testing.assert_allclose(np.exp(found[:2]) @ SPACES[0].lengths, lengths[:2], rtol=1e-5)
    assert jnp.all(jnp.isnan(found[2:]))


def test_expected_lengths_are_checked(as_users_have_it):
    for length in (0.0, 3.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"expected_length must be in \(0, 3\), got {length}"):
            strings.reference_log_probs(SPACES[0], expected_length=length)
    with pytest.raises(ValueError, match="strings of a fixed length have no expected length to choose"):
        strings.reference_log_probs(SPACES[1], expected_length=2.0)


@spaces
def test_every_space_has_a_world(key, space):
    assert np.all(np.isfinite(make_world(key, space).rewards))
