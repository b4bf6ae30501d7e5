"""How well a policy predicts held-out preferences: a number for each row, so that means have errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real

from dpo_jax.types import Params, Ratio


def evaluate_rows(make_objective: Any, data: Any, logps: Any) -> dict[str, Float[np.ndarray, " rows"]]:
    """The loss and the metrics of each row on its own; weights are not used.

    Losses that compare the rows of a batch, as KTO's reference point, BCO's shift and AOT do, see one row at a time:
    their values are not those of training.

    Args:
      make_objective: makes an objective of a scoring function, as for `tune`.
      data: with their reference, if the loss needs one.
      logps: log-probabilities of the responses under the policy, in the structure of the responses (`logps`).

    Returns:
      `loss` and the objective's metrics, a number for each row; NaN where a row has no such number.
    """
    objective = make_objective(as_given)
    data = data._replace(weights=None) if hasattr(data, "weights") else data

    @jax.jit
    @jax.vmap
    def of_row(row: Any, logps: Any) -> dict[str, Any]:
        alone = jax.tree.map(lambda leaf: leaf[None], (row, logps))
        loss, metrics = objective(alone[1], alone[0])
        return {"loss": loss, **{name: metric for name, metric in metrics.items() if not _is_difference(metric)}}

    found = of_row(jax.tree.map(jnp.asarray, data), jax.tree.map(jnp.asarray, logps))
    return {name: np.asarray(values) for name, values in found.items()}


def mean_and_stderr(values: Real[np.ndarray, " rows"]) -> dict[str, float]:
    """The mean of the rows that have a number, and its standard error."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    error = known.std(ddof=1) / np.sqrt(len(known)) if len(known) > 1 else np.nan
    return {"mean": float(known.mean()) if len(known) else np.nan, "stderr": float(error)}


def as_given(params: Params, prompts: Any, responses: Any) -> Any:
    """A policy whose parameters are its log-probabilities."""
    del prompts, responses
    return params


def _is_difference(metric: Any) -> bool:
    """Whether a metric is a difference of means over different rows, which no single row has."""
    return isinstance(metric, Ratio) and metric.minus is not None
