"""Rankings: one of all votes, and one for each category."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from dpo_jax import votes
from experiments.lab import console

MOST_FOR_CURVATURE = 2_000
"""The curvature is a table of all pairs; beyond this many responses, intervals come from the bootstrap."""

NUM_DRAWS = 4_000
"""Draws from the normal distribution that the curvature implies."""

LARGEST_MATRIX = 50
"""Matrices of win probabilities show this many of the strongest responses."""


@dataclass(frozen=True)
class Model:
    """How strengths are fitted.

    Attributes:
      prior: virtual votes of each response.
      likelihood: how ties count.
      bootstrap: whether intervals come from fits of redrawn votes, or from the curvature of the likelihood.
      num_fits: fits of redrawn votes.
      clusters: for each vote an id of those that are redrawn together, or `None`.
    """

    prior: float = 1.0
    likelihood: votes.LogLikelihood = votes.half_wins
    bootstrap: bool = False
    num_fits: int = 200
    clusters: Any = None


class Ranked(NamedTuple):
    """A response in a ranking.

    Attributes:
      response, rank: the strongest has rank 1.
      strength, stderr, low, high: above the average of its ranking (nats), its standard error and 95 % interval.
      rank_low, rank_high: the 95 % interval of the rank.
      wins, losses, ties: numbers of votes.
      better_than_next: the probability that it is stronger than the next one.
    """

    response: str
    rank: int
    strength: float
    stderr: float
    low: float
    high: float
    rank_low: int
    rank_high: int
    wins: int
    losses: int
    ties: int
    better_than_next: float


class Pairs(NamedTuple):
    """Pairs of entrants, the stronger first, with what was voted and what is fitted.

    Attributes:
      ones, others: ids of entrants.
      record: how often the first one won, lost and tied.
      fitted: the comparison by the fits.
    """

    ones: np.ndarray
    others: np.ndarray
    record: votes.Record
    fitted: votes.Comparison


class Contest:
    """Responses that compete in one or several rankings: the votes, the fit, and draws around it."""

    def __init__(
        self, key: Any, ballots: votes.Votes, responses: Sequence[str], groups: votes.Column, model: Model
    ) -> None:
        self.names, self.responses = groups.names, responses
        self.entrants = votes.entrants(ballots, groups.ids)
        self.num = len(self.entrants.groups)
        self.starts = np.searchsorted(self.entrants.groups, np.arange(len(self.names) + 1))
        settings: dict[str, Any] = {
            "prior": model.prior,
            "model": model.likelihood,
            "groups": jnp.asarray(self.entrants.groups),
        }
        unknown = without_maximum(self.entrants) if model.prior == 0 else np.zeros(self.num, bool)
        cast = without(self.entrants.votes, unknown)
        distinct = jax.tree.map(jnp.asarray, votes.tally(cast)[0])
        fitted = jax.device_get(votes.fit(distinct, self.num, **settings))
        if model.bootstrap or self.num > MOST_FOR_CURVATURE:
            with console.counting("fits", model.num_fits) as report:
                counts = {"num_fits": model.num_fits, "clusters": model.clusters, "report": report}
                draws = votes.bootstrap(key, cast, self.num, **counts, **settings)
        else:
            covariance = votes.covariance(distinct, self.num, fitted, **settings)
            draws = jax.device_get(votes.approximate(key, fitted, covariance, num_draws=NUM_DRAWS))
        self.fit, self.draws = (
            each._replace(strengths=np.where(unknown, np.nan, each.strengths)) for each in (fitted, draws)
        )
        self.order = np.lexsort((-self.fit.strengths, self.entrants.groups))

    def named(self, names: tuple[str, ...]) -> "Contest":
        """The same contest, with other names of its groups."""
        twin = copy(self)
        twin.names = names
        return twin

    def rankings(self) -> dict[str, list[Ranked]]:
        """The ranking of each group, best first."""
        low, high = votes.intervals(self.draws)
        stderr = self.draws.strengths.std(axis=0, ddof=1)
        rank_low, rank_high = votes.rank_intervals(self.draws, self.entrants.groups)
        size = np.bincount(self.entrants.groups)[self.entrants.groups]
        unknown = np.isnan(self.fit.strengths)
        place = votes.ranks(self.fit.strengths, self.entrants.groups)
        rank_low = np.where(unknown, 1, np.minimum(rank_low, place))
        rank_high = np.where(unknown, size, np.maximum(rank_high, place))
        record = votes.record(self.entrants.votes, self.num)
        better = votes.compare(self.fit, self.draws, self.order[:-1], self.order[1:]).better
        found: dict[str, list[Ranked]] = {}
        for name, begin, end in zip(self.names, self.starts[:-1], self.starts[1:], strict=True):
            found[name] = [
                Ranked(
                    response=self.responses[self.entrants.responses[i]],
                    rank=place - begin + 1,
                    strength=float(self.fit.strengths[i]),
                    stderr=float(stderr[i]),
                    low=float(low[i]),
                    high=float(high[i]),
                    rank_low=int(rank_low[i]),
                    rank_high=int(rank_high[i]),
                    wins=int(record.wins[i]),
                    losses=int(record.losses[i]),
                    ties=int(record.ties[i]),
                    better_than_next=float(better[place]) if place + 1 < end else float("nan"),
                )
                for place, i in enumerate(self.order[begin:end].tolist(), start=begin)
            ]
        return found

    def warnings(self) -> list[str]:
        """What the votes cannot say."""
        return votes.warnings_of(self.entrants, self.names, self.responses)

    def strongest(self, group: int) -> np.ndarray:
        """The entrants of a group that its matrices show, best first."""
        return self.order[self.starts[group] : self.starts[group + 1]][:LARGEST_MATRIX]

    def pairs(self) -> Pairs:
        """All pairs of the strongest responses of each group, and all that were compared; the stronger one first."""
        place = np.empty(self.num, np.int64)
        place[self.order] = np.arange(self.num)
        ballots = self.entrants.votes
        chosen, rejected = (place[side] for side in ballots.responses)
        voted = np.minimum(chosen, rejected) * self.num + np.maximum(chosen, rejected)
        shown = [np.stack(np.triu_indices(min(end - begin, LARGEST_MATRIX), 1)) + begin for begin, end in self.bounds()]
        codes = np.unique(np.concatenate([voted, *(ones * self.num + others for ones, others in shown)]))
        tied = np.zeros(len(chosen), bool) if ballots.ties is None else ballots.ties
        which = np.searchsorted(codes, voted)

        def count(rows: np.ndarray) -> np.ndarray:
            return np.bincount(which[rows], minlength=len(codes))

        ones, others = self.order[codes // self.num], self.order[codes % self.num]
        record = votes.Record(count(~tied & (chosen < rejected)), count(~tied & (chosen > rejected)), count(tied))
        return Pairs(ones, others, record, votes.compare(self.fit, self.draws, ones, others))

    def matrices(self, group: int, pairs: Pairs) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The names of the strongest responses of a group, their fitted win probabilities, and the observed ones."""
        ids = self.strongest(group)
        gaps = self.fit.strengths[ids][:, None] - self.fit.strengths[ids][None]
        fitted = expit(gaps.astype(float))
        np.fill_diagonal(fitted, np.nan)
        observed = np.full_like(fitted, np.nan)
        column = np.full(self.num, -1)
        column[ids] = np.arange(len(ids))
        rows, columns = column[pairs.ones], column[pairs.others]
        wins, losses, ties = pairs.record
        total = wins + losses + ties
        keep = (rows >= 0) & (columns >= 0) & (total > 0)
        share = (wins[keep] + ties[keep] / 2) / total[keep]
        observed[rows[keep], columns[keep]] = share
        observed[columns[keep], rows[keep]] = 1 - share
        return [self.responses[self.entrants.responses[i]] for i in ids], fitted, observed

    def bounds(self) -> list[tuple[int, int]]:
        """The entrants of each group: the first, and the one after the last."""
        return list(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True))


