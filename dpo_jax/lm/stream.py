"""Prompts and responses as one stream of tokens, without padding, in which responses share their prompt.

A row is a prompt and all responses to it: one, a pair, or a ranking. Most work of a decoder is done token by token, so
the tokens of all rows stand in one stream, each prompt once. Only attention needs rows, in a few groups of like length,
and only tokens that predict a token of a response meet the vocabulary. Sizes of the three are the capacity, which is
static; all else is computed on the device, so that batches remain plain arrays of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PADDING = -1
"""Stands in arrays of tokens where there is no token."""

MOST_GROUPS = 4
"""In how many groups of like length rows are attended at most: more of them take longer to compile."""


class Capacity(NamedTuple):
    """Sizes of a compiled program.

    Attributes:
      tokens: length of the stream.
      rows: room for the tokens of each row, from the longest row to the shortest. Rows of equal room are attended
        together.
      scored: tokens of all responses.
    """

    tokens: int
    rows: tuple[int, ...]
    scored: int


class Stream(NamedTuple):
    """The tokens of a batch, and where they stand.

    Attributes:
      tokens: ids; 0 behind the last.
      positions: of each token in its own sequence: a response goes on behind its prompt.
      to_rows: for each group of rows, longest first, and each place of them, its place in the stream (out of range:
        none).
      to_stream: for each place of the stream, its place in these rows one after the other (out of range: none).
      visible: for each group, in each row, which token (second axis) sees which (third axis).
      predictors: for each token of a response, the place in the stream of the token before it.
      targets: the ids of these tokens.
      found: for each entry of the arrays of responses, side by side, its number among the targets.
      present: which of these entries are tokens.
      fits: which rows are within the capacity, have a prompt, and have ids in range.
    """

    tokens: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    to_rows: tuple[Int[Array, "_ _"], ...]
    to_stream: Int[Array, " tokens"]
    visible: tuple[Bool[Array, "_ _ _"], ...]
    predictors: Int[Array, " scored"]
    targets: Int[Array, " scored"]
    found: Int[Array, "rows entries"]
    present: Bool[Array, "rows entries"]
    fits: Bool[Array, " rows"]


def capacity_of(prompts: Any, responses: Any, *, multiple: int = 1) -> Capacity:
    """What a batch needs.

    Args:
      prompts: tokens `[rows, tokens]`.
      responses: one such array or any pytree of them.
      multiple: numbers of tokens are rounded up to multiples of it, and all rows have equal room, so that so many
        devices can share them.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(responses)]
    of_responses = sum((leaf >= 0).sum(axis=1) for leaf in leaves)
    of_rows = (np.asarray(prompts) >= 0).sum(axis=1) + of_responses
    tokens, scored = (-(-int(part.sum()) // multiple) * multiple for part in (of_rows, np.asarray(of_responses)))
    groups = group_sizes(len(of_rows), MOST_GROUPS if multiple == 1 else 1)
    return Capacity(tokens, tuple(np.repeat(rooms_of(of_rows, groups), groups).tolist()), scored)


def group_sizes(num_rows: int, most: int) -> list[int]:
    """How many rows belong to each of at most so many groups."""
    return [len(group) for group in np.array_split(np.arange(num_rows), min(most, num_rows))]


def rooms_of(lengths: Sequence[int] | Int[np.ndarray, " rows"], groups: Sequence[int]) -> list[int]:
    """Room that a row of each group needs: the longest rows are in the first."""
    firsts = np.cumsum([0, *groups[:-1]])
    return np.maximum(np.sort(lengths)[::-1][firsts], 1).tolist()


def make_stream(
    prompts: Int[Array, "rows _"], responses: list[Int[Array, "rows _"]], capacity: Capacity | None, vocab_size: int
) -> Stream:
    """Finds the place of each token.

    Args:
      prompts: tokens, -1 where there is none; the others keep their order.
      responses: the same, for each response of a row.
      capacity: `None` means as much as arrays of these shapes can need.
      vocab_size: ids must be below it.

    Raises:
      ValueError: there are more rows than the capacity has room for.
    """
    grid = jnp.concatenate([prompts, *responses], axis=1)
    (num, width), inputs = grid.shape, prompts.shape[1]
    size = capacity or Capacity(grid.size, (width,) * num, num * (width - inputs))
    if len(size.rows) < num:
        raise ValueError(f"the capacity has room for {len(size.rows)} rows, got {num}")
    widths = [leaf.shape[1] for leaf in (prompts, *responses)]
    owner = np.repeat(np.arange(len(widths)), widths)[None]  # 0 for the prompt, 1 for the first response, ...

    real = grid >= 0
    parts = jnp.split(real, np.cumsum(widths)[:-1], axis=1)
    within = jnp.concatenate([jnp.cumsum(part, axis=1) for part in parts], axis=1) - 1
    prompt_length, length = jnp.sum(parts[0], axis=1), jnp.sum(real, axis=1)
    start = jnp.cumsum(length) - length
    slot = jnp.cumsum(real, axis=1) - 1
    place = start[:, None] + slot
    cell = inverse(jnp.where(real, place, size.tokens), size.tokens)
    position = within + jnp.where(owner == 0, 0, prompt_length[:, None])

    longest_first = jnp.argsort(length, descending=True)
    rooms, places = np.array(size.rows[:num]), sum(size.rows[:num])
    room, first = (jnp.zeros(num, int).at[longest_first].set(x) for x in (rooms, np.cumsum(rooms) - rooms))
    where_in_rows = jnp.where(slot < room[:, None], first[:, None] + slot, places)
    owners = entries_at(jnp.broadcast_to(owner, grid.shape), cell, -1)
    to_rows, visible = [], []
    for width, rows in _grouped(longest_first, rooms):
        columns = jnp.arange(width)[None]
        to_rows.append(jnp.where(columns < length[rows, None], start[rows, None] + columns, size.tokens))
        owner_in_rows = entries_at(owners, to_rows[-1], -1)
        query, key = owner_in_rows[:, :, None], owner_in_rows[:, None, :]
        visible.append(jnp.tril(jnp.ones((width, width), bool))[None] & (key >= 0) & ((key == 0) | (key == query)))

    present = real[:, inputs:]
    found = (jnp.cumsum(present) - 1).reshape(present.shape)
    entry = inverse(jnp.where(present, found, size.scored), size.scored)
    before = jnp.where(within == 0, (start + prompt_length)[:, None], place)[:, inputs:] - 1
    fits = (start + length <= size.tokens) & (length <= room) & (prompt_length > 0)
    fits &= jnp.cumsum(jnp.sum(present, axis=1)) <= size.scored
    fits &= jnp.all((grid < vocab_size) & (grid >= PADDING), axis=1)
    return Stream(
        tokens=entries_at(jnp.where(grid < vocab_size, grid, 0), cell, 0),
        positions=entries_at(position, cell, 0),
        to_rows=tuple(to_rows),
        to_stream=entries_at(where_in_rows, cell, places),
        visible=tuple(visible),
        predictors=jnp.clip(entries_at(before, entry, 0), 0, size.tokens - 1),
        targets=entries_at(grid[:, inputs:], entry, 0),
        found=found,
        present=present,
        fits=fits,
    )


def into_rows(x: Float[Array, " tokens *features"], stream: Stream) -> list[Float[Array, " _ _ *features"]]:
    """The stream in rows, group by group, zero where a row has ended."""
    places = _moved(x, _places(stream), stream.to_stream)
    ends = np.cumsum([group.size for group in stream.to_rows])[:-1]
    parts = jnp.split(places, ends)
    return [part.reshape(*group.shape, *x.shape[1:]) for part, group in zip(parts, stream.to_rows, strict=True)]


def into_stream(groups: Sequence[Float[Array, " _ _ *features"]], stream: Stream) -> Float[Array, " tokens *features"]:
    """Groups of rows as one stream, zero behind its end."""
    places = jnp.concatenate([group.reshape(-1, *group.shape[2:]) for group in groups])
    return _moved(places, stream.to_stream, _places(stream))


def _places(stream: Stream) -> Int[Array, " places"]:
    return jnp.concatenate([group.ravel() for group in stream.to_rows])


def _grouped(longest_first: Int[Array, " rows"], rooms: Int[np.ndarray, " rows"]) -> list[tuple[int, Array]]:
    """The rows that have equal room, and how much."""
    counts = [(room, len(list(equal))) for room, equal in groupby(rooms.tolist())]
    groups = jnp.split(longest_first, np.cumsum([count for _, count in counts])[:-1])
    return [(room, rows) for (room, _), rows in zip(counts, groups, strict=True)]


@jax.custom_vjp
def _moved(x: Array, index: Array, back: Array) -> Array:
    """`x[index]`, zero where the index is out of range; `back` is the inverse. The gradient is a gather, too."""
    del back
    return x.at[index].get(mode="fill", fill_value=0)


def _moved_forward(x: Array, index: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    return _moved(x, index, back), (index, back)


def _moved_backward(indices: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    index, back = indices
    return _moved(gradient, back, index), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def inverse(index: Int[Array, "rows entries"], size: int) -> Int[Array, " size"]:
    """For each number below `size`, the entry that has it; out of range if there is none."""
    entries = jnp.arange(index.size)
    return jnp.full(size, index.size, entries.dtype).at[index.ravel()].set(entries, mode="drop")


def entries_at(values: Array, index: Array, fill: int) -> Array:
    """Entries by number, and `fill` where that is out of range."""
    return values.ravel().at[index].get(mode="fill", fill_value=fill)
