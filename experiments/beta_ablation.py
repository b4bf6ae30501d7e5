"""The tutorial's beta ablation over many seeds: what beta does, with standard errors.

Each seed makes its own world, data and training. It is a sweep over beta: one compiled program serves all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dpo_jax import checks, figures, losses, sweep, toy, train
from dpo_jax.types import Metrics, Numeric, Params, Preferences
from experiments.lab import commands, console, devices, files, page
from experiments.lab.pipeline import BETA, BETAS, TUTORIAL, Pipeline, Start
from experiments.lab.statistics import mean_and_stderr, over_seeds

CURVE_BETAS = np.geomspace(0.005, 20.0, 60, dtype=np.float32)


@dataclass(frozen=True)
class Options:
    """The beta ablation over many seeds: mean and standard error of everything, beside the exact optimum."""

    seed: int = 0
    """Decides everything random."""
    num_seeds: int = 64
    """How many worlds, each with its own data, network and training."""
    betas: tuple[float, ...] = BETAS
    """Values of beta to try."""
    out: Path = Path("results/beta_ablation")
    """Folder for summary.json and the figures."""


class Experiment(NamedTuple):
    """What the runs of one seed share: a start, comparisons, and keys to train and to sample by."""

    start: Start
    preferences: Preferences
    train_key: Key[Array, ""]
    sample_key: Key[Array, ""]


def prepare(pipeline: Pipeline, key: Key[Array, ""]) -> Experiment:
    """Everything up to the comparisons."""
    start = pipeline.start(key)
    pairs_key, train_key, sample_key = jax.random.split(start.key, 3)
    return Experiment(start, pipeline.comparisons(pairs_key, start), train_key, sample_key)


def run(experiment: Experiment, *, beta: Numeric, pipeline: Pipeline = TUTORIAL) -> Metrics:
    """DPO with one beta, beside the optimum for it."""
    start, preferences, train_key, sample_key = experiment
    world, reference = start.world, start.log_probs
    params, history = pipeline.dpo(train_key, start, preferences, beta)
    optimum = toy.evaluate(toy.optimal_policy(reference, world.rewards, beta=beta), reference, world.rewards)
    population = predict_new_pairs(pipeline, start, params, beta)
    log_probs = pipeline.table(world)(params)
    last = {name: metric[-1] for name, metric in history.items()}
    return {
        **{name: last[name] for name in ("loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward")},
        **{f"{name}_history": history[name] for name in ("loss", "accuracy", "reward_margin")},
        "expected_reward": last["expected_reward"],
        "sampled_reward": jnp.mean(toy.sampled_reward(sample_key, world, log_probs)),
        "gain": last["expected_reward"] - jnp.mean(toy.expected_reward(reference, world.rewards)),
        "kl_to_reference": last["kl_to_reference"],
        "optimal_reward": optimum["expected_reward"],
        "optimal_kl": optimum["kl_to_reference"],
        "population_loss": population["loss"],
        "population_accuracy": population["accuracy"],
        "diverged": jnp.isnan(last["loss"]),
    }


def describe(experiment: Experiment) -> dict[str, Any]:
    """What does not depend on beta: the SFT policy, the best possible predictions, the exact frontier."""
    start, key = experiment.start, experiment.sample_key
    reference, rewards = start.log_probs, start.world.rewards
    sft_reward = jnp.mean(toy.expected_reward(reference, rewards))
    return {
        "sft": {
            "expected_reward": sft_reward,
            "sampled_reward": jnp.mean(toy.sampled_reward(key, start.world, reference)),
            "gain_over_demonstrations": sft_reward - jnp.mean(toy.expected_reward(jnp.log(rewards), rewards)),
            "loss": start.history["loss"][-1],
        },
        "bayes": toy.bayes_prediction(rewards),
        "frontier": toy.frontier(reference, rewards, jnp.asarray(CURVE_BETAS)),
    }


def predict_new_pairs(pipeline: Pipeline, start: Start, params: Params, beta: Numeric) -> Metrics:
    """Exact loss and accuracy on new comparisons from the same world: the average over all of them."""
    log_prob = pipeline.log_prob(start.world)
    everything = train.with_reference(log_prob, start.params, toy.all_preferences(start.world))
    loss, metrics = train.preference_objective(log_prob, losses.dpo_loss, beta=beta)(params, everything)
    return {"loss": loss, **metrics}


def ablate(
    seed: int, num_seeds: int, betas: Sequence[float], pipeline: Pipeline = TUTORIAL
) -> tuple[dict[str, Any], dict[str, float]]:
    """Means and standard errors over seeds, and the seconds spent compiling and running."""

    def with_beta(experiment: Experiment, *, beta: Numeric) -> Metrics:
        return run(experiment, beta=beta, pipeline=pipeline)

    clock = time.perf_counter()
    experiments = sweep.prepare(partial(prepare, pipeline), jax.random.key(seed), num_seeds=num_seeds)
    seconds = {"prepare": time.perf_counter() - clock}
    with console.progress("Runs") as report:
        by_beta = sweep.grid(with_beta, experiments, beta=betas, report=report)
    seconds |= {name: by_beta.attrs[f"{name}_seconds"] for name in ("compile", "run")}
    summary = {
        "num_seeds": num_seeds,
        **jax.tree.map(mean_and_stderr, over_seeds(describe, experiments)),
        "betas": [{"beta": beta, **_statistics(by_beta.isel(beta=i))} for i, beta in enumerate(betas)],
    }
    return summary, seconds


def print_results(summary: dict[str, Any]) -> None:
    """Prints the table of a summary."""
    columns = ("loss", "accuracy", "reward_margin", "kl_to_reference", "expected_reward", "gain", "optimal_reward")
    headings = ("training loss", "training accuracy", "reward margin", "KL to reference", "reward", "gain", "optimum")
    sft = summary["sft"]["expected_reward"]
    console.print_table(
        f"{summary['num_seeds']} seeds, mean ± standard error; expected reward after SFT {_plus_minus(sft)}",
        ["β", *headings],
        [[f"{entry['beta']:g}", *(_plus_minus(entry[name]) for name in columns)] for entry in summary["betas"]],
    )
    for entry in summary["betas"]:
        if entry["diverged"]["mean"]:
            console.say(f"Beware: with β = {entry['beta']:g}, {entry['diverged']['mean']:.1%} of runs diverged.")


def save_figures(summary: dict[str, Any], out: Path) -> None:
    """Draws the training at the notebook's beta, the ablation and the frontier from a summary."""
    entries = summary["betas"]
    betas = [entry["beta"] for entry in entries]

    def column(name: str, statistic: str = "mean") -> np.ndarray:
        return np.array([entry[name][statistic] for entry in entries])

    shown = betas.index(BETA) if BETA in betas else 0
    training = {name: column(f"{name}_history")[shown] for name in ("loss", "accuracy", "reward_margin")}
    bayes = {name: float(values["mean"]) for name, values in summary["bayes"].items()}
    files.save_figure(figures.training(training, bayes=bayes), out / "dpo_training.png")
    figure = figures.beta_ablation(
        betas,
        column("loss_history"),
        column("expected_reward"),
        optimal_rewards=column("optimal_reward"),
        sft_reward=float(summary["sft"]["expected_reward"]["mean"]),
        stderr=column("expected_reward", "stderr"),
    )
    files.save_figure(figure, out / "beta_ablation.png")
    figure = figures.frontier(
        {name: values["mean"] for name, values in summary["frontier"].items()},
        {name: column(name) for name in ("kl_to_reference", "expected_reward")},
        betas,
        {"kl_to_reference": column("optimal_kl"), "expected_reward": column("optimal_reward")},
        sft_reward=float(summary["sft"]["expected_reward"]["mean"]),
    )
    files.save_figure(figure, out / "frontier.png")


