"""Prompts and responses as one stream of tokens, without padding, in which responses share their prompt.

A row is a prompt and all responses to it: one, a pair, or a ranking. Most work of a decoder is done token by token, so
the tokens of all rows stand in one stream, each prompt once. Only attention needs rows, and only tokens that predict a
token of a response meet the vocabulary. Sizes of the three are the capacity, which is static; all else is computed on
the device, so that batches remain plain arrays of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PADDING = -1
"""Stands in arrays of tokens where there is no token."""


class Capacity(NamedTuple):
    """Sizes of a compiled program.

    Attributes:
      tokens: length of the stream.
      row: tokens of the longest row.
      scored: tokens of all responses.
    """

    tokens: int
    row: int
    scored: int


class Stream(NamedTuple):
    """The tokens of a batch, and where they stand.

    Attributes:
      tokens: ids; 0 behind the last.
      positions: of each token in its own sequence: a response goes on behind its prompt.
      to_rows: for each place of each row, its place in the stream (out of range: none).
      to_stream: for each place of the stream, its place in the rows one after the other (out of range: none).
      visible: in each row, which token (second axis) sees which (third axis).
      predictors: for each token of a response, the place in the stream of the token before it.
      targets: the ids of these tokens.
      found: for each entry of the arrays of responses, side by side, its number among the targets.
      present: which of these entries are tokens.
      fits: which rows are within the capacity, have a prompt, and have ids in range.
    """

    tokens: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    to_rows: Int[Array, "rows row"]
    to_stream: Int[Array, " tokens"]
    visible: Bool[Array, "rows row row"]
    predictors: Int[Array, " scored"]
    targets: Int[Array, " scored"]
    found: Int[Array, "rows entries"]
    present: Bool[Array, "rows entries"]
    fits: Bool[Array, " rows"]


def capacity_of(prompts: Any, responses: Any) -> Capacity:
    """What a batch needs.

    Args:
      prompts: tokens `[rows, tokens]`.
      responses: one such array or any pytree of them.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(responses)]
    of_responses = sum((leaf >= 0).sum(axis=1) for leaf in leaves)
    of_rows = (np.asarray(prompts) >= 0).sum(axis=1) + of_responses
    return Capacity(int(of_rows.sum()), int(of_rows.max()), int(np.sum(of_responses)))


def make_stream(
    prompts: Int[Array, "rows _"], responses: list[Int[Array, "rows _"]], capacity: Capacity | None, vocab_size: int
) -> Stream:
    """Finds the place of each token.

    Args:
      prompts: tokens, -1 where there is none; the others keep their order.
      responses: the same, for each response of a row.
      capacity: `None` means as much as arrays of these shapes can need.
      vocab_size: ids must be below it.
    """
    grid = jnp.concatenate([prompts, *responses], axis=1)
    (num, width), inputs = grid.shape, prompts.shape[1]
    size = capacity or Capacity(grid.size, width, num * (width - inputs))
    widths = [leaf.shape[1] for leaf in (prompts, *responses)]
    owner = np.repeat(np.arange(len(widths)), widths)[None]  # 0 for the prompt, 1 for the first response, ...

    real = grid >= 0
    parts = jnp.split(real, np.cumsum(widths)[:-1], axis=1)
    within = jnp.concatenate([jnp.cumsum(part, axis=1) for part in parts], axis=1) - 1
    prompt_length, length = jnp.sum(parts[0], axis=1), jnp.sum(real, axis=1)
    start = jnp.cumsum(length) - length
    slot = jnp.cumsum(real, axis=1) - 1
    place = start[:, None] + slot
    cell = _inverse(jnp.where(real, place, size.tokens), size.tokens)
    position = within + jnp.where(owner == 0, 0, prompt_length[:, None])
    where_in_rows = jnp.where(slot < size.row, jnp.arange(num)[:, None] * size.row + slot, num * size.row)
    columns = jnp.arange(size.row)[None]
    to_rows = jnp.where(columns < length[:, None], start[:, None] + columns, size.tokens)
    owner_in_rows = _at(_at(jnp.broadcast_to(owner, grid.shape), cell, -1), to_rows, -1)
    query, key = owner_in_rows[:, :, None], owner_in_rows[:, None, :]
    visible = jnp.tril(jnp.ones((size.row, size.row), bool))[None] & (key >= 0) & ((key == 0) | (key == query))

    present = real[:, inputs:]
    found = (jnp.cumsum(present) - 1).reshape(present.shape)
    entry = _inverse(jnp.where(present, found, size.scored), size.scored)
    before = jnp.where(within == 0, (start + prompt_length)[:, None], place)[:, inputs:] - 1
    fits = (start + length <= size.tokens) & (length <= size.row) & (prompt_length > 0)
    fits &= jnp.cumsum(jnp.sum(present, axis=1)) <= size.scored
    fits &= jnp.all((grid < vocab_size) & (grid >= PADDING), axis=1)
    return Stream(
        tokens=_at(jnp.where(grid < vocab_size, grid, 0), cell, 0),
        positions=_at(position, cell, 0),
        to_rows=to_rows,
        to_stream=_at(where_in_rows, cell, num * size.row),
        visible=visible,
        predictors=jnp.clip(_at(before, entry, 0), 0, size.tokens - 1),
        targets=_at(grid[:, inputs:], entry, 0),
        found=found,
        present=present,
        fits=fits,
    )


def into_rows(x: Float[Array, " tokens *features"], stream: Stream) -> Float[Array, " rows row *features"]:
    """The stream in rows, zero where a row has ended."""
    rows = _moved(x, stream.to_rows.ravel(), stream.to_stream)
    return rows.reshape(*stream.to_rows.shape, *x.shape[1:])


def into_stream(x: Float[Array, " rows row *features"], stream: Stream) -> Float[Array, " tokens *features"]:
    """Rows as one stream, zero behind its end."""
    return _moved(x.reshape(-1, *x.shape[2:]), stream.to_stream, stream.to_rows.ravel())


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


def _inverse(index: Int[Array, "rows entries"], size: int) -> Int[Array, " size"]:
    """For each number below `size`, the entry that has it; out of range if there is none."""
    entries = jnp.arange(index.size)
    return jnp.full(size, index.size, entries.dtype).at[index.ravel()].set(entries, mode="drop")


def _at(values: Array, index: Array, fill: int) -> Array:
    """Entries by number, and `fill` where that is out of range."""
    return values.ravel().at[index].get(mode="fill", fill_value=fill)
