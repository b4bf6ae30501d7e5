"""The objective of policy gradients by token, against NumPy."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses, train
from dpo_jax.types import Preferences, Rollouts, TokenLogps, TokenRollouts

MASK = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], bool)
RNG = np.random.default_rng(0)
PARAMS = jnp.asarray(-RNG.uniform(0.1, 2.0, MASK.shape), jnp.float32)
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.5, 1.0], np.float32)
AGGREGATES = {
    "mean_of_tokens": (losses.mean_of_tokens, lambda w, n: w / np.sum(w * n)),
    "mean_of_responses": (losses.mean_of_responses, lambda w, n: w / n / len(n)),
    "mean_per_length": (partial(losses.mean_per_length, max_length=3), lambda w, n: w / 3 / len(n)),
}


def token_log_prob(params, prompts, responses):
    """A table of the tokens of each response; what stands behind the end is NaN."""
    del prompts
    mask = jnp.asarray(MASK)[responses]
    return TokenLogps(params[responses] + jnp.where(mask, 0, jnp.nan), mask)


def make_batch(weights=None, **changes):
    """Responses whose log-probabilities have changed since they were sampled; NaN behind the end."""
    rng = np.random.default_rng(1)
    names = ("logps", "reference_logps", "advantages")
    columns = {name: np.float32(np.where(MASK, -rng.uniform(0.1, 2.0, MASK.shape), np.nan)) for name in names}
    columns["advantages"] = np.float32(np.where(MASK, rng.normal(size=MASK.shape), np.nan))
    ids = np.arange(len(MASK), dtype=np.int32)
    rewards = np.float32(rng.normal(size=len(MASK)))
    batch = TokenRollouts(0 * ids, ids, MASK, rewards=rewards, weights=weights, **columns)
    return jax.tree.map(jnp.asarray, batch)._replace(**changes)


def by_hand(batch, clip):
    """PPO's loss of each token, and its slope; zero behind the end."""
    old, advantages = (np.where(MASK, np.float64(leaf), 0) for leaf in (batch.logps, batch.advantages))
    ratios = np.exp(np.where(MASK, np.float64(PARAMS), 0) - old)
    plain, clipped = ratios * advantages, np.clip(ratios, 1 - clip, 1 + clip) * advantages
    return -np.minimum(plain, clipped) * MASK, -plain * (plain <= clipped) * MASK, np.abs(ratios - 1)


def run(objective, batch, params=PARAMS):
    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params, batch)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("name", AGGREGATES)
def test_values_and_gradients_are_those_of_tokens(name, weights):
    aggregate, share = AGGREGATES[name]
    batch, clip = make_batch(weights), 0.3
    objective = train.token_policy_gradient_objective(token_log_prob, losses.ppo_loss, aggregate=aggregate, clip=clip)
    (loss, _), gradient = run(objective, batch)
    values, slopes, ratio_changes = by_hand(batch, clip)
    assert np.any(ratio_changes[MASK] > clip)
    shares = share(np.ones(len(MASK)) if weights is None else weights, MASK.sum(-1))[:, None]
    np.testing.assert_allclose(loss, np.sum(shares * values), rtol=1e-5)
    np.testing.assert_allclose(gradient, shares * slopes, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_metrics_are_means_over_responses(weights):
    batch = make_batch(weights)
    (_, metrics), _ = run(train.token_policy_gradient_objective(token_log_prob, losses.ppo_loss, clip=0.2), batch)
    kl = np.where(MASK, np.float64(batch.logps) - batch.reference_logps, 0).sum(-1)
    change = (by_hand(batch, 0.2)[2] * MASK).sum(-1) / MASK.sum(-1)
    expected = {"sampled_reward": batch.rewards, "sampled_kl": kl, "ratio_change": change}
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], np.average(values, weights=weights), rtol=1e-5, err_msg=name)


def test_weighted_metrics_do_not_depend_on_the_batch_size():
    batch = make_batch(WEIGHTS)
    objective = jax.jit(train.token_policy_gradient_objective(token_log_prob, losses.ppo_loss, clip=0.2))
    part = lambda start, stop: objective(PARAMS, jax.tree.map(lambda leaf: leaf[start:stop], batch))[1]  # noqa: E731
    whole, parts = part(0, 4), [part(0, 2), part(2, 4)]
    for name, metric in whole.items():
        sums = [sum(getattr(part[name], side) for part in parts) for side in ("numerator", "denominator")]
        np.testing.assert_allclose(sums[0] / sums[1], metric, rtol=1e-5)


