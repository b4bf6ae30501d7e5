"""What every loss does to length: in worlds of strings where the best policy, and so the best length, is known.

Each loss trains from the same SFT policies on the same comparisons, by three judges: one who is indifferent to length,
one who is fond of it, and one who dislikes it. The truth says nothing about length. Hyperparameters, the learning rate
among them, are chosen in other worlds by the exact reward less beta times KL, for each judge. The length of a policy's
strings is compared with that of the policy of highest reward that is as far from the SFT policy: what is longer than
that is not worth its KL.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import figures, sweep
from dpo_jax.intervals import half_width
from dpo_jax.types import Metrics
from experiments.lab import commands, console, devices, files, page, tuning
from experiments.lab.methods import Method
from experiments.lab.pipeline import Pipeline, Start
from experiments.lab.runs import trained
from experiments.lab.statistics import Seconds, by_name, mean_and_stderr, over_seeds
from experiments.lab.string_worlds import BETA, JUDGES, PIPELINE, STRING_METHODS, heard, measured
from experiments.lab.tuning import Range, Seeds, Trials

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
class Options:
    """What every loss does to length: exact reward, KL, regret, and letters beyond the best policy at the same KL."""

    seed: int = 0
    """Decides everything random."""
    num_seeds: int = 64
    """How many worlds to report, each with its own data, network and training."""
    num_tuning_seeds: int = 32
    """How many other worlds to choose hyperparameters in: all candidates in a quarter of them, the best four in all."""
    num_candidates: int = 16
    """How many sets of hyperparameters to try for each loss and judge."""
    losses: tuple[str, ...] = ()
    """Names of the losses (see `experiments/lab/string_worlds.py`); all if none are given."""
    out: Path = Path("results/length")
    """Folder for summary.json and the figure."""


def ranges_of(method: Method) -> tuning.Ranges:
    """What to tune: the learning rate first and beta second, so that all methods try the same of these."""
    return {"learning_rate": LEARNING_RATE, **method.ranges}


def runner(pipeline: Pipeline, methods: Sequence[Method]) -> Any:
    """`run(start, method=..., trial=...)`: trains a method with a candidate on what a judge says, and measures it."""
    known = {method.name: method for method in methods}

    def run(start: Start, *, method: str, trial: Trials) -> Metrics:
        chosen = tuning.hyperparameters(ranges_of(known[method]), trial.candidate)
        feedback = heard(pipeline, start, trial.setting)
        return measured(start, trained(pipeline, known[method], start, feedback, chosen))

    return run


def compare(
    methods: Sequence[Method],
    starts: sweep.Starts,
    seeds: Seeds,
    num_candidates: int,
    pipeline: Pipeline,
    seconds: Seconds,
) -> list[dict[str, Any]]:
    """Tunes and runs all methods for all judges: for each its hyperparameters, and results `[num_seeds]`."""
    judges = list(JUDGES.values())
    num_dimensions = max(len(ranges_of(method)) for method in methods)
    with console.progress("Runs") as report:
        sweep_of = tuning.sweep_of(runner(pipeline, methods), starts, seconds=seconds, report=report)
        points = tuning.candidates(num_candidates, num_dimensions)
        chosen = tuning.tune(sweep_of, [m.name for m in methods], judges, seeds, points=points, score="merit")
        entries = []
        for method, candidate in zip(methods, chosen, strict=True):
            results = sweep_of([method.name], tuning.trials(judges, candidate[:, None]), seeds.reported).isel(method=0)
            for i, judge in enumerate(JUDGES):
                entries.append(
                    {
                        "name": method.name,
                        "family": method.family,
                        "judge": judge,
                        "hyperparameters": tuning.hyperparameters(ranges_of(method), candidate[i]),
                        "at_edge": tuning.at_edge(ranges_of(method), candidate[i]),
                        **by_name(results.isel(trial=i)),
                    }
                )
    return entries


def summarise(entries: list[dict[str, Any]], sft: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard error over worlds; the gain in merit over SFT is paired by world."""
    losses = []
    for entry in entries:
        numbers = {name: entry[name] for name in MEASURES}
        numbers["gain"] = entry["merit"] - sft["merit"]
        told = {name: entry[name] for name in ("name", "family", "judge", "hyperparameters", "at_edge")}
        losses.append({**told, **{name: mean_and_stderr(values) for name, values in numbers.items()}})
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
            *(page.interval(entries[name, judge]["longer"], num, sign=True) for judge in JUDGES),
            page.interval(entries[name, "indifferent"]["gain"], num, sign=True),
        ]
        for name in SHOWN
        if (name, "indifferent") in entries
    ]
    return page.table(["loss", *(f"letters, {judge}" for judge in JUDGES), "gain, indifferent"], rows)


def chosen_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, or all of them."""
    known = {method.name: method for method in STRING_METHODS}
    commands.check_names("--losses", names, known)
    return [known[name] for name in names] if names else list(STRING_METHODS)


def main(options: Options, pipeline: Pipeline = PIPELINE) -> None:
    """Compares the losses and writes the results."""
    commands.check_seed(options.seed)
    sizes = {name: getattr(options, name) for name in ("num_seeds", "num_tuning_seeds", "num_candidates")}
    commands.check_sizes(**sizes)
    methods = chosen_methods(options.losses)
    out, clock = files.output_folder(options.out), time.perf_counter()
    devices.use_all_cores()
    devices.enable_compilation_cache()
    seeds = Seeds.of(options.num_seeds, options.num_tuning_seeds)
    num_runs = tuning.num_runs(seeds, len(methods), len(JUDGES), options.num_candidates)
    console.say(
        f"{len(methods)} losses, {len(JUDGES)} judges: {num_runs:,} runs in {options.num_seeds:,} worlds, and "
        f"{options.num_tuning_seeds:,} more for tuning. The first start also compiles, for some minutes."
    )
    with console.waiting("Preparing worlds and SFT policies"):
        starts = sweep.prepare(pipeline.start, jax.random.key(options.seed), seeds=seeds.all)
    seconds = Seconds()
    entries = compare(methods, starts, seeds, options.num_candidates, pipeline, seconds)
    sft = over_seeds(lambda start: measured(start, start.log_probs), starts.sel(seeds.reported))
    summary = {"seed": options.seed, **sizes, "beta": BETA, **summarise(entries, sft)}
    took = {"total": time.perf_counter() - clock, **vars(seconds)}
    save_figure(summary, out)
    judges = {name: judge._asdict() for name, judge in JUDGES.items()}
    files.save_summary({**summary, "judges": judges, **files.provenance(**took)}, out)
    page.update({"length": page_table(summary)}, out)
    print_results(summary)
    console.say(
        f"{took['total']:.0f} s in all: {took['compile']:.0f} s compiling and {took['run']:.0f} s running. The figure "
        f"and summary.json are in {out}."
    )


if __name__ == "__main__":
    main(commands.parse(Options))
