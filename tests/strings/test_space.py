import dataclasses
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import strings
from dpo_jax.strings.space import LONGEST, MOST_STRINGS, path_of
from tests.strings.naive import listed, tokens_of, walk

SIZES = [(3, 3, False), (3, 3, True), (2, 5, False), (1, 4, False), (1, 3, True), (5, 1, False), (5, 1, True)]
SPACES = [strings.Strings(*size) for size in SIZES]
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda space: "-".join(map(str, dataclasses.astuple(space)[:3])))


def naive(space):
    return listed(space.num_letters, space.horizon, space.fixed_length)


@spaces
def test_strings_are_listed_by_length_and_then_by_alphabet(space):
    every = naive(space)
    assert space.num_responses == len(every)
    assert space.num_choices == space.num_letters + (not space.fixed_length)
    assert space.lengths.tolist() == [len(string) for string in every]
    tokens = [tokens_of(string, space.num_letters, space.horizon) for string in every]
    assert space.tokens.tolist() == [row + [strings.PADDING] * (space.horizon - len(row)) for row in tokens]
    assert space.num_tokens.tolist() == [len(row) for row in tokens]
    assert space.mask.tolist() == [[place < len(row) for place in range(space.horizon)] for row in tokens]
    assert {space.tokens.dtype, space.lengths.dtype, space.num_tokens.dtype} == {np.dtype(np.int32)}


@spaces
def test_prefixes_are_numbered_like_strings(space):
    number = {prefix: i for i, prefix in enumerate(listed(space.num_letters, space.horizon - 1))}
    assert space.num_prefixes == len(number)
    assert space.offsets.tolist() == [sum(len(p) < length for p in number) for length in range(space.horizon + 1)]
    expected = [
        [number[string[:place]] if place <= len(string) else 0 for place in range(space.horizon)]
        for string in naive(space)
    ]
    assert space.prefixes.tolist() == expected
    assert jax.jit(path_of, static_argnums=0)(space, jnp.asarray(space.tokens)).tolist() == expected


@spaces
def test_ids_come_back_from_tokens_and_from_text(space):
    every = jnp.arange(space.num_responses)
    assert space.ids(jnp.asarray(space.tokens)).tolist() == every.tolist()
    assert jax.jit(space.ids)(jnp.asarray(space.tokens)).tolist() == every.tolist()
    texts = space.text(every)
    assert texts == ["".join("abcde"[letter] for letter in string) for string in naive(space)]
    assert space.ids_of(texts[::-1]).tolist() == every[::-1].tolist()


def test_letters_can_have_names():
    space = strings.Strings(4, 2, fixed_length=True, alphabet="TGCA")
    assert space.text([0, 1, 4, 15]) == ["TT", "TG", "GT", "AA"]
    assert space.ids_of(["AA", "GT"]).tolist() == [15, 4]
    assert strings.Strings(30, 1, alphabet="".join(map(chr, range(945, 975)))).text([1, 25]) == ["α", "ω"]


def test_ids_keep_the_axes_of_tokens():
    space = SPACES[0]
    tokens = jnp.asarray(space.tokens)[:40].reshape(2, 20, 3)
    assert space.ids(tokens).tolist() == np.arange(40).reshape(2, 20).tolist()
    assert jax.jit(jax.vmap(space.ids))(tokens).tolist() == np.arange(40).reshape(2, 20).tolist()
    assert space.ids(tokens[1, 3]) == 23
    assert space.text(np.array([[0, 4], [2, 1]])) == ["", "aa", "b", "a"]
    assert space.text(4) == ["aa"]


def test_tokens_behind_the_end_are_ignored():
    tokens = jnp.array([[3, 0, 0], [1, 3, 99], [1, 3, -7], [2, 3, 3]])
    assert SPACES[0].ids(tokens).tolist() == jax.jit(SPACES[0].ids)(tokens).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_ids_of_tokens_in_few_bits(as_users_have_it, dtype):
    """Ids do not fit into 8 bits, where letters do."""
    space = strings.Strings(4, 6)
    some = np.array([0, 200, 1000, 5460])
    tokens = np.where(space.mask, space.tokens, 0)[some].astype(dtype)
    assert space.ids(jnp.asarray(tokens)).tolist() == some.tolist()
    assert jax.jit(space.ids)(jnp.asarray(tokens)).tolist() == some.tolist()


@pytest.mark.parametrize(
    ("space", "tokens", "what"),
    [
        (SPACES[0], [4, 0, 0], "then the end, 3: got"),
        (SPACES[0], [0, 1, 4], "letters between 0 and 2"),
        (SPACES[0], [-1, 3, -1], "letters between 0 and 2"),
        (SPACES[0], [0, -1, -1], "then the end, 3"),
        (SPACES[0], [0, -1, 3], "then the end, 3"),
        (SPACES[1], [0, 3, 0], "letters between 0 and 2, 3 of them: got"),
        (SPACES[1], [0, 1, -1], "letters between 0 and 2, 3 of them"),
    ],
)
def test_tokens_of_no_string_have_no_id(space, tokens, what):
    rows = jnp.array([[0, 1, 2], tokens])
    shown = str(tokens).replace("[", r"\[")
    with pytest.raises(ValueError, match=rf"tokens must be .*{what}.*{shown} in row 1"):
        space.ids(rows)
    with pytest.raises(ValueError, match=rf"{shown} in row \(0, 1\)"):
        space.ids(rows[None])
    with pytest.raises(ValueError, match=rf"{shown}$"):
        space.ids(rows[1])
    assert jax.jit(space.ids)(rows).tolist() == [space.ids(rows[0]), -1]


