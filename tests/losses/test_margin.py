import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dpo_jax.losses import dpo_loss
from dpo_jax.types import Pair

POLICY = Pair(jnp.array([-1.0, -0.2, -7.0]), jnp.array([-3.0, -2.5, -0.1]))
REFERENCE = Pair(jnp.array([-2.0, -0.3, -6.0]), jnp.array([-2.0, -2.0, -0.5]))
MARGINS = np.array([2.0, 0.6, -1.4])  # log-ratio of chosen minus log-ratio of rejected, by hand


def log_sigmoid(x):
    """In float64, and by another formula than JAX's."""
    return -np.logaddexp(0.0, -np.asarray(x, np.float64))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_dpo_matches_the_equation_in_float64(beta, smoothing):
    expected = -(1 - smoothing) * log_sigmoid(beta * MARGINS) - smoothing * log_sigmoid(-beta * MARGINS)
    loss = dpo_loss(POLICY, REFERENCE, beta=beta, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_dpo_without_log_ratio_is_log_two():
    np.testing.assert_allclose(dpo_loss(POLICY, POLICY, beta=0.7), np.log(2.0), rtol=1e-6)


@given(
    margins=hnp.arrays(np.float32, 8, elements=st.floats(-50, 50, width=32), unique=True),
    beta=st.floats(0.01, 10.0),
)
@settings(deadline=None)
def test_dpo_falls_as_the_margin_grows(margins, beta):
    margins = jnp.sort(jnp.asarray(margins))
    zeros = jnp.zeros_like(margins)
    loss = dpo_loss((jnp.minimum(margins, 0), -jnp.maximum(margins, 0)), (zeros, zeros), beta=beta)
    assert jnp.all(jnp.diff(loss) <= 0)
    assert loss[0] > loss[-1] or beta * (margins[-1] - margins[0]) < 1e-3


@given(shift=hnp.arrays(np.float32, 3, elements=st.floats(-5, 0, width=32)))
@settings(deadline=None)
def test_a_constant_for_each_prompt_changes_nothing(shift):
    shifted = Pair(POLICY.chosen + shift, POLICY.rejected + shift)
    np.testing.assert_allclose(
        dpo_loss(shifted, REFERENCE, beta=0.5), dpo_loss(POLICY, REFERENCE, beta=0.5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_gradient_is_the_papers(smoothing):
    """Rafailov et al. 2023, Sec. 4: weight sigmoid(-beta * margin) on each side, with opposite signs."""
    beta = 0.3
    gradient = jax.grad(lambda policy: dpo_loss(policy, REFERENCE, beta=beta, label_smoothing=smoothing).sum())(POLICY)
    wrong = 1 / (1 + np.exp(beta * MARGINS))
    weight = beta * ((1 - smoothing) * wrong - smoothing * (1 - wrong))
    np.testing.assert_allclose(gradient.chosen, -weight, rtol=1e-5)
    np.testing.assert_allclose(gradient.rejected, weight, rtol=1e-5)


def test_dpo_takes_any_two_tuples_under_jit_and_vmap():
    expected = dpo_loss(POLICY, REFERENCE, beta=0.1)
    bare = jax.jit(dpo_loss)(tuple(POLICY), tuple(REFERENCE), beta=0.1)
    np.testing.assert_allclose(bare, expected, rtol=1e-6)
    betas = jnp.array([0.1, 1.0])
    swept = jax.vmap(lambda beta: dpo_loss(POLICY, REFERENCE, beta=beta))(betas)
    looped = jnp.stack([dpo_loss(POLICY, REFERENCE, beta=beta) for beta in betas])
    np.testing.assert_allclose(swept, looped, rtol=1e-6)


def test_one_trace_serves_every_beta():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss(beta):
        return dpo_loss(POLICY, REFERENCE, beta=beta)

    assert len({float(loss(beta).sum()) for beta in (0.01, 0.1, 2.0)}) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "beta must be in .0, inf., got 0.0"),
        ({"beta": float("nan")}, ValueError, "beta must be in .0, inf., got nan"),
        ({"beta": jnp.array([1.0, -2.0, 1.0])}, ValueError, "beta must be in .0, inf., got -2.0 in row 1"),
        ({"beta": 1.0, "label_smoothing": 0.5}, ValueError, "label_smoothing must be in .0, 0.5."),
    ],
)
def test_dpo_refuses_bad_hyperparameters(arguments, error, message):
    with pytest.raises(error, match=message):
        dpo_loss(POLICY, REFERENCE, **arguments)
