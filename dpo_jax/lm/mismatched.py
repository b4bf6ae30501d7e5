"""KTO on language models: labels whose reference point is estimated from responses to other prompts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from dpo_jax import checks
from dpo_jax.losses import kto_loss, kto_reference_point
from dpo_jax.train import unpaired_objective
from dpo_jax.types import Labels, LogProbFn, Metrics, Objective, Params, UnpairedLoss


class Matched(NamedTuple):
    """A response to a prompt, and one that answers another prompt.

    Attributes:
      own: tokens of the labelled response; or what belongs to it.
      other: tokens of a response to another prompt; or what belongs to it.
    """

    own: Int[Array, "n _"]
    other: Int[Array, "n _"]


def with_mismatched(key: Key[Array, ""], labels: Labels) -> Labels:
    """Labels whose rows also hold the response of another row, as `kto_objective` takes them.

    Rows are put in a random circle, those of one prompt side by side; each gets the response of the next row, or of one
    so much further that it answers another prompt. Give them their reference afterwards: it scores both.

    Args:
      key: typed PRNG key.
      labels: of tokens, two rows or more.

    Raises:
      ValueError: more than half of the rows answer one prompt.
    """
    checks.key(key)
    num = len(labels.prompts)
    if num < 2:
        raise ValueError(f"labels must have two rows or more, so that each has another, got {num}")
    order = np.asarray(jax.random.permutation(key, num))
    _, first, which, counts = np.unique(
        np.asarray(labels.prompts)[order], axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    if 2 * counts.max() > num:
        raise ValueError(f"{counts.max()} of {num} rows answer one prompt: they lack responses to other prompts")
    circle = order[np.argsort(first[which.ravel()], kind="stable")]
    following = np.empty(num, int)
    following[circle] = np.roll(circle, -counts.max())
    responses: Any = np.asarray(labels.responses)
    both: Any = Matched(responses, responses[following])
    return labels._replace(responses=both)


def kto_objective(
    log_prob: LogProbFn, *, beta: Any, loss: UnpairedLoss = kto_loss, **hyperparameters: Any
) -> Objective:
    """KTO with the reference point of each batch (`losses.kto_reference_point`), on rows of `with_mismatched`.

    Both responses of a row share its prompt, so the reference point costs little more than its tokens. The metrics are
    those of `train.unpaired_objective`.

    Args:
      log_prob: scores responses.
      beta: strength of the pull towards the reference; positive.
      loss: another loss with a `reference_point`.
      **hyperparameters: of the loss.
    """

    def objective(params: Params, batch: Any) -> tuple[Array, Metrics]:
        if not isinstance(batch.responses, Matched):
            raise TypeError("kto_objective needs rows that also hold another row's response: with_mismatched")
        if batch.reference_logps is None:
            raise ValueError("the batch has no reference: with_reference")
        own, other = log_prob(params, batch.prompts, batch.responses)
        point = kto_reference_point(other, batch.reference_logps.other)
        alone = batch._replace(responses=batch.responses.own, reference_logps=batch.reference_logps.own)
        scored = unpaired_objective(lambda *_: own, loss, beta=beta, reference_point=point, **hyperparameters)
        return scored(params, alone)

    return objective
