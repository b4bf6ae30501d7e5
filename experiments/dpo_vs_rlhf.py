"""DPO beside RLHF, measured: what each costs, how far it gets, and how it fares with a bad learning rate.

All methods start from the same SFT policies in the same worlds and take equally many optimizer steps. The learning rate
is chosen in other worlds, for each method and each strength of its pull to the reference, by the objective that all are
meant to maximise: the exact expected reward minus beta times the KL (if the KL itself is set, by the reward alone).
Every policy is measured exactly.
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo_jax import figures, losses, rlhf, sweep, toy
from dpo_jax.types import Metrics, Numeric
from experiments.lab import commands, console, contenders, files, page, studies, tuning
from experiments.lab.contenders import CONTENDERS, STRENGTHS, Contender, Scene, contender
from experiments.lab.pipeline import BETA, TUTORIAL, Pipeline
from experiments.lab.statistics import Seconds, by_name, mean_and_stderr, over_seeds
from experiments.lab.tuning import Seeds

RLHF_PAGE = Path(rlhf.__file__).parent / "README.md"
LEARNING_RATES = tuple(float(f"{rate:.1g}") for rate in np.geomspace(3e-5, 1e-1, 8))
CURVE_BETAS = np.geomspace(0.003, 20.0, 40, dtype=np.float32)
CURVE_NUMS = np.geomspace(1.0, 1000.0, 25, dtype=np.float32)
BEST_OF = 16
UNPULLED = {"DPO": 0.003, "PPO, reward model": 0.0, "RLOO, reward model": 0.0}
"""Methods to be watched while they overoptimise, with next to no pull to the reference, and the beta of each."""
WATCHED_RATE = 1e-3
BLOCK = 16, 4
"""Worlds and trials that a device runs at once, in all rounds: what is compiled for the first serves all."""
NUM_TIMED, NUM_TIMINGS = 64, 5
"""How many runs are timed together, and how often."""
IMITATION = ("preferred fine-tuning", "unlikelihood")
"""Baselines that are in the table, but too far below to be drawn."""
ONE_BY_ONE = tuple(f"{name}, reward model" for name in ("PPO", "PPO, KL held", "REINFORCE", "RLOO"))
IN_GROUPS = tuple(f"{name}, reward model" for name in ("GRPO", "Dr. GRPO", "online DPO"))
PANELS = {
    "stored comparisons": (contenders.COMPARISONS,),
    "reward model; REINFORCE, RLOO, PPO": ONE_BY_ONE,
    "reward model; groups, pairs, best of n": IN_GROUPS,
    "people or truth, during training": (contenders.PEOPLE, contenders.TRUTH),
}
"""Which judges or methods are in each panel of the figure of reward against KL."""


@dataclass(frozen=True)
class Options(studies.Options):
    """DPO beside RLHF: cost, exact reward, KL, and sensitivity, with confidence intervals."""

    num_tuning_seeds: int = 32
    """How many other worlds to choose learning rates in."""
    out: Path = Path("results/dpo_vs_rlhf")
    """Folder for summary.json and the figures."""


class StrengthTrials(NamedTuple):
    """An axis of a sweep: in each row a strength and a learning rate. `place` distinguishes equal rows."""

    place: Any
    strength: Any
    learning_rate: Any

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float]]) -> "StrengthTrials":
        """The trials of some pairs of a strength and a learning rate."""
        return cls(np.arange(len(rows)), *(np.array(column, np.float32) for column in zip(*rows, strict=True)))

    @classmethod
    def all_of(cls, strengths: Sequence[float], rates: Sequence[float]) -> "StrengthTrials":
        """Each strength with each learning rate."""
        return cls.of([*itertools.product(strengths, rates)])


def run(pipeline: Pipeline, scene: Scene, *, method: str, trial: StrengthTrials) -> Metrics:
    """Trains one policy and measures it exactly; NaN if training diverged."""
    chosen = contender(method)
    log_probs, history = chosen.trained(scene, trial.strength, trial.learning_rate, pipeline=pipeline)
    found = measure(scene, log_probs, price_of(chosen, trial.strength))
    finished = jnp.isfinite(history["loss"][-1])
    return {name: jnp.where(finished, value, jnp.nan) for name, value in found.items()}


def price_of(contender: Contender, strength: Numeric) -> Numeric:
    """The beta of the objective that a method of this strength is meant to maximise."""
    return {"beta": strength, "tau": 4 * strength}.get(contender.strength, BETA)


def measure(scene: Scene, log_probs: Array, beta: Numeric) -> Metrics:
    """True reward, the reward model's score, KL, and regret; means over prompts."""
    rewards, reference = scene.true_rewards, scene.start.log_probs
    return {
        **toy.evaluate(log_probs, reference, rewards),
        "learned_reward": jnp.mean(toy.expected_reward(log_probs, scene.learned_rewards)),
        "regret": jnp.mean(toy.regret(log_probs, reference, rewards, beta=beta)),
        "win_rate": jnp.mean(toy.win_rate(log_probs, reference, rewards, temperature=0.0)),
    }


