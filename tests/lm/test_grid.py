"""Adapters over axes: the runs of `tune`, with labels."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from dpo_jax import lm, losses, train
from tests.lm import tiny

MODEL = tiny.model()
DATA = lm.with_reference(MODEL, tiny.pairs(8))
OPTIONS = {
    "objective": partial(train.preference_objective, loss=losses.dpo_loss),
    "optimizer": lambda learning_rate: optax.sgd(learning_rate),
    "lora": lm.LoRA(rank=2, top_layers=1),
    "batch_size": 8,
    "preflight": False,
}


@pytest.fixture(scope="module")
def grid():
    return lm.tune_grid(
        jax.random.key(1),
        MODEL,
        DATA,
        axes={"beta": [0.1, 0.5], "learning_rate": [0.01, 0.1, 1.0]},
        num_seeds=2,
        num_epochs=2,
        **OPTIONS,
    )


def test_results_have_a_dimension_for_each_axis(grid):
    assert dict(grid.results.sizes) == {"beta": 2, "learning_rate": 3, "seed": 2, "step": 2}
    assert grid.results.beta.values.tolist() == [0.1, 0.5] and grid.results.step.values.tolist() == [1, 2]


def test_each_point_is_the_run_of_its_hyperparameters(grid):
    points = {"beta": [0.5], "learning_rate": [1.0], "seed": [1]}
    alone = lm.tune(jax.random.key(1), MODEL, DATA, points=points, num_epochs=2, **OPTIONS)
    found = grid.results.loss.sel(beta=0.5, learning_rate=1.0, seed=1)
    np.testing.assert_allclose(found, alone.history["loss"][0], atol=1e-6)
    adapter = grid.adapter(beta=0.5, learning_rate=1.0, seed=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], atol=1e-5), adapter, alone.params)
    others = grid.results.loss.sel(step=2).values.ravel()
    assert len({*others.round(7).tolist()}) == 12  # no two points do the same


@pytest.mark.parametrize("point", [{"beta": 0.3}, {"beta": 0.5}, {}], ids=str)
def test_a_point_must_describe_one_adapter(grid, point):
    with pytest.raises(KeyError, match="adapters, not one"):
        grid.adapter(**point)


@pytest.mark.parametrize("axes", [{"beta": []}, {"beta": [0.1, 0.1]}, {"seed": [1]}, {"step": [1]}], ids=str)
def test_bad_axes_are_refused(axes):
    with pytest.raises(ValueError, match="must have values, each once"):
        lm.tune_grid(jax.random.key(0), MODEL, DATA, axes=axes, **OPTIONS)
