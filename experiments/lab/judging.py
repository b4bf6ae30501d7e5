"""How a claim is judged: an effect, its interval over worlds, and one of five words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.intervals import half_width
from experiments.lab.claim_figure import Measured
from experiments.lab.statistics import mean_and_stderr

NOTHING = 0.01
"""The smallest difference in reward that matters. Tuning alone moves a result by 0.007: that is how far apart two
losses were that are the same in other units (`experiments/loss_variants.py`)."""
HOLDS, SLIGHT, NO_DIFFERENCE, FAILS, OPEN = "holds", "holds slightly", "no difference", "fails", "not shown"


class Estimate(NamedTuple):
    """A mean over worlds, and half the width of its 95 % interval."""

    mean: float
    half: float

    @property
    def interval(self) -> list[float]:
        """Its ends."""
        return [self.mean - self.half, self.mean + self.half]


@dataclass(frozen=True)
class Claim:
    """One claim and its verdict.

    Attributes:
      claim: the sentence.
      quantity: the effect, in words.
      effect: its mean and interval.
      verdict: one of the five words, or on which condition it depends.
      panels: what its figure shows; see `figure.draw`.
      xlabel: and over what.
      log: whether that axis is logarithmic.
      papers: where the claim is made: arXiv numbers.
      details: other numbers that belong to it, by name.
    """

    claim: str
    quantity: str
    effect: Estimate
    verdict: str
    panels: Mapping[str, Mapping[str, Measured]]
    xlabel: str
    details: Mapping[str, Estimate | float] = field(default_factory=dict)
    log: bool = False
    papers: tuple[str, ...] = ()


def estimate(values: Any) -> Estimate:
    """Over the last axis, worlds; NaN if any training diverged."""
    values = np.asarray(values, np.float64)
    statistics = mean_and_stderr(values)
    return Estimate(float(statistics["mean"]), float(half_width(statistics["stderr"], len(values))))


def verdict(effect: Estimate, *, matters: float = 0.0) -> str:
    """The word for a claim that an effect is positive.

    Args:
      effect: with its interval.
      matters: the smallest effect that matters.

    Returns:
      - `holds`: the interval lies above what matters;
      - `holds slightly`: it lies above zero, but not all of it above what matters;
      - `no difference`: it lies within what matters on both sides of zero;
      - `fails`: it lies below zero, and not all of it within what matters;
      - `not shown`: anything else.
    """
    low, high = effect.interval
    if low > matters:
        return HOLDS
    if low > 0:
        return SLIGHT
    if -matters < low and high < matters:
        return NO_DIFFERENCE
    return FAILS if high < 0 else OPEN


def equivalence(effect: Estimate, *, within: float = NOTHING) -> str:
    """The word for a claim that there is no difference, or none that matters."""
    low, high = effect.interval
    if low > -within and high < within:
        return HOLDS
    return FAILS if low > within or high < -within else OPEN


def by_condition(effects: Mapping[str, Estimate], condition: str = "the labels", *, matters: float = NOTHING) -> str:
    """A word if all conditions agree; otherwise each word, with the conditions in which it is right."""
    words = {name: verdict(effect, matters=matters) for name, effect in effects.items()}
    return in_words(words, f"depends on {condition}")


def in_words(words: Mapping[str, str], otherwise: str = "depends") -> str:
    """One word if all agree; otherwise each word with what it belongs to."""
    names: dict[str, list[str]] = {}
    for name, word in words.items():
        names.setdefault(word, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return f"{otherwise}: " + ", ".join(f"{word} ({'; '.join(where)})" for word, where in names.items())


def series(x: Any, rows: Any) -> Measured:
    """A point for each row of values over worlds."""
    estimates = [estimate(row) for row in rows]
    return Measured(list(x), [e.mean for e in estimates], [e.half for e in estimates])
