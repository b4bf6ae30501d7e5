"""The types of the library: data, losses, objectives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

T = TypeVar("T")

if TYPE_CHECKING:
    Numeric: TypeAlias = Array | float
else:
    Numeric = ArrayLike
"""A hyperparameter: a number, or an array (possibly traced) that broadcasts against the batch."""

Params: TypeAlias = PyTree
"""Parameters of a policy: any pytree of arrays."""

Metrics: TypeAlias = dict[str, Any]
"""Named numbers, one per metric: arrays, or a `Ratio` if the denominator differs between batches."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ratio:
    """A metric whose denominator differs between batches, such as a sum of weights.

    Over several batches, numerators and denominators are summed separately, so that the result does not depend on the
    batch size. It converts to an array or a float.

    >>> import jax.numpy as jnp
    >>> print(float(Ratio(jnp.array(3.0), jnp.array(4.0))))
    0.75

    Attributes:
      numerator: a sum over the batch.
      denominator: the number of terms, or the sum of their weights; zero if the batch has none.
      minus: another ratio to subtract, or `None`.
    """

    numerator: Any
    denominator: Any
    minus: "Ratio | None" = None

    @property
    def value(self) -> Any:
        """The quotient; NaN without terms."""
        quotient = jnp.asarray(self.numerator) / self.denominator
        return quotient if self.minus is None else quotient - self.minus.value

    def __jax_array__(self) -> Any:
        return self.value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.value, dtype)

    def __float__(self) -> float:
        return float(self.value)


PairLike: TypeAlias = tuple[T, T]
"""A `Pair`, or any other 2-tuple in the order (chosen, rejected)."""


class Pair(NamedTuple):
    """Values for both sides of a comparison: responses, log-probabilities, rewards."""

    chosen: Any
    rejected: Any


class Demonstrations(NamedTuple):
    """Demonstrated responses. Every leaf shares its leading axis."""

    prompts: Int[Array, "n ..."]
    responses: Int[Array, "n ..."]
    weights: Float[Array, " n"] | None = None


class Preferences(NamedTuple):
    """Comparisons of two or more responses to one prompt. Every leaf shares its leading axis.

    Attributes:
      prompts: ids of prompts, or arrays of tokens.
      responses: a `Pair` (chosen, rejected), or a ranking of more than two responses, a tuple from best to worst.
      weights: how much each comparison counts, relative to 1; `None` means equally.
      reference_logps: log-probabilities of the responses under the reference policy, computed once per data set
        (`train.with_reference`); `None` until then.
      columns: further data of each comparison, by name: lengths, scores, ...; or `None`.
    """

    prompts: Int[Array, "n ..."]
    responses: Any
    weights: Float[Array, " n"] | None = None
    reference_logps: Any = None
    columns: dict[str, Any] | None = None


class Labels(NamedTuple):
    """Single responses, labelled good or bad. Every leaf shares its leading axis.

    Attributes:
      prompts: ids of prompts, or arrays of tokens.
      responses: ids of responses, or arrays of tokens.
      desirable: whether the response is good.
      weights: how much each label counts, relative to 1; `None` means equally.
      reference_logps: log-probabilities of the responses under the reference policy (`train.with_reference`); `None`
        until then.
      columns: further data of each response, by name; or `None`.
    """

    prompts: Int[Array, "n ..."]
    responses: Int[Array, "n ..."]
    desirable: Bool[Array, " n"]
    weights: Float[Array, " n"] | None = None
    reference_logps: Float[Array, " n"] | None = None
    columns: dict[str, Any] | None = None


class Responses(NamedTuple):
    """Responses to each prompt of a batch.

    Attributes:
      responses: a row for each prompt, a column for each response to it.
      weights: probabilities of the responses, up to a factor for each prompt, if they are all possible responses;
        `None` if they are samples.
    """

    responses: Int[Array, "prompts group ..."]
    weights: Float[Array, "prompts group"] | None = None


class Rollouts(NamedTuple):
    """Responses of a policy with their rewards. Every leaf shares its leading axis.

    Attributes:
      prompts: ids of prompts, or arrays of tokens.
      responses: ids of responses, or arrays of tokens.
      logps: log-probabilities of the responses under the policy that sampled them.
      reference_logps: the same under the reference policy.
      rewards: of the responses.
      advantages: of the responses.
      weights: how much each response counts, relative to 1; `None` means equally.
      values: predictions of a value function, or `None`.
      returns: targets of the value function, or `None`.
    """

    prompts: Int[Array, "n ..."]
    responses: Int[Array, "n ..."]
    logps: Float[Array, " n"]
    reference_logps: Float[Array, " n"]
    rewards: Float[Array, " n"]
    advantages: Float[Array, " n"]
    weights: Float[Array, " n"] | None = None
    values: Float[Array, " n"] | None = None
    returns: Float[Array, " n"] | None = None


