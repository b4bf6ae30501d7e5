"""Which rows make a batch, and the few shapes in which batches are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from dpo_jax import checks
from dpo_jax.lm.config import Config
from dpo_jax.lm.stream import MOST_GROUPS, Capacity, group_sizes, rooms_of

MOST_SHAPES = 6
"""How many shapes are compiled at most."""

MOST_NEEDS = 400
"""So many different batches are told apart when shapes are chosen; beyond that, like ones are taken together."""

COMPILATION = {"cpu": 2e11, "gpu": 3e14}
"""What compiling one more shape for scoring costs, in multiplications that could be done meanwhile. For training it is
three times as much, as is its work."""

SLOWNESS_OF_ATTENTION = 2.5
"""How much longer a multiplication in attention takes than one in a large product of matrices."""


class Prices(NamedTuple):
    """What a program costs, in units of computing one token.

    Attributes:
      scored: for each token of a response, whose logits are computed.
      places: for each pair of places in a row, which attention compares.
      shape: for compiling it.
      group: for compiling the attention of one more group of rows.
    """

    scored: float = 0.0
    places: float = 0.0
    shape: float = 0.0
    group: float = 0.0


ONLY_TOKENS = Prices()


class Batch(NamedTuple):
    """A batch to come.

    Attributes:
      rows: which rows of the data.
      capacity: the shape in which it is computed.
    """

    rows: Int[np.ndarray, " batch"]
    capacity: Capacity


def shuffled(
    key: Key[Array, ""],
    sizes: Sequence[Capacity],
    *,
    num_epochs: int,
    batch_size: int,
    rows_at_once: int | None = None,
    prices: Prices = ONLY_TOKENS,
    multiple: int = 1,
) -> list[Batch]:
    """All batches of training: each epoch is shuffled by its own part of the key; its last batch may be short.

    Args:
      key: typed PRNG key.
      sizes: what each row needs (`sizes_of`).
      num_epochs: passes over the data.
      batch_size: rows per batch.
      rows_at_once: rows that are computed at once, to which capacities then refer; `None` means a batch.
      prices, multiple: see `shaped`.
    """
    checks.key(key)
    checks.size("num_epochs", num_epochs)
    checks.size("batch_size", batch_size)
    if rows_at_once is not None:
        checks.size("rows_at_once", rows_at_once)
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, i), len(sizes))) for i in range(num_epochs)]
    batches = [part for order in orders for part in _cut(order, batch_size)]
    return shaped(batches, sizes, rows_at_once, prices, multiple)


def alike(
    sizes: Sequence[Capacity], *, batch_size: int, prices: Prices = ONLY_TOKENS, multiple: int = 1
) -> list[Batch]:
    """All rows once, for scoring: each batch has long and short rows, so that one shape serves all with little waste.

    Args:
      sizes: what each row needs (`sizes_of`).
      batch_size: rows per batch at most. All have equally many: a row of -1 is none.
      prices, multiple: see `shaped`.
    """
    checks.size("batch_size", batch_size)
    num_batches = -(-len(sizes) // batch_size)
    num_rows = -(-len(sizes) // num_batches)
    longest_first = np.argsort([-size.tokens for size in sizes], kind="stable")
    dealt = np.append(longest_first, np.full(num_batches * num_rows - len(sizes), -1)).reshape(num_rows, num_batches)
    dealt[1::2] = dealt[1::2, ::-1]  # who gets the longest row of one round gets the shortest of the next
    groups = _groups(num_rows, multiple)
    needs = np.array([_need([rows], sizes, groups) for rows in dealt.T])
    return [Batch(*both) for both in zip(dealt.T, _capacities(needs, groups, 1, prices, multiple), strict=True)]


def check_rows(config: Config, data: Any) -> None:
    """Data have rows, equally many of all that belong to them, that fit into the context of a model.

    Raises:
      ValueError: what is wrong.
    """
    checks.rows("data", data)
    checks.weights(data)
    prompts, *responses = (np.sum(np.asarray(x) >= 0, axis=1) for x in (data.prompts, *jax.tree.leaves(data.responses)))
    longest = max(int((prompts + response).max()) for response in responses)
    if longest > config.max_length:
        raise ValueError(f"a prompt with its response has {longest} tokens, the model's context {config.max_length}")


def sizes_of(prompts: Any, responses: Any) -> list[Capacity]:
    """What each row needs on its own.

    Args:
      prompts: tokens `[rows, length]`, -1 where there is none.
      responses: one such array or any pytree of them.
    """
    scored = sum((np.asarray(leaf) >= 0).sum(axis=1) for leaf in jax.tree.leaves(responses))
    tokens = (np.asarray(prompts) >= 0).sum(axis=1) + scored
    return [
        Capacity(int(t), (int(t),), int(s)) for t, s in zip(tokens, np.broadcast_to(scored, tokens.shape), strict=True)
    ]


def shaped(
    batches: Sequence[Int[np.ndarray, " _"]],
    sizes: Sequence[Capacity],
    rows_at_once: int | None = None,
    prices: Prices = ONLY_TOKENS,
    multiple: int = 1,
) -> list[Batch]:
    """Gives each batch one of at most `MOST_SHAPES` shapes, so that little is computed in vain.

    Batches of another number of rows, the short ones at the ends of epochs, are shapes of their own.

    Args:
      batches: rows of each.
      sizes: what each row needs.
      rows_at_once: see `shuffled`.
      prices: decide what is little.
      multiple: numbers of tokens are rounded up to multiples of it, so that so many devices can share them.
    """
    counts = [len(rows) for rows in batches]
    capacities: list[Any] = [None] * len(batches)
    different = sorted({*counts}, reverse=True)
    for count in different:
        own = [i for i, other in enumerate(counts) if other == count]
        num_rows = min(count, rows_at_once or count)
        groups = _groups(num_rows, multiple)
        needs = np.array([_need(_cut(batches[i], num_rows), sizes, groups) for i in own])
        most = MOST_SHAPES - len(different) + 1 if count == different[0] else 1
        for i, capacity in zip(own, _capacities(needs, groups, max(1, most), prices, multiple), strict=True):
            capacities[i] = capacity
    return [Batch(*both) for both in zip(batches, capacities, strict=True)]


def prices_of(config: Config) -> Prices:
    """Prices for a model of these sizes.

    What attention and compilation cost was measured with SmolLM2-135M on a CPU.
    """
    c = config
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    token = c.num_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
    places = SLOWNESS_OF_ATTENTION * 2 * c.num_layers * c.num_heads * c.head_dim
    shape = COMPILATION.get(jax.default_backend(), COMPILATION["gpu"])
    return Prices(c.vocab_size * c.hidden_size / token, places / token, shape / token, shape / token / 3)


def _need(parts: Sequence[Int[np.ndarray, " _"]], sizes: Sequence[Capacity], groups: Sequence[int]) -> list[int]:
    """Tokens, scored tokens and room for a row of each group that suffice for each of several parts of a batch."""
    needs = []
    for part in parts:
        own = [sizes[row] for row in part if row >= 0]
        lengths = [size.tokens for size in own] + [0] * (len(parts[0]) - len(own))
        needs.append([sum(lengths), sum(size.scored for size in own), *rooms_of(lengths, groups)])
    return np.max(needs, axis=0).tolist()


def _groups(num_rows: int, multiple: int) -> list[int]:
    """How many rows are attended together, if numbers of tokens are multiples: devices share the rows of a group."""
    return group_sizes(num_rows, MOST_GROUPS if multiple == 1 else 1)


def _capacities(
    needs: Int[np.ndarray, "batches sizes"], groups: Sequence[int], most: int, prices: Prices, multiple: int
) -> list[Capacity]:
    """The shape of each batch. See `_levels`."""
    found = []
    for tokens, scored, *rooms in _levels(needs, groups, most, prices).tolist():
        tokens, scored = (-(-size // multiple) * multiple for size in (tokens, scored))
        found.append(Capacity(tokens, tuple(np.repeat(rooms, groups).tolist()), scored))
    return found


def _cut(order: Int[np.ndarray, " rows"], batch_size: int) -> list[Int[np.ndarray, " _"]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _levels(
    needs: Int[np.ndarray, "batches sizes"], groups: Sequence[int], most: int, prices: Prices
) -> Int[np.ndarray, "batches sizes"]:
    """Gives each batch the cheapest of a few shapes that are large enough.

    Sizes are tokens, scored tokens, and room for a row of each group.

    Starts with a shape for each batch, and joins the two whose joint shape costs least, until there are few enough and
    compiling one more would cost more than it saves.
    """

    def cost(shapes: Any) -> Any:
        sizes = np.asarray(shapes, float)
        return sizes[..., 0] + prices.scored * sizes[..., 1] + prices.places * sizes[..., 2:] ** 2 @ np.array(groups)

    shapes, counts = _told_apart(needs)
    own = cost(shapes) * counts
    together = cost(np.maximum(shapes[:, None], shapes)) * (counts[:, None] + counts)
    extra = together - own[:, None] - own
    np.fill_diagonal(extra, np.inf)
    while len(shapes) > 1:
        i, j = sorted(np.unravel_index(np.argmin(extra), extra.shape))
        if len(shapes) <= most and extra[i, j] >= prices.shape:
            break
        shapes[i], counts[i] = np.maximum(shapes[i], shapes[j]), counts[i] + counts[j]
        shapes, counts = np.delete(shapes, j, 0), np.delete(counts, j)
        extra = np.delete(np.delete(extra, j, 0), j, 1)
        own = cost(shapes) * counts
        extra[i] = extra[:, i] = cost(np.maximum(shapes[i], shapes)) * (counts[i] + counts) - own[i] - own
        extra[i, i] = np.inf
    fits = np.all(shapes[None] >= needs[:, None], axis=-1)
    cheapest = np.argmin(np.where(fits, cost(shapes), np.inf), axis=1)
    for shape, uses in zip(shapes, np.bincount(cheapest, minlength=len(shapes)), strict=True):
        shape[2:] = _in_fewer_groups(shape[2:], groups, prices.places * uses, prices.group)
    return shapes[cheapest]


def _in_fewer_groups(
    rooms: Int[np.ndarray, " groups"], groups: Sequence[int], of_places: float, of_group: float
) -> Int[np.ndarray, " groups"]:
    """Gives rows the room of the group before theirs, as long as that costs less than compiling one more."""
    rooms = rooms.copy()
    while True:
        starts = np.flatnonzero(np.diff(rooms, prepend=-1))  # groups of equal room are one already
        counts = np.add.reduceat(groups, starts)
        extra = of_places * counts[1:] * (rooms[starts[:-1]] ** 2 - rooms[starts[1:]] ** 2)
        if not len(extra) or extra.min() >= of_group:
            return rooms
        cheapest = int(np.argmin(extra))
        rooms[rooms == rooms[starts[cheapest + 1]]] = rooms[starts[cheapest]]


def _told_apart(
    needs: Int[np.ndarray, "batches sizes"],
) -> tuple[Int[np.ndarray, "shapes sizes"], Int[np.ndarray, " shapes"]]:
    """Different needs and how many batches have each; like ones are taken together if they are many."""
    found, counts = np.unique(needs, axis=0, return_counts=True)
    width = 0.01
    while len(found) > MOST_NEEDS:
        cells = np.ceil(np.log(np.maximum(needs, 1)) / width)
        _, cell, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        found = np.zeros((len(counts), needs.shape[1]), needs.dtype)
        np.maximum.at(found, cell.ravel(), needs)
        width *= 1.2
    return found, counts
