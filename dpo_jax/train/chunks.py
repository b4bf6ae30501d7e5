"""Large batches in little memory: scoring chunk by chunk."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpo_jax import checks
from dpo_jax.types import LogProbFn, Params


def in_chunks(log_prob: LogProbFn, rows_per_chunk: int) -> LogProbFn:
    """Scores a batch in chunks, so that activations need the memory of one chunk: exact gradient accumulation.

    The gradient pass computes the activations of each chunk again. Objectives, losses of whole batches, running
    statistics, moving references and the optimizer see the whole batch, as without chunks, except for the order of
    summation. Gradients are accumulated in the dtype of the parameters.

    >>> import jax.numpy as jnp
    >>> log_prob = lambda params, prompts, responses: params * responses
    >>> print(in_chunks(log_prob, 2)(2.0, jnp.zeros(5, int), jnp.arange(5.0)))
    [0. 2. 4. 6. 8.]

    Args:
      log_prob: scores responses, each row on its own: `objective = preference_objective(in_chunks(log_prob, 8), ...)`.
      rows_per_chunk: static; the last chunk is short if this does not divide the batch.

    Returns:
      A function with the same arguments.
    """
    checks.size("rows_per_chunk", rows_per_chunk)
    again_in_scan = jax.checkpoint(log_prob, prevent_cse=False)  # not needed inside a scan

    def chunked(params: Params, prompts: Array, responses: Any) -> Any:
        num_full = checks.rows("responses", (prompts, responses)) // rows_per_chunk * rows_per_chunk
        if num_full == 0:
            return jax.checkpoint(log_prob)(params, prompts, responses)
        rows = (prompts, responses)
        full = jax.tree.map(lambda leaf: leaf[:num_full].reshape(-1, rows_per_chunk, *leaf.shape[1:]), rows)
        scores = jax.lax.map(lambda chunk: again_in_scan(params, *chunk), full)
        scores = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), scores)
        if num_full == len(prompts):
            return scores
        left = jax.checkpoint(log_prob)(params, *jax.tree.map(lambda leaf: leaf[num_full:], rows))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), scores, left)

    return chunked
