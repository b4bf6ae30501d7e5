"""All strings over a few letters, as ids: their tokens, lengths, and the tree of their prefixes.

A string is a response of several tokens. `Strings` lists all of them once, so a response is still an id, and a policy
is still a table `[prompts, responses]`.

Ids are ordered by length, and alphabetically among strings of equal length. Prefixes are ordered in the same way, so
the children of the prefixes of one length lie side by side: sums over the tree need no index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dpo_jax import checks

MOST_STRINGS = 2**20
"""The largest number of strings that are listed: a table of them takes 4 MiB for each prompt."""
LONGEST = 100
"""The largest horizon; only strings of a single letter can reach it."""
PADDING = -1
"""Stands behind the end of a string."""

Transitions: TypeAlias = Int[np.ndarray, "states letters"]
"""An automaton: the state after each state and letter. It begins in state 0."""


@dataclass(frozen=True)
class Strings:
    """All strings of up to `horizon` letters, or of exactly that many.

    A string that is shorter than the horizon has an end token behind its letters; the longest strings need none. Tokens
    are numbers: the letters `0 .. num_letters - 1`, and `num_letters` for the end.

    >>> strings = Strings(num_letters=2, horizon=2)
    >>> strings.text(range(strings.num_responses))
    ['', 'a', 'b', 'aa', 'ab', 'ba', 'bb']
    >>> strings.tokens[:3]  # the end is token 2, and padding -1
    array([[ 2, -1],
           [ 0,  2],
           [ 1,  2]], dtype=int32)

    Attributes:
      num_letters: size of the alphabet.
      horizon: the largest number of letters, 1 at least.
      fixed_length: whether all strings have `horizon` letters; then there is no end token.
      alphabet: the letters, for `text` and `ids_of`; a, b, c, ... if empty.

    Raises:
      TypeError, ValueError: a size is no whole number, or too small; the alphabet has another size, or a letter twice;
        or there are more than `MOST_STRINGS` strings, or longer ones than `LONGEST`.
    """

    num_letters: int
    horizon: int
    fixed_length: bool = False
    alphabet: str = ""

    def __post_init__(self) -> None:
        checks.size("num_letters", self.num_letters)
        checks.size("horizon", self.horizon)
        if self.alphabet and len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError(f"alphabet must not have a letter twice, got {self.alphabet!r}")
        if self.alphabet and len(self.alphabet) != self.num_letters:
            raise ValueError(f"alphabet must have {self.num_letters} letters, got {self.alphabet!r}")
        too_many = self.horizon > LONGEST or self.horizon * math.log2(self.num_letters) > math.log2(MOST_STRINGS)
        if too_many or self.num_responses > MOST_STRINGS:
            what = f"{MOST_STRINGS:,} strings" if self.num_letters > 1 else f"{LONGEST} letters in a string"
            raise ValueError(
                f"{self.num_letters} letters and a horizon of {self.horizon} make more than {what}, "
                "which cannot be listed: take fewer letters or a shorter horizon. Longer responses can be trained on "
                "as arrays of tokens (train/README.md), without exact values"
            )

    @property
    def num_choices(self) -> int:
        """How many tokens a prefix can be continued by: the letters, and the end where there is one."""
        return self.num_letters + (not self.fixed_length)

    @property
    def num_responses(self) -> int:
        """How many strings there are."""
        longest = self.num_letters**self.horizon
        return longest if self.fixed_length else self.num_prefixes + longest

    @property
    def num_prefixes(self) -> int:
        """How many prefixes have a next token: all strings shorter than the horizon."""
        return int(self.offsets[self.horizon])

    @cached_property
    def offsets(self) -> Int[np.ndarray, " lengths"]:
        """For each length up to the horizon, how many prefixes are shorter."""
        return np.cumsum([0, *(self.num_letters**length for length in range(self.horizon))])

    @cached_property
    def tokens(self) -> Int[np.ndarray, "responses horizon"]:
        """The tokens of each string, padded by `PADDING`."""
        rows = []
        for length in [self.horizon] if self.fixed_length else range(self.horizon + 1):
            digits = self.num_letters ** np.arange(length)[::-1]
            letters = np.arange(self.num_letters**length)[:, None] // digits % self.num_letters
            row = np.full((len(letters), self.horizon), PADDING)
            row[:, :length] = letters
            if length < self.horizon:
                row[:, length] = self.num_letters
            rows.append(row)
        return np.concatenate(rows).astype(np.int32)

    @cached_property
    def mask(self) -> Bool[np.ndarray, "responses horizon"]:
        """Which entries of `tokens` are tokens of the string, its end among them."""
        return self.tokens >= 0

    @cached_property
    def lengths(self) -> Int[np.ndarray, " responses"]:
        """The number of letters of each string."""
        return np.sum(self.mask & (self.tokens < self.num_letters), axis=-1).astype(np.int32)

    @cached_property
    def num_tokens(self) -> Int[np.ndarray, " responses"]:
        """The number of tokens of each string, its end token among them: what means over tokens divide by."""
        return np.sum(self.mask, axis=-1).astype(np.int32)

    @cached_property
    def prefixes(self) -> Int[np.ndarray, "responses horizon"]:
        """The prefix before each token of each string, as an id; 0 behind the end."""
        return np.asarray(_prefixes(np, self, self.tokens))

    def ids(self, tokens: Int[Array, "*n horizon"]) -> Int[Array, "*n"]:
        """The ids of strings given by their tokens. Tokens behind the end are ignored.

        Raises:
          TypeError: tokens are not integers.
          ValueError: they have another number of columns than the horizon, a letter is out of range, or a string has no
            end. Where tokens are traced, the id of such a string is -1, which is no response.
        """
        checks.integers("tokens", tokens)
        if jnp.shape(tokens)[-1:] != (self.horizon,):
            raise ValueError(f"tokens must have {self.horizon} columns, the horizon, got shape {jnp.shape(tokens)}")
        if checks.is_traced(tokens):
            found, valid = _ids(jnp, self, jnp.asarray(tokens, jnp.promote_types(tokens.dtype, jnp.int32)))
            return jnp.where(valid, found, PADDING)
        found, valid = _ids(np, self, np.asarray(tokens, np.int64))
        if not valid.all():
            row = tuple(int(i) for i in np.argwhere(~valid)[0])
            where = f" in row {row[0] if len(row) == 1 else row}" if row else ""
            raise ValueError(
                f"tokens must be letters between 0 and {self.num_letters - 1}"
                + (f", {self.horizon} of them" if self.fixed_length else f", then the end, {self.num_letters}")
                + f": got {np.asarray(tokens)[row].tolist()}{where}"
            )
        return jnp.asarray(found, jnp.int32)

    def ids_of(self, texts: Sequence[str]) -> Int[Array, " n"]:
        """The ids of strings given as text.

        >>> Strings(num_letters=2, horizon=3).ids_of(["ab", ""])
        Array([4, 0], dtype=int32)

        Raises:
          TypeError, ValueError: naming the row of a text that is none of the strings.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a sequence of strings, got the string {texts!r}")
        letters = {letter: number for number, letter in enumerate(self._alphabet)}
        tokens = np.full((len(texts), self.horizon), PADDING)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts must hold strings, got {text!r} in row {row}")
            if strange := [letter for letter in text if letter not in letters]:
                raise ValueError(f"texts must have letters of {self._alphabet!r}, got {strange[0]!r} in row {row}")
            if len(text) > self.horizon or (self.fixed_length and len(text) < self.horizon):
                wanted = f"{self.horizon} letters" if self.fixed_length else f"at most {self.horizon} letters"
                raise ValueError(f"texts must have {wanted}, got {text!r} in row {row}")
            tokens[row, : len(text)] = [letters[letter] for letter in text]
            tokens[row, len(text) : len(text) + 1] = self.num_letters
        return self.ids(jnp.asarray(tokens))

    def text(self, ids: Any) -> list[str]:
        """The strings of some ids, as text.

        Raises:
          TypeError, ValueError: they are not ids of responses.
        """
        ids = np.asarray(ids)
        checks.ids("ids", ids, self.num_responses)
        return [
            "".join(self._alphabet[token] for token in self.tokens[i, : self.lengths[i]]) for i in ids.ravel().tolist()
        ]

    @property
    def _alphabet(self) -> str:
        if not self.alphabet and self.num_letters > len(ascii_lowercase):
            raise ValueError(f"{self.num_letters} letters have no names: give Strings an alphabet")
        return self.alphabet or ascii_lowercase[: self.num_letters]


