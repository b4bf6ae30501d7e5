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
from jaxtyping import Array, Float, Int

from dpo_jax import checks
from dpo_jax.types import Numeric, Pair


class Votes(NamedTuple):
    """Votes between two responses each: arrays of JAX or NumPy that share their leading axis.

    Attributes:
      responses: ids of the chosen and the rejected response; in either order in a tie.
      ties: whether neither was chosen; `None` if one always was.
      weights: how much each vote counts; `None` means 1.
      first: 1 if the chosen response was shown first, -1 if the rejected one was, 0 if it is not known; or `None`.
    """

    responses: Pair
    ties: Any = None
    weights: Any = None
    first: Any = None


class Fit(NamedTuple):
    """Parameters at the maximum of the likelihood, `[responses]` and scalars; stacked, if there are several fits.

    Attributes:
      strengths: of the responses (nats: differences are log-odds of winning); 0 on average.
      shift: what was subtracted from the strengths at the maximum, so that they are 0 on average.
      first: what being shown first adds to a strength (nats).
      ties: logarithm of Davidson's parameter nu; equal responses tie with probability nu / (2 + nu). 0 if a tie is half
        a win.
      steps: how many steps of Newton's method were taken.
      last_step: the largest change of a parameter in the last one (nats).
    """

    strengths: Any
    shift: Any
    first: Any
    ties: Any
    steps: Any
    last_step: Any


Parameters: TypeAlias = tuple[Array, Array, Array]
"""Strengths, the advantage of the response shown first, and log nu."""

LogLikelihood: TypeAlias = Callable[[Array, Any, Array], Array]
"""`(margins, ties, tie_parameter) -> log-likelihoods [n]`, from how far the chosen responses are ahead (nats)."""


@jax.custom_jvp
def log_sum(margins: Array) -> Array:
    """log(exp(m / 2) + exp(-m / 2)), of which the slope is tanh(m / 2) / 2."""
    return jnp.abs(margins) / 2 + jnp.log1p(jnp.exp(-jnp.abs(margins)))


@log_sum.defjvp
def _log_sum_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return log_sum(*primals), jnp.tanh(primals[0] / 2) / 2 * tangents[0]


def half_wins(margins: Float[Array, " n"], ties: Any, tie_parameter: Any) -> Float[Array, " n"]:
    """A tie is half a win for each: log sigmoid(m), and for ties the mean of log sigmoid(m) and log sigmoid(-m)."""
    del tie_parameter
    return (1 - ties) * margins / 2 - log_sum(margins)


def davidson(margins: Float[Array, " n"], ties: Any, tie_parameter: Any) -> Float[Array, " n"]:
    """Ties are an outcome of their own, with odds nu = exp(tie_parameter) sqrt(p_i p_j) (Davidson, 1970, equation 2.2).

    Win, loss and tie have the logits m/2, -m/2 and log nu.
    """
    without_ties = log_sum(margins)
    odds = tie_parameter - without_ties
    return (1 - ties) * margins / 2 + ties * tie_parameter - without_ties - odds / 2 - log_sum(odds)


def fit(
    votes: Votes,
    num_responses: int,
    *,
    prior: Any = 1.0,
    model: LogLikelihood = half_wins,
    groups: Any = None,
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
      The parameters, in the precision of `votes.weights`, or else JAX's default one. Without a prior, there is no
      finite maximum if a set of responses never lost against the rest of its island: see `levels`.

    Raises:
      ValueError: an id is out of range, a weight is negative or not finite, or the prior is negative. Under `jit`,
        this is not checked.
    """
    checks.size("num_responses", num_responses)
    for side, ids in zip(("chosen", "rejected"), votes.responses, strict=True):
        checks.ids(side, ids, num_responses)
    if votes.weights is not None:
        checks.interval("weights", votes.weights, "[0, inf)")
    for part in jax.tree.leaves(prior):
        checks.interval("prior", part, "[0, inf)")
    options = {"prior": prior, "groups": groups, "start": start, "max_steps": max_steps, "tolerance": tolerance}
    return _fit(votes, num_responses=num_responses, model=model, **options)


@partial(jax.jit, static_argnames=("num_responses", "model"))
def _fit(
    votes: Votes,
    *,
    num_responses: int,
    prior: Any,
    model: LogLikelihood,
    groups: Any,
    start: Fit | None,
    max_steps: Any,
    tolerance: Any,
) -> Fit:
    dtype = (jnp.zeros(()) if votes.weights is None else jnp.asarray(votes.weights)).dtype
    zeros = (jnp.zeros(num_responses, dtype), jnp.zeros((), dtype), jnp.zeros((), dtype))
    small = 1e-8 if dtype == jnp.float64 else 1e-4
    (strengths, first, ties), steps, last_step = _newton(
        *penalised(votes, num_responses, prior=prior, model=model),
        zeros if start is None else parameters(start),
        max_steps,
        small if tolerance is None else tolerance,
    )
    shift = means(strengths, groups)
    return Fit(strengths - shift, shift, first, ties, steps, last_step)


def parameters(fitted: Fit) -> Parameters:
    """The parameters at the maximum."""
    return fitted.strengths + fitted.shift, fitted.first, fitted.ties


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
        fit_of_prior = jnp.sum((won - lost) * strengths / 2 - (won + lost) * log_sum(strengths))
        return -fit_of_votes - fit_of_prior + 2 * of_others * (log_sum(others[0]) + log_sum(others[1]))

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
    largest = jax.tree.map(lambda x: 4 * x, diagonal(jax.tree.map(jnp.zeros_like, start)))  # slopes stay below

    def step(state: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        params, steps, _ = state
        slope, hessian = jax.linearize(gradient, params)
        scale = jax.tree.map(lambda x: jnp.where(x > 0, jax.lax.rsqrt(x), 1), diagonal(params))
        scaled = partial(jax.tree.map, jnp.multiply, scale)
        downhill = scaled(jax.tree.map(jnp.negative, slope))
        rounding = 8 * jnp.finfo(scale[0].dtype).eps * jnp.linalg.norm(ravel_pytree(scaled(largest))[0])
        direction = scaled(cg(lambda x: scaled(hessian(scaled(x))), downhill, tol=1e-2, atol=rounding)[0])
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

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] / 2, too_far(state[0] / 2)

    # Under `vmap` a condition is evaluated twice, and rounded in two ways: so it is part of the state.
    whole = jnp.ones((), value.dtype)
    size, _ = jax.lax.while_loop(lambda state: state[1], halve, (whole, too_far(whole)))
    return at(size)


def _variance(margins: Array) -> Array:
    """sigmoid(m) sigmoid(-m): the variance of a vote."""
    return (1 - jnp.tanh(margins / 2) ** 2) / 4


def means(values: Float[Array, " n"], groups: Int[Array, " n"] | None) -> Float[Array, " n"]:
    """The mean of each value's group."""
    if groups is None:
        return jnp.full_like(values, jnp.mean(values))
    total = partial(jax.ops.segment_sum, segment_ids=groups, num_segments=len(values))
    return (total(values) / jnp.maximum(total(jnp.ones_like(values)), 1))[groups]
