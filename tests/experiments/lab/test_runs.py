import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import losses, sweep, toy
from experiments.lab.feedback import SETTINGS, Feedback, Setting
from experiments.lab.methods import METHODS
from experiments.lab.runs import measured, run_of, standard_run
from tests.experiments.small import PIPELINE

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def start():
    return jax.jit(PIPELINE.start)(jax.random.key(3))


@pytest.fixture(scope="module")
def feedback(start):
    return Feedback(PIPELINE, jax.random.key(4), start, SETTINGS["clean"])


def test_measures_by_hand(start, feedback):
    log_probs = toy.optimal_policy(start.log_probs, start.world.rewards, beta=0.1)
    found = jax.jit(lambda log_probs: measured(start, feedback, log_probs))(log_probs)
    table, rewards = np.exp(np.float64(log_probs)), np.float64(start.world.rewards)
    np.testing.assert_allclose(found["expected_reward"], (table * rewards).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["regret"], 0.0, atol=1e-6)
    taus = [stats.kendalltau(*row).statistic for row in zip(np.asarray(log_probs), rewards, strict=True)]
    np.testing.assert_allclose(found["accuracy"], (1 + np.mean(taus)) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["implicit_accuracy"], 1.0)  # the optimum moves as the truth orders
    pairs = jax.tree.map(np.asarray, jax.jit(feedback.pairs)())
    change = (np.float64(log_probs) - np.float64(start.log_probs))[pairs.prompts, pairs.responses.chosen]
    np.testing.assert_allclose(found["chosen_logp_change"], change.mean(), rtol=1e-4)


def test_a_policy_that_has_not_moved_orders_nothing(start, feedback):
    assert measured(start, feedback, start.log_probs)["implicit_accuracy"] == 0.5


def test_a_run_that_diverges_is_nan_and_another_is_not(start):
    @jax.jit
    def run(learning_rate):
        chosen = {"beta": 0.1, "learning_rate": learning_rate}
        return standard_run(PIPELINE, BY_NAME["dpo"], start, Setting(), chosen)

    assert all(jnp.isnan(value) for value in run(jnp.inf).values())
    assert all(jnp.isfinite(value) for value in run(1e-2).values())


def my_loss(policy, reference, *, beta, sharpness):
    return losses.dpo_loss(policy, reference, beta=beta * sharpness)


@pytest.mark.slow
def test_a_loss_of_your_own_is_swept_in_one_call():
    results = sweep.grid(
        run_of(my_loss, PIPELINE),
        jax.random.key(0),
        prepare=PIPELINE.start,
        num_seeds=2,
        beta=[0.1, 0.2],
        sharpness=[1, 2],
        flip_probability=[0.0, 0.5],
    )
    reward = results.kl_to_reference
    same = (reward.sel(beta=0.1, sharpness=2), reward.sel(beta=0.2, sharpness=1))
    np.testing.assert_allclose(*same, rtol=1e-5)
    assert not np.allclose(reward.sel(flip_probability=0.0), reward.sel(flip_probability=0.5))


def test_settings_and_hyperparameters_of_the_same_name_are_refused():
    def mine(policy, reference, *, beta, on_policy):
        return beta * on_policy * policy[0]

    with pytest.raises(TypeError, match="mine has an argument 'on_policy', as the run has: rename it"):
        run_of(mine, PIPELINE)


@pytest.mark.slow
def test_the_temperature_of_a_loss_is_not_that_of_people(start):
    run = jax.jit(lambda temperature: run_of(losses.discopop_loss, PIPELINE)(start, beta=0.1, temperature=temperature))
    sharp, flat = run(0.05), run(5.0)
    assert not np.allclose(sharp["expected_reward"], flat["expected_reward"], rtol=1e-4)
