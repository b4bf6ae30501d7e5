import inspect
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from dpo_jax import losses, toy, train
from dpo_jax.types import Demonstrations, Pair, Preferences, Ratio, StatefulObjective

POLICY = toy.ToyLM(num_responses=10)
ADAM = optax.adam(1e-2)
GOLDEN = Path(__file__).parents[1] / "golden" / "torch_epochs.npz"


def fit_dpo(key, start, *, beta=0.1, optimizer=ADAM, num_epochs=3, batch_size=32, **options):
    _, log_prob, params, _, preferences = start
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=beta)
    return train.fit(
        key,
        params,
        preferences,
        objective=objective,
        optimizer=optimizer,
        num_epochs=num_epochs,
        batch_size=batch_size,
        **options,
    )


# The same numbers as PyTorch, step by step, for a whole epoch


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-10), pytest.param(np.float32, 2e-4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_an_epoch_equals_pytorchs(stage, dtype, tolerance):
    golden = dict(np.load(GOLDEN))
    with jax.enable_x64(dtype == np.float64):

        def params(moment):
            kernel, bias, last_kernel, last_bias = (
                jnp.asarray(golden[f"{moment}_{layer}_{name}"], dtype)
                for layer in ("Dense_0", "Dense_1")
                for name in ("kernel", "bias")
            )
            first, last = {"kernel": kernel, "bias": bias}, {"weight": last_kernel.T, "bias": last_bias}
            return {"params": {"Dense_0": first, "Dense_1": last}}

        log_prob = toy.log_prob_fn(POLICY, jnp.asarray(golden["embeddings"], dtype))
        if stage == "sft":
            state_params, learning_rate, batch_size = params("start"), 1e-2, 32
            data = Demonstrations(*jnp.asarray(golden["demos"]))
            objective = train.sft_objective(log_prob)
        else:
            state_params, learning_rate, batch_size = params("sft"), 1e-3, 64
            prompts, chosen, rejected = jnp.asarray(golden["preferences"])
            data = train.with_reference(log_prob, state_params, Preferences(prompts, Pair(chosen, rejected)))
            objective = train.preference_objective(log_prob, losses.dpo_loss, beta=float(golden["beta"]))
        data, order = jax.tree.map(np.asarray, data), golden[f"{stage}_order"]
        optimizer = optax.adam(learning_rate)
        options = {"objective": objective, "optimizer": optimizer}
        state = train.init_state(state_params, **options)

        end, metrics = jax.jit(
            lambda state: train.run_epoch(
                state, jax.tree.map(jnp.asarray, data), jnp.asarray(order), batch_size=batch_size, **options
            )
        )(state)
        chex.assert_trees_all_close(end.params, params(stage), rtol=0, atol=tolerance)
        np.testing.assert_allclose(metrics["loss"], golden[f"{stage}_losses"].mean(), rtol=tolerance)
        assert end.step == len(golden[f"{stage}_losses"])

        @jax.jit
        def step(state, batch):
            gradient = jax.grad(lambda params: objective(params, batch)[0])(state.params)
            return gradient, *train.update(state, batch, **options)

        for i, (loss, gradient) in enumerate(zip(golden[f"{stage}_losses"], golden[f"{stage}_gradients"], strict=True)):
            rows = order[i * batch_size : (i + 1) * batch_size]
            batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], data)
            ours, state, metrics = step(state, batch)
            first, last = (jax.tree.map(np.asarray, ours["params"][layer]) for layer in ("Dense_0", "Dense_1"))
            flat = [leaf.ravel() for leaf in (first["kernel"], first["bias"], last["weight"].T, last["bias"])]
            np.testing.assert_allclose(np.concatenate(flat), gradient, rtol=0, atol=tolerance)
            np.testing.assert_allclose(metrics["loss"], loss, rtol=tolerance)


# fit


def squares(params, batch):
    """Small, but every row and every order of rows leads elsewhere; two metrics."""
    error = params - batch
    return jnp.mean(error**2), {"error": jnp.mean(error)}


