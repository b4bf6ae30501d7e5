"""What is special to the loss of a reward model; `test_every_rlhf_loss` has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dpo_jax.losses import bradley_terry_loss, dpo_loss, offset_dpo_loss

REWARDS = jnp.array([2.0, -0.5, 0.0]), jnp.array([1.0, 0.5, -3.0])


def test_it_is_dpo_of_implicit_rewards():
    policy, reference = (jnp.array([-1.0, -4.0]), jnp.array([-3.0, -0.5])), (jnp.array([-2.0, -1.0]), jnp.full(2, -1.5))
    implicit = tuple(0.3 * (after - before) for after, before in zip(policy, reference, strict=True))
    np.testing.assert_allclose(bradley_terry_loss(implicit), dpo_loss(policy, reference, beta=0.3), rtol=1e-6)
    np.testing.assert_allclose(
        bradley_terry_loss(implicit, margin=0.7), offset_dpo_loss(policy, reference, beta=0.3, offset=0.7), rtol=1e-6
    )


@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_only_centring_knows_the_level_of_rewards(centring):
    def loss(level):
        return bradley_terry_loss(tuple(side + level for side in REWARDS), centring=centring).sum()

    np.testing.assert_allclose(jax.grad(loss)(0.0), 4 * centring * sum(side.sum() for side in REWARDS), atol=1e-6)


def test_infinite_rewards_have_the_loss_of_the_limit():
    """Of a masked response, say; without centring they are none of its business."""
    rewards = jnp.array([-1.0, -jnp.inf, -jnp.inf]), jnp.array([-jnp.inf, 2.0, -jnp.inf])
    loss, pull_back = jax.vjp(bradley_terry_loss, rewards)
    np.testing.assert_allclose(loss, [0, np.inf, np.log(2)])
    np.testing.assert_allclose(pull_back(jnp.ones(3))[0], [[0, -1, 0], [0, 1, 0]], atol=1e-7)


@pytest.mark.parametrize("win", [0.5, 0.8, 0.99])
def test_it_converges_to_the_log_odds_of_the_preference(win):
    def risk(difference):
        one, other = 0.5 * difference, -0.5 * difference
        return win * bradley_terry_loss((one, other)) + (1 - win) * bradley_terry_loss((other, one))

    np.testing.assert_allclose(jax.grad(risk)(jnp.float32(special.logit(win))), 0, atol=1e-6)


@pytest.mark.usefixtures("as_users_have_it")
def test_rewards_are_a_pair():
    with pytest.raises(TypeError, match="rewards must be a pair, a tuple"):
        bradley_terry_loss(list(REWARDS))
    with pytest.raises(ValueError, match=r"rewards_chosen \(3,\), rewards_rejected \(2,\)"):
        bradley_terry_loss((REWARDS[0], REWARDS[1][:2]))