def follow(scene: Scene, *, method: str, pipeline: Pipeline) -> Metrics:
    """Exact reward, KL and learned reward after each epoch of a training with next to no pull to the reference."""
    _, history = contender(method).trained(scene, UNPULLED[method], WATCHED_RATE, pipeline=pipeline)
    return {name: history[name] for name in ("expected_reward", "kl_to_reference", "learned_reward")}


def baseline(scene: Scene) -> dict[str, Any]:
    """Policies that need no training: SFT, best-of-n, and the exact optima of the true and of the learned reward."""
    measured = partial(measure, scene, beta=BETA)
    reference, learned, true = scene.start.log_probs, scene.learned_rewards, scene.true_rewards

    def tilted(rewards: Array) -> Any:
        return jax.vmap(lambda beta: measured(toy.optimal_policy(reference, rewards, beta=beta)))(CURVE_BETAS)

    def best_of(rewards: Array) -> Any:
        return jax.vmap(lambda num: measured(toy.best_of_n_policy(reference, rewards, num=num)))(CURVE_NUMS)

    return {
        "sft": measured(reference),
        "optimum": measured(toy.optimal_policy(reference, true, beta=BETA)),
        "optimum of the reward model": measured(toy.optimal_policy(reference, learned, beta=BETA)),
        f"best of {BEST_OF}, reward model": measured(toy.best_of_n_policy(reference, learned, num=BEST_OF)),
        f"best of {BEST_OF}, true reward": measured(toy.best_of_n_policy(reference, true, num=BEST_OF)),
        "frontier": tilted(true),
        "frontier of the reward model": tilted(learned),
        "best of n, reward model": best_of(learned),
        "best of n, true reward": best_of(true),
        "reward model": scene.reward_model,
    }


def estimators(scene: Scene) -> dict[str, Any]:
    """Exact bias and variance of estimates of the policy gradient at the SFT policy, over all prompts.

    `alignment` is the cosine of expected and exact gradient, `scale` how much longer the expected one is, and `noise`
    the variance per sample in units of the squared length of the expected gradient.
    """
    expected = toy.expected_reward(scene.start.log_probs, scene.true_rewards)[:, None]

    def quality(rewards: Array, group_size: int, advantages: Any) -> dict[str, Array]:
        moments = partial(rlhf.estimate_moments, group_size=group_size, advantages=advantages)
        mean, variance = jax.lax.map(lambda prompt: moments(*prompt), (scene.start.log_probs, rewards))
        exact = rlhf.policy_gradient(scene.start.log_probs, rewards)
        length, exact_length = jnp.linalg.norm(mean), jnp.linalg.norm(exact)
        return {
            "alignment": jnp.sum(mean * exact) / (length * exact_length),
            "scale": length / exact_length,
            "noise": group_size * jnp.sum(variance) / length**2,
        }

    rewards = scene.true_rewards
    return {
        "REINFORCE, no baseline": quality(rewards, 1, lambda rewards, _: rewards),
        "exact value as baseline": quality(rewards - expected, 1, lambda rewards, _: rewards),
        "RLOO, 2": quality(rewards, 2, losses.rloo_advantages),
        "RLOO, 4": quality(rewards, 4, losses.rloo_advantages),
        "Dr. GRPO, 4": quality(rewards, 4, losses.centred_advantages),
        "GRPO, 4": quality(rewards, 4, losses.grpo_advantages),
    }


