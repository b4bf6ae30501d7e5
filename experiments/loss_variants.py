"""Every preference loss in the same worlds, each tuned over its own hyperparameters, on feedback of four kinds.

Each method trains from the same SFT policies for equally many optimizer steps: on 1,800 comparisons, the same read as
3,600 labels, as many fresh labels, or 600 rankings of four. Hyperparameters, the learning rate among them, are chosen
in other worlds by the exact expected reward (not by the regret, which is reported beside it): the best of equally many
candidates, whatever the number of hyperparameters. All methods try the same learning rates and betas.

The SFT policy imitates demonstrators who show good responses more often, so it knows something of the reward, and a
loss can gain by sharpening it without looking at a label. Two controls show how much: the same runs with random labels,
and the SFT policy sharpened by hand.
"""

import time
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
from dpo_jax.types import Metrics
from experiments.lab import commands, console, devices, files, page, tuning
from experiments.lab.feedback import SETTINGS, Setting, coin_tosses
from experiments.lab.methods import METHODS, Method
from experiments.lab.pipeline import BETA, TUTORIAL, Pipeline, Start
from experiments.lab.runs import feedback_of, measured, standard_run
from experiments.lab.statistics import Seconds, by_name, mean_and_stderr, over_seeds
from experiments.lab.tuning import Range, Seeds, Trials

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
class Options:
    """Every preference loss, tuned, in the same worlds: exact reward, KL and regret with confidence intervals."""

    seed: int = 0
    """Decides everything random."""
    num_seeds: int = 64
    """How many worlds to report, each with its own data, network and training."""
    num_tuning_seeds: int = 64
    """How many other worlds to choose hyperparameters in: all candidates in a quarter of them, the best four in all."""
    num_candidates: int = 32
    """How many sets of hyperparameters to try for each loss."""
    losses: tuple[str, ...] = ()
    """Names of the methods to compare (see `experiments/lab/methods.py`); all if none are given."""
    out: Path = Path("results/loss_variants")
    """Folder for summary.json and the figures."""


def ranges_of(method: Method) -> tuning.Ranges:
    """What to tune: the learning rate first and beta second, so that all methods try the same of these."""
    return {"learning_rate": LEARNING_RATE, **method.ranges}


def runner(pipeline: Pipeline, methods: Sequence[Method]) -> Any:
    """`run(start, method=..., trial=...)`: the standard run of a method with a candidate, in a setting."""
    known = {method.name: method for method in methods}

    def run(start: Start, *, method: str, trial: Trials) -> Metrics:
        chosen = tuning.hyperparameters(ranges_of(known[method]), trial.candidate)
        return standard_run(pipeline, known[method], start, trial.setting, chosen)

    return run