def fit_squares(key, *, optimizer=ADAM, num_epochs=3, **options):
    data = jnp.asarray(np.cos(np.arange(70)))
    return train.fit(
        key, jnp.ones(()), data, objective=squares, optimizer=optimizer, num_epochs=num_epochs, batch_size=32, **options
    )


def test_history_is_the_mean_of_batch_means_with_a_short_last_batch():
    data, order, params = np.float32(np.cos(np.arange(70))), np.arange(70)[::-1], np.float32(1.0)
    options = {"objective": squares, "optimizer": optax.sgd(0.25)}
    end, metrics = train.run_epoch(
        train.init_state(jnp.asarray(params), **options),
        jnp.asarray(data),
        jnp.asarray(order),
        batch_size=32,
        **options,
    )
    expected = {"loss": [], "error": []}
    for rows in (order[:32], order[32:64], order[64:]):
        error = params - data[rows]
        expected["loss"].append(np.mean(error**2))
        expected["error"].append(np.mean(error))
        params = params - 0.25 * 2 * np.mean(error)
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(end.params, params, rtol=1e-5)


def test_history_has_a_value_for_each_epoch(start, key):
    world = start[0]
    table = toy.table_fn(POLICY, world.embeddings)
    reference = table(start[2])
    params, history = fit_dpo(key, start, evaluate=lambda params: toy.evaluate(table(params), reference, world.rewards))
    names = {"loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward", "step"}
    assert history.keys() == names | {"expected_reward", "kl_to_reference"}
    assert all(values.shape == (3,) for values in history.values())
    assert history["step"].tolist() == [3, 6, 9]
    exact = toy.expected_reward(table(params), world.rewards).mean()
    np.testing.assert_allclose(history["expected_reward"][-1], exact, rtol=1e-6)


def test_every_row_is_used_once_in_every_epoch(key):
    def objective(params, batch):
        return params * jnp.sum(batch), {"rows": jnp.sum(2.0 ** batch.astype(jnp.float32))}

    @jax.jit
    def seen(key):
        options = {"objective": objective, "optimizer": optax.sgd(0.1), "num_epochs": 4}
        fits = (
            train.fit(key, jnp.float32(0.0), jnp.arange(10), batch_size=batch_size, **options)
            for batch_size in (4, 5, 1, 10, 99)
        )
        return [history["rows"] for _, history in fits]

    num_batches = np.array([[3], [2], [10], [1], [1]])
    np.testing.assert_allclose(np.stack(seen(key)) * num_batches, 2.0**10 - 1)


def test_epochs_are_shuffled_differently(key):
    def objective(params, batch):
        return params * 0.0, {"first": batch[0].astype(jnp.float32)}

    _, history = train.fit(
        key,
        jnp.float32(0.0),
        jnp.arange(1000),
        objective=objective,
        optimizer=optax.adam(0.1),
        num_epochs=20,
        batch_size=1000,
    )
    assert len(set(history["first"].tolist())) > 15


def test_same_key_same_bits_and_other_key_other_bits(key):
    first, again = (fit_squares(key) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    other, _ = fit_squares(jax.random.key(5))
    assert not np.array_equal(first[0], other)


def test_one_trace_serves_a_grid_of_betas_and_learning_rates(start, key):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(beta, learning_rate):
        return fit_dpo(key, start, beta=beta, optimizer=optax.adam(learning_rate))[1]["reward_margin"][-1]

    margins = {float(run(beta, rate)) for beta in (0.01, 0.1, 2.0) for rate in (1e-3, 1e-2)}
    assert len(margins) == 6


@pytest.fixture(scope="module")
def wide_start(make_start):
    """In float64: in float32 Adam's first steps turn a rounding error of a gradient near zero into a whole step."""
    with jax.enable_x64(True):
        return make_start()


@pytest.fixture(scope="module")
def wide_program(wide_start):
    """Training by a key, a beta and a learning rate."""

    def run(key, beta, rate):
        return fit_dpo(key, wide_start, beta=beta, optimizer=optax.adam(rate))

    return run


KEYS = 0, 3, 0
HYPERPARAMETERS = np.array([[0.1, 1e-2], [2.0, 1e-3], [0.1, np.inf]]).T
"""Betas and learning rates; the last of them diverges."""


@pytest.fixture(scope="module")
def wide_runs(wide_program):
    with jax.enable_x64(True):
        keys = jnp.stack([jax.random.key(seed) for seed in KEYS])
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(wide_program))(keys, *jnp.asarray(HYPERPARAMETERS)))


