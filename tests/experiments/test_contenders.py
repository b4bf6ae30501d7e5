"""Every contender trains, on what it says it needs, and is measured exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import toy
from experiments import contenders
from experiments.contenders import CONTENDERS, prepare
from experiments.dpo_vs_rlhf import measure, price_of, run

BY_NAME = {contender.name: contender for contender in CONTENDERS}


@pytest.fixture(scope="module")
def scene():
    return jax.jit(prepare)(jnp.uint32(3))


@pytest.fixture
def short(monkeypatch):
    """A few optimizer steps are enough to see that it works."""
    monkeypatch.setattr(contenders, "NUM_EPOCHS", 2)
    monkeypatch.setattr(contenders, "STEPS_PER_EPOCH", 10)
    monkeypatch.setattr(contenders, "PPO_ROUNDS", 3)


def test_the_scene_is_the_notebooks_with_a_reward_model(scene):
    assert scene.learned_rewards.shape == scene.world.rewards.shape
    assert 0.5 < scene.reward_model["ranking_accuracy"] < 1
    error = scene.learned_rewards - scene.world.rewards
    np.testing.assert_allclose(scene.reward_model["error"], np.std(np.asarray(error), axis=-1).mean(), rtol=1e-5)
    assert len(scene.preferences.prompts) == 1800
    assert scene.preferences.reference_logps is not None


@pytest.mark.parametrize("name", BY_NAME)
def test_a_few_steps_change_the_policy_and_keep_it_finite(short, scene, name):
    contender = BY_NAME[name]
    log_probs, history = jax.jit(lambda: contender.trained(scene, contender.usual, 1e-3))()
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-5)
    assert jnp.max(jnp.abs(log_probs - scene.log_probs)) > 1e-3
    assert jnp.all(jnp.isfinite(history["loss"]))
    assert {"expected_reward", "kl_to_reference", "learned_reward", "step"} <= history.keys()
    exact = toy.evaluate(log_probs, scene.log_probs, scene.world.rewards)
    np.testing.assert_allclose(history["expected_reward"][-1], exact["expected_reward"], rtol=1e-5)


@pytest.mark.parametrize("name", ["RLOO, true reward", "PPO, true reward"])
def test_what_sees_the_truth_earns_more(scene, name):
    measured = jax.jit(lambda: run(BY_NAME[name], scene, {"strength": 0.1, "learning_rate": 1e-3}))()
    optimum = toy.optimal_policy(scene.log_probs, scene.world.rewards, beta=0.1)
    best = toy.evaluate(optimum, scene.log_probs, scene.world.rewards)
    np.testing.assert_allclose(measured["expected_reward"], best["expected_reward"], atol=0.01)
    assert measured["regret"] < 0.002


def test_all_take_as_many_steps():
    assert contenders.NUM_STEPS == 1450
    rounds = contenders.PPO_ROUNDS * contenders.PPO_PASSES * contenders.PPO_BATCHES
    assert abs(rounds - contenders.NUM_STEPS) < 16


@pytest.mark.parametrize("name", BY_NAME)
def test_what_it_says_of_its_needs_is_possible(name):
    contender = BY_NAME[name]
    assert contender.usual in contender.strengths
    assert (contenders.FIT_REWARDS in contender.stages) == (contender.judge == contenders.MODEL)
    assert (contender.labels == 1800) == (contender.judge in (contenders.COMPARISONS, contenders.MODEL))
    assert (contender.samples == 0) == (contender.judge == contenders.COMPARISONS)


def test_samples_are_counted_as_they_are_drawn(scene):
    """By the shapes of what is collected."""
    embeddings = scene.world.embeddings
    log_prob = toy.log_prob_fn(contenders.POLICY, embeddings)
    setup = contenders.Setup(jax.random.key(0), scene, log_prob, toy.table_fn(contenders.POLICY, embeddings))
    for group_size, num in ((1, 64), (8, 64), (2, 64), (1, 256)):
        exchange = setup.exchange(group_size, num)
        ask, respond = exchange["ask"], exchange["respond"]
        prompts = ask(jax.random.key(1))
        assert respond(jax.random.key(2), scene.params, prompts).responses.shape == (num // group_size, group_size)
    assert contenders.SAMPLES == 64 * 1450
    assert contenders.PPO_SAMPLES == 256 * 90


def test_measures_by_hand(scene):
    log_probs = toy.optimal_policy(scene.log_probs, scene.learned_rewards, beta=0.2)
    measured = measure(scene, log_probs, 0.3)
    probs = np.exp(np.float64(log_probs))
    np.testing.assert_allclose(
        measured["learned_reward"], (probs * np.float64(scene.learned_rewards)).sum(-1).mean(), rtol=1e-5
    )
    best = toy.optimal_policy(scene.log_probs, scene.world.rewards, beta=0.3)

    def objective(table):
        found = toy.evaluate(table, scene.log_probs, scene.world.rewards)
        return found["expected_reward"] - 0.3 * found["kl_to_reference"]

    np.testing.assert_allclose(measured["regret"], objective(best) - objective(log_probs), atol=1e-5)


def test_the_price_is_that_of_the_objective():
    assert price_of(BY_NAME["DPO"], 0.3) == 0.3
    assert price_of(BY_NAME["Nash-MD, people"], 0.025) == 0.1
    assert price_of(BY_NAME["PPO, KL held, reward model"], 0.8) == 0.1


def test_a_run_that_stops_is_marked(short, scene):
    broken = {"strength": jnp.float32(0.1), "learning_rate": jnp.float32(jnp.inf)}
    measured = jax.jit(lambda h: run(BY_NAME["RLOO, reward model"], scene, h))(broken)
    assert all(jnp.isnan(value) for value in measured.values())
