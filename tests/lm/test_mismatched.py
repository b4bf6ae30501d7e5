"""KTO on tokens: labels with responses to other prompts beside their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import lm, losses
from dpo_jax.types import Labels
from tests.lm import tiny

MODEL = tiny.model()
PAIRS = tiny.pairs(6)
LABELS = Labels(PAIRS.prompts, PAIRS.responses.rejected, np.arange(6) % 2 == 0)


def test_each_row_gets_the_response_of_another_in_one_circle(key):
    responses = lm.with_mismatched(key, LABELS).responses
    np.testing.assert_array_equal(responses.own, LABELS.responses)
    rows = [row.tobytes() for row in responses.own]
    following = [rows.index(row.tobytes()) for row in responses.other]
    place, seen = 0, []
    for _ in rows:
        place = following[place]
        seen.append(place)
    assert sorted(seen) == [0, 1, 2, 3, 4, 5] and len({*rows}) == 6


def test_rows_of_one_prompt_do_not_get_each_others_responses(key):
    which = np.array([0, 1, 0, 2, 1, 0, 3])
    rows = Labels(tiny.pairs(4).prompts[which], np.arange(7)[:, None], np.ones(7, bool))
    other = lm.with_mismatched(key, rows).responses.other[:, 0]
    assert np.all(which[other] != which) and {*other.tolist()} == {*range(7)}
    few = jax.tree.map(lambda leaf: leaf[[0, 1, 2, 5]], rows)
    with pytest.raises(ValueError, match="3 of 4 rows answer one prompt"):
        lm.with_mismatched(key, few)


def test_the_loss_is_that_of_the_library_with_the_point_of_the_batch(key):
    data = lm.with_reference(MODEL, lm.with_mismatched(key, LABELS))
    params = jax.tree.map(lambda leaf: 0.8 * leaf, MODEL.params)
    log_prob = jax.jit(lm.log_prob_fn(MODEL.decoder))
    own, other = log_prob(params, *jax.tree.map(jnp.asarray, (data.prompts, data.responses)))
    point = jnp.maximum(jnp.mean(other - data.reference_logps.other), 0)
    expected = losses.kto_loss(
        own, jnp.asarray(data.reference_logps.own), jnp.asarray(data.desirable), beta=0.3, reference_point=point
    )
    batch = jax.tree.map(jnp.asarray, data)
    found, _ = lm.kto_objective(log_prob, beta=0.3)(params, batch)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-6)
    assert point > 0 and abs(float(found) - 0.5) > 1e-3


def test_tuning_raises_the_good_above_the_bad(key):
    data = lm.with_reference(MODEL, lm.with_mismatched(key, LABELS))
    tuned = lm.tune(
        key,
        MODEL,
        data,
        objective=partial(lm.kto_objective, beta=0.1),
        optimizer=lambda: optax.adam(1e-2),
        batch_size=6,
        num_epochs=4,
    )
    assert tuned.history["reward_margin"][-1] > tuned.history["reward_margin"][0] + 0.1
    np.testing.assert_allclose(tuned.history["loss"][0], 0.5, atol=1e-5)


def test_rows_without_a_mismatched_response_are_refused(key):
    with pytest.raises(TypeError, match="with_mismatched"):
        lm.kto_objective(lm.log_prob_fn(MODEL.decoder), beta=0.1)(MODEL.params, LABELS)
    with pytest.raises(ValueError, match="two rows or more"):
        lm.with_mismatched(key, jax.tree.map(lambda leaf: leaf[:1], LABELS))