@pytest.fixture(scope="module")
def wide_loop(wide_program):
    with jax.enable_x64(True):
        program, rows = jax.jit(wide_program), zip(KEYS, *HYPERPARAMETERS.tolist(), strict=True)
        return [jax.tree.map(np.asarray, program(jax.random.key(seed), *row)) for seed, *row in rows]


def test_vmap_over_keys_betas_and_learning_rates_equals_a_loop(wide_runs, wide_loop):
    for i, alone in enumerate(wide_loop[:2]):
        together = jax.tree.map(lambda leaf, i=i: leaf[i], wide_runs)
        chex.assert_trees_all_close(together, alone, rtol=1e-9, atol=1e-12)


def test_the_learning_rate_may_be_part_of_the_optimizers_state(key):
    with jax.enable_x64(True):
        injected = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
        chex.assert_trees_all_close(fit_squares(key, optimizer=injected), fit_squares(key), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_vmap_over_betas_and_seeds_equals_a_loop(wide_start):
    with jax.enable_x64(True):
        start, keys, betas = wide_start, jax.random.split(jax.random.key(3), 2), jnp.array([0.01, 2.0])

        def run(key, beta):
            return fit_dpo(key, start, beta=beta, num_epochs=2)

        swept = jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None))(keys, betas)
        program = jax.jit(run)
        for i, key in enumerate(keys):
            for j, beta in enumerate(betas):
                alone = jax.tree.map(lambda leaf, i=i, j=j: np.asarray(leaf)[i, j], swept)
                chex.assert_trees_all_close(alone, program(key, beta), rtol=1e-9, atol=1e-12)


def test_reports_come_between_pieces_and_change_nothing(key):
    reports = []
    reported = fit_squares(key, num_epochs=5, epochs_per_report=2, report=lambda *arguments: reports.append(arguments))
    chex.assert_trees_all_close(reported, fit_squares(key, num_epochs=5), rtol=1e-6)
    assert [epochs for epochs, _ in reports] == [2, 4, 5]
    assert reports[-1][1]["loss"] == reported[1]["loss"][-1]
    with pytest.raises(ValueError, match="report cannot be called under jit"):
        jax.jit(lambda key: fit_squares(key, report=print))(key)


def test_schedules_and_other_optimizers_are_welcome(key):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(optax.cosine_decay_schedule(1.0, 30)))
    _, history = fit_squares(key, optimizer=optimizer, num_epochs=10)
    assert history["loss"][-1] < history["loss"][0]


def test_table_policy_converges_to_the_closed_form_optimum(key, world):
    """With every comparison weighted by its true probability, DPO's minimum is the optimum of the RLHF objective."""
    beta, policy = 0.2, toy.TablePolicy(num_responses=10)
    reference_table = special.log_softmax(np.asarray(jax.random.normal(key, world.rewards.shape)), axis=-1)
    log_prob = toy.log_prob_fn(policy, world.embeddings)
    reference = {"params": {"logits": jnp.asarray(reference_table)}}
    data = jax.jit(lambda: train.with_reference(log_prob, reference, toy.all_preferences(world)))()
    params, _ = train.fit(
        key,
        reference,
        data,
        objective=train.preference_objective(log_prob, losses.dpo_loss, beta=beta),
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 1000)),
        num_epochs=1000,
        batch_size=len(data.prompts),
    )
    learnt = np.asarray(toy.table_fn(policy, world.embeddings)(params))
    optimum = np.asarray(toy.optimal_policy(jnp.asarray(reference_table), world.rewards, beta=beta))
    total_variation = 0.5 * np.abs(np.exp(learnt) - np.exp(optimum)).sum(-1)
    assert np.max(total_variation) < 1e-3, total_variation
    start_variation = 0.5 * np.abs(np.exp(reference_table) - np.exp(optimum)).sum(-1)
    assert np.min(start_variation) > 0.1


