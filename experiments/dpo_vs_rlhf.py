"""DPO beside RLHF, measured: what each costs, how far it gets, and how it fares with a bad learning rate.

All methods start from the same SFT policies in the same worlds and take equally many optimizer steps. The learning rate
is chosen in other worlds, for each method and each strength of its pull to the reference, by what they are all meant to
maximise: the exact expected reward less beta times the KL (where the KL itself is set, by the reward alone). Every
policy is measured exactly.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo_jax import checks, figures, losses, rlhf, toy
from dpo_jax.types import Numeric
from experiments import contenders, harness
from experiments.contenders import BETAS, CONTENDERS, NUM_STEPS, Contender, Scene
from experiments.notebook import BETA
from experiments.tuning import RUNS_PER_CHUNK, Counter, Hyperparameters, Runner, Task

THREADS = 2
LEARNING_RATES = tuple(float(f"{rate:.1g}") for rate in np.geomspace(3e-5, 1e-1, 8))
CURVE_BETAS = np.geomspace(0.003, 20.0, 40, dtype=np.float32)
CURVE_NUMS = np.geomspace(1.0, 1000.0, 25, dtype=np.float32)
BEST_OF = 16
UNPULLED = {"DPO": 0.003, "PPO, reward model": 0.0, "RLOO, reward model": 0.0}
"""Methods to be watched while they overoptimise, with next to no pull to the reference, and the beta of each."""
WATCHED_RATE = 1e-3
IMITATION = ("preferred fine-tuning", "unlikelihood")
"""Baselines that are in the table, but too far below to be drawn."""
PANELS = {
    "from comparisons": (contenders.COMPARISONS,),
    "by the reward model": (contenders.MODEL,),
    "by people asked on, or by the truth": (contenders.PEOPLE, contenders.TRUTH),
}
"""Who judges, in each panel of the figure of reward against KL."""


@dataclass(frozen=True)
class Options:
    """DPO beside RLHF: cost, exact reward, KL, and sensitivity, with confidence intervals."""

    seed: int = 0
    """The first seed to report; the others follow it. Tuning uses the seeds after them."""
    num_seeds: int = 64
    """How many worlds to report, each with its own data, network and training."""
    num_tuning_seeds: int = 32
    """How many other worlds to choose learning rates in."""
    out: Path = Path("results/dpo_vs_rlhf")
    """Folder for summary.json and the figures."""


def run(contender: Contender, scene: Scene, hyperparameters: dict[str, Numeric]) -> dict[str, Array]:
    """Trains one policy and measures it exactly; NaN where training came to a halt."""
    log_probs, history = contender.trained(scene, hyperparameters["strength"], hyperparameters["learning_rate"])
    measured = measure(scene, log_probs, price_of(contender, hyperparameters["strength"]))
    finished = jnp.isfinite(history["loss"][-1])
    return {name: jnp.where(finished, value, jnp.nan) for name, value in measured.items()}


def price_of(contender: Contender, strength: Numeric) -> Numeric:
    """The beta of the objective that a method of this strength is meant to maximise."""
    return {"beta": strength, "tau": 4 * strength}.get(contender.strength, BETA)


def measure(scene: Scene, log_probs: Array, beta: Numeric) -> dict[str, Array]:
    """True reward, what the reward model makes of it, KL, and regret; means over prompts."""
    rewards = scene.world.rewards
    return {
        **toy.evaluate(log_probs, scene.log_probs, rewards),
        "learned_reward": jnp.mean(toy.expected_reward(log_probs, scene.learned_rewards)),
        "regret": jnp.mean(toy.regret(log_probs, scene.log_probs, rewards, beta=beta)),
        "win_rate": jnp.mean(toy.win_rate(log_probs, scene.log_probs, rewards, temperature=0.0)),
    }


def follow(contender: Contender, scene: Scene, hyperparameters: dict[str, Numeric]) -> dict[str, Array]:
    """The course of one training: exact reward, KL and learned reward after each epoch."""
    _, history = contender.trained(scene, hyperparameters["strength"], hyperparameters["learning_rate"])
    return {name: history[name] for name in ("expected_reward", "kl_to_reference", "learned_reward")}


def baseline(scene: Scene) -> dict[str, Any]:
    """What needs no training: SFT, best-of-n, and the exact optima of the true and of the learned reward."""
    measured = partial(measure, scene, beta=BETA)
    learned, true = scene.learned_rewards, scene.world.rewards

    def tilted(rewards: Array) -> Any:
        return jax.vmap(lambda beta: measured(toy.optimal_policy(scene.log_probs, rewards, beta=beta)))(CURVE_BETAS)

    def best_of(rewards: Array) -> Any:
        return jax.vmap(lambda num: measured(toy.best_of_n_policy(scene.log_probs, rewards, num=num)))(CURVE_NUMS)

    return {
        "sft": measured(scene.log_probs),
        "optimum": measured(toy.optimal_policy(scene.log_probs, true, beta=BETA)),
        "optimum of the reward model": measured(toy.optimal_policy(scene.log_probs, learned, beta=BETA)),
        f"best of {BEST_OF}, reward model": measured(toy.best_of_n_policy(scene.log_probs, learned, num=BEST_OF)),
        f"best of {BEST_OF}, true reward": measured(toy.best_of_n_policy(scene.log_probs, true, num=BEST_OF)),
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
    expected = toy.expected_reward(scene.log_probs, scene.world.rewards)[:, None]

    def quality(rewards: Array, group_size: int, advantages: Any) -> dict[str, Array]:
        moments = partial(rlhf.estimate_moments, group_size=group_size, advantages=advantages)
        mean, variance = jax.lax.map(lambda prompt: moments(*prompt), (scene.log_probs, rewards))
        exact = rlhf.policy_gradient(scene.log_probs, rewards)
        length, exact_length = jnp.linalg.norm(mean), jnp.linalg.norm(exact)
        return {
            "alignment": jnp.sum(mean * exact) / (length * exact_length),
            "scale": length / exact_length,
            "noise": group_size * jnp.sum(variance) / length**2,
        }

    rewards = scene.world.rewards
    return {
        "REINFORCE, no baseline": quality(rewards, 1, lambda rewards, _: rewards),
        "exact value as baseline": quality(rewards - expected, 1, lambda rewards, _: rewards),
        "RLOO, 2": quality(rewards, 2, losses.rloo_advantages),
        "RLOO, 4": quality(rewards, 4, losses.rloo_advantages),
        "Dr. GRPO, 4": quality(rewards, 4, losses.centred_advantages),
        "GRPO, 4": quality(rewards, 4, losses.grpo_advantages),
    }


def compare(options: Options, watch: harness.Stopwatch) -> dict[str, Any]:
    """Tunes and runs every contender.

    Returns:
      The baselines, and for each contender what was measured, by strength and by learning rate.
    """
    num_all = options.num_seeds + options.num_tuning_seeds
    rows, tuning = np.arange(options.num_seeds), np.arange(options.num_seeds, num_all)
    num_runs = sum(count_runs(contender, len(rows), len(tuning)) for contender in CONTENDERS)
    harness.console.print(
        f"{len(CONTENDERS)} methods: {num_runs:,} runs in {len(rows):,} worlds, and {len(tuning):,} more for tuning. "
        f"{harness.FIRST_START}"
    )
    scenes = prepare_all(np.arange(options.seed, options.seed + num_all).astype(np.uint32), watch)
    with harness.progress("runs", num_runs, watch) as show_done, harness.threads(THREADS) as threads:
        runner = Runner({"worlds": scenes}, watch, Counter(show_done))
        learned = list(threads.map(partial(tune_and_run, runner, rows, tuning), CONTENDERS))
    reported = jax.tree.map(lambda leaf: leaf[rows], scenes)
    with harness.waiting("Timing each method alone"):
        models = seconds_per_run(lambda scene, _: fit_rewards(scene), reported, watch)
        seconds = {c.name: seconds_of(c, reported, models, watch) for c in CONTENDERS}
    with harness.waiting("Overoptimisation, and what needs no training"):
        courses = {name: course(contender, reported, watch) for name, contender in watched().items()}
        baselines = jax.device_get(jax.jit(jax.vmap(baseline))(reported))
        moments = jax.device_get(jax.jit(partial(jax.lax.map, estimators))(reported))
    return {
        "baseline": baselines,
        "contenders": learned,
        "seconds": seconds,
        "courses": courses,
        "estimators": moments,
    }


def prepare_all(seeds: np.ndarray, watch: harness.Stopwatch) -> Scene:
    """The scenes of all seeds, as NumPy arrays."""
    chunks = [np.resize(seeds[i : i + RUNS_PER_CHUNK], RUNS_PER_CHUNK) for i in range(0, len(seeds), RUNS_PER_CHUNK)]
    program = watch.compiled(jax.vmap(contenders.prepare), chunks[0])
    with harness.waiting("Preparing worlds, SFT policies and reward models"):
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(seeds)], *map(program, chunks))


def count_runs(contender: Contender, num_seeds: int, num_tuning: int) -> int:
    """How many policies a contender trains."""
    by_rate, by_strength = len(LEARNING_RATES), len(contender.strengths)
    return num_tuning * by_rate * by_strength + num_seeds * (by_rate + by_strength)


def tune_and_run(runner: Runner, rows: np.ndarray, tuning: np.ndarray, contender: Contender) -> dict[str, Any]:
    """Chooses a learning rate for each strength in the tuning worlds, then runs all strengths, and all rates."""
    program = runner.compiled(partial(run, contender), point(contender.usual, LEARNING_RATES[0]))

    def everywhere(points: Sequence[Hyperparameters], where: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays `[points, worlds]`."""
        task = Task("worlds", np.tile(where, len(points)), [h for h in points for _ in where])
        return {name: values.reshape(len(points), -1) for name, values in runner(program, task).items()}

    chosen = []
    for strength in contender.strengths:
        tried = [point(strength, rate) for rate in LEARNING_RATES]
        score = merit(contender, everywhere(tried, tuning)).mean(axis=1)
        chosen.append(tried[int(np.argmax(np.nan_to_num(score, nan=-np.inf)))])
    rates = [point(contender.usual, rate) for rate in LEARNING_RATES]
    return {
        "chosen": [float(f"{h['learning_rate']:.6g}") for h in chosen],
        "by_strength": everywhere(chosen, rows),
        "by_rate": everywhere(rates, rows),
    }


