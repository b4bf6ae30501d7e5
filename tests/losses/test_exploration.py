"""What is special to exploratory preference optimization; `test_every_rlhf_loss` has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import dpo_loss, xpo_loss

POLICY, REFERENCE = (
    (jnp.array([-1.0, -4.0, -0.3]), jnp.array([-3.0, -0.5, -2.0])),
    (jnp.array([-2.0, -1.0, -0.2]), jnp.array([-1.5, -1.5, -6.0])),
)
REFERENCE_WON = jnp.array([True, False, True])


def test_without_optimism_it_is_dpo():
    loss = xpo_loss(POLICY, REFERENCE, beta=0.3, alpha=0.0, reference_won=REFERENCE_WON)
    np.testing.assert_array_equal(loss, dpo_loss(POLICY, REFERENCE, beta=0.3))


def test_optimism_pushes_what_the_reference_answered_down_and_nothing_else():
    def gradient(loss):
        return jax.grad(lambda policy: loss(policy).sum())(POLICY)

    by_dpo = gradient(lambda policy: dpo_loss(policy, REFERENCE, beta=0.3))
    by_xpo = gradient(lambda policy: xpo_loss(policy, REFERENCE, beta=0.3, alpha=0.7, reference_won=REFERENCE_WON))
    np.testing.assert_allclose(by_xpo[0] - by_dpo[0], 0.7 * REFERENCE_WON, atol=1e-6)
    np.testing.assert_allclose(by_xpo[1] - by_dpo[1], 0.7 * ~REFERENCE_WON, atol=1e-6)


@pytest.mark.usefixtures("as_users_have_it")
def test_who_won_is_said_in_booleans_of_the_right_shape():
    def call(reference_won, policy=POLICY):
        return xpo_loss(policy, REFERENCE, beta=0.3, alpha=0.1, reference_won=reference_won)

    with pytest.raises(TypeError, match="reference_won must hold Booleans"):
        call(jnp.array([1, 0, 1]))
    with pytest.raises(TypeError, match="reference_won must be an array"):
        call([True, False, True])
    with pytest.raises(ValueError, match=r"reference_won must broadcast to the shape \(3,\), got shape \(2,\)"):
        call(REFERENCE_WON[:2])
    with pytest.raises(TypeError, match="policy must be a pair"):
        call(REFERENCE_WON, policy=list(POLICY))


def test_beta_is_positive():
    with pytest.raises(ValueError, match="beta must be in .0, inf., got 0.0"):
        xpo_loss(POLICY, REFERENCE, beta=0.0, alpha=0.1, reference_won=REFERENCE_WON)


@pytest.mark.usefixtures("as_users_have_it")
def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="reference is missing.*train.with_reference"):
        xpo_loss(POLICY, None, beta=0.3, alpha=0.1, reference_won=REFERENCE_WON)
