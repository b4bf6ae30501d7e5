"""Every contender trains, on what it says it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import toy
from experiments.lab import contenders
from experiments.lab.contenders import CONTENDERS
from experiments.lab.pipeline import TUTORIAL
from tests.experiments.small import PIPELINE, slow_but

BY_NAME = {contender.name: contender for contender in CONTENDERS}


@pytest.fixture(scope="module")
def scene():
    return jax.jit(lambda key: contenders.scene(PIPELINE, key))(jax.random.key(3))


def test_the_scene_has_a_reward_model(scene):
    assert scene.learned_rewards.shape == scene.true_rewards.shape
    assert 0 < scene.reward_model["ranking_accuracy"] < 1
    error = scene.learned_rewards - scene.true_rewards
    np.testing.assert_allclose(scene.reward_model["error"], np.std(np.asarray(error), axis=-1).mean(), rtol=1e-5)
    assert scene.preferences.reference_logps is not None


@pytest.mark.parametrize("name", slow_but(BY_NAME, "DPO", "PPO, reward model"))
def test_a_few_steps_change_the_policy_and_keep_it_finite(scene, name):
    contender, start = BY_NAME[name], scene.start
    log_probs, history = jax.jit(lambda: contender.trained(scene, contender.usual, 1e-2, pipeline=PIPELINE))()
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1, rtol=1e-5)
    assert jnp.max(jnp.abs(log_probs - start.log_probs)) > 1e-3
    assert jnp.all(jnp.isfinite(history["loss"]))
    assert {"expected_reward", "kl_to_reference", "learned_reward", "step"} <= history.keys()
    assert history["step"][-1] == contender.steps(PIPELINE)
    exact = toy.evaluate(log_probs, start.log_probs, scene.true_rewards)
    np.testing.assert_allclose(history["expected_reward"][-1], exact["expected_reward"], rtol=1e-5)


def test_all_take_about_as_many_steps():
    steps = {contender.name: contender.steps(TUTORIAL) for contender in CONTENDERS}
    assert {name for name, num in steps.items() if num != 1450} == {name for name in steps if name.startswith("PPO")}
    assert steps["PPO, reward model"] == 1440


@pytest.mark.parametrize("name", BY_NAME)
def test_what_it_says_of_its_needs_is_possible(name):
    contender = BY_NAME[name]
    assert contender.usual in contender.strengths
    assert (contenders.FIT_REWARDS in contender.stages) == (contender.judge == contenders.MODEL)
    stored = contender.judge in (contenders.COMPARISONS, contenders.MODEL) and "46,400" not in name
    assert (contender.labels(TUTORIAL) == 1800) == stored
    assert (contender.samples(TUTORIAL) == 0) == (contender.judge == contenders.COMPARISONS and stored)


def test_samples_are_counted_as_they_are_drawn(scene):
    """By the shapes of what is collected."""
    for group_size, num in ((1, 64), (8, 64), (2, 64), (1, 256)):
        asked = contenders.exchange(PIPELINE, scene, group_size, num)
        prompts = jax.eval_shape(asked["ask"], jax.random.key(1))
        drawn = jax.eval_shape(asked["respond"], jax.random.key(2), scene.start.params, prompts)
        assert drawn.responses.shape == (num // group_size, group_size)
    assert BY_NAME["RLOO, reward model"].samples(TUTORIAL) == 64 * 1450
    assert BY_NAME["PPO, reward model"].samples(TUTORIAL) == 256 * 90
    assert (
        BY_NAME["online DPO, people"].labels(TUTORIAL) == BY_NAME["DPO, 46,400 comparisons"].labels(TUTORIAL) == 46400
    )


def test_a_policy_that_never_changes_answers_for_another(scene):
    respond = toy.respond_fn(PIPELINE.policy, scene.world.embeddings, group_size=3)
    other = jax.tree.map(lambda leaf: 2 * leaf, scene.start.params)
    always = contenders.answered_by(scene.start.params, respond)
    prompts = jnp.arange(5)
    own = respond(jax.random.key(0), scene.start.params, prompts)
    np.testing.assert_array_equal(always(jax.random.key(0), other, prompts).responses, own.responses)