def merit(contender: Contender, measured: dict[str, np.ndarray]) -> np.ndarray:
    """What a learning rate is chosen by: the larger, the better."""
    return measured["expected_reward"] if contender.strength == "target KL" else -measured["regret"]


def point(strength: float, learning_rate: float) -> Hyperparameters:
    """One set of hyperparameters."""
    return {"strength": np.float32(strength), "learning_rate": np.float32(learning_rate)}


def watched() -> dict[str, Contender]:
    """The contenders of `UNPULLED`, by name."""
    return {contender.name: contender for contender in CONTENDERS if contender.name in UNPULLED}


def course(contender: Contender, scenes: Scene, watch: harness.Stopwatch) -> dict[str, np.ndarray]:
    """How training goes with next to no pull to the reference: arrays `[worlds, epochs]`."""
    runner = Runner({"worlds": scenes}, watch, lambda _: None)
    unpulled = point(UNPULLED[contender.name], WATCHED_RATE)
    program = runner.compiled(partial(follow, contender), unpulled)
    num = len(scenes.log_probs)
    return runner(program, Task("worlds", np.arange(num), [unpulled] * num))


def fit_rewards(scene: Scene) -> Array:
    """The stage that all share who learn from a reward model, to be timed."""
    return contenders.train_reward_model(jax.random.wrap_key_data(scene.key), scene.world, scene.preferences)[0]


