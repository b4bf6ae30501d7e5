"""`fit_online`: one scan over rounds of collecting data with the current policy and training on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.fast.shuffle import permutation
from dpo_jax.train.fit import (
    NonFiniteError,
    TrainState,
    check_optimizer,
    init_state,
    memory_like,
    pass_over,
    pooled,
    run_epochs,
)
from dpo_jax.types import Learner, Metrics, Params


def fit_online(
    key: Key[Array, ""],
    params: Params,
    learner: Learner,
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int,
    rounds_per_epoch: int = 1,
    passes_per_round: int = 1,
    batch_size: int | None = None,
    evaluate: Callable[[Params], Metrics] | None = None,
    report: Callable[[int, Metrics], None] | None = None,
    epochs_per_report: int = 10,
) -> tuple[Params, Metrics]:
    """Trains a policy on-policy, in rounds: collect data, then pass over them, in one compiled scan.

    A pure function, like `fit`: use it inside `jit` and `vmap`, or on its own. Whatever learner and optimizer close
    over may be traced (beta, clip, the world, a reward model, the learning rate).

    Args:
      key: typed PRNG key; each round has its own part of it.
      params: initial parameters.
      learner: how to collect data, and what to minimise, for instance `rlhf.ppo(...)`.
      num_epochs: number of entries of the history; static.
      rounds_per_epoch: rounds of collecting and training for each entry; static.
      passes_per_round: number of passes over the data of a round, shuffled each time; static. PPO takes several.
      batch_size: rows per optimizer step; static. `None` means all data of a round.
      optimizer, evaluate, report, epochs_per_report: see `fit`.

    Returns:
      The trained parameters, and the history: for each metric an array `[num_epochs]`, see `fit`; an epoch is all of
      its rounds and passes.

    Raises:
      TypeError, ValueError: an argument is not as described, or a function returned invalid values.
      NonFiniteError: as for `fit`; also if a reward is NaN or a weight is negative.
    """
    checks.key(key)
    for name, size in {
        "num_epochs": num_epochs,
        "rounds_per_epoch": rounds_per_epoch,
        "passes_per_round": passes_per_round,
    }.items():
        checks.size(name, size)
    check_optimizer(optimizer)
    memory = jax.tree.map(jnp.asarray, learner.memory)
    collected = jax.eval_shape(learner.collect, key, params, memory)
    if not isinstance(collected, tuple) or len(collected) != 2:
        raise TypeError(f"learner.collect must return (data, memory), got {type(collected).__name__}")
    num_rows = checks.rows("collected data", collected[0])
    size = num_rows if batch_size is None else min(batch_size, num_rows)
    checks.size("batch_size", size)

    def one_pass(state: TrainState, pass_key: Key[Array, ""], data: Any) -> tuple[TrainState, Metrics]:
        order = jnp.arange(num_rows) if size == num_rows else permutation(pass_key, num_rows)
        return pass_over(state, data, order, objective=learner.objective, optimizer=optimizer, batch_size=size)

    def one_round(state: TrainState, round_key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        collect_key, train_key = jax.random.split(round_key)
        objective_memory, memory = state.memory
        data, new_memory = learner.collect(collect_key, state.params, memory)
        state, metrics = jax.lax.scan(
            lambda state, pass_key: one_pass(state, pass_key, data),
            state._replace(memory=objective_memory),
            jax.random.split(train_key, passes_per_round),
        )
        memory = memory_like(memory, new_memory, "learner.collect")
        return state._replace(memory=(state.memory, memory)), pooled(metrics)

    def epoch(state: TrainState, epoch_key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        state, metrics = jax.lax.scan(one_round, state, jax.random.split(epoch_key, rounds_per_epoch))
        return state, pooled(metrics)

    state = init_state(params, objective=learner.objective, optimizer=optimizer)
    state, history = run_epochs(
        key,
        epoch,
        state._replace(memory=(state.memory, memory)),
        num_epochs=num_epochs,
        evaluate=evaluate,
        report=report,
        epochs_per_report=epochs_per_report,
    )
    if not checks.is_traced(state) and not state.finite:
        steps_per_epoch = rounds_per_epoch * passes_per_round * -(-num_rows // size)
        raise NonFiniteError(int(state.step), steps_per_epoch, state.params, history)
    return state.params, history
