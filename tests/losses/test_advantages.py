from functools import cache

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dpo_jax.losses import centred_advantages, grpo_advantages, reinforce_loss, rloo_advantages, whitened
from tests.losses import rollout_oracles

GROUPED = [centred_advantages, grpo_advantages, rloo_advantages]
EVERY = [*GROUPED, whitened]
SHAPE = 2, 3, 4


def as_by_numpy(rewards, weights, of, epsilon=0.01):
    """Equations in extended precision; the group is the last axis, or everything."""
    rewards = np.asarray(rewards, np.longdouble)
    axes = None if of is whitened else -1
    num = rewards.size if of is whitened else rewards.shape[-1]
    weights = None if weights is None else np.asarray(weights, np.longdouble)
    mean = np.average(rewards, axis=axes, weights=weights, keepdims=True)
    bessel = num / (num - np.longdouble(1)) if weights is None else 1
    variance = np.average((rewards - mean) ** 2, axis=axes, weights=weights, keepdims=True) * bessel
    return np.float64(
        {
            centred_advantages: rewards - mean,
            grpo_advantages: (rewards - mean) / (np.sqrt(variance) + epsilon),
            rloo_advantages: (rewards - mean) * bessel,
            whitened: (rewards - mean) / np.sqrt(variance + 1e-8),
        }[of]
    )


def options(of):
    return {"epsilon": 0.01} if of is grpo_advantages else {}


@cache
def compiled(of):
    return jax.jit(of)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("of", EVERY)
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_advantages_are_as_by_numpy(of, weighted, data):
    rewards = data.draw(hnp.arrays(float, SHAPE, elements=st.floats(-10, 10)), "rewards")
    weights = data.draw(hnp.arrays(float, SHAPE, elements=st.floats(0.01, 10)), "weights") if weighted else None
    with jax.enable_x64(True):
        advantages = compiled(of)(rewards, weights, **options(of))
    np.testing.assert_allclose(advantages, as_by_numpy(rewards, weights, of), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
@pytest.mark.parametrize("of", EVERY)
def test_dtypes_stay_and_equal_rewards_have_no_advantage(of, dtype, tolerance):
    rewards = np.random.default_rng(0).normal(size=SHAPE)
    rewards[0, 1] = 0.5
    for numbers in (rewards, np.full(SHAPE, 0.5)):
        numbers = np.float64(jnp.asarray(numbers, dtype))
        for weights in (None, np.linspace(0.25, 1.0, 24).reshape(SHAPE)):
            advantages = of(jnp.asarray(numbers, dtype), None if weights is None else jnp.asarray(weights, dtype))
            assert advantages.dtype == dtype
            expected = as_by_numpy(numbers, weights, of, epsilon=1e-4)
            np.testing.assert_allclose(np.float64(advantages), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("of", EVERY)
def test_equal_rewards_have_no_advantage_at_all(of, dtype):
    """Of any size, with weights and without; those without weight have no say."""
    program, weights = compiled(of), np.asarray([np.geomspace(0.01, 1, 6)], dtype)
    for reward in (0.0, 0.1, 0.5, -1000.1, 6e4, 1e30, 3e38):
        if reward < 7e4 or dtype != jnp.float16:
            rewards = np.full((1, 6), reward, dtype)
            for advantages in (program(rewards), program(rewards, weights)):
                np.testing.assert_array_equal(np.float32(advantages), 0)
    others = np.arange(6) != 2
    outlier = program(np.asarray([np.where(others, 1000.1, -5.0)], dtype), np.asarray([others], dtype))
    np.testing.assert_array_equal(np.float32(outlier)[0, others], 0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("of", EVERY)
def test_small_differences_of_large_rewards_are_seen_and_large_ones_do_not_overflow(of, weighted):
    for rewards in ([1000.1, 1000.2, 1000.4, 1000.1], [1e30, 3e30, -2e30, 0.0], [1e-20, 3e-20, -2e-20, 0.0]):
        rewards = np.float32([rewards])
        weights = np.array([[0.1, 0.4, 0.3, 0.2]]) if weighted else None
        advantages = of(jnp.asarray(rewards), None if weights is None else jnp.asarray(weights, jnp.float32))
        np.testing.assert_allclose(advantages, as_by_numpy(rewards, weights, of, epsilon=1e-4), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("of", EVERY)
def test_without_any_weight_there_is_no_advantage_and_weights_are_up_to_any_factor(of):
    rewards, weights = jnp.array([[1.0, -2.0, 4.0]]), jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(of(rewards, 0 * weights), 0)
    np.testing.assert_allclose(of(rewards, 1e-30 * weights), of(rewards, weights), rtol=1e-5)
    np.testing.assert_allclose(of(rewards, 1e36 * weights), of(rewards, weights), rtol=1e-5)
    assert of(jnp.asarray(rewards, jnp.bfloat16), weights).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="weights must be in .0, inf."):
        of(rewards, -weights)


@pytest.mark.parametrize("of", GROUPED)
def test_jit_and_vmap_change_nothing_and_groups_are_by_themselves(of):
    rewards = jax.random.normal(jax.random.key(0), SHAPE)
    weights = jax.random.uniform(jax.random.key(1), SHAPE)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(of)))(rewards, weights), of(rewards, weights), rtol=1e-5)
    np.testing.assert_allclose(of(rewards)[1, 2], of(rewards[1, 2]), rtol=1e-5)


