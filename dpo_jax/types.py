"""The nouns of the library: what a comparison is, what a loss is, what an objective is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

T = TypeVar("T")

if TYPE_CHECKING:
    Scalar: TypeAlias = Array | float
else:
    Scalar = ArrayLike
"""A hyperparameter: a number, or an array (traced, perhaps) that broadcasts against the batch."""

Params: TypeAlias = PyTree
"""Parameters of a policy: any pytree of arrays."""

Metrics: TypeAlias = dict[str, Any]
"""Named arrays: one per metric."""

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
      reference: log-probabilities of the responses under the reference policy, computed once per data set
        (`train.with_reference`); `None` until then.
      columns: what else is known of each comparison, by name: lengths, scores, ...; `None` if nothing.
    """

    prompts: Int[Array, "n ..."]
    responses: Any
    weights: Float[Array, " n"] | None = None
    reference: Any = None
    columns: dict[str, Any] | None = None


class Labels(NamedTuple):
    """Single responses that somebody called good or bad. Every leaf shares its leading axis.

    Attributes:
      prompts: what was asked.
      responses: what was answered.
      desirable: whether that was good.
      weights: how much each label counts, relative to 1; `None` means equally.
      reference: log-probabilities of the responses under the reference policy (`train.with_reference`); `None` until
        then.
      columns: what else is known of each response, by name; `None` if nothing.
    """

    prompts: Int[Array, "n ..."]
    responses: Int[Array, "n ..."]
    desirable: Bool[Array, " n"]
    weights: Float[Array, " n"] | None = None
    reference: Float[Array, " n"] | None = None
    columns: dict[str, Any] | None = None


LogProbFn: TypeAlias = Callable[[Params, Array, Any], Any]
"""Scores responses: `log_prob(params, prompts, responses)`.

`responses` is an array or any pytree of arrays (a `Pair`, say); the result has the same structure, with the
log-probability of each response in place of the response.
"""

PreferenceLoss: TypeAlias = Callable[..., Array]
"""An elementwise loss `(policy, reference, *, beta, ...) -> [batch]` of two (chosen, rejected) pairs of
log-probabilities."""

ReferenceFreeLoss: TypeAlias = Callable[..., Array]
"""An elementwise loss `(policy, *, ...) -> [batch]` of one (chosen, rejected) pair of log-probabilities."""

UnpairedLoss: TypeAlias = Callable[..., Array]
"""An elementwise loss `(policy, reference, desirable, *, beta, ...) -> [batch]` of single responses."""

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
