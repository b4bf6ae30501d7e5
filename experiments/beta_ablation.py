"""The notebook's beta ablation over many seeds: what beta does, with standard errors.

Each seed makes its own world, data and training. One compiled program serves all: `vmap` over beta inside `vmap` over
seeds, a chunk of seeds at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo_jax import checks, figures, losses, toy, train
from dpo_jax.types import Metrics, Numeric, Params
from experiments import harness
from experiments.notebook import BETA, BETAS, POLICY, Start, ablate

SEEDS_PER_CHUNK = 64
CURVE_BETAS = np.geomspace(0.005, 20.0, 60, dtype=np.float32)


@dataclass(frozen=True)
class Options:
    """The beta ablation over many seeds: mean and standard error of everything, beside the exact optimum."""

    seed: int = 0
    """The first seed; the others follow it."""
    num_seeds: int = 64
    """How many worlds, each with its own data, network and training."""
    betas: tuple[float, ...] = BETAS
    """Values of beta to try."""
    out: Path = Path("results/beta_ablation")
    """Folder for summary.json and the figures."""


def run(seed: Int[Array, ""], betas: Float[Array, " betas"]) -> dict[str, Any]:
    """The ablation for one seed: figures of the SFT policy, of each trained policy, and of the exact frontier."""
    start, policies = ablate(jax.random.key(seed), betas)
    reference, rewards = start.sft.log_probs, start.world.rewards
    optima = toy.frontier(reference, rewards, betas)
    sft_reward = jnp.mean(start.sft.expected_reward)
    demonstrated_reward = jnp.mean(toy.expected_reward(jnp.log(rewards), rewards))
    population = jax.vmap(predict_new_pairs, in_axes=(None, 0, 0))(start, policies.params, betas)
    last = {name: metric[:, -1] for name, metric in policies.history.items()}
    return {
        "sft": {
            "expected_reward": sft_reward,
            "sampled_reward": jnp.mean(start.sft.sampled_reward),
            "gain_over_demonstrations": sft_reward - demonstrated_reward,
            "loss": start.sft.history["loss"][-1],
        },
        "betas": {
            **{name: last[name] for name in ("loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward")},
            **{f"{name}_history": policies.history[name] for name in ("loss", "accuracy", "reward_margin")},
            "expected_reward": last["expected_reward"],
            "sampled_reward": jnp.mean(policies.sampled_reward, axis=-1),
            "gain": last["expected_reward"] - sft_reward,
            "kl_to_reference": last["kl_to_reference"],
            "optimal_reward": optima["expected_reward"],
            "optimal_kl": optima["kl_to_reference"],
            "population_loss": population["loss"],
            "population_accuracy": population["accuracy"],
            "diverged": jnp.isnan(last["loss"]),
        },
        "bayes": toy.bayes_prediction(rewards),
        "frontier": toy.frontier(reference, rewards, jnp.asarray(CURVE_BETAS)),
    }


def predict_new_pairs(start: Start, params: Params, beta: Numeric) -> Metrics:
    """Exact loss and accuracy on new comparisons from the same world: the average over all of them."""
    log_prob = toy.log_prob_fn(POLICY, start.world.embeddings)
    everything = train.with_reference(log_prob, start.sft.params, toy.all_preferences(start.world))
    loss, metrics = train.preference_objective(log_prob, losses.dpo_loss, beta=beta)(params, everything)
    return {"loss": loss, **metrics}


def run_all(seed: int, num_seeds: int, betas: Sequence[float], watch: harness.Stopwatch) -> dict[str, Any]:
    """`run` for seeds `seed .. seed + num_seeds - 1`: the same dictionary, each array with a leading axis of seeds."""
    size = min(num_seeds, SEEDS_PER_CHUNK)
    beta_array = jnp.asarray(betas, jnp.float32)
    last = seed + num_seeds - 1  # fills up the last chunk
    chunks = [
        np.minimum(np.arange(first, first + size), last).astype(np.uint32) for first in range(seed, last + 1, size)
    ]
    program = watch.compiled(jax.vmap(run, in_axes=(0, None)), chunks[0], beta_array)
    with harness.waiting("Compiling one program for all seeds and betas"):
        program.wait()
    results = []
    with harness.progress("seeds", num_seeds) as show_done:
        for chunk in chunks:
            results.append(program(chunk, beta_array))
            show_done(min(num_seeds, len(results) * size))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_seeds], *results)


def summarise(results: dict[str, Any], betas: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error over seeds of what `run_all` returned."""
    parts = {
        part: {name: harness.mean_and_stderr(values) for name, values in metrics.items()}
        for part, metrics in results.items()
    }
    by_beta = [jax.tree.map(lambda values, i=i: values[i], parts["betas"]) for i in range(len(betas))]
    return {
        "num_seeds": len(results["sft"]["loss"]),
        **parts,
        "betas": [{"beta": beta, **metrics} for beta, metrics in zip(betas, by_beta, strict=True)],
    }


