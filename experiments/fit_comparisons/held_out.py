"""How well strengths predict votes that they were not fitted on."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from dpo_jax import votes
from dpo_jax.fast.shuffle import permutation
from dpo_jax.intervals import half_width
from experiments.fit_comparisons.ranking import Model

BINS = np.linspace(0.5, 1.0, 6)
"""Edges of the bins of predicted probabilities."""


class Split(NamedTuple):
    """Rows of the votes that are fitted, and of those held out."""

    training: np.ndarray
    held_out: np.ndarray


def split(key: Any, num_votes: int, share: float) -> Split:
    """Divides votes at random.

    Raises:
      ValueError: one part would be empty.
    """
    num_held_out = round(share * num_votes)
    if num_held_out in (0, num_votes):
        raise ValueError(
            f"--held-out {share} of {num_votes} comparisons leaves none to fit, or none to test on; "
            "--held-out 0 does without a test"
        )
    order = np.asarray(permutation(key, num_votes))
    return Split(order[num_held_out:], order[:num_held_out])


class Predictions(NamedTuple):
    """What a fit says about votes.

    Attributes:
      margins: log-odds of the chosen response.
      losses: negative log-likelihoods (nats).
      right: 1 if the stronger response was chosen, 0 if not, 1/2 for a tie and for equal strengths.
    """

    margins: Any
    losses: Any
    right: Any


def predict(fitted: votes.Fit, ballots: votes.Votes, model: Model) -> Predictions:
    """Predicts votes."""
    chosen, rejected = ballots.responses
    ties = np.zeros(len(chosen), bool) if ballots.ties is None else ballots.ties
    first = 0 if ballots.first is None else ballots.first
    margins = fitted.strengths[chosen] - fitted.strengths[rejected] + first * fitted.first
    losses = -np.asarray(model.likelihood(jnp.asarray(margins), jnp.asarray(ties), jnp.asarray(fitted.ties)))
    return Predictions(margins, losses, np.where(ties, 0.5, 0.5 + 0.5 * np.sign(margins)))


def evaluate(contest: votes.Entrants, parts: Split, model: Model) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Fits one part of the votes, and predicts the other.

    The majority rule predicts what most of the fitted votes on the same two responses said; a pair that was not among
    them, and a draw, counts as half predicted.

    Returns:
      The test: `num_training`, `num_held_out`; `accuracy`, `majority_accuracy`, their difference `gain` and `log_loss`,
      each with `mean` and `stderr` over the held-out votes; `calibration`. And the history: what training and held-out
      votes say after 0, 1, 2, ... steps of the fit.
    """
    num = len(contest.groups)
    training, held_out = (_rows(contest.votes, rows) for rows in parts)
    refit = partial(votes.fit, num_responses=num, prior=model.prior, model=model.likelihood)
    distinct = jax.tree.map(jnp.asarray, votes.tally(training)[0])
    steps = int(refit(distinct).steps)
    history: dict[str, list[float]] = {}
    for max_steps in range(steps + 1):
        fitted = jax.device_get(refit(distinct, max_steps=max_steps))
        for prefix, part in (("", training), ("held_out_", held_out)):
            found = predict(fitted, part, model)
            for name, values in (("loss", found.losses), ("accuracy", found.right), ("reward_margin", found.margins)):
                history.setdefault(prefix + name, []).append(float(np.average(values, weights=part.weights)))
    majority = _majority(training, held_out, num)
    test = {
        "num_training": len(parts.training),
        "num_held_out": len(parts.held_out),
        "accuracy": _mean_and_stderr(found.right, held_out.weights),
        "majority_accuracy": _mean_and_stderr(majority, held_out.weights),
        "gain": _mean_and_stderr(found.right - majority, held_out.weights),
        "log_loss": _mean_and_stderr(found.losses, held_out.weights),
        "calibration": calibration(found),
    }
    return test, history


def calibration(predictions: Predictions) -> list[dict[str, float]]:
    """How often the favourite won, by the predicted probability: mean of the predictions, share, and its interval."""
    probabilities = expit(np.abs(predictions.margins.astype(float)))
    bins = np.clip(np.searchsorted(BINS, probabilities, side="right") - 1, 0, len(BINS) - 2)
    found = []
    for number in np.unique(bins):
        inside = bins == number
        share, votes_inside = float(predictions.right[inside].mean()), int(inside.sum())
        stderr = np.std(predictions.right[inside], ddof=1) / np.sqrt(votes_inside) if votes_inside > 1 else np.nan
        found.append(
            {
                "predicted": float(probabilities[inside].mean()),
                "observed": share,
                "half_width": float(half_width(stderr, votes_inside)),
                "votes": votes_inside,
            }
        )
    return found


def _rows(ballots: votes.Votes, rows: np.ndarray) -> votes.Votes:
    return jax.tree.map(lambda leaf: leaf[rows], ballots)


def _majority(training: votes.Votes, held_out: votes.Votes, num: int) -> np.ndarray:
    """How far each held-out vote agrees with the majority of the fitted ones: 1, 1/2 or 0."""

    def sides(part: votes.Votes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen, rejected = (np.asarray(side, np.int64) for side in part.responses)
        sign = np.where(chosen < rejected, 1.0, -1.0)
        sign = sign if part.ties is None else np.where(part.ties, 0.0, sign)
        weights = np.ones(len(chosen)) if part.weights is None else part.weights
        return np.minimum(chosen, rejected) * num + np.maximum(chosen, rejected), sign, weights

    pair, sign, weights = sides(training)
    seen, which = np.unique(pair, return_inverse=True)
    ahead, total = np.bincount(which, sign * weights), np.bincount(which, weights)
    ahead = np.where(np.abs(ahead) > 1e-6 * total, np.sign(ahead), 0.0)  # not if it is a rounding error of weights
    pair, sign, _ = sides(held_out)
    place = np.clip(np.searchsorted(seen, pair), 0, len(seen) - 1)
    return 0.5 + 0.5 * sign * np.where(seen[place] == pair, ahead[place], 0.0)


def _mean_and_stderr(values: np.ndarray, weights: Any) -> dict[str, float]:
    """The weighted mean, and its standard error if the values are independent."""
    shares = np.ones(len(values)) if weights is None else weights
    shares = shares / shares.sum()
    mean = float(shares @ values)
    return {"mean": mean, "stderr": float(np.sqrt(np.sum((shares * (values - mean)) ** 2)))}
