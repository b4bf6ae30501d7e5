import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, toy, train
from dpo_jax.types import StatefulObjective

POLICY = toy.ToyLM(num_responses=10)


def test_ktos_reference_point_is_that_of_responses_to_the_next_prompt(start, labels):
    world, log_prob, params, _, _ = start
    moved = jax.tree.map(lambda leaf: leaf * 1.5, params)
    table = jax.jit(toy.table_fn(POLICY, world.embeddings))
    prompts, responses = np.asarray(labels.prompts), np.asarray(labels.responses)
    points = []
    for policy, reference in ((moved, params), (params, moved)):
        ratios = np.subtract(*(np.float64(table(params)) for params in (policy, reference)))
        mismatched = [ratios[prompts[i], responses[(i + 1) % 40]] for i in range(40)]
        point = jax.jit(train.batch_reference_point(log_prob, reference))
        points.append(point(policy, labels, labels.reference_logps))
        np.testing.assert_allclose(points[-1], max(0, np.mean(mismatched)), rtol=1e-4, atol=1e-6)
    assert max(points) > 0


def test_ktos_reference_point_counts_pairs_by_the_weights_of_both_rows(start, labels):
    _, log_prob, params, _, _ = start
    moved, weights = jax.tree.map(lambda leaf: leaf * 1.5, params), np.arange(40.0, dtype=np.float32) % 3
    mismatched, weighted = jnp.roll(labels.responses, -1), labels._replace(weights=jnp.asarray(weights))
    score = jax.jit(log_prob)
    scores = (np.float64(score(policy, labels.prompts, mismatched)) for policy in (moved, params))
    expected = np.average(np.subtract(*scores), weights=weights * np.roll(weights, -1))
    forth, back = (
        jax.jit(train.batch_reference_point(log_prob, reference))(policy, weighted, labels.reference_logps)
        for policy, reference in ((moved, params), (params, moved))
    )
    np.testing.assert_allclose(forth - back, expected, rtol=1e-4)


def test_the_shift_is_the_mean_of_all_rewards_so_far(start):
    """With a learning rate of nothing, after two epochs: every response counted twice, good and bad equally."""
    _, log_prob, params, _, preferences = start
    moved = jax.tree.map(lambda leaf: leaf * 1.5, params)
    shift = train.running_shift(beta=0.5)
    preferences = jax.tree.map(np.asarray, preferences)
    logps = jax.tree.map(np.asarray, jax.jit(log_prob)(moved, preferences.prompts, preferences.responses))
    rewards = [0.5 * np.float64(logps[i] - preferences.reference_logps[i]) for i in (0, 1)]
    memory = shift.memory
    for rows in (slice(0, 30), slice(30, 70)):
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], preferences)
        value, memory = jax.jit(shift.update)(
            memory, moved, batch, jax.tree.map(lambda leaf, rows=rows: leaf[rows], logps)
        )
    np.testing.assert_allclose(value, (rewards[0].mean() + rewards[1].mean()) / 2, rtol=1e-4)
    objective = train.preference_objective(log_prob, losses.bco_pair_loss, beta=0.5, shift=shift)
    assert isinstance(objective, StatefulObjective)


@pytest.mark.slow
def test_a_running_shift_trains(start, key):
    _, log_prob, params, _, preferences = start
    shift = train.running_shift(beta=0.5)
    objective = train.preference_objective(log_prob, losses.bco_pair_loss, beta=0.5, shift=shift)
    params, history = train.fit(
        key, params, preferences, objective=objective, optimizer=optax.adam(1e-2), num_epochs=3, batch_size=32
    )
    assert history["loss"][-1] < history["loss"][0]


def test_the_shift_of_labels_counts_good_and_bad_equally(start, labels):
    _, log_prob, params, _, _ = start
    logps = jax.jit(log_prob)(params, labels.prompts, labels.responses)
    value, _ = jax.jit(train.running_shift(beta=2.0).update)(losses.Shift(), params, labels, logps)
    rewards, good = 2 * np.float64(logps - labels.reference_logps), np.asarray(labels.desirable)
    np.testing.assert_allclose(value, (rewards[good].mean() + rewards[~good].mean()) / 2, rtol=1e-4)


def test_beta_dpo_draws_another_filter_for_every_batch(start, key):
    _, log_prob, params, _, preferences = start
    moved = jax.tree.map(lambda leaf: leaf * 1.5, params)
    moments = train.running_margin_moments(key)
    objective = train.preference_objective(log_prob, losses.beta_dpo_loss, beta=0.5, alpha=0.5, moments=moments)
    first, _, memory = jax.jit(objective.apply)(moved, preferences, objective.memory)
    second, _, memory = jax.jit(objective.apply)(moved, preferences, memory)
    assert first != second
    keys = [jax.random.key_data(m["moments"].key) for m in (objective.memory, memory)]
    assert not np.array_equal(*keys)


