"""Every preference loss in the same worlds, each tuned over its own hyperparameters, on feedback of four kinds.

Each method trains from the same SFT policies for equally many optimizer steps: on 1,800 comparisons, the same read as
3,600 labels, as many fresh labels, or 600 rankings of four. Hyperparameters, the learning rate among them, are chosen
in other worlds by the exact expected reward (not by the regret, which is reported beside it): the best of equally many
candidates, whatever the number of hyperparameters. All methods try the same learning rates and betas.

The SFT policy imitates demonstrators who show good responses more often, so it knows something of the reward, and a
loss can gain by sharpening it without looking at a label. Two controls show how much: the same runs with random labels,
and the SFT policy sharpened by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import figures, sweep, toy
from dpo_jax.intervals import half_width
from experiments.lab import commands, comparison, console, files, page, studies, tuning
from experiments.lab.feedback import SETTINGS, Setting, coin_tosses
from experiments.lab.methods import METHODS, Method
from experiments.lab.pipeline import BETA, TUTORIAL, Pipeline, Start
from experiments.lab.runs import feedback_of, measured, standard_run
from experiments.lab.statistics import Seconds, mean_and_stderr, over_seeds
from experiments.lab.tuning import Range, Seeds

LEARNING_RATE = Range(1e-5, 1e-2)
LABELLED = ("dpo", "ipo", "simpo", "kto", "orpo", "cpo", "nca", "apo-down", "preferred fine-tuning")
"""Names to be written into the figure of reward against KL."""
ON_PAGE = (
    "dpo",
    "conservative dpo",
    "robust dpo",
    "ipo",
    "dpo with forward KL",
    "dpo with alpha 0.5",
    "apo-down",
    "nca",
    "kto",
    "plackett-luce of 4",
    "simpo",
    "cpo",
    "orpo",
    "rpo",
)
"""Names of the losses in the table on the page of results."""
GAINS = {"Gain over the SFT policy": "gain", "Gain from labels, over random labels": "gain_from_labels"}
"""What is drawn of each loss."""


@dataclass(frozen=True)
class Options(studies.Options):
    """Every preference loss, tuned, in the same worlds: exact reward, KL and regret with confidence intervals."""

    num_tuning_seeds: int = 64
    """How many other worlds to choose hyperparameters in: all candidates in a quarter of them, the best four in all."""
    num_candidates: int = 32
    """How many sets of hyperparameters to try for each loss."""
    losses: tuple[str, ...] = ()
    """Names of the methods to compare (see `experiments/lab/methods.py`); all if none are given."""
    out: Path = Path("results/loss_variants")
    """Folder for summary.json and the figures."""


def compare(
    methods: Sequence[Method],
    starts: sweep.Starts,
    seeds: Seeds,
    num_candidates: int,
    pipeline: Pipeline,
    seconds: Seconds,
) -> dict[str, list[dict[str, Any]]]:
    """Tunes and runs all methods in all settings, and again with random labels; see `comparison.compare`."""
    return comparison.compare(
        partial(standard_run, pipeline),
        methods,
        SETTINGS,
        starts,
        seeds,
        learning_rate=LEARNING_RATE,
        num_candidates=num_candidates,
        seconds=seconds,
        control=coin_tosses,
    )


def baseline(pipeline: Pipeline, start: Start, *, setting: Setting) -> dict[str, Any]:
    """References to compare with: the SFT policy, the optimum, the exact frontier, and the SFT policy sharpened.

    To sharpen is to raise probabilities to a power, which takes no label.
    """
    rewards, reference = start.world.rewards, start.log_probs
    measure = partial(measured, start, feedback_of(pipeline, start, setting))
    powers = jnp.geomspace(1.0, 30.0, 20)
    return {
        "sft": measure(reference),
        "optimum": measure(toy.optimal_policy(reference, rewards, beta=BETA)),
        "frontier": toy.frontier(reference, rewards, jnp.geomspace(0.01, 20.0, 40)),
        "sharpened": jax.vmap(lambda power: toy.evaluate(jax.nn.log_softmax(power * reference), reference, rewards))(
            powers
        ),
    }


def baselines(pipeline: Pipeline, starts: sweep.Starts) -> dict[str, Any]:
    """For each setting the baseline, arrays with the seed first."""

    def of_all(start: Start) -> dict[str, Any]:
        return {name: baseline(pipeline, start, setting=setting) for name, setting in SETTINGS.items()}

    found: dict[str, Any] = over_seeds(of_all, starts)
    return found


def summarise(found: dict[str, Any], known: dict[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    """Mean and standard error over seeds; gains (over SFT, from labels, over DPO) are paired by seed."""
    entries = []
    for setting, tuned in found.items():
        dpo = next((t["results"] for t, m in zip(tuned, methods, strict=True) if m.name == "dpo"), None)
        for method, entry in zip(methods, tuned, strict=True):
            numbers = dict(entry["results"])
            reward, sft_reward = numbers["expected_reward"], numbers.pop("sft_reward")
            numbers["gain"] = reward - sft_reward
            numbers["gain_from_labels"] = reward - entry["control"]["expected_reward"]
            if dpo is not None:
                numbers["gain_over_dpo"] = reward - dpo["expected_reward"]
            entries.append(
                {
                    "name": method.name,
                    "family": method.family,
                    "setting": setting,
                    **{name: entry[name] for name in ("hyperparameters", "at_edge")},
                    **{name: mean_and_stderr(values) for name, values in numbers.items()},
                    "diverged": float(np.mean(np.isnan(reward))),
                }
            )
    num_seeds = len(next(iter(known.values()))["sft"]["expected_reward"])
    return {"num_seeds": num_seeds, "losses": entries, "baselines": jax.tree.map(mean_and_stderr, known)}


def print_results(summary: dict[str, Any]) -> None:
    """Prints a table for each setting, the best loss first, with 95 % confidence intervals."""
    columns = {
        "expected_reward": "reward",
        "gain": "gain over SFT",
        "gain_from_labels": "gain from labels",
        "gain_over_dpo": "gain over DPO",
        "kl_to_reference": "KL to reference",
        "regret": "regret",
        "accuracy": "accuracy",
        "chosen_logp_change": "log-prob. of chosen",
    }
    num = summary["num_seeds"]
    for setting in SETTINGS:
        entries = [entry for entry in summary["losses"] if entry["setting"] == setting]
        entries.sort(key=lambda entry: -np.nan_to_num(entry["expected_reward"]["mean"], nan=-np.inf))
        shown = [name for name in columns if name in entries[0]]
        console.print_table(
            f"{setting} labels, mean and 95% interval",
            ["loss", *(columns[name] for name in shown)],
            [[entry["name"], *(console.interval(entry[name], num) for name in shown)] for entry in entries],
        )


def save_figures(summary: dict[str, Any], out: Path) -> None:
    """Draws what each loss gains, and where it ends up in reward and KL."""
    families: dict[str, list[str]] = {}
    for entry in summary["losses"]:
        if entry["setting"] == next(iter(SETTINGS)):
            families.setdefault(entry["family"], []).append(entry["name"])
    gains: dict[str, Any] = {name: {setting: {} for setting in SETTINGS} for name in GAINS}
    num = summary["num_seeds"]
    points: dict[str, Any] = {setting: {} for setting in SETTINGS}
    for entry in summary["losses"]:
        for name, label in GAINS.items():
            gains[name][entry["setting"]][entry["name"]] = entry[label]["mean"], half_width(entry[label]["stderr"], num)
        kl, reward = entry["kl_to_reference"], entry["expected_reward"]
        points[entry["setting"]][entry["name"]] = kl["mean"], reward["mean"]
    files.save_figure(figures.loss_gains(families, gains), out / "gains.png")
    panels = {
        setting.capitalize(): {
            **{
                curve: {name: values["mean"] for name, values in known[curve].items()}
                for curve in ("frontier", "sharpened")
            },
            "sft_reward": float(known["sft"]["expected_reward"]["mean"]),
            "points": points[setting],
        }
        for setting, known in summary["baselines"].items()
    }
    files.save_figure(figures.loss_frontiers(panels, families, labelled=LABELLED), out / "frontiers.png")


def page_table(summary: dict[str, Any]) -> str:
    """The table on the page of results: gains of some losses in every setting, and over random labels."""
    entries = {(entry["name"], entry["setting"]): entry for entry in summary["losses"]}

    def cell(name: str, setting: str, gain: str) -> str:
        return console.interval(entries[name, setting][gain], summary["num_seeds"], sign=True)

    settings = list(summary["settings"])
    rows = [
        [name, *(cell(name, setting, "gain") for setting in settings), cell(name, "clean", "gain_from_labels")]
        for name in ON_PAGE
        if (name, "clean") in entries
    ]
    return page.table(["loss", *settings, "clean, over random labels"], rows)


def main(options: Options, pipeline: Pipeline = TUTORIAL) -> None:
    """Compares the losses and writes the results."""
    methods = comparison.chosen_methods(options.losses, METHODS)
    study = studies.begin(options, options.out)
    num_runs = tuning.num_runs(study.seeds, len(methods), len(SETTINGS), options.num_candidates, reports=2)
    study.announce(f"{len(methods)} losses on feedback of {len(SETTINGS)} kinds: {num_runs:,} runs")
    starts = study.prepare(pipeline.start, "worlds and SFT policies")
    found = compare(methods, starts, study.seeds, options.num_candidates, pipeline, study.seconds)
    settings = {name: setting._asdict() for name, setting in SETTINGS.items()}
    results = summarise(found, baselines(pipeline, starts.sel(study.seeds.reported)), methods)
    summary = study.save({"settings": settings, **results})
    save_figures(summary, study.out)
    page.update({"loss_variants": page_table(summary)}, study.out)
    print_results(summary)
    study.end()


if __name__ == "__main__":
    main(commands.parse(Options))
