"""Your own comparisons: learns which responses people prefer, from a file, by Direct Preference Optimization.

The policy is a table with a logit for each response to each prompt, the reference is uniform over the responses that
were compared. With beta = 1 the ratio of two probabilities is the odds that the one is preferred to the other.

Every accuracy counts a tie as half right, as a coin toss between the two would be. (The accuracies of `train`'s
objectives, which follow the notebook, count it as wrong.) Those of the history are taken after each epoch.
"""

import csv
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float

from dpo_jax import checks, figures, losses, toy, train
from dpo_jax.fast.shuffle import permutation
from dpo_jax.types import Metrics, Preferences
from experiments.lab import commands, console, devices, files

PROMPTS_SHOWN = 5
RESPONSES_SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Learns which responses people prefer, from a file of your own comparisons."""

    file: Annotated[Path, tyro.conf.Positional]
    """CSV, JSON Lines or Parquet with columns prompt, chosen, rejected and optionally weight."""
    seed: int = 0
    """Decides which comparisons are held out, and the order of training."""
    beta: float = 1.0
    """Strength of the pull towards the uniform reference. 1 makes probabilities readable as odds."""
    label_smoothing: float = 0.0
    """Assumed probability that a comparison is recorded the wrong way round."""
    learning_rate: float = 0.1
    """Where the learning rate starts; it falls to zero along a cosine."""
    num_epochs: int = 100
    """Passes over the training comparisons."""
    batch_size: int = 256
    """Comparisons per optimizer step."""
    held_out: float = 0.2
    """Share of the comparisons that is kept for the test."""
    out: Path = Path("results/fit_comparisons")
    """Folder for the policy, its ranking, the training figure and summary.json."""


def main(options: Options) -> None:
    """Reads the comparisons, fits a policy, reports how good it is, and saves it."""
    with commands.clear_errors():
        check(options)
        comparisons = toy.read_comparisons(options.file)
        training, held_out = split(options, comparisons.preferences)
    if comparisons.unused_columns:
        console.say(f"Columns that are not used: {', '.join(map(repr, comparisons.unused_columns))}.")
    out = files.output_folder(options.out)
    devices.enable_compilation_cache()

    start = time.perf_counter()
    with console.counting("epochs", options.num_epochs) as show_done, commands.clear_errors(train.NonFiniteError):
        policy, history = fit(options, comparisons.names, training, held_out, show_done)
    seconds = time.perf_counter() - start
    test = evaluate(policy, training, held_out)
    ranking = rank(policy, training, options.beta)
    files.save(out / "policy.npz", lambda path: toy.save_policy(path, policy))
    files.save(out / "ranking.csv", lambda path: write_ranking(path, ranking))
    files.save_figure(figures.training(history), out / "training.png")
    summary = {"file": options.file.name, "beta": options.beta, "test": test, "history": history}
    files.save_summary({**summary, **files.provenance(compile_and_run=seconds)}, out)
    print_test(test)
    print_ranking(ranking)
    console.say(f"Saved policy.npz, ranking.csv, training.png and summary.json in {out}.")


def check(options: Options) -> None:
    """Raises an error on options that make no sense, before anything is read or computed."""
    commands.check_seed(options.seed)
    checks.interval("--beta", options.beta, "(0, inf)")
    checks.interval("--label-smoothing", options.label_smoothing, "[0, 0.5)")
    checks.interval("--learning-rate", options.learning_rate, "(0, inf)")
    checks.size("--num-epochs", options.num_epochs)
    checks.size("--batch-size", options.batch_size)
    if not 0 < options.held_out < 1:
        raise ValueError(f"--held-out must lie between 0 and 1, got {options.held_out}")


def split(options: Options, preferences: Preferences) -> tuple[Preferences, Preferences]:
    """Divides comparisons at random into those for training and those held out."""
    num = len(preferences.prompts)
    num_held_out = round(options.held_out * num)
    if num_held_out in (0, num):
        raise ValueError(
            f"--held-out {options.held_out} of {num} comparisons leaves none to train on, or none to test on"
        )
    order = np.asarray(permutation(jax.random.key(options.seed), num))
    held_out, training = order[:num_held_out], order[num_held_out:]
    return _rows(preferences, training), _rows(preferences, held_out)


def fit(
    options: Options, names: toy.Names, training: Preferences, held_out: Preferences, show_done: Any
) -> tuple[toy.NamedPolicy, Metrics]:
    """Trains a table policy; its history also follows the held-out comparisons."""
    compared = jnp.asarray(names.compared)
    table = partial(log_probs, compared)

    def log_prob(logits: Array, prompts: Array, responses: Any) -> Any:
        return toy.lookup(table(logits), prompts, responses)

    uniform = jnp.zeros(compared.shape)
    training, held_out = (train.with_reference(log_prob, uniform, data) for data in (training, held_out))
    dpo = train.preference_objective(
        log_prob, losses.dpo_loss, beta=options.beta, label_smoothing=options.label_smoothing
    )

    def objective(logits: Array, batch: Preferences) -> tuple[Array, Metrics]:
        loss, metrics = dpo(logits, batch)
        return loss, {name: value for name, value in metrics.items() if name != "accuracy"}

    def accuracy(logits: Array, data: Preferences) -> Array:
        chosen, rejected = log_prob(logits, data.prompts, data.responses)
        return jnp.average(0.5 + 0.5 * jnp.sign(chosen - rejected), weights=data.weights)

    def metrics_after_epoch(logits: Array) -> Metrics:
        loss, metrics = objective(logits, held_out)
        metrics = {"loss": loss, **metrics, "accuracy": accuracy(logits, held_out)}
        held_out_metrics = {f"held_out_{name}": jnp.asarray(value) for name, value in metrics.items()}
        return {"accuracy": accuracy(logits, training), **held_out_metrics}

    steps = options.num_epochs * -(-len(training.prompts) // options.batch_size)
    logits, history = train.fit(
        jax.random.key(options.seed + 1),
        uniform,
        training,
        objective=objective,
        optimizer=optax.adam(optax.cosine_decay_schedule(options.learning_rate, steps)),
        num_epochs=options.num_epochs,
        batch_size=options.batch_size,
        evaluate=metrics_after_epoch,
        report=lambda epochs_done, _: show_done(epochs_done),
    )
    learnt, reference = jax.device_get((table(logits), table(uniform)))
    return toy.NamedPolicy(names, learnt, reference), jax.device_get(history)


def log_probs(compared: Array, logits: Float[Array, "prompts responses"]) -> Float[Array, "prompts responses"]:
    """The policy as a table of log-probabilities: softmax over the responses that were compared."""
    return jax.nn.log_softmax(jnp.where(compared, logits, -jnp.inf))


def evaluate(policy: toy.NamedPolicy, training: Preferences, held_out: Preferences) -> dict[str, Any]:
    """How often held-out comparisons are predicted: by the policy, by a majority vote, by tossing a coin.

    The majority rule predicts what most training comparisons of the same two responses said. A tie, but for rounding
    errors of the weights, and a pair never seen in training, counts as half predicted.

    Returns:
      `num_training`, `num_held_out`; and `accuracy`, `majority_accuracy` and their difference `gain`, each with `mean`
      and `stderr` over the held-out comparisons.
    """
    votes: Counter[tuple[int, int, int]] = Counter()
    for comparison, weight in zip(_triples(training), _weights(training), strict=True):
        votes[comparison] += weight
    score = [policy.log_probs[p, c] - policy.log_probs[p, r] for p, c, r in _triples(held_out)]
    majority = [_majority(votes[p, c, r], votes[p, r, c]) for p, c, r in _triples(held_out)]
    predicted, predicted_by_majority = (0.5 + 0.5 * np.sign(margins) for margins in (score, majority))
    weights = _weights(held_out)
    return {
        "num_training": len(training.prompts),
        "num_held_out": len(held_out.prompts),
        "accuracy": _weighted_mean_and_stderr(predicted, weights),
        "majority_accuracy": _weighted_mean_and_stderr(predicted_by_majority, weights),
        "gain": _weighted_mean_and_stderr(predicted - predicted_by_majority, weights),
    }


class Ranked(NamedTuple):
    """A response in the ranking of its prompt.

    Attributes:
      prompt, rank, response: the best response has rank 1.
      probability: under the learnt policy.
      implicit_reward: beta times its log-ratio to the reference.
      wins, losses: summed weights of the training comparisons in which it was chosen, or rejected.
    """

    prompt: str
    rank: int
    response: str
    probability: float
    implicit_reward: float
    wins: float
    losses: float


def rank(policy: toy.NamedPolicy, training: Preferences, beta: float) -> list[Ranked]:
    """The learnt ranking of the responses to each prompt, prompts with the most comparisons first."""
    wins, losses = np.zeros((2, *policy.log_probs.shape))
    for side, ids in ((wins, training.responses.chosen), (losses, training.responses.rejected)):
        np.add.at(side, (np.asarray(training.prompts), np.asarray(ids)), _weights(training))
    ranking = []
    for row in np.argsort(-wins.sum(axis=1), kind="stable"):
        responses = policy.names.responses[row]
        order = np.argsort(-policy.log_probs[row, : len(responses)], kind="stable")
        ranking += [
            Ranked(
                prompt=policy.names.prompts[row],
                rank=place,
                response=responses[column],
                probability=float(np.exp(policy.log_probs[row, column])),
                implicit_reward=float(beta * (policy.log_probs[row, column] - policy.reference_log_probs[row, column])),
                wins=float(wins[row, column]),
                losses=float(losses[row, column]),
            )
            for place, column in enumerate(order, start=1)
        ]
    return ranking


def print_test(test: dict[str, Any]) -> None:
    """Prints the held-out accuracies."""
    rows = {"policy, by DPO": "accuracy", "majority vote of the training comparisons": "majority_accuracy"}
    console.print_table(
        f"Predicting {test['num_held_out']:,} held-out comparisons, from {test['num_training']:,}",
        ["rule", "accuracy (a tie is half right)"],
        [
            *([rule, f"{test[name]['mean']:.1%} ± {test[name]['stderr']:.1%}"] for rule, name in rows.items()),
            ["coin toss", "50.0%"],
        ],
    )
    gain = test["gain"]
    console.say(f"The policy is ahead of the vote by {gain['mean']:+.1%} ± {gain['stderr']:.1%} (paired).")


def print_ranking(ranking: list[Ranked]) -> None:
    """Prints the best responses to the prompts that were compared most."""
    prompts = list(dict.fromkeys(entry.prompt for entry in ranking))
    for prompt in prompts[:PROMPTS_SHOWN]:
        entries = [entry for entry in ranking if entry.prompt == prompt]
        console.print_table(
            _shortened(prompt),
            ["response", "probability", "implicit reward", "wins", "losses"],
            [
                [
                    f"{entry.rank}. {_shortened(entry.response)}",
                    f"{entry.probability:.1%}",
                    f"{entry.implicit_reward:+.2f}",
                    f"{entry.wins:g}",
                    f"{entry.losses:g}",
                ]
                for entry in entries[:RESPONSES_SHOWN]
            ],
        )
        if len(entries) > RESPONSES_SHOWN:
            console.say(f"and {len(entries) - RESPONSES_SHOWN} more responses")
    if len(prompts) > PROMPTS_SHOWN:
        console.say(f"and {len(prompts) - PROMPTS_SHOWN} more prompts: see ranking.csv")


def write_ranking(path: Path, ranking: list[Ranked]) -> None:
    """Writes the ranking as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Ranked._fields, *ranking])


