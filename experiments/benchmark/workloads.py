"""The workloads: whole experiments and DPO runs, as sweeps, and their least work.

An experiment is everything in the tutorial: a world, supervised fine-tuning, comparisons, DPO, DPO for four values of
beta, and exact evaluation: 8,850 optimizer steps.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, UInt32

from dpo_jax import losses, sweep, toy, train
from dpo_jax.sweep.planning import fitted
from dpo_jax.types import Metrics, Numeric, Params, Preferences
from experiments.benchmark import measuring
from experiments.benchmark.least_work import DEMONSTRATION, DPO_PAIR, Training, Work
from experiments.benchmark.measuring import Clock
from experiments.lab.pipeline import BETA, BETAS, TUTORIAL, Start

SFT = Training(TUTORIAL.sft_epochs, TUTORIAL.num_demonstrations, TUTORIAL.sft_batch_size, row=DEMONSTRATION)
DPO = Training(TUTORIAL.num_epochs, TUTORIAL.num_preferences, TUTORIAL.batch_size, row=DPO_PAIR)
NUM_STAGES = 1 + len(BETAS)
EXPERIMENT_STEPS = SFT.steps + NUM_STAGES * DPO.steps
EXPERIMENT_WORK = SFT.work + DPO.work * NUM_STAGES
LONG = 10.0
"""Seconds after which something is measured once, without a run to warm up: its many blocks warm up."""


class Stage(NamedTuple):
    """An axis of a sweep: the DPO runs of an experiment.

    Attributes:
      ablation: 0 for the first run, 1 for those that vary beta.
      beta: of the loss.
    """

    ablation: Any
    beta: Any


STAGES = Stage(np.array([0] + [1] * len(BETAS)), np.array([BETA, *BETAS], np.float32))


class Experiment(NamedTuple):
    """What the DPO runs of an experiment share: a start, comparisons, and a key to train by."""

    start: Start
    preferences: Preferences
    key: Key[Array, ""]


def prepare(key: Key[Array, ""]) -> Experiment:
    """A world, its SFT policy, and comparisons."""
    start = TUTORIAL.start(key)
    pairs_key, train_key = jax.random.split(start.key)
    return Experiment(start, TUTORIAL.comparisons(pairs_key, start), train_key)


def run_stage(experiment: Experiment, *, stage: Stage) -> Metrics:
    """One DPO run of an experiment, evaluated after each epoch: its last metrics."""
    key = jax.random.fold_in(experiment.key, stage.ablation)
    _, history = TUTORIAL.dpo(key, experiment.start, experiment.preferences, stage.beta)
    return {name: metric[-1] for name, metric in history.items()}


def run_experiment(seed: UInt32[Array, ""]) -> Metrics:
    """A whole experiment as one function."""
    experiment = prepare(jax.random.key(seed))
    stages = jax.tree.map(jnp.asarray, STAGES)
    return jax.vmap(lambda stage: run_stage(experiment, stage=stage))(stages)


def run_dpo(experiment: Experiment, *, again: Numeric) -> Metrics:
    """One DPO run, without the tutorial's evaluations on the way; with another `again` in other orders."""
    start = experiment.start
    key = jax.random.fold_in(experiment.key, 2 + jnp.asarray(again))
    params, history = TUTORIAL.fit(
        key, start.params, experiment.preferences, objective=dpo_objective(start.world.embeddings)
    )
    reward = toy.expected_reward(TUTORIAL.table(start.world)(params), start.world.rewards)
    return {name: metric[-1] for name, metric in history.items()} | {"expected_reward": jnp.mean(reward)}


def dpo_objective(embeddings: Array) -> Any:
    """The tutorial's DPO."""
    return train.preference_objective(toy.log_prob_fn(TUTORIAL.policy, embeddings), losses.dpo_loss, beta=BETA)


def dpo_step(params: Params, experiment: Experiment) -> Metrics:
    """One optimizer step of DPO from a fresh state."""
    objective, adam = dpo_objective(experiment.start.world.embeddings), optax.adam(TUTORIAL.learning_rate)
    state = train.init_state(params, objective=objective, optimizer=adam)
    batch = jax.tree.map(lambda leaf: leaf[: DPO.batch_size], experiment.preferences)
    state, metrics = train.update(state, batch, objective=objective, optimizer=adam)
    return {**metrics, "state": state}


Job = Callable[[], Any]
"""Runs a sweep to its end and returns its results."""