def compare(
    methods: Sequence[Method],
    starts: sweep.Starts,
    seeds: Seeds,
    num_candidates: int,
    pipeline: Pipeline,
    seconds: Seconds,
) -> dict[str, list[dict[str, Any]]]:
    """Tunes and runs all methods in all settings.

    Returns:
      For each setting and method its `hyperparameters`, those `at_edge`, and its results, arrays `[num_seeds]`;
      `reward_of_random_labels` is the expected reward of the same run with random labels.
    """
    names, settings = [method.name for method in methods], list(SETTINGS.values())
    num_dimensions = max(len(ranges_of(method)) for method in methods)
    with console.progress("Runs") as report:
        sweep_of = tuning.sweep_of(runner(pipeline, methods), starts, seconds=seconds, report=report)
        points = tuning.candidates(num_candidates, num_dimensions)
        chosen = tuning.tune(sweep_of, names, settings, seeds, points=points)
        found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
        for method, candidate in zip(methods, chosen, strict=True):
            everywhere = tuning.trials(
                [*settings, *map(coin_tosses, settings)], np.concatenate([candidate, candidate])[:, None]
            )
            results = sweep_of([method.name], everywhere, seeds.reported).isel(method=0)
            for i, setting in enumerate(SETTINGS):
                tossed = results.expected_reward.isel(trial=len(settings) + i)
                found[setting].append(
                    {
                        "hyperparameters": tuning.hyperparameters(ranges_of(method), candidate[i]),
                        "at_edge": tuning.at_edge(ranges_of(method), candidate[i]),
                        **by_name(results.isel(trial=i)),
                        "reward_of_random_labels": tossed.values,
                    }
                )
    return found


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
    for setting, results in found.items():
        dpo = next((r for r, m in zip(results, methods, strict=True) if m.name == "dpo"), None)
        for method, result in zip(methods, results, strict=True):
            tuned = {name: result[name] for name in ("hyperparameters", "at_edge")}
            numbers = {name: values for name, values in result.items() if name not in (*tuned, "sft_reward")}
            reward = numbers["expected_reward"]
            numbers["gain"] = reward - result["sft_reward"]
            numbers["gain_from_labels"] = reward - numbers.pop("reward_of_random_labels")
            if dpo is not None:
                numbers["gain_over_dpo"] = reward - dpo["expected_reward"]
            entries.append(
                {
                    "name": method.name,
                    "family": method.family,
                    "setting": setting,
                    **tuned,
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
        return page.interval(entries[name, setting][gain], summary["num_seeds"], sign=True)

    settings = list(summary["settings"])
    rows = [
        [name, *(cell(name, setting, "gain") for setting in settings), cell(name, "clean", "gain_from_labels")]
        for name in ON_PAGE
        if (name, "clean") in entries
    ]
    return page.table(["loss", *settings, "clean, over random labels"], rows)


def chosen_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, or all of them."""
    known = {method.name: method for method in METHODS}
    commands.check_names("--losses", names, known)
    return [known[name] for name in names] if names else list(METHODS)


def main(options: Options, pipeline: Pipeline = TUTORIAL) -> None:
    """Compares the losses and writes the results."""
    commands.check_seed(options.seed)
    sizes = {name: getattr(options, name) for name in ("num_seeds", "num_tuning_seeds", "num_candidates")}
    commands.check_sizes(**sizes)
    methods = chosen_methods(options.losses)
    out, clock = files.output_folder(options.out), time.perf_counter()
    devices.use_all_cores()
    devices.enable_compilation_cache()
    seeds = Seeds.of(options.num_seeds, options.num_tuning_seeds)
    num_runs = tuning.num_runs(seeds, len(methods), len(SETTINGS), options.num_candidates, reports=2)
    console.say(
        f"{len(methods)} losses on feedback of {len(SETTINGS)} kinds: {num_runs:,} runs in {options.num_seeds:,} "
        f"worlds, and {options.num_tuning_seeds:,} more for tuning. The first start also compiles, for some minutes."
    )
    with console.waiting("Preparing worlds and SFT policies"):
        starts = sweep.prepare(pipeline.start, jax.random.key(options.seed), seeds=seeds.all)
    seconds = Seconds()
    found = compare(methods, starts, seeds, options.num_candidates, pipeline, seconds)
    summary = summarise(found, baselines(pipeline, starts.sel(seeds.reported)), methods)
    took = {"total": time.perf_counter() - clock, **vars(seconds)}
    save_figures(summary, out)
    settings = {name: setting._asdict() for name, setting in SETTINGS.items()}
    options_used = {"seed": options.seed, **sizes, "settings": settings}
    files.save_summary({**options_used, **summary, **files.provenance(**took)}, out)
    page.update({"loss_variants": page_table({**options_used, **summary})}, out)
    print_results(summary)
    console.say(
        f"{took['total']:.0f} s in all: {took['compile']:.0f} s compiling and {took['run']:.0f} s running. Figures and "
        f"summary.json are in {out}."
    )


if __name__ == "__main__":
    main(commands.parse(Options))