def seconds_of(
    contender: Contender, scenes: Scene, reward_model: dict[str, float], watch: harness.Stopwatch
) -> dict[str, float]:
    """Seconds to compile, and to run, all stages after SFT: what one policy takes among 64 that train together."""
    seconds = seconds_per_run(partial(run, contender), scenes, watch, strength=contender.usual)
    if contender.judge != contenders.MODEL:
        return seconds
    return {name: seconds[name] + reward_model[name] for name in seconds}


def seconds_per_run(
    function: Any, scenes: Scene, watch: harness.Stopwatch, *, strength: float = BETA
) -> dict[str, float]:
    """Seconds to compile, and to run one of 64 that run together: the median of five times, nothing beside it."""
    start = time.perf_counter()
    once = timed(function, scenes, watch, strength=strength)
    compiled = time.perf_counter() - start
    return {"compile": compiled, "run": statistics.median(once() for _ in range(5))}


def timed(function: Any, scenes: Scene, watch: harness.Stopwatch, *, strength: float = BETA) -> Callable[[], float]:
    """Compiles `function(scene, hyperparameters)`; what it returns runs 64 together and says how long one took."""
    runner = Runner({"worlds": scenes}, watch, lambda _: None)
    usual = point(strength, WATCHED_RATE)
    program = runner.compiled(function, usual)
    program.wait()
    rows = np.resize(np.arange(len(scenes.log_probs)), RUNS_PER_CHUNK)
    arguments = runner.arguments(Task("worlds", rows, [usual] * RUNS_PER_CHUNK), 0)

    def once() -> float:
        start = time.perf_counter()
        program(*arguments)
        return (time.perf_counter() - start) / RUNS_PER_CHUNK

    return once


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Means and standard errors over seeds; gains over SFT are paired by seed."""
    sft = results["baseline"]["sft"]
    entries = [
        summarise_contender(contender, found, sft, results["seconds"][contender.name])
        for contender, found in zip(CONTENDERS, results["contenders"], strict=True)
    ]
    return {
        "num_seeds": len(sft["expected_reward"]),
        "learning_rates": LEARNING_RATES,
        "methods": entries,
        "baselines": jax.tree.map(harness.mean_and_stderr, results["baseline"]),
        "curves": {"beta": CURVE_BETAS, "num": CURVE_NUMS},
        "baseline_gains": {
            name: gains(values, sft) for name, values in results["baseline"].items() if "expected_reward" in values
        },
        "gradient_estimators": jax.tree.map(harness.mean_and_stderr, results["estimators"]),
        "courses": {
            name: {"beta": UNPULLED[name], "learning_rate": WATCHED_RATE, **gains(values, sft)}
            for name, values in results["courses"].items()
        },
    }


def summarise_contender(
    contender: Contender, found: dict[str, Any], sft: dict[str, np.ndarray], seconds: dict[str, float]
) -> dict[str, Any]:
    """One row of the table, and the points of the figures."""
    usual = contender.strengths.index(contender.usual)
    at_usual = {name: values[usual] for name, values in found["by_strength"].items()}
    worse = ~(found["by_rate"]["expected_reward"] > sft["expected_reward"])
    return {
        "name": contender.name,
        "stages": contender.stages,
        "judge": contender.judge,
        "labels": contender.labels,
        "samples": contender.samples,
        "steps": contender.steps + (NUM_STEPS if contender.judge == contenders.MODEL else 0),
        "seconds": seconds,
        "strength": contender.strength,
        "usual": contender.usual,
        "learning_rate": found["chosen"][usual],
        "at_edge": found["chosen"][usual] in (LEARNING_RATES[0], LEARNING_RATES[-1]),
        **{name: harness.mean_and_stderr(values) for name, values in at_usual.items()},
        **gains(at_usual, sft),
        "spread_of_gain": float(np.std(at_usual["expected_reward"] - sft["expected_reward"], ddof=1)),
        "diverged": float(np.mean(np.isnan(at_usual["expected_reward"]))),
        "worse_than_sft": harness.mean_and_stderr(worse.mean(axis=0)),
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
        "gain": harness.mean_and_stderr(true),
        "learned_gain": harness.mean_and_stderr(learned),
        "overestimate": harness.mean_and_stderr(learned - true),
        "kl_to_reference": harness.mean_and_stderr(measured["kl_to_reference"]),
    }


def print_results(summary: dict[str, Any]) -> None:
    """Prints the table of methods."""
    columns = ["method", "labels", "samples", "steps", "ms per run", "learning rate", "reward", "gain over SFT"]
    columns += ["spread", "KL", "model's gain", "worse than SFT"]
    rows = [row_of(entry, summary["num_seeds"]) for entry in summary["methods"]]
    harness.print_table("DPO and RLHF, means over worlds and 95% intervals", columns, rows)
    untrained = {name: entry for name, entry in summary["baseline_gains"].items() if entry["gain"]["mean"].ndim == 0}
    harness.print_table(
        "Without training",
        ["policy", "gain over SFT", "KL", "model's gain"],
        [
            [
                name,
                harness.interval(e["gain"], summary["num_seeds"]),
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
        harness.interval(entry["gain"], num_seeds),
        f"{entry['spread_of_gain']:.3f}",
        f"{entry['kl_to_reference']['mean']:.3f}",
        f"{entry['learned_gain']['mean']:.3f}",
        f"{entry['worse_than_sft']['mean']:.0%}",
    ]


def save_figures(summary: dict[str, Any], out: Path) -> None:
    """Draws reward against KL, overoptimisation, and what the learning rate does."""
    methods, known = summary["methods"], summary["baseline_gains"]
    learned_frontier = points(known["frontier of the reward model"])
    bounds = {"exact frontier": points(known["frontier"]), "reward model, maximised exactly": learned_frontier}
    judges = {
        title: {
            entry["name"].removesuffix(", reward model"): points(entry["by_strength"])
            for entry in methods
            if entry["judge"] in which and entry["name"] not in IMITATION
        }
        for title, which in PANELS.items()
    }
    judges["by the reward model"]["best of n"] = points(known["best of n, reward model"])
    figure = figures.rlhf_frontier(judges, bounds, limits=(1.5, -0.05))
    harness.save_figure(figure, out / "frontier.png")

    courses = {name.removesuffix(", reward model"): points(entry) for name, entry in summary["courses"].items()}
    courses |= {"best of n": points(known["best of n, reward model"]), "exact maximum": learned_frontier}
    harness.save_figure(figures.overoptimisation(courses, largest_kl=1.4), out / "overoptimisation.png")

    rates = {
        name: {
            entry["name"]: np.array([row(each) for each in entry["by_rate"]])
            for entry in methods
            if entry["name"] not in IMITATION
        }
        for name, row in {"gains": lambda e: e["gain"]["mean"], "worse": lambda e: e["worse_than_sft"]}.items()
    }
    harness.save_figure(figures.learning_rates(summary["learning_rates"], **rates), out / "learning_rates.png")


def points(entry: Any) -> figures.Points:
    """Means over seeds, of one entry with arrays or of a list of entries."""
    names = ("kl_to_reference", "gain", "learned_gain")
    if isinstance(entry, dict):
        return figures.Points(*(np.asarray(entry[name]["mean"]) for name in names))
    return figures.Points(*(np.array([each[name]["mean"] for each in entry]) for name in names))


def main(options: Options) -> None:
    """Compares the methods and writes the results."""
    harness.check_seeds(options.seed, options.num_seeds + options.num_tuning_seeds)
    with harness.clear_errors():
        checks.size("--num-seeds", options.num_seeds, at_least=2)
        checks.size("--num-tuning-seeds", options.num_tuning_seeds)
    out = harness.output_folder(options.out)
    harness.enable_compilation_cache()
    watch, start = harness.Stopwatch(), time.perf_counter()
    summary = summarise(compare(options, watch))
    seconds = {"total": time.perf_counter() - start, "compile": watch.compile, "run": watch.run}
    sizes = {name: getattr(options, name) for name in ("seed", "num_seeds", "num_tuning_seeds")}
    harness.save_summary({**sizes, "betas": BETAS, **summary, **harness.provenance(**seconds)}, out)
    save_figures(summary, out)
    print_results(summary)
    harness.console.print(
        f"{seconds['total']:.0f} s in all. {THREADS} threads spent {watch.compile:.0f} s on tracing and on waiting for "
        f"the compiler, and {watch.run:.0f} s on running. Figures and summary.json are in {out}."
    )


if __name__ == "__main__":
    main(harness.parse(Options))
