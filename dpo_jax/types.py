"""The nouns of the library: what a comparison is, what a loss is, what an objective is."""

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
"""A hyperparameter: a number, or an array (traced, perhaps) that broadcasts against the batch."""

Params: TypeAlias = PyTree
"""Parameters of a policy: any pytree of arrays."""

Metrics: TypeAlias = dict[str, Any]
"""Named numbers, one per metric: arrays, or a `Ratio` where the denominator differs from batch to batch."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ratio:
    """A metric whose denominator differs from batch to batch, such as a sum of weights.

    Over several batches, numerators and denominators are added up apart, so that the result does not depend on the
    batch size. Used as an array or as a float, it is its value.

    >>> import jax.numpy as jnp
    >>> print(float(Ratio(jnp.array(3.0), jnp.array(4.0))))
    0.75

    Attributes:
      numerator: a sum over the batch.
      denominator: the number of terms, or the sum of their weights; zero if the batch has none.
      minus: another ratio that is subtracted; `None` if there is none.
    """

    numerator: Any
    denominator: Any
    minus: "Ratio | None" = None

    @property
    def value(self) -> Any:
        """The quotient; NaN if there were no terms."""
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
    """Something that exists for both sides of a comparison: responses, log-probabilities, rewards."""

    chosen: Any
    rejected: Any


class Demonstrations(NamedTuple):
    """Responses worth imitating. Every leaf shares its leading axis."""

    prompts: Int[Array, "n ..."]
    responses: Int[Array, "n ..."]
    weights: Float[Array, " n"] | None = None


class Preferences(NamedTuple):
    """Comparisons of two or more responses to one prompt. Every leaf shares its leading axis.

    Attributes:
      prompts: what was asked.
      responses: what was preferred, and what it was preferred to: a `Pair`; or a ranking of more than two responses, a
        tuple from best to worst.
      weights: how much each comparison counts, relative to 1; `None` means equally.
      reference_logps: log-probabilities of the responses under the reference policy, computed once per data set
        (`train.with_reference`); `None` until then.
      columns: what else is known of each comparison, by name: lengths, scores, ...; `None` if nothing.
    """

    prompts: Int[Array, "n ..."]
    responses: Any
    weights: Float[Array, " n"] | None = None
    reference_logps: Any = None
    columns: dict[str, Any] | None = None


class Labels(NamedTuple):
    """Single responses that somebody called good or bad. Every leaf shares its leading axis.

    Attributes:
      prompts: what was asked.
      responses: what was answered.
      desirable: whether that was good.
      weights: how much each label counts, relative to 1; `None` means equally.
      reference_logps: log-probabilities of the responses under the reference policy (`train.with_reference`); `None`
        until then.
      columns: what else is known of each response, by name; `None` if nothing.
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
      weights: how probable each one is, up to a factor for each prompt, if they are all that there are; `None` if they
        are samples.
    """

    responses: Int[Array, "prompts group ..."]
    weights: Float[Array, "prompts group"] | None = None


class Rollouts(NamedTuple):
    """Responses that a policy gave, and what came of them. Every leaf shares its leading axis.

    Attributes:
      prompts: what was asked.
      responses: what was answered.
      logps: log-probabilities of the responses under the policy that gave them.
      reference_logps: the same under the reference policy.
      rewards: what the responses earned.
      advantages: how much better than usual that was.
      weights: how much each response counts, relative to 1; `None` means equally.
      values: what a value function expected, if there is one.
      returns: what it should have expected.
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


LogProbFn: TypeAlias = Callable[[Params, Array, Any], Any]
"""Scores responses: `log_prob(params, prompts, responses)`.

`responses` is an array or any pytree of arrays (a `Pair`, say); the result has the same structure, with the
log-probability of each response in place of the response.
"""

AskFn: TypeAlias = Callable[[Any], Array]
"""Draws prompts: `ask(key) -> prompts`, as many each time."""

RespondFn: TypeAlias = Callable[[Any, Params, Array], Responses]
"""Responds to prompts: `respond(key, params, prompts) -> Responses`, to each prompt equally many times."""

RewardFn: TypeAlias = Callable[[Array, Any], Array]
"""Rewards responses: `reward(prompts, responses) -> rewards`, by the truth or by a model of it."""

ValueFn: TypeAlias = Callable[[Params, Array], Array]
"""Expects rewards: `value(params, prompts) -> values`."""

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
"""What training minimises: `(params, batch) -> (scalar loss, metrics)`."""


@dataclass(frozen=True)
class StatefulObjective:
    """An objective that remembers something from batch to batch. Called as an `Objective`, it meets its first batch.

    Attributes:
      memory: what it remembers before the first batch: any pytree of arrays.
      apply: `(params, batch, memory) -> (scalar loss, metrics, memory)`.
    """

    memory: Any
    apply: Callable[[Params, Any, Any], tuple[Array, Metrics, Any]]

    def __call__(self, params: Params, batch: Any) -> tuple[Array, Metrics]:
        loss, metrics, _ = self.apply(params, batch, self.memory)
        return loss, metrics


CollectFn: TypeAlias = Callable[[Any, Params, Any], tuple[Any, Any]]
"""Makes training data by trying out the policy: `(key, params, memory) -> (data, memory)`."""


class Learner(NamedTuple):
    """A way to learn from what the policy itself does: collect data, minimise an objective on them, and again.

    Attributes:
      collect: makes data of the current parameters, as many each time.
      objective: what training minimises on them.
      memory: what `collect` remembers before the first time: any pytree of arrays; `None` if nothing.
    """

    collect: CollectFn
    objective: Objective
    memory: Any = None
