"""A comparison of methods on feedback of several kinds: each is tuned in other worlds, then reported."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax import sweep
from dpo_jax.types import Metrics, Numeric
from experiments.lab import commands, console, tuning
from experiments.lab.methods import Method
from experiments.lab.pipeline import Start
from experiments.lab.statistics import Seconds, by_name
from experiments.lab.tuning import Range, Seeds, Trials

Run = Callable[[Method, Start, Any, Mapping[str, Numeric]], Metrics]
"""Trains `(method, start, setting, hyperparameters)`, where a setting says how feedback arises; measures the policy."""


def chosen_methods(names: tuple[str, ...], methods: Sequence[Method]) -> list[Method]:
    """The methods of these names, or all of them; ends the command if there is no such method, or it is named twice."""
    known = {method.name: method for method in methods}
    commands.check_names("--losses", names, known)
    with commands.clear_errors():
        if twice := [name for name in known if names.count(name) > 1]:
            raise ValueError(f"--losses names {twice[0]!r} twice")
    return [known[name] for name in names] if names else list(methods)


def ranges_of(method: Method, learning_rate: Range) -> tuning.Ranges:
    """What to tune: the learning rate first and beta second, so that all methods try the same of these."""
    return {"learning_rate": learning_rate, **method.ranges}


def compare(
    run: Run,
    methods: Sequence[Method],
    settings: Mapping[str, Any],
    starts: sweep.Starts,
    seeds: Seeds,
    *,
    learning_rate: Range,
    num_candidates: int,
    seconds: Seconds,
    score: str = "expected_reward",
    control: Callable[[Any], Any] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Tunes and reports all methods in all settings.

    Args:
      run: makes one run.
      methods: what to compare.
      settings: how feedback arises, by name.
      starts: of all worlds.
      seeds: which of them to report, and which to tune in.
      learning_rate: where to look for it.
      num_candidates: how many sets of hyperparameters to try for each method and setting.
      seconds: adds up what it takes.
      score: the result to maximise by tuning.
      control: from a setting to another one, which is run with the same hyperparameters.

    Returns:
      For each setting and method its `hyperparameters`, those `at_edge`, its `results`, arrays `[num_seeds]` by name,
      and those of its `control`.
    """
    known = {method.name: method for method in methods}
    ranges = {name: ranges_of(method, learning_rate) for name, method in known.items()}
    measured_in = [*settings.values(), *(map(control, settings.values()) if control else [])]

    def run_trial(start: Start, *, method: str, trial: Trials) -> Metrics:
        return run(known[method], start, trial.setting, tuning.hyperparameters(ranges[method], trial.candidate))

    with console.progress("Runs") as report:
        sweep_of = tuning.sweep_of(run_trial, starts, seconds=seconds, report=report)
        points = tuning.candidates(num_candidates, max(map(len, ranges.values())))
        chosen = tuning.tune(sweep_of, list(known), list(settings.values()), seeds, points=points, score=score)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
        for name, candidates in zip(known, chosen, strict=True):
            repeated = np.tile(candidates, (len(measured_in) // len(settings), 1))[:, None]
            results = sweep_of([name], tuning.trials(measured_in, repeated), seeds.reported).isel(method=0)
            for i, setting in enumerate(settings):
                found[setting].append(
                    {
                        "hyperparameters": tuning.hyperparameters(ranges[name], candidates[i]),
                        "at_edge": tuning.at_edge(ranges[name], candidates[i]),
                        "results": by_name(results.isel(trial=i)),
                        "control": by_name(results.isel(trial=len(settings) + i)) if control else None,
                    }
                )
    return found