def test_hyperparameters_may_be_functions_without_gradient():
    """They see parameters, the batch and log-probabilities that are zero behind the end."""
    batch, seen = make_batch(), []

    def half(params, batch, logps):
        seen.append((params.shape, type(batch)))
        return 0.3 * jnp.sum(logps) / jnp.sum(jax.lax.stop_gradient(logps)) + 0.0 * batch.rewards[0]

    def loss(logps, old_logps, advantages, *, size):
        return size * logps * advantages + 0.0 * old_logps

    found, fixed = (
        run(train.token_policy_gradient_objective(token_log_prob, loss, size=s), batch) for s in (half, 0.3)
    )
    chex.assert_trees_all_close(found, fixed, rtol=1e-5)
    assert seen[0] == (MASK.shape, TokenRollouts)


def test_no_gradient_flows_into_what_is_worked_out_from_the_policy():
    def loss(logps, old_logps, advantages, *, price):
        return price * logps + 0.0 * (old_logps + advantages)

    price = lambda params, batch, logps: jnp.sum(params**2) * jnp.ones_like(logps)  # noqa: E731
    batch, fixed = make_batch(), float(jnp.sum(PARAMS**2))
    (_, found), (_, expected) = (
        run(train.token_policy_gradient_objective(token_log_prob, loss, price=p), batch) for p in (price, fixed)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_reference_of_grpo_comes_from_the_batch():
    batch, beta = make_batch(), 0.4
    objective = train.token_policy_gradient_objective(
        token_log_prob,
        losses.grpo_loss,
        reference=lambda params, batch, logps: jnp.where(batch.mask, batch.reference_logps, 0),
        beta=beta,
    )
    (loss, _), _ = run(objective, batch)
    gap = np.where(MASK, np.float64(batch.reference_logps) - np.float64(PARAMS), 0)
    expected = by_hand(batch, 0.2)[0] + beta * (np.exp(gap) - 1 - gap)
    np.testing.assert_allclose(loss, expected.sum() / MASK.sum(), rtol=1e-5)


def test_a_negative_weight_is_an_error_and_stops_training_where_values_are_unknown():
    objective = train.token_policy_gradient_objective(token_log_prob, losses.ppo_loss, clip=0.2)
    batch = make_batch(-WEIGHTS)
    with pytest.raises(ValueError, match=r"weights must be in .0, inf."):
        objective(PARAMS, batch)
    assert jnp.isnan(jax.jit(objective)(PARAMS, batch)[0])


def test_batches_of_another_type_are_told_where_they_belong(as_users_have_it):
    ids, logps = jnp.zeros(2, jnp.int32), jnp.zeros(2)
    whole = Rollouts(ids, ids, logps, logps, logps, logps)
    objective = train.token_policy_gradient_objective(token_log_prob, losses.ppo_loss, clip=0.2)
    with pytest.raises(TypeError, match="is for TokenRollouts, got Rollouts: use train.policy_gradient_objective"):
        objective(PARAMS, whole)
    with pytest.raises(TypeError, match="got Preferences: use train.preference_objective"):
        objective(PARAMS, Preferences(ids, (ids, ids)))
    of_responses = train.policy_gradient_objective(lambda *_: logps, losses.ppo_loss, clip=0.2)
    with pytest.raises(TypeError, match="got TokenRollouts: use train.token_policy_gradient_objective"):
        of_responses(PARAMS, make_batch())


@pytest.mark.parametrize(
    ("loss", "hyperparameters", "error", "message"),
    [
        (losses.dpo_loss, {"beta": 0.1}, TypeError, "use train.preference_objective"),
        (losses.value_loss, {}, TypeError, "loss of a value function"),
        (losses.grpo_loss, {"beta": 0.1}, TypeError, "grpo_loss needs reference"),
        (losses.ppo_loss, {"clip": 0.0}, ValueError, "clip must be in .0, inf."),
        (losses.ppo_loss, {"beta": 0.1, "clip": 0.2}, TypeError, "ppo_loss has no hyperparameter beta"),
        (losses.grpo_loss, {"beta": -0.1, "reference": lambda *_: 0.0}, ValueError, "beta must be in .0, inf."),
    ],
)
def test_losses_that_do_not_fit_are_refused_when_it_is_made(as_users_have_it, loss, hyperparameters, error, message):
    with pytest.raises(error, match=message):
        train.token_policy_gradient_objective(token_log_prob, loss, **hyperparameters)


def test_a_loss_that_is_no_number_for_each_token_is_refused():
    def mean(logps, old_logps, advantages):
        return jnp.mean((logps - old_logps) * advantages, axis=-1)

    with pytest.raises(ValueError, match="shapes must be equal"):
        train.token_policy_gradient_objective(token_log_prob, mean)(PARAMS, make_batch())