# Bad input


def test_weights_must_match_and_only_scale_the_loss(start):
    _, log_prob, params, _, preferences = start
    params = jax.tree.map(lambda leaf: 1.5 * leaf, params)  # not the reference's: no two losses are equal
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=0.1)
    loss, metrics = jax.jit(objective)(params, preferences)
    tripled, same = jax.jit(objective)(params, preferences._replace(weights=jnp.full(70, 3.0)))
    np.testing.assert_allclose(tripled, 3 * loss, rtol=1e-5)
    chex.assert_trees_all_close({name: np.asarray(metric) for name, metric in same.items()}, metrics, rtol=1e-5)
    with pytest.raises(ValueError, match=r"losses \(70,\), weights \(70, 1\)"):
        objective(params, preferences._replace(weights=jnp.ones((70, 1))))


def test_evaluate_may_not_hide_a_metric(start, key):
    with pytest.raises(ValueError, match="evaluate must not return loss, step"):
        fit_dpo(key, start, evaluate=lambda params: {"loss": 0.0, "step": 0.0, "mine": 0.0})


def test_large_finite_updates_are_taken(key):
    def objective(params, batch):
        return jnp.sum(params * 1e38), {}

    params, _ = train.fit(
        key,
        jnp.zeros(9),
        jnp.arange(4),
        objective=objective,
        optimizer=optax.sgd(1.0),
        num_epochs=1,
        batch_size=4,
    )
    assert jnp.all(params == -1e38)


def test_ids_out_of_range_stop_training_and_are_never_clamped(start, key):
    _, log_prob, params, demos, _ = start
    wrong = demos._replace(responses=demos.responses.at[3].set(10))
    with pytest.raises(train.NonFiniteError, match="ids out of range"):
        train.fit(
            key,
            params,
            wrong,
            objective=train.sft_objective(log_prob),
            optimizer=optax.adam(1e-2),
            num_epochs=1,
            batch_size=50,
        )


def nan_from(step):
    """An objective that is fine until `step` steps were taken: the parameter counts them."""

    def objective(params, batch):
        loss = jnp.where(params > -0.5 - step, params, jnp.nan)
        return loss, {"value": params}

    return objective


