"""Batches: every row once an epoch, in a few shapes that fit."""

import jax
import numpy as np
import pytest

from dpo_jax.lm import batches
from dpo_jax.lm.stream import Capacity
from dpo_jax.types import Demonstrations
from tests.lm import tiny

SIZES = [Capacity(int(t), (int(t),), int(t) // 3) for t in np.random.default_rng(0).integers(40, 300, 203)]


def need(rows):
    own = [SIZES[row] for row in rows]
    return [sum(s.tokens for s in own), sum(s.scored for s in own), *sorted((s.tokens for s in own), reverse=True)]


def has_room(capacity, rows):
    """Whether a batch of rows fits."""
    tokens, scored, *lengths = need(rows)
    room = all(np.array(capacity.rows[: len(rows)]) >= lengths)
    return capacity.tokens >= tokens and capacity.scored >= scored and room


def shuffled(**options):
    return batches.shuffled(jax.random.key(0), SIZES, **{"num_epochs": 3, "batch_size": 4, **options})


def test_a_row_may_fill_the_context():
    prompts, responses = np.zeros((2, tiny.CONFIG.max_length - 3), np.int32), np.zeros((2, 3), np.int32)
    batches.check_rows(tiny.CONFIG, Demonstrations(prompts, responses))
    longer = Demonstrations(prompts, np.zeros((2, 4), np.int32))
    with pytest.raises(ValueError, match=f"has {tiny.CONFIG.max_length + 1} tokens, the model's context"):
        batches.check_rows(tiny.CONFIG, longer)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    found = shuffled()
    epochs = [np.concatenate([batch.rows for batch in found[i : i + 51]]) for i in (0, 51, 102)]
    assert all(sorted(epoch) == list(range(203)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(batch.rows) for batch in found[:51]] == [4] * 50 + [3]


def test_the_same_key_makes_the_same_batches():
    assert [b.rows.tolist() for b in shuffled()] == [b.rows.tolist() for b in shuffled()]


def test_all_fit_into_at_most_six_shapes_with_little_in_vain():
    found = shuffled()
    for batch in found:
        assert has_room(batch.capacity, batch.rows) and len(batch.capacity.rows) == len(batch.rows)
    shapes = {(len(batch.rows), batch.capacity) for batch in found}
    assert 2 < len(shapes) <= batches.MOST_SHAPES
    computed, needed = sum(b.capacity.tokens for b in found), sum(need(b.rows)[0] for b in found)
    assert computed < 1.08 * needed


def test_where_compiling_is_dear_there_is_one_shape_for_each_number_of_rows():
    assert len({batch.capacity for batch in shuffled(prices=batches.Prices(shape=1e9))}) == 2


def partitions(items, most):
    """All ways to divide items into at most so many groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:], most):
        yield from ([[items[0], *group] if i == j else group for j, group in enumerate(rest)] for i in range(len(rest)))
        if len(rest) < most:
            yield [[items[0]], *rest]


@pytest.mark.parametrize("prices", [batches.Prices(), batches.Prices(0.3, 0.01, 40.0)], ids=str)
def test_shapes_cost_little_more_than_the_best_there_are(prices):
    rng = np.random.default_rng(1)

    def cost(shape):
        return shape[0] + prices.scored * shape[1] + prices.places * shape[2:] ** 2 @ [3, 2]

    for _ in range(5):
        needs = np.stack([rng.integers(lowest, 4 * lowest, 7) for lowest in (50, 20, 30, 25)], axis=1)
        needs[:, 2:] = -np.sort(-needs[:, 2:])
        found = batches._levels(needs, [3, 2], 3, prices)
        assert np.all(found >= needs) and len(np.unique(found, axis=0)) <= 3
        total = sum(map(cost, found)) + prices.shape * len(np.unique(found, axis=0))
        best = min(
            sum(len(group) * cost(needs[group].max(axis=0)) + prices.shape for group in groups)
            for groups in partitions([*range(7)], 3)
        )
        assert best <= total * (1 + 1e-9) <= 1.1 * best


def test_many_different_batches_get_few_shapes_quickly():
    needs = -np.sort(-np.random.default_rng(2).integers(100, 1000, (5000, 5)))
    found = batches._levels(needs, [2, 1, 1], 6, batches.Prices(0.3, 0.001, 0.0))
    assert np.all(found >= needs) and len(np.unique(found, axis=0)) == 6


def test_groups_are_as_many_as_pay():
    rooms = np.array([300, 200, 190, 100])  # of which the second costs 3,900 in place of the third
    found = [batches._in_fewer_groups(rooms, [2, 1, 1, 1], 1.0, price).tolist() for price in (3e3, 4e3, 4e4, 2e5)]
    assert found == [[300, 200, 190, 100], [300, 200, 200, 100], [300, 200, 200, 200], [300] * 4]
    assert len({*shuffled(batch_size=203, num_epochs=1, prices=batches.Prices(group=1e9))[0].capacity.rows}) == 1
    assert len({*shuffled(batch_size=203, num_epochs=1)[0].capacity.rows}) == 4


def test_parts_of_a_batch_need_less():
    found = shuffled(rows_at_once=2, num_epochs=1)
    for batch in found:
        parts = [batch.rows[i : i + 2] for i in range(0, len(batch.rows), 2)]
        assert all(has_room(batch.capacity, part) for part in parts)
    assert max(b.capacity.tokens for b in found) < max(b.capacity.tokens for b in shuffled(num_epochs=1))


@pytest.mark.parametrize("batch_size", [7, 8, 203, 500])
def test_batches_for_scoring_are_so_alike_that_one_shape_serves_all(batch_size):
    found = batches.alike(SIZES, batch_size=batch_size)
    rows = np.concatenate([batch.rows for batch in found])
    assert sorted(rows[rows >= 0]) == list(range(203))
    assert len({len(batch.rows) for batch in found}) == 1 and len(found[0].rows) <= batch_size
    assert len({batch.capacity for batch in found}) == 1
    assert all(has_room(batch.capacity, batch.rows[batch.rows >= 0]) for batch in found)
    assert sum(b.capacity.tokens for b in found) < 1.1 * sum(size.tokens for size in SIZES)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_epochs": 0}, {"num_epochs": 1.5}], ids=str)
def test_sizes_are_checked(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        shuffled(**options)