@pytest.mark.slow
def test_beta_dpo_trains(start, key):
    _, log_prob, params, _, preferences = start
    moments = train.running_margin_moments(key)
    objective = train.preference_objective(log_prob, losses.beta_dpo_loss, beta=0.5, alpha=0.5, moments=moments)
    _, history = train.fit(
        key, params, preferences, objective=objective, optimizer=optax.adam(1e-2), num_epochs=2, batch_size=32
    )
    chex.assert_tree_all_finite(history)


@pytest.mark.parametrize(
    ("mix", "steps_per_move"), [(0.3, 2), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((1.0, 2), (0.3, 1)))]
)
def test_the_reference_follows_the_policy(start, mix, steps_per_move):
    """Against a loop in which everything is done by hand."""
    _, log_prob, params, _, preferences = start
    dpo = train.preference_objective(log_prob, losses.dpo_loss, beta=0.5)
    options = {
        "objective": train.moving_reference(dpo, log_prob, params, mix=mix, steps_per_move=steps_per_move),
        "optimizer": optax.sgd(0.5),
    }
    state = train.init_state(params, **options)
    state, _ = jax.jit(lambda state: train.run_epoch(state, preferences, jnp.arange(70), batch_size=16, **options))(
        state
    )
    policy, reference, step = params, params, 0
    gradient_of = jax.jit(jax.grad(lambda p, r, batch: dpo(p, train.with_reference(log_prob, r, batch))[0]))
    for rows in (slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 64), slice(64, 70)):
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], preferences)
        gradient, old, step = gradient_of(policy, reference, batch), policy, step + 1
        policy = jax.tree.map(lambda p, g: p - 0.5 * g, policy, gradient)
        if step % steps_per_move == 0:
            reference = jax.tree.map(lambda r, p: (1 - mix) * r + mix * p, reference, old)
    chex.assert_trees_all_close(state.params, policy, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state.memory.reference_params, reference, rtol=1e-4, atol=1e-6)


def test_a_moving_reference_carries_what_its_objective_remembers(start, key):
    _, log_prob, params, _, preferences = start
    bco = train.preference_objective(log_prob, losses.bco_pair_loss, beta=0.5, shift=train.running_shift(beta=0.5))
    objective = train.moving_reference(bco, log_prob, params, mix=0.1, steps_per_move=1)
    _, history = train.fit(
        key, params, preferences, objective=objective, optimizer=optax.adam(1e-2), num_epochs=2, batch_size=32
    )
    assert history["loss"][1] != history["loss"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mix": 0.0}, "mix must be in .0, 1."), ({"steps_per_move": 0}, "steps_per_move must be at least 1")],
)
def test_a_reference_that_cannot_move_is_refused(start, changes, message):
    dpo = train.preference_objective(start[1], losses.dpo_loss, beta=0.5)
    with pytest.raises(ValueError, match=message):
        train.moving_reference(dpo, start[1], start[2], **changes)


def test_a_shift_of_weighted_labels_is_weighted(start, labels):
    _, log_prob, params, _, _ = start
    weights = jnp.linspace(0.1, 2.0, 40)
    logps = jax.jit(log_prob)(params, labels.prompts, labels.responses)
    weighted = labels._replace(weights=weights)
    value, _ = jax.jit(train.running_shift(beta=2.0).update)(losses.Shift(), params, weighted, logps)
    rewards, good = 2 * np.float64(logps - labels.reference_logps), np.asarray(labels.desirable)
    means = (np.average(rewards[side], weights=weights[side]) for side in (good, ~good))
    np.testing.assert_allclose(value, sum(means) / 2, rtol=1e-4)


def test_a_shift_of_weighted_pairs_gives_both_sides_the_weight_of_their_pair(start):
    _, log_prob, params, _, preferences = start
    weights = jnp.linspace(0.1, 2.0, len(preferences.prompts))
    logps = jax.jit(log_prob)(params, preferences.prompts, preferences.responses)
    reference = jax.tree.map(jnp.zeros_like, logps)
    weighted = preferences._replace(weights=weights, reference_logps=reference)
    value, _ = jax.jit(train.running_shift(beta=2.0).update)(losses.Shift(), params, weighted, logps)
    means = [np.average(2 * np.float64(side), weights=weights) for side in logps]
    np.testing.assert_allclose(value, sum(means) / 2, rtol=1e-4)


def test_a_bad_beta_of_the_shift_is_refused():
    with pytest.raises(ValueError, match="beta must be in .0, inf., got -3"):
        train.running_shift(beta=-3)