@pytest.mark.parametrize("bad_step", [0, 5])
def test_nan_stops_training_with_the_step_and_the_last_good_parameters(key, bad_step):
    options = {"num_epochs": 4, "batch_size": 4, "optimizer": optax.sgd(1.0)}
    run = lambda: train.fit(key, jnp.float32(0.0), jnp.arange(10), objective=nan_from(bad_step - 1), **options)  # noqa: E731
    with pytest.raises(train.NonFiniteError, match=f"not finite in step {bad_step} ") as caught:
        run()
    assert caught.value.step == bad_step
    assert caught.value.params == -bad_step
    params, history = jax.jit(run)()
    assert params == -bad_step
    assert history["step"].tolist() == [min(3 * epoch, bad_step) for epoch in range(1, 5)]
    assert jnp.isnan(history["loss"][-1])
    assert jnp.isnan(history["loss"][bad_step // 3])
    assert not jnp.any(jnp.isnan(history["loss"][: bad_step // 3]))


def test_after_a_bad_batch_nothing_is_learnt_from_good_ones():
    def objective(params, batch):
        return params + jnp.sum(batch), {}

    options = {"objective": objective, "optimizer": optax.sgd(1.0)}
    state = train.init_state(jnp.float32(0.0), **options)
    data = jnp.zeros(10).at[3].set(jnp.nan)  # in the second batch of five
    state, _ = train.run_epoch(state, data, jnp.arange(10), batch_size=2, **options)
    assert (state.step, state.params, state.finite) == (1, -1.0, False)


def test_an_infinite_update_is_not_taken(key):
    def objective(params, batch):
        return jnp.sqrt(jnp.abs(params)).sum(), {}  # finite at 0, but not its slope

    with pytest.raises(train.NonFiniteError, match="in step 0 ") as caught:
        train.fit(
            key, jnp.zeros(2), jnp.arange(4), objective=objective, optimizer=optax.adam(1.0), num_epochs=1, batch_size=4
        )
    assert caught.value.params.tolist() == [0.0, 0.0]


def test_one_diverging_run_leaves_its_neighbours_alone(wide_runs, wide_loop):
    params, history = wide_runs
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], params), wide_loop[0][0], rtol=1e-9, atol=1e-12)
    assert history["step"][:, -1].tolist() == [9, 9, 0]


@pytest.mark.parametrize("order", [[0, 10], [-1, 0]])
def test_an_order_of_rows_that_are_not_there_is_refused(order):
    options = {"objective": lambda params, batch: (params * jnp.mean(batch), {}), "optimizer": optax.sgd(0.1)}
    state = train.init_state(jnp.float32(0.0), **options)
    with pytest.raises(ValueError, match="order must be between 0 and 9"):
        train.run_epoch(state, jnp.arange(10.0), jnp.array(order), batch_size=2, **options)


def test_nan_is_reported_between_pieces_too(key):
    with pytest.raises(train.NonFiniteError) as caught:
        train.fit(
            key,
            jnp.float32(0.0),
            jnp.arange(10),
            objective=nan_from(4),
            optimizer=optax.sgd(1.0),
            num_epochs=9,
            batch_size=4,
            report=lambda *_: None,
            epochs_per_report=3,
        )
    assert caught.value.step == 5
    assert caught.value.history["loss"].shape == (3,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": optax.adam}, TypeError, r"got the function adam: write optimizer=optax.adam\(1e-3\)"),
        ({"num_epochs": 0}, ValueError, "num_epochs must be at least 1, got 0"),
        ({"batch_size": -3}, ValueError, "batch_size must be at least 1, got -3"),
        ({"data": jnp.zeros((0,))}, ValueError, "data has no rows"),
        ({"data": (jnp.zeros(3), jnp.zeros(4))}, ValueError, r"data is ragged.*data\[0\] \(3,\), data\[1\] \(4,\)"),
        ({"data": ()}, ValueError, "data holds no arrays"),
        ({"key": 0}, TypeError, "key must be a typed key made by jax.random.key"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "key must be a typed key made by jax.random.key"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    arguments = {"key": jax.random.key(0), "params": jnp.float32(0.0), "data": jnp.arange(4)}
    arguments |= {"optimizer": optax.adam(0.1), "num_epochs": 1, "batch_size": 2, **changes}
    with pytest.raises(error, match=message):
        inspect.unwrap(train.fit)(objective=nan_from(0), **arguments)


# What users' functions return, and weights


def fit_parabola(changes=lambda loss, batch: (loss, {}), **options):
    def objective(params, batch):
        return changes(params**2, batch)

    arguments = {"objective": objective, "optimizer": optax.adam(0.1), "num_epochs": 1, "batch_size": 4, **options}
    return train.fit(jax.random.key(0), jnp.float32(1.0), jnp.arange(6.0), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            lambda loss, _: loss,
            TypeError,
            r"must return \(loss, metrics\) \(without metrics, an empty dict\)",
        ),
        (lambda loss, _: (loss, {}, None), TypeError, r"must return \(loss, metrics\), got a tuple of 3"),
        (
            lambda loss, batch: (loss * batch, {}),
            TypeError,
            r"loss is one floating-point number, got an array",
        ),
        (lambda loss, _: (loss, {"loss": 0.0}), ValueError, "objective must not return loss"),
        (lambda loss, _: (loss, {"step": 0.0, "mine": 0.0}), ValueError, "objective must not return step"),
        (
            lambda loss, batch: (loss, {"mine": batch}),
            TypeError,
            r"metrics\['mine'\] must be one number",
        ),
        (lambda loss, _: (loss, loss), TypeError, "objective must return metrics as a dict"),
    ],
)
def test_objectives_that_return_something_else_are_told_what_they_should(changes, error, message):
    with pytest.raises(error, match=message):
        fit_parabola(changes)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [(lambda params: params, "evaluate must return metrics as a dict"), (lambda _: {"x": "y"}, "must return arrays")],
)
def test_evaluations_that_are_no_metrics_are_refused(as_users_have_it, evaluate, message):
    with pytest.raises(TypeError, match=message):
        fit_parabola(evaluate=evaluate)


@pytest.mark.parametrize(
    ("memory", "message"),
    [({"other": 0}, "memory of the shapes"), (jnp.zeros(3), "memory of the shapes"), (0.5, "float32 of int32")],
)
def test_a_memory_that_changes_its_kind_is_refused(memory, message):
    objective = StatefulObjective(jnp.int32(0), lambda params, batch, _: (params**2, {}, memory))
    with pytest.raises(TypeError, match=f"objective must return a {message}|but made {message}"):
        fit_parabola(objective=objective)


def test_a_ratio_is_a_number_in_history_reports_and_evaluations():
    reported = []
    _, history = fit_parabola(
        lambda loss, batch: (loss, {"mean": Ratio(jnp.sum(batch), len(batch))}),
        evaluate=lambda params: {"half": Ratio(params, 2.0)},
        report=lambda _, metrics: reported.append(metrics),
    )
    assert history["mean"] == reported[0]["mean"] == 2.5
    assert history["half"].shape == (1,)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (jnp.ones(70).at[2].set(-1.0), "data.weights must be in .0, inf., got -1.0 in row 2"),
        (jnp.ones(70).at[2].set(jnp.nan), "data.weights must be in .0, inf., got nan in row 2"),
        (jnp.zeros(70), "data.weights must not all be zero"),
    ],
)
def test_weights_by_which_nothing_can_be_learnt_are_refused(start, key, weights, message):
    with pytest.raises(ValueError, match=message):
        fit_dpo(key, (*start[:4], start[4]._replace(weights=weights)))


