"""What is special to the policy gradients and the estimates of KL; `test_every_rlhf_loss` has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax

from dpo_jax.losses import (
    centred_advantages,
    grpo_loss,
    k1_estimate,
    k2_estimate,
    k3_estimate,
    ppo_loss,
    reinforce_loss,
    value_loss,
)

ESTIMATES = [k1_estimate, k2_estimate, k3_estimate]


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def logits():
    return jnp.array([0.3, -1.2, 0.9, 0.0, -0.4])


@pytest.fixture
def reference():
    return log_softmax(jnp.array([-0.5, 0.8, 0.1, -2.0, 0.4]))


def expectation(values, logps):
    """Over all responses, with the probabilities that the policy has now, whatever it may have after a step."""
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logps)) * values)


def kl(log_probs, others):
    return jnp.sum(jnp.exp(log_probs) * (log_probs - others))


# Estimates of KL, in exact expectation over the policy's responses


@pytest.mark.parametrize("estimate", [k1_estimate, k3_estimate])
def test_the_value_is_unbiased(estimate, logits, reference):
    logps = log_softmax(logits)
    np.testing.assert_allclose(expectation(estimate(logps, reference), logps), kl(logps, reference), rtol=1e-12)


@pytest.mark.parametrize(
    ("estimate", "divergence"),
    [
        (k1_estimate, lambda logps, reference: 0.0 * logps[0]),
        (k2_estimate, kl),
        (k3_estimate, lambda logps, reference: kl(reference, logps)),
    ],
)
def test_the_gradient_is_that_of(estimate, divergence, logits, reference):
    def mean(logits):
        logps = log_softmax(logits)
        return expectation(estimate(logps, reference), logps)

    exact = jax.grad(lambda logits: divergence(log_softmax(logits), reference))(logits)
    np.testing.assert_allclose(jax.grad(mean)(logits), exact, rtol=1e-12, atol=1e-15)


def test_the_gradient_of_k2_is_reinforce_with_k1_as_a_cost(logits, reference):
    logps = log_softmax(logits)
    by_k2 = jax.grad(lambda logps: k2_estimate(logps, reference).sum())(logps)
    by_reinforce = jax.grad(lambda x: reinforce_loss(x, -k1_estimate(logps, reference)).sum())(logps)
    np.testing.assert_allclose(by_k2, by_reinforce, rtol=1e-12)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_where_policy_and_reference_agree_the_estimate_is_zero(estimate, reference):
    np.testing.assert_array_equal(estimate(reference, reference), 0)


def test_k2_and_k3_are_never_negative():
    gaps = jnp.linspace(-5, 5, 101)
    for estimate in (k2_estimate, k3_estimate):
        assert jnp.all(estimate(jnp.minimum(gaps, 0), jnp.minimum(-gaps, 0)) >= 0)


@pytest.mark.parametrize(("estimate", "is_at_rest"), [(k2_estimate, True), (k3_estimate, False), (None, False)])
def test_grpo_is_at_rest_at_the_optimum_of_rlhf_with_k2_alone(estimate, is_at_rest, reference):
    beta, rewards = 0.5, jnp.array([1.0, 0.2, -0.3, 0.8, 0.0])

    def risk(logits):
        logps = log_softmax(logits)
        old = jax.lax.stop_gradient(logps)
        advantages = centred_advantages(rewards, jnp.exp(old))
        return expectation(grpo_loss(logps, old, advantages, reference=reference, beta=beta, kl=estimate), logps)

    slope = jax.grad(risk)(reference + rewards / beta)
    assert bool(jnp.all(jnp.abs(slope) < 1e-15)) == is_at_rest


# Surrogates


@pytest.mark.parametrize("baseline", [0.0, 5.0])
def test_the_expected_gradient_of_reinforce_is_that_of_the_expected_reward(baseline, logits):
    rewards = jnp.array([1.0, 0.2, -0.3, 0.8, 0.0])

    def risk(logits):
        logps = log_softmax(logits)
        return expectation(reinforce_loss(logps, rewards - baseline), logps)

    exact = jax.grad(lambda logits: -jnp.sum(jax.nn.softmax(logits) * rewards))(logits)
    np.testing.assert_allclose(jax.grad(risk)(logits), exact, rtol=1e-12)


@pytest.mark.parametrize("clip", [0.2, jnp.inf])
def test_ppo_starts_as_reinforce(clip):
    logps, advantages = jnp.array([-1.0, -0.3, -5.0]), jnp.array([2.0, -1.5, 0.0])
    by_ppo = jax.grad(lambda x: ppo_loss(x, logps, advantages, clip=clip).sum())(logps)
    by_reinforce = jax.grad(lambda x: reinforce_loss(x, advantages).sum())(logps)
    np.testing.assert_allclose(by_ppo, by_reinforce, rtol=1e-12)


RATIOS = np.array([0.5, 0.75, 0.85, 1.15, 1.25, 1.5])


@pytest.mark.parametrize(
    ("advantage", "clip_high", "pulls"),
    [
        (1.0, None, [1, 1, 1, 1, 0, 0]),
        (-1.0, None, [0, 0, 1, 1, 1, 1]),
        (1.0, 0.28, [1, 1, 1, 1, 1, 0]),
        (-1.0, 0.28, [0, 0, 1, 1, 1, 1]),
    ],
)
def test_ppo_does_not_pull_where_it_has_moved_too_far(advantage, clip_high, pulls):
    def loss(logps):
        advantages = jnp.full(6, advantage)
        return ppo_loss(logps, jnp.zeros(6), advantages, clip=0.2, clip_high=clip_high).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.log(RATIOS)), -advantage * RATIOS * pulls, rtol=1e-12)


def test_ppo_promises_no_more_than_the_ratio_does():
    logps, advantages = jnp.log(RATIOS) - 1, jnp.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    loss = ppo_loss(logps, -jnp.ones(6), advantages, clip=0.2)
    assert jnp.all(loss >= -RATIOS * advantages)
    np.testing.assert_allclose(ppo_loss(logps, -jnp.ones(6), advantages, clip=jnp.inf), -RATIOS * advantages)


def test_a_ratio_too_large_to_be_held_still_pulls():
    """Back from where the advantage is negative, along the tangent."""
    loss = lambda logps: ppo_loss(logps, jnp.float32(-1e4), jnp.float32(-1.0), clip=0.2)  # noqa: E731
    assert jnp.isfinite(loss(jnp.float32(0.0)))
    assert jax.grad(loss)(jnp.float32(0.0)) > 1e6


def test_grpo_without_beta_is_ppo(reference):
    old, advantages = reference[::-1], jnp.array([1.0, -1.0, 0.5, -2.0, 0.0])
    for options in ({}, {"clip_high": 0.5}):
        loss = grpo_loss(reference, old, advantages, reference=old, beta=0.0, **options)
        np.testing.assert_array_equal(loss, ppo_loss(reference, old, advantages, **{"clip": 0.2} | options))


def test_values_do_not_move_further_than_the_clip():
    """They are pulled while they are near, or on the far side of what came."""
    values = jnp.array([0.1, 0.5, 1.5, -0.5])
    slope = jax.grad(lambda x: value_loss(x, jnp.zeros(4), jnp.ones(4), clip=0.2).sum())(values)
    np.testing.assert_allclose(slope, [-0.9, 0.0, 0.0, -1.5])


# Bad input


def test_the_right_hyperparameter_is_named():
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match="^clip must be in .0, inf., got -0.1"):
        ppo_loss(ones, ones, ones, clip=-0.1)
    with pytest.raises(ValueError, match="^clip_high must be in .0, inf., got 0.0"):
        grpo_loss(ones, ones, ones, reference=ones, beta=0.1, clip=jnp.inf, clip_high=0.0)
    with pytest.raises(ValueError, match="beta must be in .0, inf., got -1.0"):
        grpo_loss(ones, ones, ones, reference=ones, beta=-1.0)