def test_tokens_that_are_no_tokens_are_refused(as_users_have_it):
    with pytest.raises(ValueError, match=r"tokens must have 3 columns, the horizon, got shape \(2, 4\)"):
        SPACES[0].ids(jnp.zeros((2, 4), int))
    with pytest.raises(ValueError, match=r"3 columns, the horizon, got shape \(\)"):
        SPACES[0].ids(jnp.array(1))
    with pytest.raises(TypeError, match="tokens must hold integers, got an array of shape .2, 3. and dtype float32"):
        SPACES[0].ids(jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match="tokens must be an array, got"):
        SPACES[0].ids([[0, 1, 2]])


@pytest.mark.parametrize(
    ("space", "texts", "error", "message"),
    [
        (SPACES[0], ["ab", "ad"], ValueError, "texts must have letters of 'abc', got 'd' in row 1"),
        (SPACES[0], ["abca"], ValueError, "texts must have at most 3 letters, got 'abca' in row 0"),
        (SPACES[1], ["abc", "ab"], ValueError, "texts must have 3 letters, got 'ab' in row 1"),
        (SPACES[1], ["abca"], ValueError, "texts must have 3 letters, got 'abca' in row 0"),
        (SPACES[0], ["a", 1], TypeError, "texts must hold strings, got 1 in row 1"),
        (SPACES[0], "ab", TypeError, "texts must be a sequence of strings, got the string 'ab'"),
    ],
)
def test_texts_that_are_no_strings_are_refused(as_users_have_it, space, texts, error, message):
    with pytest.raises(error, match=message):
        space.ids_of(texts)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([3, 40], ValueError, "ids must be between 0 and 39, got 40 in row 1"),
        ([-1], ValueError, "ids must be between 0 and 39, got -1 in row 0"),
        ([0.5], TypeError, "ids must hold integers"),
    ],
)
def test_ids_that_are_none_have_no_text(ids, error, message):
    with pytest.raises(error, match=message):
        SPACES[0].text(ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3), ValueError, "num_letters must be at least 1, got 0"),
        ((3, 0), ValueError, "horizon must be at least 1, got 0"),
        ((2.0, 3), TypeError, "num_letters must be a whole number known before tracing, got 2.0"),
        ((2, True), TypeError, "horizon must be a whole number known before tracing, got True"),
        ((2, 3, False, "aa"), ValueError, "alphabet must not have a letter twice, got 'aa'"),
        ((2, 3, False, "abc"), ValueError, "alphabet must have 2 letters, got 'abc'"),
    ],
)
def test_sizes_and_alphabets_are_checked(as_users_have_it, arguments, error, message):
    with pytest.raises(error, match=message):
        strings.Strings(*arguments)


def test_letters_without_names_have_no_text():
    space = strings.Strings(27, 2)
    for ask in (lambda: space.text([1]), lambda: space.ids_of(["a"])):
        with pytest.raises(ValueError, match="27 letters have no names: give Strings an alphabet"):
            ask()


@pytest.mark.parametrize(
    ("num_letters", "horizon"),
    [(2, 20), (4, 10), (10**9, 1), (10**9, 10**6), (2, 10**400), (10**400, 2), (1, 10**6), (1, 10**400)],
)
def test_too_many_strings_are_refused_at_once(num_letters, horizon):
    start = time.perf_counter()
    most = f"{LONGEST} letters in a string" if num_letters == 1 else f"{MOST_STRINGS:,} strings"
    with pytest.raises(ValueError, match=f"{num_letters} letters and a horizon of {horizon} make more than {most}"):
        strings.Strings(num_letters, horizon)
    assert time.perf_counter() - start < 1


def test_the_most_strings_are_allowed():
    assert strings.Strings(2, 20, fixed_length=True).num_responses == MOST_STRINGS
    assert strings.Strings(2, 19).num_responses == MOST_STRINGS - 1
    assert strings.Strings(1, LONGEST).tokens.shape == (LONGEST + 1, LONGEST)


def test_strings_of_the_same_sizes_are_equal_and_fixed():
    first, second = strings.Strings(3, 3), strings.Strings(3, 3)
    assert first.num_responses == len(first.tokens)
    assert (first, hash(first)) == (second, hash(second)) != (strings.Strings(3, 3, fixed_length=True), 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.horizon = 4


AUTOMATON = np.array([[1, 0, 2], [2, 2, 0], [0, 1, 1]])


@spaces
def test_states_are_those_of_a_walk(space):
    transitions = AUTOMATON[:, :1] if space.num_letters == 1 else np.resize(AUTOMATON, (3, space.num_letters))
    expected = [walk(prefix, transitions)[-1] for prefix in listed(space.num_letters, space.horizon - 1)]
    assert strings.states_of(space, transitions).tolist() == expected
    prefixes = listed(space.num_letters, space.horizon - 1)
    letters = strings.states_of(space, strings.previous_letter(space))
    assert letters.tolist() == [1 + prefix[-1] if prefix else 0 for prefix in prefixes]
    assert not strings.states_of(space, strings.one_state(space)).any()


@pytest.mark.parametrize(
    ("transitions", "error", "message"),
    [
        (np.array([[0, 1, 2], [0, 1, 1], [0, 1, 3]]), ValueError, r"transitions must be between 0 and 2, got 3 in row"),
        (np.array([[0, -1, 0]]), ValueError, r"transitions must be between 0 and 0, got -1 in row \(0, 1\)"),
        (np.array([[0, 0]]), ValueError, r"transitions must have 3 columns, got shape \(1, 2\)"),
        (np.array([0, 0, 0]), ValueError, r"transitions must have 3 columns, got shape \(3,\)"),
        (np.zeros((1, 3)), TypeError, "transitions must hold integers"),
    ],
)
def test_automata_are_checked(transitions, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(strings.states_of)(SPACES[0], transitions)
