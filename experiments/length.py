"""What every loss does to length: in worlds of strings where the best policy, and so the best length, is known.

Each loss trains from the same SFT policies on the same comparisons, by three judges: one who is indifferent to length,
one who is fond of it, and one who dislikes it. The truth says nothing about length. Hyperparameters, the learning rate
among them, are chosen in other worlds by the exact reward less beta times KL, for each judge. The length of a policy's
strings is compared with that of the policy of highest reward that is as far from the SFT policy: what is longer than
that is not worth its KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import figures
from dpo_jax.intervals import half_width
from dpo_jax.types import Metrics, Numeric
from experiments.lab import commands, comparison, console, files, page, studies, tuning
from experiments.lab.methods import Method
from experiments.lab.pipeline import Pipeline, Start
from experiments.lab.runs import trained
from experiments.lab.statistics import mean_and_stderr, over_seeds
from experiments.lab.string_worlds import BETA, JUDGES, PIPELINE, STRING_METHODS, Judge, heard, measured
from experiments.lab.tuning import Range

LEARNING_RATE = Range(1e-4, 3e-2)
SHOWN = (
    "dpo",
    "r-dpo",
    "ld-dpo",
    "sampo",
    "ln-dpo",
    "simpo",
    "ipo",
    "ipo on means",
    "orpo",
    "orpo on sums",
    "cpo",
    "rpo",
    "kto",
    "chi-po",
    "preferred fine-tuning",
)
"""Losses in the figure and in the table on the page of results."""
MEASURES = ("expected_reward", "kl_to_reference", "regret", "merit", "expected_length", "optimal_length", "longer")


@dataclass(frozen=True)
class Options(studies.Options):
    """What every loss does to length: exact reward, KL, regret, and letters beyond the best policy at the same KL."""

    num_tuning_seeds: int = 32
    """How many other worlds to choose hyperparameters in: all candidates in a quarter of them, the best four in all."""
    num_candidates: int = 16
    """How many sets of hyperparameters to try for each loss and judge."""
    losses: tuple[str, ...] = ()
    """Names of the losses (see `experiments/lab/string_worlds.py`); all if none are given."""
    out: Path = Path("results/length")
    """Folder for summary.json and the figure."""


def run(pipeline: Pipeline, method: Method, start: Start, judge: Judge, chosen: Mapping[str, Numeric]) -> Metrics:
    """Trains a method on what a judge says, and measures it."""
    return measured(start, trained(pipeline, method, start, heard(pipeline, start, judge), chosen))


def summarise(found: dict[str, list[dict[str, Any]]], methods: list[Method], sft: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard error over worlds; the gain in merit over SFT is paired by world."""
    losses = []
    for i, method in enumerate(methods):
        for judge in found:
            entry = found[judge][i]
            numbers = {name: entry["results"][name] for name in MEASURES}
            numbers["gain"] = numbers["merit"] - sft["merit"]
            losses.append(
                {
                    "name": method.name,
                    "family": method.family,
                    "judge": judge,
                    **{name: entry[name] for name in ("hyperparameters", "at_edge")},
                    **{name: mean_and_stderr(values) for name, values in numbers.items()},
                }
            )
    return {"losses": losses, "sft": {name: mean_and_stderr(sft[name]) for name in MEASURES}}


def print_results(summary: dict[str, Any]) -> None:
    """Prints a table for each judge, the best loss first, with 95 % confidence intervals."""
    columns = {
        "gain": "reward - βKL, over SFT",
        "expected_reward": "reward",
        "kl_to_reference": "KL",
        "regret": "regret",
        "expected_length": "letters",
        "longer": "more than the best at this KL",
    }
    num = summary["num_seeds"]
    for judge in JUDGES:
        entries = sorted(
            (entry for entry in summary["losses"] if entry["judge"] == judge),
            key=lambda entry: -np.nan_to_num(entry["merit"]["mean"], nan=-np.inf),
        )
        rows = [[entry["name"], *(console.interval(entry[name], num) for name in columns)] for entry in entries]
        console.print_table(f"Judges {judge}, mean and 95% interval", ["loss", *columns.values()], rows)


def save_figure(summary: dict[str, Any], out: Path) -> None:
    """Draws how many letters too long each loss is, and what it gains."""
    num = summary["num_seeds"]
    rows: dict[str, dict[str, Any]] = {name: {} for name in SHOWN}
    for entry in summary["losses"]:
        if entry["name"] in rows:
            rows[entry["name"]][entry["judge"]] = {
                name: (entry[name]["mean"], half_width(entry[name]["stderr"], num)) for name in ("longer", "gain")
            }
    rows = {name: judges for name, judges in rows.items() if judges}
    if rows:
        files.save_figure(figures.lengths(rows), out / "length.png")


def page_table(summary: dict[str, Any]) -> str:
    """The table on the page of results: letters beyond the best policy at equal KL, and the gain in reward less KL."""
    entries = {(entry["name"], entry["judge"]): entry for entry in summary["losses"]}
    num = summary["num_seeds"]
    rows = [
        [
            name,
            *(console.interval(entries[name, judge]["longer"], num, sign=True) for judge in JUDGES),
            console.interval(entries[name, "indifferent"]["gain"], num, sign=True),
        ]
        for name in SHOWN
        if (name, "indifferent") in entries
    ]
    return page.table(["loss", *(f"letters, {judge}" for judge in JUDGES), "gain, indifferent"], rows)


def main(options: Options, pipeline: Pipeline = PIPELINE) -> None:
    """Compares the losses and writes the results."""
    methods = comparison.chosen_methods(options.losses, STRING_METHODS)
    study = studies.begin(options, options.out)
    num_runs = tuning.num_runs(study.seeds, len(methods), len(JUDGES), options.num_candidates)
    study.announce(f"{len(methods)} losses, {len(JUDGES)} judges: {num_runs:,} runs")
    starts = study.prepare(pipeline.start, "worlds and SFT policies")
    found = comparison.compare(
        partial(run, pipeline),
        methods,
        JUDGES,
        starts,
        study.seeds,
        learning_rate=LEARNING_RATE,
        num_candidates=options.num_candidates,
        seconds=study.seconds,
        score="merit",
    )
    sft = over_seeds(lambda start: measured(start, start.log_probs), starts.sel(study.seeds.reported))
    judges = {name: judge._asdict() for name, judge in JUDGES.items()}
    summary = study.save({"beta": BETA, **summarise(found, methods, sft), "judges": judges})
    save_figure(summary, study.out)
    page.update({"length": page_table(summary)}, study.out)
    print_results(summary)
    study.end()


if __name__ == "__main__":
    main(commands.parse(Options))
