"""Which rows make a batch, and the few shapes in which batches are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from dpo_jax import checks
from dpo_jax.lm.stream import Capacity
from dpo_jax.types import Params

MOST_SHAPES = 6
"""How many shapes are compiled at most."""

COMPILATION = 3e11
"""What compiling one more shape costs, in products with a parameter: a guess that decides how many shapes pay."""


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
    price: float = 0.0,
    multiple: int = 1,
) -> list[Batch]:
    """All batches of training: each epoch is shuffled by its own part of the key; its last batch may be short.

    Args:
      key: typed PRNG key.
      sizes: what each row needs (`sizes_of`).
      num_epochs: passes over the data.
      batch_size: rows per batch.
      rows_at_once: rows that are computed at once, to which capacities then refer; `None` means a batch.
      price, multiple: see `shaped`.
    """
    checks.key(key)
    checks.size("num_epochs", num_epochs)
    checks.size("batch_size", batch_size)
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, i), len(sizes))) for i in range(num_epochs)]
    batches = [part for order in orders for part in _cut(order, batch_size)]
    return shaped(batches, sizes, rows_at_once, price, multiple)


def sorted_by_length(
    sizes: Sequence[Capacity], *, batch_size: int, price: float = 0.0, multiple: int = 1
) -> list[Batch]:
    """All rows once, rows of like length together, for scoring."""
    checks.size("batch_size", batch_size)
    batches = _cut(np.argsort([-size.tokens for size in sizes], kind="stable"), batch_size)
    return shaped(batches, sizes, price=price, multiple=multiple)


def sizes_of(prompts: Any, responses: Any) -> list[Capacity]:
    """What each row needs on its own.

    Args:
      prompts: tokens `[rows, length]`, -1 where there is none.
      responses: one such array or any pytree of them.
    """
    scored = sum((np.asarray(leaf) >= 0).sum(axis=1) for leaf in jax.tree.leaves(responses))
    tokens = (np.asarray(prompts) >= 0).sum(axis=1) + scored
    return [
        Capacity(int(t), int(t), int(s)) for t, s in zip(tokens, np.broadcast_to(scored, tokens.shape), strict=True)
    ]


def shaped(
    batches: Sequence[Int[np.ndarray, " _"]],
    sizes: Sequence[Capacity],
    rows_at_once: int | None = None,
    price: float = 0.0,
    multiple: int = 1,
) -> list[Batch]:
    """Gives each batch one of at most `MOST_SHAPES` shapes: those for which least is computed in vain.

    Batches of another number of rows, the short ones at the ends of epochs, are shapes of their own.

    Args:
      batches: rows of each.
      sizes: what each row needs.
      rows_at_once: see `shuffled`.
      price: of compiling one more shape, in tokens that could be computed in that time.
      multiple: numbers of tokens are rounded up to multiples of it, so that so many devices can share them.
    """
    needs = np.array([_need(rows, sizes, rows_at_once) for rows in batches])
    counts = np.array([len(rows) for rows in batches])
    capacities = np.zeros_like(needs)
    lengths = sorted(set(counts.tolist()), reverse=True)
    for count in lengths:
        own = counts == count
        most = MOST_SHAPES - len(lengths) + 1 if count == lengths[0] else 1
        capacities[own] = _levels(needs[own], max(1, most), price)
    rounded = [
        Capacity(*(int(-(-size // m) * m) for size, m in zip(sizes, (multiple, 1, multiple), strict=True)))
        for sizes in capacities
    ]
    return [Batch(*both) for both in zip(batches, rounded, strict=True)]


def price_of_shape(params: Params, *, passes: int) -> float:
    """The price of a shape (`shaped`), for a model with these parameters.

    Args:
      params: of the model.
      passes: over the parameters, for each token: 1 for scoring, 3 for training.
    """
    return COMPILATION / (passes * sum(leaf.size for leaf in jax.tree.leaves(params)))


def _need(rows: Int[np.ndarray, " _"], sizes: Sequence[Capacity], at_once: int | None) -> Capacity:
    """What several rows need together, or the largest of their parts."""
    parts = [np.array([sizes[row] for row in part]) for part in _cut(rows, at_once or len(rows))]
    needs = np.array([(*part[:, :1].sum(0), *part[:, 1:2].max(0), *part[:, 2:].sum(0)) for part in parts])
    return Capacity(*map(int, needs.max(axis=0)))


def _cut(order: Int[np.ndarray, " rows"], batch_size: int) -> list[Int[np.ndarray, " _"]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _levels(needs: Int[np.ndarray, "batches 3"], most: int, price: float) -> Int[np.ndarray, "batches 3"]:
    """Splits batches, sorted by tokens, into at most so many groups, each as large as its largest.

    By dynamic programming over groups of sorted batches; the cost of a group is its number times its largest
    stream, and the price.
    """
    order = np.argsort(needs[:, 0], kind="stable")
    tokens = needs[order, 0].astype(float)
    ends = np.unique(np.linspace(0, len(tokens), min(len(tokens), 256) + 1).astype(int))  # where a group may end
    best, cuts = np.zeros(len(ends)), [[0] * len(ends)]
    best[1:] = np.inf
    totals = []
    for _ in range(most):
        cost = best[:, None] + (ends[None] - ends[:, None]) * tokens[np.maximum(ends - 1, 0)][None] + price
        cost[ends[:, None] >= ends[None]] = np.inf
        best = np.min(cost, axis=0)
        cuts.append(list(np.argmin(cost, axis=0)))
        totals.append(best[-1])
    found = np.zeros_like(needs)
    end = len(ends) - 1
    for cut in reversed(cuts[1 : 2 + int(np.argmin(totals))]):
        group = order[ends[cut[end]] : ends[end]]
        found[group] = needs[group].max(axis=0)
        end = cut[end]
    return found