def _rows(preferences: Preferences, rows: np.ndarray) -> Preferences:
    """Some of the comparisons, their weights scaled to average 1 again."""
    part = jax.tree.map(lambda leaf: leaf[rows], preferences)
    return part if part.weights is None else part._replace(weights=part.weights / part.weights.mean())


def _triples(preferences: Preferences) -> list[tuple[int, int, int]]:
    columns = (preferences.prompts, *preferences.responses)
    return list(zip(*(np.asarray(column).tolist() for column in columns), strict=True))


def _weights(preferences: Preferences) -> np.ndarray:
    weights = np.ones(len(preferences.prompts)) if preferences.weights is None else preferences.weights
    return np.asarray(weights, np.float64)


def _majority(for_it: float, against: float) -> float:
    """How far one side is ahead; zero if that is a rounding error of weights in single precision."""
    return 0.0 if math.isclose(for_it, against, rel_tol=1e-6) else for_it - against


def _weighted_mean_and_stderr(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """The weighted mean, and its standard error when the values are independent."""
    mean = float(weights @ values / weights.sum())
    shares = weights / weights.sum()
    return {"mean": mean, "stderr": float(np.sqrt(np.sum((shares * (values - mean)) ** 2)))}


def _shortened(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


if __name__ == "__main__":
    main(commands.parse(Options))