def page_table(summary: dict[str, Any]) -> str:
    """The table on the page of results."""
    columns = {"loss": 4, "accuracy": 4, "kl_to_reference": 4, "expected_reward": 3, "gain": 4}
    headings = ["β", "training loss", "training accuracy", "KL to reference", "reward", "gain over SFT"]
    rows = [
        [
            f"{entry['beta']:g}",
            *(_plus_minus(entry[name], digits) for name, digits in columns.items()),
            *(f"{entry[name]['mean']:.3f}" for name in ("optimal_reward", "optimal_kl")),
        ]
        for entry in summary["betas"]
    ]
    return page.table([*headings, "optimal reward", "its KL"], rows)


def main(options: Options, pipeline: Pipeline = TUTORIAL) -> None:
    """Runs the ablation and writes its results."""
    commands.check_seed(options.seed)
    commands.check_sizes(num_seeds=options.num_seeds)
    with commands.clear_errors():
        if not options.betas:
            raise ValueError("--betas needs at least one value")
        checks.interval("--betas", np.array(options.betas), "(0, inf)")
    out = files.output_folder(options.out)
    devices.use_all_cores()
    devices.enable_compilation_cache()
    with commands.clear_errors():
        summary, seconds = ablate(options.seed, options.num_seeds, options.betas, pipeline)
    save_figures(summary, out)
    page.update({"beta_ablation": page_table(summary)}, out)
    files.save_summary({"seed": options.seed, **summary, **files.provenance(**seconds)}, out)
    print_results(summary)
    console.say(
        f"Prepared in {seconds['prepare']:.1f} s; then compiled in {seconds['compile']:.1f} s, and ran in "
        f"{seconds['run']:.2f} s. Figures and summary.json are in {out}."
    )


def _statistics(results: Any) -> dict[str, Any]:
    return {str(name): mean_and_stderr(values.transpose("seed", ...)) for name, values in results.data_vars.items()}


def _plus_minus(statistics: dict[str, Any], digits: int = 4) -> str:
    mean, stderr = (f"{statistics[name]:.{digits}f}" for name in ("mean", "stderr"))
    return mean if stderr == "nan" else f"{mean} ± {stderr}"


if __name__ == "__main__":
    main(commands.parse(Options))
