import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, toy, train
from dpo_jax.types import Demonstrations, Pair, Preferences


@pytest.mark.parametrize("rows_per_chunk", [3, pytest.param(8, marks=pytest.mark.slow)])  # batches have 8 and 6 rows
def test_batches_in_chunks_train_as_whole_batches_do(key, rows_per_chunk):
    """With a loss of whole batches, a reference that moves, and a statistic that runs."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        start, reference = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(2))
        prompts, chosen, rejected = (jnp.asarray(rng.integers(0, 3, 14)) for _ in range(3))

        def log_prob(params, prompts, responses):
            assert params.shape == (4, 3)
            return jax.tree.map(lambda r: toy.lookup(jax.nn.log_softmax(params), prompts, r), responses)

        def run(log_prob):
            data = train.with_reference(log_prob, reference, Preferences(prompts, Pair(chosen, rejected)))
            objective = train.preference_objective(log_prob, mixed, beta=0.5, shift=train.running_shift(beta=0.5))
            objective = train.moving_reference(objective, log_prob, reference, mix=0.5, steps_per_move=2)
            options = {"objective": objective, "optimizer": optax.adam(0.1), "num_epochs": 2, "batch_size": 8}
            return train.fit(key, start, data, **options)

        def mixed(policy, reference, *, beta, shift):
            bco = losses.bco_pair_loss(policy, reference, beta=beta, shift=shift)
            return bco + losses.aot_loss(policy, reference, beta=beta)

        whole = jax.jit(run, static_argnums=0)(log_prob)
        chunked = jax.jit(run, static_argnums=0)(train.in_chunks(log_prob, rows_per_chunk))
        chex.assert_trees_all_close(chunked, whole, rtol=1e-9)
        assert whole[1]["step"].tolist() == [2, 4]


@pytest.mark.parametrize("rows_per_chunk", [3, 7, 20])
def test_scores_of_chunks_stand_in_the_order_of_the_rows(rows_per_chunk):
    rows = jnp.arange(14)
    scores = train.in_chunks(lambda params, prompts, responses: params * responses, rows_per_chunk)(2.0, rows, rows)
    assert scores.tolist() == [2.0 * row for row in range(14)]


def test_a_chunk_at_a_time_needs_less_memory():
    """Of a wide model, whose activations are the largest arrays."""
    width, num_rows = 512, 256
    params = {"in": jnp.zeros((4, width)), "out": jnp.zeros((width, 4))}
    data = Demonstrations(jnp.zeros(num_rows, int), jnp.zeros(num_rows, int))

    def log_prob(params, prompts, responses):
        logits = jnp.tanh(params["in"][prompts]) @ params["out"]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), responses[:, None], 1)[:, 0]

    def memory(log_prob):
        gradient = jax.grad(lambda params: train.sft_objective(log_prob)(params, data)[0])
        return jax.jit(gradient).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(train.in_chunks(log_prob, 16)) < memory(log_prob) / 4


def gathering(rate):
    return optax.chain(optax.clip(1.0), optax.MultiSteps(optax.adam(rate), 2).gradient_transformation())


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (optax.MultiSteps(optax.adam(0.1), 2), ValueError, "log_prob = train.in_chunks"),
        (gathering(0.1), ValueError, "log_prob = train.in_chunks"),
        (optax.chain(optax.apply_every(2), optax.sgd(0.1)), ValueError, "log_prob = train.in_chunks"),
        (optax.adam, TypeError, r"got the function adam: write optimizer=optax.adam\(1e-3\)"),
        ("adam", TypeError, "optimizer must be an Optax optimizer, got 'adam'"),
        (0.1, TypeError, "optimizer must be an Optax optimizer, got 0.1"),
    ],
)
def test_optimizers_that_cannot_be_used_are_refused(as_users_have_it, key, optimizer, error, message):
    with pytest.raises(error, match=message):
        minimise(key, optimizer)


def sharpness_aware(rate):
    return optax.contrib.sam(optax.sgd(rate), optax.sgd(0.01))


@pytest.mark.parametrize("make", [optax.lbfgs, optax.polyak_sgd, sharpness_aware])
def test_optimizers_are_given_what_they_ask_for(key, make):
    params, history = minimise(key, make(0.1))
    assert abs(params) < 1
    assert history["loss"][-1] < history["loss"][0]


def minimise(key, optimizer):
    options = {"num_epochs": 4, "batch_size": 4, "optimizer": optimizer}
    return train.fit(key, jnp.float32(1.0), jnp.zeros(4), objective=lambda p, batch: (p**2 + batch[0], {}), **options)


@pytest.mark.parametrize(("num", "error"), [(0, ValueError), (2.5, TypeError)])
def test_a_chunk_has_a_row_at_least(as_users_have_it, num, error):
    with pytest.raises(error, match="rows_per_chunk must be"):
        train.in_chunks(lambda *_: jnp.zeros(3), num)
