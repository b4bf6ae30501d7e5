import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dpo_jax.losses import dpo_loss, log_ratios
from dpo_jax.losses.ratios import bounded_exp, difference, log1mexp, power_score, times
from dpo_jax.types import Pair

POLICY = Pair(jnp.array([-1.0, -0.2, -7.0]), jnp.array([-3.0, -2.5, -0.1]))
REFERENCE = Pair(jnp.array([-2.0, -0.3, -6.0]), jnp.array([-2.0, -2.0, -0.5]))


def test_log_ratios_by_hand():
    ratios = log_ratios(POLICY, REFERENCE)
    chex.assert_trees_all_close(ratios, Pair(jnp.array([1.0, 0.1, -1.0]), jnp.array([-1.0, -0.5, 0.4])), atol=1e-6)


@pytest.mark.usefixtures("as_users_have_it")
def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"policy_chosen \(3,\).*reference_chosen \(2,\)"):
        log_ratios(POLICY, Pair(jnp.zeros(2), jnp.zeros(2)))
    with pytest.raises(TypeError, match=r"policy\.chosen must hold floating-point numbers"):
        log_ratios((jnp.array([1, 2, 3]), POLICY.rejected), REFERENCE)
    with pytest.raises(TypeError, match="reference must be a pair"):
        log_ratios(POLICY, REFERENCE.chosen)
    with pytest.raises(TypeError, match="policy.chosen must be an array, got"):
        log_ratios(([-1.0], [-2.0]), REFERENCE)
    with pytest.raises(TypeError, match="policy_chosen bfloat16.*reference_chosen float32"):
        log_ratios(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), POLICY), REFERENCE)
    with pytest.raises(ValueError, match=r"beta must broadcast to the shape \(3,\), got shape \(3, 1\)"):
        dpo_loss(POLICY, REFERENCE, beta=jnp.ones((3, 1)))


def test_equal_infinities_cancel_without_a_gradient_and_nothing_times_infinity_is_nothing():
    inf = np.inf
    first, second = jnp.array([2.0, -inf, inf, -inf, -inf]), jnp.array([1.0, -inf, inf, inf, 0.0])
    value, pull_back = jax.vjp(difference, first, second)
    np.testing.assert_array_equal(value, [1, 0, 0, -inf, -inf])
    np.testing.assert_array_equal(pull_back(jnp.ones(5)), [[1, 0, 0, 1, 1], [-1, 0, 0, -1, -1]])
    factor, second = jnp.array([0.0, 0.0, 2.0, 2.0, 0.0]), jnp.array([3.0, -inf, inf, 3.0, jnp.nan])
    value, pull_back = jax.vjp(times, factor, second)
    np.testing.assert_array_equal(value, [0, 0, inf, 6, np.nan])
    np.testing.assert_array_equal(pull_back(jnp.ones(5)), [[3, 0, 0, 3, np.nan], [0, 0, 2, 2, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("traced", [False, True])
def test_a_masked_response_does_not_stop_dpo(smoothing, traced):
    """The chosen response allowed and the rejected one masked, the other way round, both masked, none."""
    inf, reference = np.inf, (-jnp.ones(4), -jnp.ones(4))
    policy = jnp.array([-1.0, -inf, -inf, -1.0]), jnp.array([-inf, -1.0, -inf, -1.0])

    def loss(policy, beta, label_smoothing):
        return dpo_loss(policy, reference, beta=beta, label_smoothing=label_smoothing)

    smoothed = jnp.full(4, smoothing) if traced else smoothing
    value, pull_back = jax.vjp(jax.jit(loss) if traced else loss, policy, 0.1, smoothed)
    np.testing.assert_allclose(value, [inf if smoothing else 0, inf, np.log(2), np.log(2)], rtol=1e-6)
    by_policy, by_beta, _ = pull_back(jnp.ones(4))
    pull = 0.1 * np.array([smoothing, smoothing - 1, 0, smoothing - 0.5])
    np.testing.assert_allclose(by_policy, [pull, -pull], rtol=1e-6)
    assert by_beta == 0


@given(exponent=st.floats(-80, 22))
@settings(deadline=None)
def test_bounded_exp_is_exp_where_it_matters(exponent):
    np.testing.assert_allclose(bounded_exp(jnp.float32(exponent)), np.exp(np.float64(np.float32(exponent))), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bounded_exp_goes_on_along_its_tangent(dtype):
    """So its square and its gradient stay finite, and the gradient does not vanish."""
    np.testing.assert_array_equal(jax.value_and_grad(bounded_exp)(jnp.asarray(jnp.inf, dtype))[0], np.inf)
    assert jax.grad(bounded_exp)(jnp.asarray(jnp.inf, dtype)) == jax.grad(bounded_exp)(jnp.asarray(1e4, dtype))
    exponent = jnp.asarray([25.0, 1e3, 1e4, 1e8], dtype)
    value, slope = jax.vmap(jax.value_and_grad(bounded_exp))(exponent)
    chex.assert_tree_all_finite((value**2, slope**2))
    np.testing.assert_allclose(np.float32(slope), np.exp(np.log(float(jnp.finfo(dtype).max)) / 4), rtol=0.2)
    assert jnp.all(jnp.diff(value) > 0)
    assert value.dtype == dtype


@pytest.mark.parametrize("power", [0.1, 1e-3, -1e-3, 1e-5])
def test_power_score_has_all_digits_near_its_limit(power):
    logps = np.array([-2.0, -0.9, -0.1])
    with jax.enable_x64(True):
        found = power_score(jnp.asarray(logps), power)
    np.testing.assert_allclose(found, np.float64(np.expm1(power * np.longdouble(logps)) / power), rtol=1e-12)


@given(logp=st.floats(-80, -1e-30))
@settings(deadline=None)
def test_log1mexp_is_accurate_at_both_ends(logp):
    rounded = np.longdouble(np.float32(logp))
    exact = np.log1p(-np.exp(rounded)) if logp < -1 else np.log(-np.expm1(rounded))
    np.testing.assert_allclose(log1mexp(jnp.float32(logp)), np.float64(exact), rtol=1e-5)


def test_log1mexp_is_finite_at_certainty_and_impossibility():
    value, slope = jax.vmap(jax.value_and_grad(log1mexp))(jnp.array([0.0, -1e4]))
    chex.assert_tree_all_finite((value, slope))
    assert value[0] < -80
    assert value[1] == 0
