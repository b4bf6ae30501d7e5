"""DPO runs on strings: a step takes 64 pairs of strings of at most five tokens, scored token by token."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from dpo_jax import losses, strings, sweep, toy, train
from dpo_jax.types import Metrics, Numeric, Params, Preferences
from experiments.benchmark.least_work import StringNetwork, Training, string_pair
from experiments.benchmark.workloads import Workload, runs_from
from experiments.lab.pipeline import BETA

STRINGS = strings.Strings(num_letters=4, horizon=5)
HIDDEN_DIM = 32
POLICY = strings.CausalMLP(STRINGS, hidden_dim=HIDDEN_DIM)
NUM_PROMPTS, NUM_PAIRS, BATCH_SIZE, NUM_EPOCHS, LEARNING_RATE = 5, 1024, 64, 4, 1e-3
RUNS_AT_ONCE = 16
"""How many runs a core trains at once: their intermediate results stay in its cache. More are slower."""

TRAINING = Training(
    NUM_EPOCHS,
    NUM_PAIRS,
    BATCH_SIZE,
    row=string_pair(float(np.mean(STRINGS.num_tokens))),
    network=StringNetwork(
        prompts=NUM_PROMPTS,
        hidden=HIDDEN_DIM,
        letters=STRINGS.num_letters,
        horizon=STRINGS.horizon,
        strings=2 * BATCH_SIZE,
    ),
)


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
      embeddings: of the prompts.
      params: of an untrained policy, the reference.
      preferences: comparisons that carry their log-probabilities under it.
      key: to train by.
    """

    embeddings: Float[Array, "prompts features"]
    params: Params
    preferences: Preferences
    key: Key[Array, ""]


def prepare(key: Key[Array, ""]) -> Start:
    """A world, an untrained policy, and comparisons of uniform pairs of strings."""
    world_key, init_key, pairs_key, train_key = jax.random.split(key, 4)
    world = strings.make_world(world_key, STRINGS, num_prompts=NUM_PROMPTS)
    params = POLICY.init(init_key, world.embeddings)
    pairs = toy.sample_preferences(pairs_key, world, num=NUM_PAIRS)
    score = strings.log_prob_fn(POLICY, world.embeddings)
    return Start(world.embeddings, params, train.with_reference(score, params, pairs), train_key)


def objective(start: Start) -> Any:
    """DPO of the policy, by the paths of strings."""
    score = strings.log_prob_fn(POLICY, start.embeddings)
    return train.preference_objective(score, losses.dpo_loss, beta=BETA)


def run(start: Start, *, again: Numeric) -> Metrics:
    """One DPO run: the metrics of its last epoch; with another `again` in other orders."""
    _, history = train.fit(
        jax.random.fold_in(start.key, again),
        start.params,
        start.preferences,
        objective=objective(start),
        optimizer=optax.adam(LEARNING_RATE),
        num_epochs=NUM_EPOCHS,
        batch_size=BATCH_SIZE,
    )
    return {name: metric[-1] for name, metric in history.items()}


def step(params: Params, start: Start) -> Metrics:
    """One optimizer step from a fresh state."""
    adam = optax.adam(LEARNING_RATE)
    state = train.init_state(params, objective=objective(start), optimizer=adam)
    batch = jax.tree.map(lambda leaf: leaf[:BATCH_SIZE], start.preferences)
    state, metrics = train.update(state, batch, objective=objective(start), optimizer=adam)
    return {**metrics, "state": state}


def workload(starts: sweep.Starts, runs_at_once: int | None) -> Workload:
    """Such runs."""
    if runs_at_once is None and jax.default_backend() == "cpu":
        runs_at_once = RUNS_AT_ONCE
    return runs_from(starts, run, TRAINING, runs_at_once)