@dataclass(frozen=True)
class Workload:
    """A sweep of any number of runs.

    Attributes:
      arguments: from a number of runs to the arguments of `sweep.grid`.
      steps: optimizer steps of a run.
      work: the least work of a run.
      runs_at_once: how many runs a device trains at once; `None` leaves it to the sweep.
    """

    arguments: Callable[[int], dict[str, Any]]
    steps: int
    work: Work
    runs_at_once: int | None

    def plan(self, num: int, **options: Any) -> sweep.Plan:
        """What there is to do, compiled."""
        return fitted(sweep.plan(**self._all(num, options)))

    def run(self, num: int, **options: Any) -> Any:
        """Makes so many runs."""
        return sweep.grid(**self._all(num, options), report=lambda _: None)

    def _all(self, num: int, options: dict[str, Any]) -> dict[str, Any]:
        return {"runs_at_once": self.runs_at_once, **self.arguments(num), **options}


def experiments(seed: int, runs_at_once: int | None) -> Workload:
    """Whole experiments."""

    def arguments(num: int) -> dict[str, Any]:
        return {"run": run_stage, "key": jax.random.key(seed), "num_seeds": num, "prepare": prepare, "stage": STAGES}

    return Workload(arguments, EXPERIMENT_STEPS, EXPERIMENT_WORK, runs_at_once)


def dpo_runs(starts: sweep.Starts, runs_at_once: int | None) -> Workload:
    """DPO runs."""
    return runs_from(starts, run_dpo, DPO, runs_at_once)


def runs_from(
    starts: sweep.Starts, run: Callable[..., Metrics], training: Training, runs_at_once: int | None
) -> Workload:
    """Training runs; if there are more runs than starts, some start alike and differ in their orders."""

    def arguments(num: int) -> dict[str, Any]:
        num_seeds = min(num, len(starts.seeds))
        again = np.arange(-(-num // num_seeds))
        return {"run": run, "key": starts, "seeds": starts.seeds[:num_seeds], "again": again}

    return Workload(arguments, training.steps, training.work, runs_at_once)


def at_once(workload: Workload, numbers: Iterable[int], clock: Clock, max_seconds: float) -> Iterator[dict[str, Any]]:
    """Entries of the summary, one for each number of runs; they end where one would take longer than `max_seconds`."""
    for i, num in enumerate(numbers):
        first = workload.run(num)
        seconds = first.attrs["run_seconds"]
        if seconds > max_seconds and i > 0:
            return
        again = partial(workload.run, num)
        measure = partial(_median, again, 1 if seconds > LONG else clock.repeats)
        times = clock.timed(measure, workload.work * num, runs=num, steps=num * workload.steps)
        plan = workload.plan(num)
        yield {
            "num": num,
            "num_devices": min(len(plan.devices), num),
            "per_device": plan.shape.seeds * plan.shape.points,
            "blocks": plan.num_blocks,
            "compile_seconds": first.attrs["compile_seconds"],
            "microseconds_per_step_and_run": 1e6 * times["seconds"] / (num * workload.steps),
            **times,
            "memory": plan.programs.memory,
        }


def scaling(workload: Workload, num_each: int, clock: Clock) -> list[dict[str, Any]]:
    """So many runs for each of 1, 2, 4, ... devices, and of all."""
    num_all = jax.local_device_count()
    entries: list[dict[str, Any]] = []
    for num_devices in sorted({num_all, *(2**i for i in range(num_all.bit_length()) if 2**i <= num_all)}):
        num = num_devices * num_each
        job = partial(workload.run, num, devices=jax.local_devices()[:num_devices])
        job()  # compiles
        seconds = _median(job, clock.repeats)
        rates = {
            "seconds": seconds,
            "runs_per_second": num / seconds,
            "steps_per_second": num * workload.steps / seconds,
        }
        alone = entries[0]["runs_per_second"] if entries else num / seconds
        entries.append(
            {"num_devices": num_devices, "num": num, **rates, "efficiency": num / seconds / (num_devices * alone)}
        )
    return entries


def step_counts(step: Callable[..., Any], params: Params, starts: Any, training: Training) -> dict[str, Any]:
    """One optimizer step of a run: the least work, and what XLA says the compiled step does when 64 are stacked.

    Args:
      step: `(params, start)`.
      params: of all starts, stacked.
      starts: from which runs start.
      training: which consists of such steps.
    """
    num, work = 64, training.work * (1 / training.steps)
    rows = np.arange(num) % len(jax.tree.leaves(starts)[0])
    stacked = jax.tree.map(lambda leaf: leaf[rows], (params, starts))
    program = measuring.compile_on(1, jax.vmap(step), *stacked)
    xla = {name: count / num for name, count in program.xla_counts.items()}
    return {"least_flops": work.flops, "least_bytes": work.bytes, "xla": xla}


def _median(job: Job, repeats: int) -> float:
    return statistics.median(job().attrs["run_seconds"] for _ in range(repeats))
