"""The numbers of the tutorial notebook, and the same steps with fewer data."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses, train
from experiments.lab.pipeline import TUTORIAL
from tests.experiments.small import PIPELINE, more


def test_runs_have_the_notebooks_length():
    """Steps, which averages hardly show: 100 epochs of 500 in batches of 32, 50 of about 1,800 in batches of 64."""
    start = jax.eval_shape(TUTORIAL.start, jax.random.key(0))
    assert start.history["loss"].shape == (100,)
    pairs = jax.eval_shape(TUTORIAL.comparisons, jax.random.key(0), start)
    assert len(pairs.prompts) == 1800
    _, history = jax.eval_shape(TUTORIAL.dpo, jax.random.key(0), start, pairs, 0.1)
    assert history["loss"].shape == (50,)
    assert (TUTORIAL.num_demonstrations, TUTORIAL.sft_batch_size) == (500, 32)
    assert (TUTORIAL.steps_per_epoch, TUTORIAL.num_steps) == (29, 1450)


def test_imitation_has_a_learning_rate_of_its_own():
    start = jax.jit(replace(PIPELINE, sft_learning_rate=0.0, sft_batch_size=PIPELINE.num_demonstrations).start)
    np.testing.assert_allclose(np.ptp(start(jax.random.key(0)).history["loss"]), 0, atol=1e-6)


@pytest.mark.slow
def test_more_data_take_as_many_steps_in_larger_batches():
    start = jax.jit(PIPELINE.start)(jax.random.key(0))
    log_prob = PIPELINE.log_prob(start.world)
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=0.1)
    for factor in (1, 2):
        pairs = jax.jit(more(factor).comparisons)(jax.random.key(1), start)
        _, history = jax.jit(lambda pairs: PIPELINE.fit(jax.random.key(2), start.params, pairs, objective=objective))(
            pairs
        )
        assert history["step"][-1] == PIPELINE.num_steps
        assert jnp.all(jnp.isfinite(history["loss"]))


def test_dpo_is_evaluated_exactly_after_each_epoch():
    start = jax.jit(PIPELINE.start)(jax.random.key(0))
    pairs = jax.jit(PIPELINE.comparisons)(jax.random.key(1), start)
    params, history = jax.jit(lambda beta: PIPELINE.dpo(jax.random.key(2), start, pairs, beta))(0.1)
    probs = np.exp(np.float64(PIPELINE.table(start.world)(params)))
    exact = (probs * np.float64(start.world.rewards)).sum(-1).mean()
    assert history["expected_reward"].shape == (PIPELINE.num_epochs,)
    np.testing.assert_allclose(history["expected_reward"][-1], exact, rtol=1e-5)