class TokenLogps(NamedTuple):
    """Log-probabilities of the tokens of responses.

    Attributes:
      values: a row for each response, a column for each token (nats).
      mask: which entries are tokens of the response; the others have no meaning.
    """

    values: Float[Array, "*n tokens"]
    mask: Bool[Array, "*n tokens"]


class TokenRollouts(NamedTuple):
    """Responses of a policy, token by token. Every leaf shares its leading axis.

    Attributes:
      prompts: ids of prompts, or arrays of tokens.
      responses: ids of responses, or arrays of tokens.
      mask: which entries of the arrays below are tokens of the response.
      logps: log-probabilities of the tokens under the policy that sampled them.
      reference_logps: the same under the reference policy.
      rewards: of the responses.
      advantages: of the tokens.
      weights: how much each response counts, relative to 1; `None` means equally.
      values: predictions of a value function for each token, or `None`.
      returns: targets of the value function, or `None`.
    """

    prompts: Int[Array, "n ..."]
    responses: Int[Array, "n ..."]
    mask: Bool[Array, "n tokens"]
    logps: Float[Array, "n tokens"]
    reference_logps: Float[Array, "n tokens"]
    rewards: Float[Array, " n"]
    advantages: Float[Array, "n tokens"]
    weights: Float[Array, " n"] | None = None
    values: Float[Array, "n tokens"] | None = None
    returns: Float[Array, "n tokens"] | None = None


LogProbFn: TypeAlias = Callable[[Params, Array, Any], Any]
"""Scores responses: `log_prob(params, prompts, responses)`.

`responses` is an array or any pytree of arrays (a `Pair`, say); the result has the same structure, with a
log-probability for each response.
"""

TokenLogProbFn: TypeAlias = Callable[[Params, Array, Any], TokenLogps]
"""Scores the tokens of responses: `token_log_prob(params, prompts, responses) -> TokenLogps`, of one array of ids or of
tokens."""

TokenValueFn: TypeAlias = Callable[[Params, Array, Any], Array]
"""Predicts rewards token by token: `token_value(params, prompts, responses) -> values`; each value depends on the
tokens before its place only."""

AskFn: TypeAlias = Callable[[Any], Array]
"""Draws prompts: `ask(key) -> prompts`, the same number each time."""

RespondFn: TypeAlias = Callable[[Any, Params, Array], Responses]
"""Responds to prompts: `respond(key, params, prompts) -> Responses`, the same number to each prompt."""

RewardFn: TypeAlias = Callable[[Array, Any], Array]
"""Rewards responses: `reward(prompts, responses) -> rewards`, the true ones, or those of a reward model."""

ValueFn: TypeAlias = Callable[[Params, Array], Array]
"""Predicts rewards: `value(params, prompts) -> values`."""

PreferenceFn: TypeAlias = Callable[[Array, Any, Any], Array]
"""Compares responses: `prefer(prompts, responses, others) -> probabilities` that the first is preferred."""

PreferenceLoss: TypeAlias = Callable[..., Array]
"""An elementwise loss `(policy, reference, *, beta, ...) -> [batch]` of two (chosen, rejected) pairs of
log-probabilities."""

ReferenceFreeLoss: TypeAlias = Callable[..., Array]
"""An elementwise loss `(policy, *, ...) -> [batch]` of one (chosen, rejected) pair of log-probabilities, or
`(rewards, *, ...) -> [batch]` of one pair of rewards."""

UnpairedLoss: TypeAlias = Callable[..., Array]
"""An elementwise loss `(policy, reference, desirable, *, beta, ...) -> [batch]` of single responses."""

PolicyGradientLoss: TypeAlias = Callable[..., Array]
"""An elementwise surrogate `(logps, old_logps, advantages, *, ...) -> [batch]` of single responses."""

Objective: TypeAlias = Callable[[Params, Any], tuple[Array, Metrics]]
"""A function to minimise: `(params, batch) -> (scalar loss, metrics)`."""


@dataclass(frozen=True)
class StatefulObjective:
    """An objective with a memory between batches. Calling it uses the initial memory.

    Attributes:
      memory: the initial memory: any pytree of arrays.
      apply: `(params, batch, memory) -> (scalar loss, metrics, memory)`.
    """

    memory: Any
    apply: Callable[[Params, Any, Any], tuple[Array, Metrics, Any]]

    def __call__(self, params: Params, batch: Any) -> tuple[Array, Metrics]:
        loss, metrics, _ = self.apply(params, batch, self.memory)
        return loss, metrics


CollectFn: TypeAlias = Callable[[Any, Params, Any], tuple[Any, Any]]
"""Collects training data with the policy: `(key, params, memory) -> (data, memory)`."""


class Learner(NamedTuple):
    """An on-policy learner: in each round, it collects data and minimises an objective on them.

    Attributes:
      collect: collects data with the current parameters, of the same size each time.
      objective: minimised on these data.
      memory: the initial memory of `collect`: any pytree of arrays, or `None`.
    """

    collect: CollectFn
    objective: Objective
    memory: Any = None