def checked(strings: Strings, **tables: Any) -> None:
    """Each table has a last axis of all strings.

    Raises:
      ValueError: it has another length.
    """
    for name, table in tables.items():
        if jnp.shape(table)[-1:] != (strings.num_responses,):
            raise ValueError(
                f"{name} must have an entry for each of the {strings.num_responses} strings, got shape "
                f"{jnp.shape(table)}"
            )


def one_state(strings: Strings) -> Transitions:
    """The automaton that remembers nothing."""
    return np.zeros((1, strings.num_letters), int)


def previous_letter(strings: Strings) -> Transitions:
    """The automaton that remembers one letter: state 0 at the beginning, state `1 + letter` after a letter."""
    return np.tile(1 + np.arange(strings.num_letters), (1 + strings.num_letters, 1))


def states_of(strings: Strings, transitions: Transitions) -> Int[np.ndarray, " prefixes"]:
    """The state of an automaton, which begins in state 0, after each prefix.

    Args:
      strings: which strings there are.
      transitions: the state after each state and letter.

    Raises:
      TypeError, ValueError: a state is out of range, or there is no column for each letter.
    """
    checks.ids("transitions", np.asarray(transitions), len(transitions))
    if np.shape(transitions)[1:] != (strings.num_letters,):
        raise ValueError(f"transitions must have {strings.num_letters} columns, got shape {np.shape(transitions)}")
    level, states = np.zeros(1, int), []
    for _ in range(strings.horizon):
        states.append(level)
        level = np.asarray(transitions)[level].ravel()
    return np.concatenate(states)