def compare(scenes: sweep.Starts, seeds: Seeds, pipeline: Pipeline, seconds: Seconds) -> list[dict[str, Any]]:
    """Chooses a learning rate for each method and strength in the tuning worlds, then runs all strengths and all rates.

    Methods of the same strengths are tuned in one sweep, so that their programs are compiled side by side.

    Returns:
      For each method what `run_reported` returns.
    """
    with console.progress("Runs") as report:
        sweep_of = tuning.sweep_of(partial(run, pipeline), scenes, block=BLOCK, seconds=seconds, report=report)
        tuned: dict[str, Any] = {}
        for strengths in dict.fromkeys(each.strengths for each in CONTENDERS):
            names = [each.name for each in CONTENDERS if each.strengths == strengths]
            results = sweep_of(names, StrengthTrials.all_of(strengths, LEARNING_RATES), seeds.tuning)
            tuned |= {name: results.sel({"method": name}) for name in names}  # sel has an argument `method`
        return [run_reported(sweep_of, seeds, each, tuned[each.name]) for each in CONTENDERS]


def run_reported(
    sweep_of: Callable[[Sequence[str], StrengthTrials, range], Any], seeds: Seeds, contender: Contender, tuned: Any
) -> dict[str, Any]:
    """Chooses the best learning rate for each strength, and runs these, and all rates at the usual strength.

    Returns:
      The chosen learning rates, and arrays `[points, worlds]` of what was measured `by_strength` and `by_rate`.
    """
    strengths, name = contender.strengths, contender.name
    scores = merit(contender, tuned).mean("seed", skipna=False).values.reshape(len(strengths), -1)
    chosen = [LEARNING_RATES[place] for place in np.argmax(np.nan_to_num(scores, nan=-np.inf), axis=1)]
    reported = StrengthTrials.of(
        [*zip(strengths, chosen, strict=True), *((contender.usual, rate) for rate in LEARNING_RATES)]
    )
    found = by_name(sweep_of([name], reported, seeds.reported).isel(method=0))
    return {
        "chosen": chosen,
        "by_strength": {name: values[: len(strengths)] for name, values in found.items()},
        "by_rate": {name: values[len(strengths) :] for name, values in found.items()},
    }


def merit(contender: Contender, results: Any) -> Any:
    """The score by which a learning rate is chosen: the larger, the better."""
    return results.expected_reward if contender.strength == "target KL" else -results.regret


def num_runs(seeds: Seeds) -> int:
    """How many policies all contenders train."""
    by_rate = len(LEARNING_RATES)
    return sum(
        len(seeds.tuning) * by_rate * len(each.strengths) + len(seeds.reported) * (by_rate + len(each.strengths))
        for each in CONTENDERS
    )


def fit_rewards(scene: Scene, *, pipeline: Pipeline) -> Array:
    """The stage that all share that learn from a reward model, to be timed."""
    return contenders.train_reward_model(pipeline, scene.key, scene.world, scene.preferences)[0]


def timed(run: Callable[..., Any], scenes: sweep.Starts, **point: Any) -> Callable[[], dict[str, float]]:
    """Runs a point in 64 worlds together, on one device, whenever it is called; returns the seconds of one run."""
    seeds = scenes.seeds[:NUM_TIMED]
    options = {"seeds": seeds, "runs_at_once": (len(seeds), 1), "devices": jax.local_devices()[:1]}

    def once() -> dict[str, float]:
        results = sweep.grid(run, scenes, **options, **point)
        return {"compile": results.attrs["compile_seconds"], "run": results.attrs["run_seconds"] / len(seeds)}

    return once


