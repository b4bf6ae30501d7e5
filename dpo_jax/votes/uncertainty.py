"""How well strengths are known: by redrawing the votes, and by the curvature of the likelihood."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, Num
from scipy.special import expit

from dpo_jax.types import Numeric, Pair
from dpo_jax.votes.strengths import Fit, LogLikelihood, Votes, fit, half_wins, means, parameters, penalised

CONVERGED = 1e-2
"""Refits stop after a step below this (nats): the next one would be of the order of its square."""

VOTES_AT_ONCE, RESPONSES_AT_ONCE = 2**22, 2**19
"""Refits are stacked up to so many votes, and so many strengths."""

COMPARED_AT_ONCE = 2**22
"""Differences of strengths that are sorted at once."""

LIMITS = (0.025, 0.975)


def tally(votes: Votes) -> tuple[Votes, Int[np.ndarray, " n"]]:
    """Sums up equal votes.

    Returns:
      The distinct votes, with summed weights; and for each vote which of them it is.
    """
    chosen, rejected = (np.asarray(side, np.int64) for side in votes.responses)
    ties = None if votes.ties is None else np.asarray(votes.ties)
    if ties is not None:
        low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
        first = votes.first if votes.first is None else np.where(ties & (chosen != low), -votes.first, votes.first)
        chosen, rejected = np.where(ties, low, chosen), np.where(ties, high, rejected)
    else:
        first = votes.first
    code = chosen * (max(chosen.max(), rejected.max()) + 1) + rejected
    for column, size in ((ties, 2), (None if first is None else np.asarray(first) + 1, 3)):
        code = code if column is None else code * size + column
    _, index, rows = np.unique(code, return_index=True, return_inverse=True)
    weights = np.bincount(rows, None if votes.weights is None else votes.weights)
    distinct = Votes(
        Pair(chosen[index].astype(np.int32), rejected[index].astype(np.int32)),
        None if ties is None else ties[index],
        weights.astype(np.float64),
        None if first is None else np.asarray(first)[index],
    )
    return distinct, rows


def redraw(
    key: Key[Array, ""], num_votes: int, num_responses: int, *, prior: Any = 1.0, clusters: Any = None
) -> tuple[Float[Array, " n"], Pair]:
    """Random weights of the Bayesian bootstrap (Rubin, 1981): of the votes, and of the virtual votes of the prior.

    Each vote, or each cluster, has an exponential weight with mean 1; the virtual votes won and lost by a response have
    gamma weights with mean `prior / 2`. For votes on one response against a fixed opponent, the refitted probabilities
    of winning are draws from the exact posterior, Beta(wins + prior / 2, losses + prior / 2).

    Args:
      key: a key.
      num_votes: how many votes there are.
      num_responses: how many responses.
      prior: the number of virtual votes of each response.
      clusters: ids below `num_votes` of votes that share a weight, those of one judge, say; `None` if all are
        independent.
    """
    votes_key, virtual_key = jax.random.split(key)
    weights = jax.random.exponential(votes_key, (num_votes,))
    half = jnp.full((2, num_responses), prior / 2, weights.dtype)
    virtual = jnp.where(half > 0, jax.random.gamma(virtual_key, half), 0)
    return weights if clusters is None else weights[clusters], Pair(*virtual)


def bootstrap(
    key: Key[Array, ""],
    votes: Votes,
    num_responses: int,
    *,
    num_fits: int,
    prior: Numeric = 1.0,
    model: LogLikelihood = half_wins,
    groups: Any = None,
    clusters: Any = None,
    report: Callable[[int], object] = lambda _: None,
) -> Fit:
    """Fits redrawn votes again and again: see `redraw`.

    Args:
      key: a key.
      votes: the votes one by one, not summed up.
      num_responses: how many ids of responses there are.
      num_fits: how many fits.
      prior, model, groups: as in `fit`.
      clusters: as in `redraw`.
      report: called with the number of fits done.

    Returns:
      The fits, stacked: strengths `[num_fits, responses]`, and so on, in NumPy arrays.
    """
    distinct, rows = tally(votes)
    distinct = jax.tree.map(jnp.asarray, distinct)
    own = 1.0 if votes.weights is None else jnp.asarray(votes.weights)
    refit = partial(fit, num_responses=num_responses, model=model, groups=groups)

    @jax.jit
    def refits(keys: Key[Array, " fits"], start: Fit, rows: Array, own: Any, clusters: Any) -> Fit:
        def once(own_key: Key[Array, ""]) -> Fit:
            weights, virtual = redraw(own_key, len(rows), num_responses, prior=prior, clusters=clusters)
            summed = jax.ops.segment_sum(weights * own, rows, len(distinct.responses.chosen))
            return refit(distinct._replace(weights=summed), prior=virtual, start=start, tolerance=CONVERGED)

        return jax.vmap(once)(keys)

    start = refit(distinct, prior=prior)
    stack = int(np.clip(min(VOTES_AT_ONCE // len(rows), RESPONSES_AT_ONCE // num_responses), 1, num_fits))
    keys = jax.random.split(key, num_fits)
    done = []
    for begin in range(0, num_fits, stack):
        chosen = keys[np.arange(begin, begin + stack) % num_fits]
        done.append(jax.device_get(refits(chosen, start, jnp.asarray(rows), own, clusters)))
        report(min(begin + stack, num_fits))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_fits], *done)


@partial(jax.jit, static_argnames=("num_responses", "model"))
def covariance(
    votes: Votes,
    num_responses: int,
    fitted: Fit,
    *,
    prior: Numeric = 1.0,
    model: LogLikelihood = half_wins,
    groups: Any = None,
) -> Float[Array, "parameters parameters"]:
    """Covariance of the strengths, and of `first` and `ties`, by the curvature of the likelihood (nats squared).

    It is the inverse of the Hessian at the maximum, strengths seen from the average of their group. It counts all votes
    as independent.

    Args:
      votes, num_responses, prior, model, groups: as in `fit`.
      fitted: what `fit` found.

    Returns:
      A table with `num_responses + 2` rows and columns; for very many responses, use `bootstrap`. Where the votes say
      nothing, it is zero.
    """
    objective, _ = penalised(votes, num_responses, prior=prior, model=model)
    flat, restored = ravel_pytree(parameters(fitted))
    _, hessian = jax.linearize(jax.grad(lambda params: objective(restored(params))), flat)
    table = jax.lax.map(hessian, jnp.eye(len(flat), dtype=flat.dtype))

    def centre(row: Array) -> Array:
        strengths = row[:num_responses]
        return jnp.concatenate([strengths - means(strengths, groups), row[num_responses:]])

    inverse = jnp.linalg.pinv((table + table.T) / 2, hermitian=True)
    return jax.vmap(centre)(jax.vmap(centre)(inverse).T)


@partial(jax.jit, static_argnames="num_draws")
def approximate(
    key: Key[Array, ""], fitted: Fit, covariance: Float[Array, "parameters parameters"], *, num_draws: int
) -> Fit:
    """Draws parameters from the normal distribution around the maximum.

    Args:
      key: a key.
      fitted: what `fit` found.
      covariance: of its parameters.
      num_draws: how many draws.

    Returns:
      Draws, stacked like the fits of `bootstrap`.
    """
    num = len(fitted.strengths)
    mean = jnp.concatenate([fitted.strengths, jnp.stack([fitted.first, fitted.ties])])
    variances, directions = jnp.linalg.eigh(covariance)  # some are zero: strengths are 0 on average
    root = directions * jnp.sqrt(jnp.maximum(variances, 0))[None]
    draws = mean[None] + jax.random.normal(key, (num_draws, len(mean)), mean.dtype) @ root.T
    rest = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_draws, *leaf.shape)), fitted)
    return rest._replace(strengths=draws[:, :num], first=draws[:, num], ties=draws[:, num + 1])


class Comparison(NamedTuple):
    """How sure it is that one response is better than another, and by how much.

    Attributes:
      better: probability that the first is stronger.
      win_probability: of the first against the second, in a vote without tie and order, as fitted.
      low, high: its 95 % interval.
    """

    better: Float[np.ndarray, "..."]
    win_probability: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]

    @property
    def separable(self) -> Bool[np.ndarray, "..."]:
        """Whether the interval excludes one half."""
        return np.asarray((self.low > 0.5) | (self.high < 0.5))


def compare(fitted: Fit, draws: Fit, ones: Any, others: Any) -> Comparison:
    """Compares responses.

    Args:
      fitted: what `fit` found.
      draws: fits that `bootstrap` made, or draws of `approximate`.
      ones: ids of responses, of any shape.
      others: ids of the responses that they are compared with, of the same shape.
    """
    ones, others = np.broadcast_arrays(ones, others)
    by_response = np.ascontiguousarray(draws.strengths.T)
    found = np.empty((3, ones.size))
    step = max(1, COMPARED_AT_ONCE // by_response.shape[1])
    for begin in range(0, ones.size, step):
        part = np.s_[begin : begin + step]
        gaps = np.sort(by_response[ones.ravel()[part]] - by_response[others.ravel()[part]])
        found[0, part] = np.mean(np.heaviside(gaps, 0.5), axis=1)
        found[1:, part] = expit(_quantiles(gaps, LIMITS).T)
    better, low, high = found.reshape(3, *ones.shape)
    strengths = np.asarray(fitted.strengths, np.float64)
    return Comparison(better, expit(strengths[ones] - strengths[others]), low, high)


def intervals(draws: Fit) -> tuple[Float[np.ndarray, " responses"], Float[np.ndarray, " responses"]]:
    """The 95 % interval of each strength (nats)."""
    low, high = _quantiles(np.sort(draws.strengths.T), LIMITS).T
    return low, high


def ranks(strengths: Float[np.ndarray, " responses"], groups: Any = None) -> Int[np.ndarray, " responses"]:
    """The rank of each response in its group; the strongest has rank 1, and equals are ranked by their ids."""
    groups = np.zeros(len(strengths), int) if groups is None else np.asarray(groups)
    order = np.lexsort((-np.asarray(strengths), groups))
    placed = np.empty(len(order), int)
    placed[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order]) + 1
    return placed


def rank_intervals(
    draws: Fit, groups: Any = None
) -> tuple[Int[np.ndarray, " responses"], Int[np.ndarray, " responses"]]:
    """The best and the worst rank of each response in its group, of 95 % of the draws."""
    all_ranks = np.stack([ranks(strengths, groups) for strengths in draws.strengths])
    low, high = np.round(_quantiles(np.sort(all_ranks.T), LIMITS)).astype(int).T
    return low, high


def _quantiles(values: Num[np.ndarray, "n draws"], shares: Sequence[float]) -> Float[np.ndarray, "n shares"]:
    """Quantiles of sorted rows, by linear interpolation."""
    place = np.asarray(shares) * (values.shape[1] - 1)
    below = np.floor(place).astype(int)
    above = np.ceil(place).astype(int)
    return values[:, below] + (place - below) * (values[:, above] - values[:, below])
