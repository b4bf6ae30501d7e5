"""Strengths of responses by maximum likelihood, converged.

The model is that of Bradley and Terry (1952): response i is chosen over j with probability sigmoid(s_i - s_j). DPO with
beta = 1 on a table with a uniform reference has the same likelihood (Rafailov et al., 2023, equation 7), the implicit
rewards being the strengths.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.types import Numeric, Pair


class Votes(NamedTuple):
    """Votes between two responses each. Every leaf shares its leading axis.

    Attributes:
      responses: ids of the chosen and the rejected response; in either order in a tie.
      ties: whether neither was chosen; `None` if one always was.
      weights: how much each vote counts; `None` means 1.
      first: 1 if the chosen response was shown first, -1 if the rejected one was, 0 if it is not known; or `None`.
    """

    responses: Pair
    ties: Bool[Array, " n"] | None = None
    weights: Float[Array, " n"] | None = None
    first: Any = None


class Fit(NamedTuple):
    """Parameters at the maximum of the likelihood.

    Attributes:
      strengths: of the responses (nats: differences are log-odds of winning); 0 on average.
      first: what being shown first adds to a strength (nats).
      ties: logarithm of Davidson's parameter nu; equal responses tie with probability nu / (2 + nu). 0 if a tie is half
        a win.
      steps: how many steps of Newton's method were taken.
      last_step: the largest change of a parameter in the last one (nats).
    """

    strengths: Float[Array, " responses"]
    first: Float[Array, ""]
    ties: Float[Array, ""]
    steps: Int[Array, ""]
    last_step: Float[Array, ""]


Parameters: TypeAlias = tuple[Array, Array, Array]
"""Strengths, the advantage of the response shown first, and log nu."""

LogLikelihood: TypeAlias = Callable[[Array, Any, Array], Array]
"""`(margins, ties, tie_parameter) -> log-likelihoods [n]` of votes, from how far the chosen response is ahead (nats)."""


def half_wins(margins: Float[Array, " n"], ties: Any, tie_parameter: Any) -> Float[Array, " n"]:
    """A tie is half a win for each: log sigmoid(m), and for ties the mean of log sigmoid(m) and log sigmoid(-m)."""
    del tie_parameter
    return jax.nn.log_sigmoid(margins) - 0.5 * ties * margins


def davidson(margins: Float[Array, " n"], ties: Any, tie_parameter: Any) -> Float[Array, " n"]:
    """Ties are an outcome of their own, with odds nu = exp(tie_parameter) sqrt(p_i p_j) (Davidson, 1970, equation 2.2).

    Win, loss and tie have the logits m/2, -m/2 and log nu.
    """
    logits = jnp.stack(jnp.broadcast_arrays(margins / 2, -margins / 2, tie_parameter))
    return jnp.where(ties, logits[2], logits[0]) - jax.nn.logsumexp(logits, axis=0)


@partial(jax.jit, static_argnames=("num_responses", "model"))
def fit(
    votes: Votes,
    num_responses: int,
    *,
    prior: Any = 1.0,
    model: LogLikelihood = half_wins,
    groups: Int[Array, " responses"] | None = None,
    start: Fit | None = None,
    max_steps: Numeric = 50,
    tolerance: Numeric | None = None,
) -> Fit:
    r"""Maximises the log-likelihood of votes plus a weak prior, by Newton's method. A pure function.

    The prior is `prior` virtual votes of each response against an average one, half of them won:
    `prior / 2 (log sigmoid(s) + log sigmoid(-s))`. With 1, the default, the probability of winning against an average
    response has Jeffreys' prior, Beta(1/2, 1/2). It keeps strengths finite where a response never lost, and is soon
    outweighed. The effect of being shown first and `log nu` have the same prior.

    The linear system of each step is solved by conjugate gradients, which pass over the votes and need no table of all
    pairs: memory and time grow with the number of votes. A step is halved until the objective does not rise.

    Args:
      votes: the votes, one by one or summed up by `tally`.
      num_responses: how many ids of responses there are.
      prior: how many virtual votes each response has; 0 for none; or a `Pair` of arrays, those won and those lost.
      model: `half_wins` or `davidson`.
      groups: responses whose strengths average 0 together, by ids of groups; all of them by default.
      start: where to start from; from equal strengths by default.
      max_steps: the most steps; it may be traced.
      tolerance: stops after a step that changes no parameter by more (nats): by default 1e-8, or 1e-4 in single
        precision.

    Returns:
      The parameters, in the precision of `votes.weights`, or else JAX's default one. Without a prior, a response that
      never lost has no finite maximum: `unbounded` finds those.
    """
    small = 1e-8 if _dtype(votes) == jnp.float64 else 1e-4
    params, steps, last_step = maximum(
        votes,
        num_responses,
        prior=prior,
        model=model,
        start=start,
        max_steps=max_steps,
        tolerance=small if tolerance is None else tolerance,
    )
    strengths, first, ties = params
    return Fit(centred(strengths, groups), first, ties, steps, last_step)


def maximum(
    votes: Votes,
    num_responses: int,
    *,
    prior: Any,
    model: LogLikelihood,
    start: Fit | None = None,
    max_steps: Numeric = 50,
    tolerance: Numeric = 0.0,
) -> tuple[Parameters, Array, Array]:
    """The parameters that `fit` centres, how many steps were taken, and the last one."""
    dtype = _dtype(votes)
    zeros = (jnp.zeros(num_responses, dtype), jnp.zeros((), dtype), jnp.zeros((), dtype))
    functions = penalised(votes, num_responses, prior=prior, model=model)
    return _newton(*functions, zeros if start is None else start[:3], max_steps, tolerance)


def penalised(
    votes: Votes, num_responses: int, *, prior: Any = 1.0, model: LogLikelihood = half_wins
) -> tuple[Callable[[Parameters], Array], Callable[[Parameters], Parameters]]:
    """What `fit` minimises, and about the diagonal of its Hessian, as functions of (strengths, first, ties)."""
    chosen, rejected = votes.responses
    weights = jnp.ones(len(chosen)) if votes.weights is None else jnp.asarray(votes.weights)
    ties = jnp.zeros((1,), bool) if votes.ties is None else jnp.asarray(votes.ties)
    first = jnp.zeros((1,)) if votes.first is None else jnp.asarray(votes.first)
    won, lost = prior if isinstance(prior, tuple) else (jnp.asarray(prior / 2),) * 2
    of_others = jnp.mean(won + lost) / 2  # each side of the prior of the two other parameters

    def margins(params: Parameters) -> Array:
        strengths, advantage, _ = params
        return strengths[chosen] - strengths[rejected] + first * advantage

    def objective(params: Parameters) -> Array:
        strengths, *others = params
        fit_of_votes = jnp.sum(weights * model(margins(params), ties, others[1]))
        fit_of_prior = jnp.sum(won * jax.nn.log_sigmoid(strengths) + lost * jax.nn.log_sigmoid(-strengths))
        return -fit_of_votes - fit_of_prior - of_others * sum(jax.nn.log_sigmoid(other) + jax.nn.log_sigmoid(-other) for other in others)

    def diagonal(params: Parameters) -> Parameters:
        of_votes = weights * _variance(margins(params))
        of_strengths = jnp.zeros(num_responses, of_votes.dtype).at[chosen].add(of_votes).at[rejected].add(of_votes)
        of_first, of_ties = jnp.sum(of_votes * first**2), jnp.sum(of_votes)
        return of_strengths + (won + lost) * _variance(params[0]), of_first + of_others / 2, of_ties + of_others / 2

    return objective, diagonal


def _newton(
    objective: Callable[[Any], Array],
    diagonal: Callable[[Any], Any],
    start: Any,
    max_steps: Numeric,
    tolerance: Numeric,
) -> tuple[Any, Array, Array]:
    """Minimises a convex function by Newton's method; returns the parameters, the steps taken, and the last one.

    Slopes below rounding errors count as zero: without a prior, adding a constant to all strengths changes nothing, and
    dividing an error by that curvature would.
    """
    gradient = jax.grad(objective)
    most = jax.tree.map(lambda x: 4 * x, diagonal(jax.tree.map(jnp.zeros_like, start)))  # what a slope can be
    rounding = 8 * jnp.finfo(jax.tree.leaves(start)[0].dtype).eps * jnp.linalg.norm(ravel_pytree(most)[0])

    def step(state: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        params, steps, _ = state
        slope, hessian = jax.linearize(gradient, params)
        scale = jax.tree.map(lambda x: jnp.where(x > 0, x, 1), diagonal(params))
        downhill = jax.tree.map(jnp.negative, slope)
        direction, _ = cg(hessian, downhill, tol=1e-2, atol=rounding, M=lambda x: jax.tree.map(jnp.divide, x, scale))
        moved = _backtrack(objective, params, direction)
        change = jax.tree.map(lambda new, old: jnp.max(jnp.abs(new - old)), moved, params)
        return moved, steps + 1, jax.tree.reduce(jnp.maximum, change)

    def goes_on(state: tuple[Any, Array, Array]) -> Array:
        _, steps, last = state
        return (steps < max_steps) & (last > tolerance)

    last = jnp.asarray(jnp.inf, jax.tree.leaves(start)[0].dtype)
    return jax.lax.while_loop(goes_on, step, (start, jnp.zeros((), jnp.int32), last))


def _backtrack(objective: Callable[[Any], Array], params: Any, direction: Any) -> Any:
    """Goes in a direction, half as far again and again until the objective has not grown, but for rounding errors."""
    value = objective(params)
    allowed = value + 8 * jnp.finfo(value.dtype).eps * jnp.abs(value)

    def at(size: Array) -> Any:
        return jax.tree.map(lambda x, d: x + size * d, params, direction)

    def too_far(size: Array) -> Array:
        return ~(objective(at(size)) <= allowed) & (size > 1e-6)

    return at(jax.lax.while_loop(too_far, lambda size: size / 2, jnp.ones((), value.dtype)))


def _dtype(votes: Votes) -> Any:
    return (jnp.zeros(()) if votes.weights is None else jnp.asarray(votes.weights)).dtype


def _variance(margins: Array) -> Array:
    """sigmoid(m) sigmoid(-m): the variance of a vote."""
    return jnp.exp(jax.nn.log_sigmoid(margins) + jax.nn.log_sigmoid(-margins))


def centred(values: Float[Array, " n"], groups: Int[Array, " n"] | None) -> Float[Array, " n"]:
    """Values minus the mean of their group."""
    if groups is None:
        return values - jnp.mean(values)
    total = partial(jax.ops.segment_sum, segment_ids=groups, num_segments=len(values))
    return values - (total(values) / jnp.maximum(total(jnp.ones_like(values)), 1))[groups]