def print_results(summary: dict[str, Any]) -> None:
    """Prints the table of a summary."""
    columns = ("loss", "accuracy", "reward_margin", "kl_to_reference", "expected_reward", "gain", "optimal_reward")
    headings = ("training loss", "training accuracy", "reward margin", "KL to reference", "reward", "gain", "optimum")
    sft = summary["sft"]["expected_reward"]
    harness.print_table(
        f"{summary['num_seeds']} seeds, mean ± standard error; expected reward after SFT {_plus_minus(sft)}",
        ["β", *headings],
        [[f"{entry['beta']:g}", *(_plus_minus(entry[name]) for name in columns)] for entry in summary["betas"]],
    )
    for entry in summary["betas"]:
        if entry["diverged"]["mean"]:
            harness.console.print(
                f"Beware: with β = {entry['beta']:g}, {entry['diverged']['mean']:.1%} of runs diverged."
            )


def save_figures(summary: dict[str, Any], out: Path) -> None:
    """Draws the training at the notebook's beta, the ablation and the frontier from a summary."""
    entries = summary["betas"]
    betas = [entry["beta"] for entry in entries]

    def column(name: str, statistic: str = "mean") -> np.ndarray:
        return np.array([entry[name][statistic] for entry in entries])

    shown = betas.index(BETA) if BETA in betas else 0
    training = {name: column(f"{name}_history")[shown] for name in ("loss", "accuracy", "reward_margin")}
    bayes = {name: float(values["mean"]) for name, values in summary["bayes"].items()}
    harness.save_figure(figures.training(training, bayes=bayes), out / "dpo_training.png")
    figure = figures.beta_ablation(
        betas,
        column("loss_history"),
        column("expected_reward"),
        optimal_rewards=column("optimal_reward"),
        sft_reward=float(summary["sft"]["expected_reward"]["mean"]),
        stderr=column("expected_reward", "stderr"),
    )
    harness.save_figure(figure, out / "beta_ablation.png")
    figure = figures.frontier(
        {name: values["mean"] for name, values in summary["frontier"].items()},
        {name: column(name) for name in ("kl_to_reference", "expected_reward")},
        betas,
        {"kl_to_reference": column("optimal_kl"), "expected_reward": column("optimal_reward")},
        sft_reward=float(summary["sft"]["expected_reward"]["mean"]),
    )
    harness.save_figure(figure, out / "frontier.png")


def main(options: Options) -> None:
    """Runs the ablation and writes its results."""
    harness.check_seeds(options.seed, options.num_seeds)
    with harness.clear_errors():
        if not options.betas:
            raise ValueError("--betas needs at least one value")
        checks.interval("--betas", np.array(options.betas), "(0, inf)")
    out = harness.output_folder(options.out)
    harness.enable_compilation_cache()
    watch = harness.Stopwatch()
    summary = summarise(run_all(options.seed, options.num_seeds, options.betas, watch), options.betas)
    save_figures(summary, out)
    harness.save_summary(
        {"seed": options.seed, **summary, **harness.provenance(compile=watch.compile, run=watch.run)}, out
    )
    print_results(summary)
    harness.console.print(
        f"Compiled in {watch.compile:.1f} s, ran in {watch.run:.2f} s "
        f"({10 * watch.run / options.num_seeds:.2f} s per ten seeds). Figures and summary.json are in {out}."
    )


def _plus_minus(statistics: dict[str, Any]) -> str:
    mean, stderr = (f"{statistics[name]:.4f}" for name in ("mean", "stderr"))
    return mean if stderr == "nan" else f"{mean} ± {stderr}"


if __name__ == "__main__":
    main(harness.parse(Options))