def seconds_of_all(scenes: sweep.Starts, pipeline: Pipeline) -> dict[str, dict[str, float]]:
    """Seconds to compile, and to run, all stages after SFT: of one policy among 64 that train together, alone."""

    def seconds_of(once: Callable[[], dict[str, float]]) -> dict[str, float]:
        compiled = once()["compile"]
        return {"compile": compiled, "run": statistics.median(once()["run"] for _ in range(NUM_TIMINGS))}

    model = seconds_of(timed(partial(fit_rewards, pipeline=pipeline), scenes))
    found = {}
    for each in CONTENDERS:
        trial = StrengthTrials.of([(each.usual, WATCHED_RATE)])
        own = seconds_of(timed(partial(run, pipeline), scenes, method=[each.name], trial=trial))
        shared = model if each.judge == contenders.MODEL else dict.fromkeys(model, 0.0)
        found[each.name] = {name: own[name] + shared[name] for name in own}
    return found


def untrained(scenes: sweep.Starts, pipeline: Pipeline) -> dict[str, Any]:
    """Baselines and estimators, and the course of overoptimisation: arrays with the world first."""
    with console.waiting("Overoptimisation, and what needs no training"):
        run = partial(follow, pipeline=pipeline)
        courses = {name: sweep.grid(run, scenes, method=[name]).isel(method=0) for name in UNPULLED}
        return {
            "baseline": over_seeds(baseline, scenes),
            "estimators": over_seeds(estimators, scenes),
            "courses": {name: {k: v.T for k, v in by_name(found).items()} for name, found in courses.items()},
        }


