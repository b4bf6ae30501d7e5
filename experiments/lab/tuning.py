"""Tuning: a sweep over candidates, the best of them in more worlds, and the best of all in the worlds to report.

All methods get equally many candidates, whatever the number of their hyperparameters. The candidates are points of a
unit cube; each method maps them to its own ranges, so one axis of a sweep serves all methods.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.stats import qmc

from dpo_jax import sweep
from dpo_jax.types import Numeric
from experiments.lab.statistics import Seconds

NUM_FINALISTS = 4
BLOCK = 8, 8
"""Seeds and trials that a device runs at once. One size for all rounds: what is compiled for the first serves all."""


SettingType = TypeVar("SettingType", bound=tuple[Any, ...])
"""How feedback arises: a named tuple of numbers, such as `feedback.Setting`."""


class Range(NamedTuple):
    """Where to look for a hyperparameter: from `low` to `high`, evenly in its logarithm unless `linear`.

    `usual` is its value where nobody chose one.
    """

    low: float
    high: float
    linear: bool = False
    usual: float | None = None

    def at(self, share: Any) -> Any:
        """The number a given share of the way from the low to the high end."""
        if self.linear:
            return self.low + share * (self.high - self.low)
        return self.low * (self.high / self.low) ** share


Ranges = Mapping[str, Range]


class Trials(NamedTuple):
    """An axis of a sweep: in each row a setting and a candidate. `place` distinguishes equal rows."""

    place: Int[np.ndarray, " trials"]
    setting: Any
    candidate: Float[np.ndarray, "trials dimensions"]


class Seeds(NamedTuple):
    """In which worlds to report, and in which to tune."""

    reported: range
    tuning: range

    @classmethod
    def of(cls, num_reported: int, num_tuning: int) -> "Seeds":
        """The tuning worlds follow the reported ones."""
        return cls(range(num_reported), range(num_reported, num_reported + num_tuning))

    @property
    def all(self) -> range:
        """All of them."""
        return range(self.tuning.stop)

    @property
    def first_round(self) -> range:
        """The quarter of the tuning worlds that all candidates see."""
        return self.tuning[: -(-len(self.tuning) // 4)]


def candidates(num: int, num_dimensions: int) -> Float[np.ndarray, "num dimensions"]:
    """Points that fill a unit cube evenly (a Halton sequence); the first dimensions do not depend on their number."""
    return qmc.Halton(num_dimensions, scramble=False).random(num + 1)[1:].astype(np.float32)  # the first is a corner


def hyperparameters(ranges: Ranges, candidate: Any) -> dict[str, Numeric]:
    """The candidate in the ranges of a method."""
    return {name: limits.at(candidate[i]) for i, (name, limits) in enumerate(ranges.items())}


def at_edge(ranges: Ranges, candidate: Float[np.ndarray, " dimensions"]) -> list[str]:
    """The hyperparameters that lie in the outermost tenth of their range: a wider range might do better."""
    return [name for name, share in zip(ranges, candidate, strict=False) if not 0.05 <= float(share) <= 0.95]


def trials(settings: Sequence[SettingType], points: Float[np.ndarray, "settings candidates dimensions"]) -> Trials:
    """A row for each setting and each of its candidates."""
    num = points.shape[1]
    columns = (np.repeat(np.array(column, np.float32), num) for column in zip(*settings, strict=True))
    repeated = type(settings[0])(*columns)
    return Trials(np.arange(len(settings) * num), repeated, points.reshape(-1, points.shape[-1]))


def num_runs(seeds: Seeds, num_methods: int, num_settings: int, num_candidates: int, *, reports: int = 1) -> int:
    """How many runs it takes to tune all methods in all settings, and to report `reports` trials of each."""
    finalists = min(NUM_FINALISTS, num_candidates)
    tuning = num_candidates * len(seeds.first_round) + finalists * len(seeds.tuning)
    return num_methods * num_settings * (tuning + reports * len(seeds.reported))


def tune(
    sweep_of: Callable[[Sequence[str], Trials, range], Any],
    methods: Sequence[str],
    settings: Sequence[SettingType],
    seeds: Seeds,
    *,
    points: Float[np.ndarray, "candidates dimensions"],
    score: str = "expected_reward",
) -> Float[np.ndarray, "methods settings dimensions"]:
    """The candidate with the best mean score, for each method and setting.

    All candidates run in a quarter of the tuning worlds, the best four in all of them. Runs that diverge score worst.

    Args:
      sweep_of: `(methods, trials, seeds) -> results`, with dimensions method, trial and seed.
      methods: their names.
      settings: how feedback arises.
      seeds: the worlds.
      points: the candidates.
      score: the result to maximise.
    """

    def ranked(names: Sequence[str], tried: np.ndarray, where: range) -> np.ndarray:
        """Places of candidates `[methods, settings, candidates]`, the best first."""
        found = sweep_of(names, trials(settings, tried), where)[score].mean("seed", skipna=False)
        means = found.transpose("method", "trial").values.reshape(len(names), len(settings), -1)
        return np.argsort(-np.nan_to_num(means, nan=-np.inf), axis=-1, kind="stable")

    first = ranked(methods, np.broadcast_to(points, (len(settings), *points.shape)), seeds.first_round)
    chosen = []
    for name, places in zip(methods, first, strict=True):
        finalists = points[places[:, :NUM_FINALISTS]]
        (best,) = ranked([name], finalists, seeds.tuning)[..., 0]
        chosen.append(finalists[np.arange(len(settings)), best])
    return np.array(chosen)


def sweep_of(
    run: Callable[..., Any],
    starts: sweep.Starts,
    *,
    seconds: Seconds,
    report: Callable[[Any], None] | None = None,
    block: tuple[int, int] = BLOCK,
) -> Callable[[Sequence[str], Any, range], Any]:
    """The sweep that `tune` asks for: `run(start, method=..., trial=...)` in blocks of one size."""
    shape = min(block[0], max(1, len(starts.seeds) // jax.local_device_count())), block[1]

    def results(methods: Sequence[str], tried: Any, seeds: range) -> Any:
        found = sweep.grid(run, starts, seeds=seeds, runs_at_once=shape, report=report, method=methods, trial=tried)
        return seconds.count(found)

    return results