def test_a_beta_that_is_too_high_is_among_the_suspects(start, key):
    moved = jax.tree.map(lambda leaf: leaf * 1.5, start[2])
    with pytest.raises(train.NonFiniteError, match="the learning rate or a hyperparameter of the loss, such as beta"):
        fit_dpo(key, (*start[:2], moved, *start[3:]), beta=3e38)


# Objectives that remember


def counting(params, batch, memory):
    """Remembers how many rows there were; its loss is the square of one parameter."""
    memory = {"rows": memory["rows"] + len(batch)}
    return jnp.square(params), {"rows": jnp.asarray(memory["rows"], jnp.float32)}, memory


def test_memory_goes_from_batch_to_batch_and_from_epoch_to_epoch(key):
    objective = StatefulObjective({"rows": jnp.int32(10)}, counting)
    options = {"objective": objective, "optimizer": optax.adam(0.1), "num_epochs": 3, "batch_size": 3}
    _, history = train.fit(key, jnp.float32(1.0), jnp.arange(5), **options)
    seen = np.cumsum([3, 2] * 3) + 10  # batches of three and of two rows
    np.testing.assert_allclose(history["rows"], seen.reshape(3, 2).mean(axis=1))
    reported = []
    _, again = train.fit(
        key, jnp.float32(1.0), jnp.arange(5), report=lambda *r: reported.append(r), epochs_per_report=1, **options
    )
    chex.assert_trees_all_close(again, history)
    assert len(reported) == 3


def test_memory_stops_with_training(key):
    def failing(params, batch, memory):
        loss, metrics, memory = counting(params, batch, memory)
        return jnp.where(memory["rows"] > 4, jnp.nan, loss), metrics, memory

    options = {"objective": StatefulObjective({"rows": 0}, failing), "optimizer": optax.sgd(0.1)}
    state = train.init_state(jnp.float32(1.0), **options)
    state, _ = train.run_epoch(state, jnp.arange(6), jnp.arange(6), batch_size=2, **options)
    assert (state.step, state.memory["rows"], state.finite) == (2, 4, False)


def test_runs_under_vmap_have_memories_of_their_own(key):
    def last(start):
        objective = StatefulObjective({"rows": start}, counting)
        options = {"objective": objective, "optimizer": optax.adam(0.1), "num_epochs": 1, "batch_size": 5}
        return train.fit(key, jnp.float32(1.0), jnp.arange(5), **options)[1]["rows"][0]

    np.testing.assert_allclose(jax.vmap(last)(jnp.array([0, 7])), [5, 12])
