"""Tuning: many runs of one program with different hyperparameters, in chunks, and the choice of the best of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.stats import qmc

from experiments import harness

RUNS_PER_CHUNK = 64
NUM_FINALISTS = 4

Hyperparameters = dict[str, np.float32]


class Range(NamedTuple):
    """Where to look for a hyperparameter: from `low` to `high`, evenly in its logarithm unless `linear`."""

    low: float
    high: float
    linear: bool = False

    def at(self, share: float) -> float:
        """The number a given share of the way from the low to the high end."""
        if self.linear:
            return self.low + share * (self.high - self.low)
        return self.low * (self.high / self.low) ** share


def candidates(ranges: Mapping[str, Range], num: int) -> list[Hyperparameters]:
    """Sets of hyperparameters that fill their ranges evenly: points of a Halton sequence.

    Those that come first in the mapping have the same values whatever follows.
    """
    points = qmc.Halton(len(ranges), scramble=False).random(num + 1)[1:]  # the first is a corner
    return [
        {name: np.float32(limits.at(share)) for (name, limits), share in zip(ranges.items(), point, strict=True)}
        for point in points
    ]


def at_edge(ranges: Mapping[str, Range], chosen: Hyperparameters) -> list[str]:
    """The hyperparameters for which the outermost tenth of the range was chosen: a wider range might do better."""
    return [name for name, limits in ranges.items() if not limits.at(0.05) <= float(chosen[name]) <= limits.at(0.95)]


class Task(NamedTuple):
    """Runs of one program: from which starts, and with which hyperparameters.

    Attributes:
      where: the name of the starts.
      rows: which of them, one for each run.
      hyperparameters: one set for each run.
    """

    where: str
    rows: np.ndarray
    hyperparameters: list[Hyperparameters]


class Runner:
    """Runs programs chunk by chunk from starts that were prepared once.

    Attributes:
      starts: by name, pytrees of arrays with a leading axis of seeds.
      watch: compiles, and counts the seconds.
      report: called with the number of runs after each chunk.
    """

    def __init__(self, starts: Mapping[str, Any], watch: harness.Stopwatch, report: Callable[[int], None]):
        self.starts, self.watch, self.report = starts, watch, report

    def compiled(self, run: Callable[[Any, Any], Any], example: Hyperparameters) -> harness.Program:
        """The program for `RUNS_PER_CHUNK` runs of `run(start, hyperparameters)`."""
        chunk = self.arguments(Task(next(iter(self.starts)), np.zeros(1, int), [example]), 0)
        return self.watch.compiled(jax.vmap(run), *chunk)

    def __call__(self, program: harness.Program, task: Task) -> dict[str, np.ndarray]:
        """What was measured, one number for each run of a task."""
        results = []
        for first in range(0, len(task.rows), RUNS_PER_CHUNK):
            results.append(program(*self.arguments(task, first)))
            self.report(min(RUNS_PER_CHUNK, len(task.rows) - first))
        return {name: np.concatenate([part[name] for part in results])[: len(task.rows)] for name in results[0]}

    def arguments(self, task: Task, first: int) -> tuple[Any, dict[str, np.ndarray]]:
        """The arguments of a chunk; the last run fills up a chunk that is short."""
        runs = np.minimum(np.arange(first, first + RUNS_PER_CHUNK), len(task.rows) - 1)
        start = jax.tree.map(lambda leaf: leaf[task.rows[runs]], self.starts[task.where])
        tried = [task.hyperparameters[i] for i in runs]
        return start, {name: np.array([h[name] for h in tried]) for name in tried[0]}


class Plan(NamedTuple):
    """In which worlds to run, and how many sets of hyperparameters to try.

    Attributes:
      reported: rows of the worlds to report.
      tuning: rows of the worlds to choose hyperparameters in.
      num_candidates: how many sets of hyperparameters to try.
    """

    reported: np.ndarray
    tuning: np.ndarray
    num_candidates: int

    @property
    def first_round(self) -> np.ndarray:
        """The tuning worlds that all candidates see."""
        return self.tuning[: -(-len(self.tuning) // 4)]

    @property
    def num_tuning_runs(self) -> int:
        """Runs of one program until the choice is made."""
        finalists = min(NUM_FINALISTS, self.num_candidates)
        return self.num_candidates * len(self.first_round) + finalists * len(self.tuning)


def tune(
    runner: Runner, program: harness.Program, where: str, tried: list[Hyperparameters], plan: Plan, *, score: str
) -> Hyperparameters:
    """The set of hyperparameters with the best mean score: all are tried in a quarter of the worlds, four in all."""
    finalists = ranked(runner, program, where, tried, plan.first_round, score=score)[:NUM_FINALISTS]
    return ranked(runner, program, where, finalists, plan.tuning, score=score)[0]


def ranked(
    runner: Runner, program: harness.Program, where: str, tried: list[Hyperparameters], rows: np.ndarray, *, score: str
) -> list[Hyperparameters]:
    """Sets of hyperparameters by their mean score in some worlds, the best first; those that diverge come last."""
    trials = Task(where, np.tile(rows, len(tried)), [h for h in tried for _ in rows])
    means = runner(program, trials)[score].reshape(len(tried), -1).mean(axis=1)
    return [tried[i] for i in np.argsort(-np.nan_to_num(means, nan=-np.inf), kind="stable")]


class Counter:
    """Adds up what several threads have done, and shows it."""

    def __init__(self, show: Callable[[int], None]):
        self.total, self.show = 0, show

    def __call__(self, num: int) -> None:
        self.total += num
        self.show(self.total)
