"""The main programs lower for GPUs and TPUs, from any machine: no device runs anything here."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from dpo_jax import losses, rlhf, toy, train
from dpo_jax.sweep.programs import BlockShape, Struct, trace_prepare, trace_run

PLATFORMS = ("cuda", "rocm", "tpu")
CALLS = {"cu_threefry2x32_ffi", "hip_threefry2x32_ffi"}
"""What JAX has written by hand for GPUs. All else must be StableHLO, which XLA compiles for any device."""
POLICY, VALUE = toy.ToyLM(num_responses=4), toy.ToyLM(num_responses=1)
OPTIONS = {"optimizer": optax.adam(0.1), "num_epochs": 2}


def make_start(key):
    world = toy.make_world(key, num_prompts=3, num_responses=4)
    return world, toy.log_prob_fn(POLICY, world.embeddings), POLICY.init(key, world.embeddings)


def sft_and_dpo(key, beta):
    world, log_prob, params = make_start(key)
    demos, pairs = toy.sample_demonstrations(key, world, num=5), toy.sample_preferences(key, world, num=5)
    reference, _ = train.fit(key, params, demos, objective=train.sft_objective(log_prob), batch_size=2, **OPTIONS)
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=beta)
    pairs = train.with_reference(log_prob, reference, pairs)
    return train.fit(key, reference, pairs, objective=objective, batch_size=2, **OPTIONS)


def ppo(key, beta):
    world, log_prob, params = make_start(key)
    learner = rlhf.ppo(
        ask=toy.ask_uniformly(world, num=4),
        respond=toy.respond_fn(POLICY, world.embeddings, group_size=1),
        log_prob=log_prob,
        reward=toy.reward_fn(world.rewards),
        value=toy.value_fn(VALUE, world.embeddings),
        reference_params=params,
        beta=beta,
    )
    start = rlhf.ActorCritic(params, VALUE.init(key, world.embeddings))
    return train.fit_online(key, start, learner, passes_per_round=2, batch_size=2, **OPTIONS)


def prepare(key):
    world_key, train_key = jax.random.split(key)
    world, log_prob, params = make_start(world_key)
    pairs = toy.sample_preferences(world_key, world, num=5)
    return train_key, world, params, train.with_reference(log_prob, params, pairs)


def dpo(start, *, beta):
    key, world, params, pairs = start
    objective = train.preference_objective(toy.log_prob_fn(POLICY, world.embeddings), losses.dpo_loss, beta=beta)
    return train.fit(key, params, pairs, objective=objective, batch_size=2, **OPTIONS)[1]


def check_calls(program):
    assert set(re.findall(r"custom_call @(\w+)", program)) <= CALLS


@pytest.mark.slow
@pytest.mark.parametrize("run", [sft_and_dpo, ppo])
def test_stacked_runs_lower_for_all_platforms(run):
    keys, betas = jax.eval_shape(lambda: (jax.random.split(jax.random.key(0), 3), jnp.ones(3)))
    exported = jax.export.export(jax.jit(jax.vmap(run)), platforms=PLATFORMS)(keys, betas)
    assert exported.platforms == PLATFORMS
    check_calls(exported.mlir_module())


def test_a_block_of_a_sweep_lowers_for_all_platforms(key):
    prepared = trace_prepare(prepare, key)
    run = trace_run(dpo, prepared.start, Struct.of({"beta": jax.ShapeDtypeStruct((), jnp.float32)}), {})
    for program in (prepared, run):
        check_calls(program.lower(BlockShape(seeds=3, points=2), jax.devices()[:1], PLATFORMS).as_text())
