"""Every preference loss in the same worlds, each tuned over its own hyperparameters, under clean and noisy labels.

Each method trains from the same SFT policies for equally many optimizer steps: on 1,800 comparisons, the same read as
3,600 labels, as many fresh labels, or 600 rankings of four. Hyperparameters, the learning rate among them, are chosen
in other worlds by the exact expected reward (not by the regret, which is reported beside it): the best of equally many
candidates, whatever the number of hyperparameters. All methods try the same learning rates and betas.

The SFT policy imitates demonstrators who show good responses more often, so it knows something of the reward, and a
loss can gain by sharpening it without looking at a label. Two controls tell: the same runs with coin tosses for labels,
and the SFT policy sharpened by hand.

A program is compiled once for each method: it takes a chunk of runs, whatever their seeds, labels and hyperparameters.
"""

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dpo_jax import checks, figures, toy, train
from dpo_jax.intervals import half_width
from dpo_jax.types import Numeric, Params
from experiments import harness, notebook
from experiments.methods import METHODS, Feedback, Method, Setup
from experiments.notebook import BETA, POLICY
from experiments.tuning import RUNS_PER_CHUNK, Counter, Plan, Range, Runner, Task, at_edge, candidates, tune

THREADS = 2
STEPS_PER_EPOCH, NUM_EPOCHS = 29, 50
NUM_RANKED = 4
LEARNING_RATE = Range(1e-5, 1e-2)
LABELLED = ("dpo", "ipo", "simpo", "kto", "orpo", "cpo", "nca", "apo-down", "preferred fine-tuning")
"""Names to be written into the figure of reward against KL."""
GAINS = {"Gain over the SFT policy": "gain", "Gain from labels, over coin tosses": "gain_from_labels"}
"""What is drawn of each loss."""


class Setting(NamedTuple):
    """How feedback comes about.

    Attributes:
      temperature, flip_probability: how people judge, see `toy.preference_probability`.
      on_policy: 1 if they judge what the SFT policy responds, 0 if they judge uniform responses.
    """

    temperature: float = 1.0
    flip_probability: float = 0.0
    on_policy: float = 0.0


SETTINGS = {
    "clean": Setting(),
    "noisy": Setting(flip_probability=0.2),
    "deterministic": Setting(temperature=0.0),
    "on-policy": Setting(on_policy=1.0),
}
"""People judge as Bradley and Terry have it; a fifth of their labels is flipped; they are always right; they judge
responses of the SFT policy."""
CONTROLS = {
    "uniform, coin tosses": Setting(flip_probability=0.5),
    "on-policy, coin tosses": Setting(flip_probability=0.5, on_policy=1.0),
}
"""The same responses, with coin tosses for labels."""


@dataclass(frozen=True)
class Options:
    """Every preference loss, tuned, in the same worlds: exact reward, KL and regret with confidence intervals."""

    seed: int = 0
    """The first seed to report; the others follow it. Tuning uses the seeds after them."""
    num_seeds: int = 64
    """How many worlds to report, each with its own data, network and training."""
    num_tuning_seeds: int = 64
    """How many other worlds to choose hyperparameters in: all candidates in a quarter of them, the best four in all."""
    num_candidates: int = 32
    """How many sets of hyperparameters to try for each loss."""
    losses: tuple[str, ...] = ()
    """Names of the methods to compare (see `experiments/methods.py`); all if none are given."""
    out: Path = Path("results/loss_variants")
    """Folder for summary.json and the figures."""


class Start(NamedTuple):
    """What every run in one world and setting starts from."""

    key: Any
    world: toy.World
    params: Params
    log_probs: Float[Array, "prompts responses"]
    feedback: Feedback