def summarise(results: dict[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    """Means and standard errors over seeds; gains over SFT are paired by seed."""
    sft = results["baseline"]["sft"]
    entries = [
        summarise_contender(contender, found, sft, results["seconds"][contender.name], pipeline)
        for contender, found in zip(CONTENDERS, results["contenders"], strict=True)
    ]
    return {
        "num_seeds": len(sft["expected_reward"]),
        "learning_rates": LEARNING_RATES,
        "methods": entries,
        "baselines": jax.tree.map(mean_and_stderr, results["baseline"]),
        "curves": {"beta": CURVE_BETAS, "num": CURVE_NUMS},
        "baseline_gains": {
            name: gains(values, sft) for name, values in results["baseline"].items() if "expected_reward" in values
        },
        "gradient_estimators": jax.tree.map(mean_and_stderr, results["estimators"]),
        "courses": {
            name: {"beta": UNPULLED[name], "learning_rate": WATCHED_RATE, **gains(values, sft)}
            for name, values in results["courses"].items()
        },
    }


def summarise_contender(
    contender: Contender,
    found: dict[str, Any],
    sft: dict[str, np.ndarray],
    seconds: dict[str, float],
    pipeline: Pipeline,
) -> dict[str, Any]:
    """One row of the table, and the points of the figures."""
    usual = contender.strengths.index(contender.usual)
    at_usual = {name: values[usual] for name, values in found["by_strength"].items()}
    worse = ~(found["by_rate"]["expected_reward"] > sft["expected_reward"])
    return {
        "name": contender.name,
        "stages": contender.stages,
        "judge": contender.judge,
        "labels": contender.labels(pipeline),
        "samples": contender.samples(pipeline),
        "steps": contender.steps(pipeline) + (pipeline.num_steps if contender.judge == contenders.MODEL else 0),
        "seconds": seconds,
        "strength": contender.strength,
        "usual": contender.usual,
        "learning_rate": found["chosen"][usual],
        "at_edge": found["chosen"][usual] in (LEARNING_RATES[0], LEARNING_RATES[-1]),
        **{name: mean_and_stderr(values) for name, values in at_usual.items()},
        **gains(at_usual, sft),
        "spread_of_gain": float(np.std(at_usual["expected_reward"] - sft["expected_reward"], ddof=1)),
        "diverged": float(np.mean(np.isnan(at_usual["expected_reward"]))),
        "worse_than_sft": mean_and_stderr(worse.mean(axis=0)),
        "by_strength": [
            {"strength": strength, "learning_rate": rate, **points}
            for strength, rate, points in zip(
                contender.strengths, found["chosen"], rows_of(found["by_strength"], sft), strict=True
            )
        ],
        "by_rate": [
            {"learning_rate": rate, "worse_than_sft": float(lost.mean()), **points}
            for rate, lost, points in zip(LEARNING_RATES, worse, rows_of(found["by_rate"], sft), strict=True)
        ],
    }


def rows_of(measured: dict[str, np.ndarray], sft: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Gains and KL of each row of arrays `[points, worlds]`."""
    num = len(measured["expected_reward"])
    return [gains({name: values[i] for name, values in measured.items()}, sft) for i in range(num)]


def gains(measured: dict[str, np.ndarray], sft: dict[str, np.ndarray]) -> dict[str, Any]:
    """Gains over SFT in true and in learned reward, by how much the latter exceeds the former, and KL; over seeds."""
    true, learned = (
        measured[name] - sft[name].reshape(-1, *(1,) * (measured[name].ndim - 1))
        for name in ("expected_reward", "learned_reward")
    )
    return {
        "gain": mean_and_stderr(true),
        "learned_gain": mean_and_stderr(learned),
        "overestimate": mean_and_stderr(learned - true),
        "kl_to_reference": mean_and_stderr(measured["kl_to_reference"]),
    }


def print_results(summary: dict[str, Any]) -> None:
    """Prints the table of methods."""
    columns = ["method", "labels", "samples", "steps", "ms per run", "learning rate", "reward", "gain over SFT"]
    columns += ["spread", "KL", "model's gain", "worse than SFT"]
    rows = [row_of(entry, summary["num_seeds"]) for entry in summary["methods"]]
    console.print_table("DPO and RLHF, means over worlds and 95% intervals", columns, rows)
    untrained = {name: entry for name, entry in summary["baseline_gains"].items() if entry["gain"]["mean"].ndim == 0}
    console.print_table(
        "Without training",
        ["policy", "gain over SFT", "KL", "model's gain"],
        [
            [
                name,
                console.interval(e["gain"], summary["num_seeds"]),
                f"{e['kl_to_reference']['mean']:.3f}",
                f"{e['learned_gain']['mean']:.3f}",
            ]
            for name, e in untrained.items()
        ],
    )


def row_of(entry: dict[str, Any], num_seeds: int) -> list[str]:
    """A row of the table of methods."""
    return [
        entry["name"],
        f"{entry['labels']:,}",
        f"{entry['samples']:,}",
        f"{entry['steps']:,}",
        f"{1000 * entry['seconds']['run']:.0f}",
        f"{entry['learning_rate']:g}",
        f"{entry['expected_reward']['mean']:.3f}",
        console.interval(entry["gain"], num_seeds),
        f"{entry['spread_of_gain']:.3f}",
        f"{entry['kl_to_reference']['mean']:.3f}",
        f"{entry['learned_gain']['mean']:.3f}",
        f"{entry['worse_than_sft']['mean']:.0%}",
    ]


def page_table(summary: dict[str, Any]) -> str:
    """The table on the page of results."""
    columns = ["method", "stages after SFT", "labels", "samples", "optimizer steps", "ms per run", "gain over SFT"]
    rows = [
        [
            entry["name"],
            " → ".join(entry["stages"][1:]),
            *(f"{entry[name]:,}" for name in ("labels", "samples", "steps")),
            f"{1000 * entry['seconds']['run']:.0f}",
            console.interval(entry["gain"], summary["num_seeds"], sign=True),
            f"{entry['spread_of_gain']:.3f}",
            *(f"{entry[name]['mean']:.3f}" for name in ("kl_to_reference", "learned_gain")),
            f"{entry['worse_than_sft']['mean']:.0%}",
        ]
        for entry in summary["methods"]
    ]
    return page.table([*columns, "spread", "KL", "score", "worse than SFT"], rows)


def estimators_table(summary: dict[str, Any]) -> str:
    """The table of bias and noise on the page of RLHF."""
    rows = [
        [
            name,
            f"{quality['alignment']['mean']:.3f}",
            f"{quality['scale']['mean']:.2f}",
            console.interval(quality["noise"], summary["num_seeds"], digits=1),
        ]
        for name, quality in summary["gradient_estimators"].items()
    ]
    return page.table(["estimate", "alignment", "length", "noise"], rows)


def save_figures(summary: dict[str, Any], out: Path) -> None:
    """Draws reward against KL, overoptimisation, and what the learning rate does."""
    methods, known = summary["methods"], summary["baseline_gains"]
    learned_frontier = points(known["frontier of the reward model"])
    bounds = {"exact frontier": points(known["frontier"]), "reward model, maximised exactly": learned_frontier}
    panels = {
        title: {
            entry["name"].removesuffix(", reward model"): points(entry["by_strength"])
            for entry in methods
            if (entry["judge"] in which or entry["name"] in which) and entry["name"] not in IMITATION
        }
        for title, which in PANELS.items()
    }
    panels["reward model; groups, pairs, best of n"]["best of n"] = points(known["best of n, reward model"])
    figure = figures.rlhf_frontier(panels, bounds, limits=(1.5, -0.01))
    files.save_figure(figure, out / "frontier.png")

    courses = {name.removesuffix(", reward model"): points(entry) for name, entry in summary["courses"].items()}
    courses |= {"best of n": points(known["best of n, reward model"]), "exact maximum": learned_frontier}
    files.save_figure(figures.overoptimisation(courses, largest_kl=1.4), out / "overoptimisation.png")

    rates = {
        name: {
            entry["name"]: np.array([row(each) for each in entry["by_rate"]])
            for entry in methods
            if entry["name"] not in IMITATION
        }
        for name, row in {"gains": lambda e: e["gain"]["mean"], "worse": lambda e: e["worse_than_sft"]}.items()
    }
    files.save_figure(figures.learning_rates(summary["learning_rates"], **rates), out / "learning_rates.png")


def points(entry: Any) -> figures.Points:
    """Means over seeds, of one entry with arrays or of a list of entries."""
    names = ("kl_to_reference", "gain", "learned_gain")
    if isinstance(entry, dict):
        return figures.Points(*(np.asarray(entry[name]["mean"]) for name in names))
    return figures.Points(*(np.array([each[name]["mean"] for each in entry]) for name in names))


def main(options: Options, pipeline: Pipeline = TUTORIAL) -> None:
    """Compares the methods and writes the results."""
    study = studies.begin(options, options.out, at_least=2)
    study.announce(f"{len(CONTENDERS)} methods: {num_runs(study.seeds):,} runs")
    scenes = study.prepare(partial(contenders.scene, pipeline), "worlds, SFT policies and reward models")
    learned = compare(scenes, study.seeds, pipeline, study.seconds)
    rest = untrained(scenes.sel(study.seeds.reported), pipeline)
    results = summarise({"contenders": learned, "seconds": _timed(scenes, pipeline), **rest}, pipeline)
    summary = study.save({"betas": STRENGTHS, **results})
    save_figures(summary, study.out)
    page.update({"dpo_vs_rlhf": page_table(summary)}, study.out)
    page.update({"gradient_estimators": estimators_table(summary)}, study.out, path=RLHF_PAGE)
    print_results(summary)
    study.end()


def _timed(scenes: sweep.Starts, pipeline: Pipeline) -> dict[str, dict[str, float]]:
    with console.waiting("Timing each method alone"):
        return seconds_of_all(scenes, pipeline)


if __name__ == "__main__":
    main(commands.parse(Options))