def test_whitening_can_be_compiled():
    advantages = jax.random.normal(jax.random.key(0), SHAPE)
    np.testing.assert_allclose(jax.jit(whitened)(advantages), whitened(advantages), rtol=1e-5)


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_whitening_by_a_mask_ignores_what_is_not_finite_behind_it(rubbish):
    """In values and in gradients: both are 0 there."""
    advantages, mask = np.random.default_rng(0).normal(size=(3, 4)), np.arange(4) < np.array([[2], [4], [1]])
    weights = jnp.asarray(mask, jnp.float32)
    spoilt = np.float32(np.where(mask, advantages, rubbish))

    @jax.jit
    def measured(x):
        white, pull_back = jax.vjp(lambda x: whitened(x, weights), x)
        return white, jnp.sum(jnp.sin(white)), *pull_back(jnp.cos(white))

    white, value, gradient = measured(spoilt)
    np.testing.assert_allclose(white, np.where(mask, as_by_numpy(advantages, mask, whitened), 0), rtol=1e-5, atol=1e-6)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient != 0, mask)
    spoilt[1, 1] = np.nan  # one that counts
    assert np.isnan(np.asarray(measured(spoilt)[0])[mask]).all()


def test_whitening_by_a_mask_is_that_of_trl_but_for_the_variance_of_samples():
    mask, rewards = (np.array(rollout_oracles.INPUTS[name]) for name in ("mask", "token_rewards"))
    (entry,) = (
        entry
        for entry in rollout_oracles.ENTRIES
        if entry["loss"] == "whiten" and entry["hyperparameters"]["shift_mean"]
    )
    num = mask.sum()
    white = whitened(jnp.asarray(np.where(mask, rewards, np.nan)), jnp.asarray(mask, jnp.float32))
    expected = np.where(mask, entry["values"], 0)
    np.testing.assert_allclose(white * np.sqrt((num - 1) / num), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", EVERY)
def test_weights_are_up_to_a_factor_and_count_as_often(of):
    rewards, counts = jnp.array([1.0, -2.0, 0.5, 4.0]), jnp.array([3.0, 1.0, 2.0, 0.0])
    weighted = of(rewards, counts)
    np.testing.assert_allclose(of(rewards, 0.1 * counts), weighted, rtol=1e-5)
    repeated = np.repeat(rewards, np.int32(counts))
    spread = {grpo_advantages: np.std(repeated) + 1e-4, whitened: np.sqrt(np.var(repeated) + 1e-8)}.get(of, 1.0)
    np.testing.assert_allclose(weighted, (rewards - repeated.mean()) / spread, rtol=1e-5)


def test_leave_one_out_leaves_one_out():
    rewards = np.array([[1.0, 5.0, -2.0], [0.3, 0.1, 0.7]])
    others = [[np.delete(row, i).mean() for i in range(3)] for row in rewards]
    np.testing.assert_allclose(rloo_advantages(jnp.asarray(rewards, jnp.float32)), rewards - others, rtol=1e-5)


def test_leave_one_out_is_centred_but_for_a_factor():
    rewards = jax.random.normal(jax.random.key(0), SHAPE)
    np.testing.assert_allclose(rloo_advantages(rewards), 4 / 3 * centred_advantages(rewards), rtol=1e-6)
    weights = jnp.ones(SHAPE)
    np.testing.assert_array_equal(rloo_advantages(rewards, weights), centred_advantages(rewards, weights))


def test_grpo_forgets_the_scale_of_rewards():
    rewards = jnp.array([[1.0, 2.0, 4.0]])
    narrow, wide = (grpo_advantages(scale * rewards, epsilon=1e-9) for scale in (0.01, 1.0))
    np.testing.assert_allclose(narrow, wide, rtol=1e-4)
    by_default = (rewards - rewards.mean()) / (np.std(rewards, ddof=1) + 1e-4)
    np.testing.assert_allclose(grpo_advantages(rewards), by_default, rtol=1e-5)


# Three responses in a group, and all groups that there can be

REWARDS, LOGITS = np.array([1.0, 0.2, -0.7]), np.array([0.4, -0.3, 0.9])


def gradient_by_reinforce(responses, probabilities, advantages):
    """Minus the expected gradient of the mean loss of a group, by the logits."""

    def risk(logits):
        logps = jax.nn.log_softmax(logits)[responses]
        return jnp.sum(probabilities * reinforce_loss(logps, advantages))

    return -jax.grad(risk)(jnp.asarray(LOGITS))


@pytest.mark.parametrize(
    ("of", "factor"), [(rloo_advantages, 1.0), (centred_advantages, 2 / 3), (grpo_advantages, None)]
)
def test_only_leave_one_out_is_unbiased(of, factor):
    groups = np.stack(np.meshgrid(*[range(3)] * 3), axis=-1).reshape(-1, 3)
    with jax.enable_x64(True):
        policy = jax.nn.softmax(jnp.asarray(LOGITS))
        exact = policy * (REWARDS - policy @ REWARDS)
        of_groups = np.prod(policy[groups], axis=1, keepdims=True)
        slope = gradient_by_reinforce(groups, of_groups / 3, of(jnp.asarray(REWARDS[groups])))
        from_all = gradient_by_reinforce(np.arange(3), policy, of(jnp.asarray(REWARDS), policy))
    slope, exact = np.asarray(slope), np.asarray(exact)
    parallel = slope @ exact / (exact @ exact)
    assert np.allclose(slope, parallel * exact, rtol=1e-10) == (of is not grpo_advantages)
    if factor is not None:
        np.testing.assert_allclose(parallel, factor, rtol=1e-10)
        np.testing.assert_allclose(from_all, exact, rtol=1e-10)


# Bad input


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("of", GROUPED)
def test_what_is_no_group_is_refused(of):
    with pytest.raises(TypeError, match="rewards must hold floating-point numbers"):
        of(jnp.ones((2, 3), int))
    with pytest.raises(TypeError, match="rewards must be an array"):
        of([1.0, 2.0])
    with pytest.raises(ValueError, match="rewards must be a batch, with at least one axis"):
        of(jnp.float32(1.0))
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), weights \(3,\)"):
        of(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize("of", [centred_advantages, grpo_advantages, rloo_advantages])
def test_a_group_of_one_is_refused(of):
    with pytest.raises(ValueError, match="number of responses in a group must be at least 2, got 1"):
        of(jnp.ones((3, 1)))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, np.inf, np.nan])
def test_epsilon_is_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon must be in .0, inf."):
        grpo_advantages(jnp.ones((1, 2)), epsilon=epsilon)


@pytest.mark.usefixtures("as_users_have_it")
def test_whitening_refuses_what_are_no_advantages():
    with pytest.raises(TypeError, match="advantages must hold floating-point numbers"):
        whitened(jnp.ones(3, int))
    with pytest.raises(TypeError, match="advantages must be an array"):
        whitened([1.0, 2.0])


@pytest.mark.usefixtures("as_users_have_it")
def test_whitening_refuses_a_single_response():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        whitened(jnp.ones(1))


@pytest.mark.usefixtures("as_users_have_it")
def test_whitening_refuses_weights_of_another_shape():
    with pytest.raises(ValueError, match=r"advantages \(2, 3\), weights \(3, 2\)"):
        whitened(jnp.ones((2, 3)), jnp.ones((3, 2)))