def prepare(seed: Int[Array, ""], setting: Setting) -> Start:
    """A world, its SFT policy, and what people say there; the same world and policy whatever they say."""
    start_key, pair_key, label_key, ranking_key, key = jax.random.split(jax.random.key(seed), 5)
    start = notebook.prepare(start_key)
    world, num = start.world, notebook.NUM_PREFERENCES
    judged: dict[str, Any] = {
        "log_probs": jax.nn.log_softmax(setting.on_policy * start.sft.log_probs),
        "temperature": setting.temperature,
        "flip_probability": setting.flip_probability,
    }
    feedback = Feedback(
        pairs=toy.sample_preferences(pair_key, world, num=num, **judged),
        labels=toy.sample_labels(label_key, world, num=2 * num, **judged),
        rankings=toy.sample_rankings(ranking_key, world, num=num // (NUM_RANKED - 1), num_ranked=NUM_RANKED, **judged),
    )
    log_prob = toy.log_prob_fn(POLICY, world.embeddings)
    scored = Feedback(*(train.with_reference(log_prob, start.sft.params, data) for data in feedback))
    return Start(jax.random.key_data(key), world, start.sft.params, start.sft.log_probs, scored)


def run(method: Method, start: Start, hyperparameters: dict[str, Numeric]) -> dict[str, Array]:
    """Trains by one method and measures the policy exactly."""
    train_key, method_key = jax.random.split(jax.random.wrap_key_data(start.key))
    embeddings = start.world.embeddings
    log_prob, table = toy.log_prob_fn(POLICY, embeddings), toy.table_fn(POLICY, embeddings)
    setup = Setup(method_key, log_prob, table, start.params, start.log_probs)
    tuned = {name: value for name, value in hyperparameters.items() if name != "learning_rate"}
    data = method.data(start.feedback)
    batch_size = -(-len(data.prompts) // STEPS_PER_EPOCH)
    params, history = train.fit(
        train_key,
        start.params,
        data,
        objective=method.objective(setup, tuned),
        optimizer=optax.adam(hyperparameters["learning_rate"]),
        num_epochs=NUM_EPOCHS,
        batch_size=batch_size,
    )
    finished = history["step"][-1] == NUM_EPOCHS * -(-len(data.prompts) // batch_size)
    measured = measure(start, table(params))
    return {name: jnp.where(finished, value, jnp.nan) for name, value in measured.items()}


def measure(start: Start, log_probs: Float[Array, "prompts responses"]) -> dict[str, Array]:
    """What became of the policy: all exact, but for the change of the chosen, which is that of the training pairs.

    `accuracy` is that of the policy, which learnt from demonstrations too; `implicit_accuracy` is that of its change.
    """
    world, pairs = start.world, start.feedback.pairs
    return {
        **toy.evaluate(log_probs, start.log_probs, world.rewards),
        "regret": jnp.mean(toy.regret(log_probs, start.log_probs, world.rewards, beta=BETA)),
        "accuracy": jnp.mean(toy.ranking_accuracy(log_probs, world.rewards)),
        "implicit_accuracy": jnp.mean(toy.ranking_accuracy(log_probs - start.log_probs, world.rewards)),
        "chosen_logp_change": jnp.mean(toy.lookup(log_probs - start.log_probs, pairs.prompts, pairs.responses.chosen)),
    }


def baseline(start: Start) -> dict[str, Any]:
    """What there is to compare with: the SFT policy, the optimum, the exact frontier, and the SFT policy sharpened.

    To sharpen is to raise probabilities to a power, which takes no label.
    """
    rewards = start.world.rewards
    return {
        "sft": measure(start, start.log_probs),
        "optimum": measure(start, toy.optimal_policy(start.log_probs, rewards, beta=BETA)),
        "frontier": toy.frontier(start.log_probs, rewards, jnp.geomspace(0.01, 20.0, 40)),
        "sharpened": jax.vmap(
            lambda power: toy.evaluate(jax.nn.log_softmax(power * start.log_probs), start.log_probs, rewards)
        )(jnp.geomspace(1.0, 30.0, 20)),
    }


def compare(options: Options, methods: Sequence[Method], watch: harness.Stopwatch) -> dict[str, Any]:
    """Tunes and runs all methods in all settings.

    Returns:
      For each setting the baseline, and for each method what was measured, arrays `[num_seeds]`, and the
      hyperparameters that were chosen.
    """
    num_all = options.num_seeds + options.num_tuning_seeds
    seeds = np.arange(options.seed, options.seed + num_all).astype(np.uint32)
    plan = Plan(np.arange(options.num_seeds), np.arange(options.num_seeds, num_all), options.num_candidates)
    num_runs = len(methods) * len(SETTINGS) * (plan.num_tuning_runs + 2 * options.num_seeds)
    harness.console.print(
        f"{len(methods)} losses on feedback of {len(SETTINGS)} kinds: {num_runs:,} runs in {options.num_seeds:,} "
        f"worlds, and {options.num_tuning_seeds:,} more for tuning. {harness.FIRST_START}"
    )
    starts = prepare_all(seeds, watch)
    with harness.progress("runs", num_runs, watch) as show_done, harness.threads(THREADS) as threads:
        runner = Runner(starts, watch, Counter(show_done))
        learned = list(threads.map(partial(tune_and_run, runner, plan), methods))
    baselines = jax.jit(jax.vmap(baseline))
    return {
        setting: {
            "baseline": jax.device_get(baselines(jax.tree.map(lambda leaf: leaf[plan.reported], starts[setting]))),
            "methods": [results[setting] for results in learned],
        }
        for setting in SETTINGS
    }


def prepare_all(seeds: np.ndarray, watch: harness.Stopwatch) -> dict[str, Start]:
    """For each setting, the starts of all seeds, as NumPy arrays."""
    chunks = [np.resize(seeds[i : i + RUNS_PER_CHUNK], RUNS_PER_CHUNK) for i in range(0, len(seeds), RUNS_PER_CHUNK)]
    program = watch.compiled(jax.vmap(prepare, in_axes=(0, None)), chunks[0], Setting())
    with harness.waiting("Preparing worlds and SFT policies"):
        return {
            name: jax.tree.map(
                lambda *parts: np.concatenate(parts)[: len(seeds)], *(program(chunk, setting) for chunk in chunks)
            )
            for name, setting in (SETTINGS | CONTROLS).items()
        }


def tune_and_run(runner: Runner, plan: Plan, method: Method) -> dict[str, dict[str, Any]]:
    """For each setting: chooses among candidates in the tuning worlds, and runs the best in those to report."""
    tried = candidates(ranges_of(method), plan.num_candidates)
    program = runner.compiled(partial(run, method), tried[0])
    results = {}
    for setting in SETTINGS:
        chosen = tune(runner, program, setting, tried, plan, score="expected_reward")
        repeated = [chosen] * len(plan.reported)
        measured = runner(program, Task(setting, plan.reported, repeated))
        tossed = runner(program, Task(control(setting), plan.reported, repeated))
        results[setting] = {
            "hyperparameters": chosen,
            **measured,
            "expected_reward_of_coin_tosses": tossed["expected_reward"],
        }
    return results


def ranges_of(method: Method) -> dict[str, Range]:
    """What to tune: the learning rate first and beta second, so that all methods try the same of these."""
    return {"learning_rate": LEARNING_RATE, **method.ranges}


def control(setting: str) -> str:
    """The name of the starts in which coins are tossed for the labels of a setting."""
    return f"{'on-policy' if SETTINGS[setting].on_policy else 'uniform'}, coin tosses"


def summarise(results: dict[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    """Mean and standard error over seeds; gains (over SFT, from labels, over DPO) are paired by seed."""
    entries, baselines = [], {}
    for setting, found in results.items():
        baselines[setting] = jax.tree.map(harness.mean_and_stderr, found["baseline"])
        sft = found["baseline"]["sft"]["expected_reward"]
        dpo = next((r for r, m in zip(found["methods"], methods, strict=True) if m.name == "dpo"), None)
        for method, result in zip(methods, found["methods"], strict=True):
            measured = {name: values for name, values in result.items() if name != "hyperparameters"}
            reward = measured["expected_reward"]
            measured["gain"] = reward - sft
            measured["gain_from_labels"] = reward - measured.pop("expected_reward_of_coin_tosses")
            if dpo is not None:
                measured["gain_over_dpo"] = reward - dpo["expected_reward"]
            entries.append(
                {
                    "name": method.name,
                    "family": method.family,
                    "setting": setting,
                    "hyperparameters": result["hyperparameters"],
                    "at_edge": at_edge(ranges_of(method), result["hyperparameters"]),
                    **{name: harness.mean_and_stderr(values) for name, values in measured.items()},
                    "diverged": float(np.mean(np.isnan(reward))),
                }
            )
    return {"num_seeds": len(sft), "losses": entries, "baselines": baselines}


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
        harness.print_table(
            f"{setting} labels, mean and 95% interval",
            ["loss", *(columns[name] for name in shown)],
            [[entry["name"], *(harness.interval(entry[name], num) for name in shown)] for entry in entries],
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
    harness.save_figure(figures.loss_gains(families, gains), out / "gains.png")
    panels = {
        setting.capitalize(): {
            **{
                curve: {name: values["mean"] for name, values in baseline[curve].items()}
                for curve in ("frontier", "sharpened")
            },
            "sft_reward": float(baseline["sft"]["expected_reward"]["mean"]),
            "points": points[setting],
        }
        for setting, baseline in summary["baselines"].items()
    }
    harness.save_figure(figures.loss_frontiers(panels, families, labelled=LABELLED), out / "frontiers.png")


def chosen_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, or all of them."""
    known = {method.name: method for method in METHODS}
    with harness.clear_errors():
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
                raise ValueError(f"--losses: there is no {name!r}; perhaps {', '.join(map(repr, close))}")
    return [known[name] for name in names] if names else list(METHODS)


def main(options: Options) -> None:
    """Compares the losses and writes the results."""
    harness.check_seeds(options.seed, options.num_seeds + options.num_tuning_seeds)
    with harness.clear_errors():
        checks.size("--num-seeds", options.num_seeds)
        checks.size("--num-tuning-seeds", options.num_tuning_seeds)
        checks.size("--num-candidates", options.num_candidates)
    methods = chosen_methods(options.losses)
    out = harness.output_folder(options.out)
    harness.enable_compilation_cache()
    watch, start = harness.Stopwatch(), time.perf_counter()
    summary = summarise(compare(options, methods, watch), methods)
    seconds = {"total": time.perf_counter() - start, "compile": watch.compile, "run": watch.run}
    save_figures(summary, out)
    sizes = {name: getattr(options, name) for name in ("seed", "num_seeds", "num_tuning_seeds", "num_candidates")}
    settings = {name: setting._asdict() for name, setting in SETTINGS.items()}
    harness.save_summary({**sizes, "settings": settings, **summary, **harness.provenance(**seconds)}, out)
    print_results(summary)
    harness.console.print(
        f"{seconds['total']:.0f} s in all. {THREADS} threads spent {watch.compile:.0f} s on tracing and on waiting for "
        f"the compiler, and {watch.run:.0f} s on running. Figures and summary.json are in {out}."
    )


if __name__ == "__main__":
    main(harness.parse(Options))
