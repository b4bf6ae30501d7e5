"""`fit_online`: rounds of collecting and training, as one pure function."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import train
from dpo_jax.types import Learner, Ratio, StatefulObjective

START = {"x": jnp.array([2.0, -1.0])}
OPTIONS = {"optimizer": optax.adam(0.1), "num_epochs": 3}


def squared_error(params, batch):
    return jnp.mean((params["x"][None] - batch["target"]) ** 2), {"target": jnp.mean(batch["target"])}


def collect_noise(key, params, memory):
    """Targets around zero: eight rows."""
    return {"target": jax.random.normal(key, (8, 2))}, memory


NOISE = Learner(collect_noise, squared_error)
fit = partial(train.fit_online, params=START, learner=NOISE, **OPTIONS)


def test_the_history_has_one_entry_for_each_epoch(key):
    params, history = fit(key, rounds_per_epoch=2, evaluate=lambda params: {"size": jnp.sum(params["x"] ** 2)})
    assert {name: values.shape for name, values in history.items()} == dict.fromkeys(
        ("loss", "target", "size", "step"), (3,)
    )
    assert history["size"][-1] == jnp.sum(params["x"] ** 2)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 3),
        ({"rounds_per_epoch": 4}, 12),
        ({"passes_per_round": 5}, 15),
        ({"batch_size": 3}, 9),
        ({"batch_size": 100}, 3),
        ({"rounds_per_epoch": 2, "passes_per_round": 2, "batch_size": 4}, 24),
    ],
)
def test_it_takes_as_many_steps_as_asked(key, options, steps):
    _, history = fit(key, **options)
    np.testing.assert_array_equal(history["step"], steps * np.array([1, 2, 3]) // 3)


def test_a_round_sees_the_parameters_of_its_time(key):
    """Targets one above the parameters are never reached. The loss of an epoch is the mean over its rounds."""

    def collect(_, params, memory):
        return {"target": params["x"][None] + 1}, memory

    _, history = fit(key, learner=Learner(collect, squared_error), optimizer=optax.sgd(0.1), rounds_per_epoch=2)
    np.testing.assert_allclose(history["loss"], 1.0, rtol=1e-6)


def test_no_gradient_flows_through_what_was_collected(key):
    def collect(_, params, memory):
        return {"target": 3 * params["x"][None]}, memory

    params, _ = fit(key, learner=Learner(collect, squared_error), optimizer=optax.sgd(0.1), num_epochs=1)
    np.testing.assert_allclose(params["x"], START["x"] - 0.1 * (START["x"] - 3 * START["x"]), rtol=1e-6)


def test_it_is_what_a_loop_by_hand_does(key):
    params, _ = fit(key, optimizer=optax.sgd(0.1), rounds_per_epoch=2)
    by_hand = START
    for epoch_key in jax.random.split(key, 3):
        for round_key in jax.random.split(epoch_key, 2):
            data, _ = collect_noise(jax.random.split(round_key)[0], by_hand, None)
            gradient = jax.grad(lambda params, data=data: squared_error(params, data)[0])(by_hand)
            by_hand = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, by_hand, gradient)
    np.testing.assert_allclose(params["x"], by_hand["x"], rtol=1e-6)


def test_each_pass_sees_every_row_once(key):
    def collect(_, params, memory):
        return {"target": jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, 2))}, memory

    _, history = fit(key, learner=Learner(collect, squared_error), batch_size=2, passes_per_round=3)
    np.testing.assert_allclose(history["target"], 3.5, rtol=1e-6)


def test_it_remembers_from_round_to_round_what_collecting_and_what_the_objective_remember(key):
    def collect(key, params, count):
        return {"target": jnp.full((4, 2), count, jnp.float32)}, count + 1

    objective = StatefulObjective(
        jnp.float32(0), lambda params, batch, total: (total * 0.0, {"total": total}, total + batch["target"][0, 0])
    )
    _, history = fit(key, learner=Learner(collect, objective, 10), passes_per_round=2)
    np.testing.assert_array_equal(history["total"], [5, 10 + 10 + 5.5, 42 + 6])


def test_the_same_key_gives_the_same_whether_reported_or_not(key):
    eager, _ = fit(key)
    seen = []
    reported, _ = fit(key, report=lambda epochs, metrics: seen.append(epochs), epochs_per_report=2)
    np.testing.assert_allclose(eager["x"], reported["x"], rtol=1e-5)
    assert seen == [2, 3]


@pytest.mark.slow
def test_the_same_key_gives_the_same_whether_jitted_mapped_or_reported(key):
    eager, _ = fit(key)
    jitted, _ = jax.jit(fit)(key)
    mapped, _ = jax.vmap(fit)(jnp.stack([key, jax.random.key(9)]))
    seen = []
    reported, _ = fit(key, report=lambda epochs, metrics: seen.append(epochs), epochs_per_report=2)
    for params in (jitted, jax.tree.map(lambda leaf: leaf[0], mapped), reported):
        np.testing.assert_allclose(eager["x"], params["x"], rtol=1e-5)
    assert seen == [2, 3]
    assert np.abs(mapped["x"][0] - mapped["x"][1]).max() > 1e-3


def test_hyperparameters_are_traced():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(rate):
        return fit(jax.random.key(0), optimizer=optax.adam(rate))[0]["x"]

    run(0.1)
    run(0.2)


def test_ratios_are_pooled_over_batches_passes_and_rounds(key):
    """Rows of which only some count, more of them in each round."""

    def collect(key, params, num):
        return {"target": jnp.zeros((4, 2)), "weight": (jnp.arange(4) < num).astype(jnp.float32)}, num + 1

    def objective(params, batch):
        weight = batch["weight"]
        return jnp.sum(params["x"]) * 0.0, {"mean": Ratio(jnp.sum(weight**2 * jnp.sum(weight)), jnp.sum(weight))}

    options = {"rounds_per_epoch": 2, "passes_per_round": 2, "num_epochs": 1, "batch_size": 4}
    _, history = fit(key, learner=Learner(collect, objective, 1), **options)
    np.testing.assert_allclose(history["mean"], (1 * 1 + 2 * 2) / (1 + 2), rtol=1e-6)


def test_a_memory_keeps_its_dtype(key):
    """Also if what is remembered is worked out in another one."""

    def collect(key, params, memory):
        return collect_noise(key, params, jnp.asarray(memory + 0.5, jnp.bfloat16))

    fit(key, learner=Learner(collect, squared_error, np.float32(0.0)))


def breaks_in_round(when):
    """Collects NaN from a round on."""

    def collect(key, params, count):
        return {"target": jnp.where(count >= when, jnp.nan, 1.0) * jnp.ones((4, 2))}, count + 1

    return Learner(collect, squared_error, 0)


def test_nan_stops_with_the_last_good_state(key):
    with pytest.raises(train.NonFiniteError, match=r"step 4 \(epoch 2, batch 0") as caught:
        fit(key, learner=breaks_in_round(2), passes_per_round=2)
    expected, _ = fit(key, learner=breaks_in_round(9), passes_per_round=2, num_epochs=2)
    np.testing.assert_allclose(caught.value.params["x"], expected["x"], rtol=1e-6)
    assert caught.value.step == 4
    assert np.isnan(caught.value.history["loss"]).tolist() == [False, False, True]


def test_the_last_batch_of_a_pass_counts_as_a_step(key):
    with pytest.raises(train.NonFiniteError, match=r"step 4 \(epoch 2, batch 0"):
        fit(key, learner=breaks_in_round(2), batch_size=3)  # of four rows


def test_under_jit_it_freezes(key):
    params, history = jax.jit(lambda key: fit(key, learner=breaks_in_round(1), num_epochs=4))(key)
    assert jnp.all(jnp.isfinite(params["x"]))
    assert history["step"].tolist() == [1, 1, 1, 1]
    assert np.isnan(history["loss"]).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_epochs": 0}, ValueError, "num_epochs must be at least 1"),
        ({"rounds_per_epoch": 0}, ValueError, "rounds_per_epoch must be at least 1"),
        ({"passes_per_round": 1.5}, TypeError, "passes_per_round must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"key": 7}, TypeError, "key must be a typed key"),
        ({"learner": Learner(lambda *_: ({}, None), squared_error)}, ValueError, "collected data holds no arrays"),
        ({"learner": Learner(lambda *_: START, squared_error)}, TypeError, r"must return \(data, memory\), got dict"),
        (
            {"learner": Learner(lambda *_: ({"target": START["x"][None]}, 0), squared_error)},
            TypeError,
            "learner.collect must return a memory",
        ),
        ({"optimizer": optax.adam}, TypeError, r"write optimizer=optax.adam\(1e-3\)"),
        ({"evaluate": lambda params: {"loss": 0.0}}, ValueError, "evaluate must not return loss"),
    ],
)
def test_bad_arguments_are_refused(as_users_have_it, changes, error, message):
    with pytest.raises(error, match=message):
        fit(**{"key": jax.random.key(0), **changes})
