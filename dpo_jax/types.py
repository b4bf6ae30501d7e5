"""The nouns of the library: what a comparison is, what a loss is, what an objective is."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from jaxtyping import Array, ArrayLike, Float, Int, PyTree

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
    """Comparisons of two responses to one prompt. Every leaf shares its leading axis.

    Attributes:
      prompts: what was asked.
      responses: what was preferred, and what it was preferred to.
      weights: how much each comparison counts, relative to 1; `None` means equally.
      reference: log-probabilities of both responses under the reference policy, computed once per data set
        (`train.with_reference`); `None` until then.
    """

    prompts: Int[Array, "n ..."]
    responses: Pair
    weights: Float[Array, " n"] | None = None
    reference: Pair | None = None


LogProbFn: TypeAlias = Callable[[Params, Array, Any], Any]
"""Scores responses: `log_prob(params, prompts, responses)`.

`responses` is an array or any pytree of arrays (a `Pair`, say); the result has the same structure, with the
log-probability of each response in place of the response.
"""

PreferenceLoss: TypeAlias = Callable[..., Array]
"""An elementwise loss `(policy, reference, *, beta, ...) -> [batch]` of two (chosen, rejected) pairs of
log-probabilities."""

Objective: TypeAlias = Callable[[Params, Any], tuple[Array, Metrics]]
"""What training minimises: `(params, batch) -> (scalar loss, metrics)`."""