def path_of(strings: Strings, tokens: Int[Array, "*n horizon"]) -> Int[Array, "*n horizon"]:
    """The prefix before each token, as an id; 0 behind the end. Tokens may be traced."""
    return _prefixes(jnp, strings, tokens)


def _prefixes(xp: Any, strings: Strings, tokens: Any) -> Any:
    """The prefix before each place: its length is the place, and its letters are a number in base `num_letters`."""
    number, columns = xp.zeros_like(tokens[..., 0]), []
    inside = xp.ones_like(number, dtype=bool)
    for place in range(strings.horizon):
        columns.append(xp.where(inside, int(strings.offsets[place]) + number, 0))
        token = tokens[..., place]
        inside &= (token >= 0) & (token < strings.num_letters)
        number = xp.where(inside, strings.num_letters * number + token, 0)
    return xp.stack(columns, -1)


def _ids(xp: Any, strings: Strings, tokens: Any) -> tuple[Any, Any]:
    """Ids, and whether the tokens are those of a string."""
    first = xp.zeros_like(tokens[..., 0])
    number, length, valid, inside = first, first, first == 0, first == 0
    for place in range(strings.horizon):
        token = tokens[..., place]
        is_letter = inside & (token >= 0) & (token < strings.num_letters)
        is_end = inside & (token == strings.num_letters) & (not strings.fixed_length)
        valid = valid & (~inside | is_letter | is_end)
        number = xp.where(is_letter, strings.num_letters * number + token, number)
        length, inside = length + is_letter, is_letter
    if strings.fixed_length:
        return number, valid
    return xp.asarray(strings.offsets)[length].astype(number.dtype) + number, valid
