"""A study: one question asked in many worlds. What all such commands share: how they begin, and how they end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from dpo_jax import checks, sweep
from experiments.lab import commands, console, devices, files
from experiments.lab.statistics import Seconds, by_name
from experiments.lab.tuning import Seeds


@dataclass(frozen=True)
class Options:
    """Options of every study; a command adds its own, and defaults of its own."""

    seed: int = 0
    """Decides everything random."""
    num_seeds: int = 64
    """How many worlds to report, each with its own data, network and training."""
    num_tuning_seeds: int = 32
    """How many other worlds to choose hyperparameters in."""


@dataclass
class Study:
    """A study that is under way.

    Attributes:
      options: of the command.
      out: the folder of results.
      began: when it began, by `time.perf_counter`.
      seconds: what its sweeps took.
    """

    options: Options
    out: Path
    began: float
    seconds: Seconds = field(default_factory=Seconds)

    @cached_property
    def seeds(self) -> Seeds:
        """Which worlds to report, and which to tune in."""
        return Seeds.of(self.options.num_seeds, self.options.num_tuning_seeds)

    def announce(self, what: str) -> None:
        """Says what will be done, and in how many worlds."""
        console.say(
            f"{what} in {self.options.num_seeds:,} worlds, and {self.options.num_tuning_seeds:,} more for tuning. The "
            "first start also compiles, for some minutes."
        )

    @property
    def key(self) -> Key[Array, ""]:
        """The key of all worlds; the same key makes the same worlds."""
        return jax.random.key(self.options.seed)

    def prepare(
        self, make: Callable[[Key[Array, ""]], Any], what: str, seeds: Sequence[int] | None = None
    ) -> sweep.Starts:
        """Makes what all runs of a seed share, by default in all worlds."""
        with console.waiting(f"Preparing {what}"):
            return sweep.prepare(make, self.key, seeds=self.seeds.all if seeds is None else seeds)

    def grid(self, run: Callable[..., Any], starts: sweep.Starts, report: Any, **axes: Any) -> dict[str, np.ndarray]:
        """A sweep, whose seconds count: arrays with the seed last, by name."""
        return by_name(self.seconds.count(sweep.grid(run, starts, report=report, **axes)))

    def split(self, found: Any) -> dict[str, Any]:
        """Splits arrays whose last axis is the seed: the `reported` worlds, and those for `tuning`."""
        num = len(self.seeds.reported)
        parts = {"reported": slice(num), "tuning": slice(num, None)}
        return {name: jax.tree.map(lambda values, part=part: values[..., part], found) for name, part in parts.items()}

    def save(self, results: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json`: sizes, results, and their provenance; returns it."""
        took = {"total": time.perf_counter() - self.began, **vars(self.seconds)}
        summary = {**numbers_of(self.options), **results, **files.provenance(**took)}
        files.save_summary(summary, self.out)
        return summary

    def end(self) -> None:
        """Says how long it took, and where the results are."""
        console.say(
            f"{time.perf_counter() - self.began:.0f} s in all; sweeps took {self.seconds.compile:.0f} s to compile and "
            f"{self.seconds.run:.0f} s to run. Results are in {self.out}."
        )


def begin(options: Options, out: Path, *, at_least: int = 1) -> Study:
    """Checks the options, makes the folder, and makes devices ready; ends the command if something is wrong.

    Args:
      options: of the command; numbers beside the seed must be 1 or more.
      out: the folder of results.
      at_least: how many worlds it needs.
    """
    sizes = numbers_of(options)
    commands.check_seed(sizes.pop("seed"))
    with commands.clear_errors():
        checks.size("--num-seeds", sizes.pop("num_seeds"), at_least=at_least)
    commands.check_sizes(**sizes)
    study = Study(options, files.output_folder(out), time.perf_counter())
    devices.use_all_cores()
    devices.enable_compilation_cache()
    return study


def numbers_of(options: Options) -> dict[str, int]:
    """The seed and the sizes: options that are whole numbers, by name."""
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    return {name: value for name, value in values.items() if type(value) is int}