def with_effective_weights(ballots: votes.Votes) -> votes.Votes:
    """Weights scaled so that they sum to the effective number of votes, (sum w)^2 / sum w^2 (Kish, 1965, section 11.7).

    So a few heavy votes do not look like many votes.
    """
    if ballots.weights is None:
        return ballots
    weights = np.asarray(ballots.weights)
    return ballots._replace(weights=weights * weights.sum() / np.sum(weights**2))


def without_maximum(contest: votes.Entrants) -> np.ndarray:
    """Which entrants are in a group that is not connected, or whose likelihood has no finite maximum."""
    num = len(contest.groups)
    island, level = votes.islands(contest.votes, num), votes.levels(contest.votes, num)
    level_of_island = np.zeros(num, int)
    level_of_island[island] = level
    island_of_group = np.zeros(num, int)
    island_of_group[contest.groups] = island
    apart = (level != level_of_island[island]) | (island != island_of_group[contest.groups])
    return np.isin(contest.groups, contest.groups[apart])


def without(ballots: votes.Votes, left_out: np.ndarray) -> votes.Votes:
    """Votes, with weight zero for those on some entrants."""
    if not left_out.any():
        return ballots
    weights = np.ones(len(ballots.responses.chosen)) if ballots.weights is None else ballots.weights
    return ballots._replace(weights=np.where(left_out[ballots.responses.chosen], 0.0, weights))
