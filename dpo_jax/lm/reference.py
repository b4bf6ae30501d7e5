"""Log-probabilities under the reference, computed once and kept on disk."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from dpo_jax.fast.compiling import precise_options
from dpo_jax.lm.batches import ONLY_TOKENS, Prices, alike, check_rows, prices_of, sizes_of
from dpo_jax.lm.checkpoints import fingerprint
from dpo_jax.lm.folder import LanguageModel, write_folder
from dpo_jax.lm.model import Decoder
from dpo_jax.lm.processes import agreed
from dpo_jax.lm.scoring import log_prob_fn
from dpo_jax.lm.sharding import mesh_of, to_host
from dpo_jax.lm.stream import PADDING, Capacity
from dpo_jax.types import Params

VERSION = 1
"""Of the computation: another one makes old files useless."""


def logps(
    model: LanguageModel,
    data: Any,
    *,
    mean: bool = False,
    batch_size: int = 8,
    report: Callable[[int, int], None] | None = None,
) -> Any:
    """Log-probabilities (nats) of the responses of data, in the structure of the responses.

    Args:
      model: the policy.
      data: `Preferences`, `Labels` or `Demonstrations` of tokens.
      mean: see `log_prob_fn`.
      batch_size: rows at once.
      report: called as `report(done, all)` after each batch.
    """
    check_rows(model.decoder.config, data)
    mesh = mesh_of(model.params)

    def score(capacity: Capacity, prompts: Any, responses: Any) -> Any:
        return _scorer(model.decoder, capacity, mean, mesh)(model.params, prompts, responses)

    prices, multiple = prices_of(model.decoder.config), mesh.size if mesh else 1
    return score_rows(score, data, batch_size, report, prices=prices, multiple=multiple)


def score_rows(
    score: Callable[[Capacity, Any, Any], Any],
    data: Any,
    batch_size: int,
    report: Callable[[int, int], None] | None = None,
    *,
    prices: Prices = ONLY_TOKENS,
    multiple: int = 1,
) -> Any:
    """Scores all rows.

    Args:
      score: `score(capacity, prompts, responses)`, one number for each response; or more, on axes before that of rows.
      data: with prompts and responses.
      batch_size: rows at once.
      report: see `logps`.
      prices, multiple: see `batches.shaped`.
    """
    sizes = sizes_of(data.prompts, data.responses)
    batches = alike(sizes, batch_size=batch_size, prices=prices, multiple=multiple)
    parts = []
    for i, batch in enumerate(batches):
        rows = jax.tree.map(lambda leaf, rows=batch.rows: _rows(leaf, rows), (data.prompts, data.responses))
        parts.append(jax.tree.map(to_host, score(batch.capacity, *rows)))
        if report:
            report(i + 1, len(batches))
    back = np.argsort(np.concatenate([batch.rows for batch in batches]))[-len(sizes) :]  # before them, rows of -1
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1)[..., back], *parts)


def with_reference(
    model: LanguageModel,
    data: Any,
    *,
    mean: bool = False,
    batch_size: int = 8,
    cache: str | Path | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Any:
    """`Preferences` or `Labels` that carry the log-probabilities of their responses under a model.

    Args:
      model: the reference.
      data: of tokens.
      mean: see `log_prob_fn`.
      batch_size: rows at once.
      cache: a folder that keeps the results under a hash of the model's parameters and sizes, the tokens and `mean`.
      report: see `logps`.

    Raises:
      FloatingPointError: a log-probability is not finite.
      ValueError: a file of the cache is damaged.
    """

    def compute() -> Any:
        return _finite(logps(model, data, mean=mean, batch_size=batch_size, report=report))

    if cache is None:
        return data._replace(reference_logps=compute())
    options = [VERSION, repr(model.decoder.config), str(model.decoder.dtype), mean]
    place = Path(cache) / fingerprint((options, model.params, data.prompts, data.responses))
    if not agreed(place.exists()):
        leaves = jax.tree.leaves(compute())
        write_folder(place, [(f"{i}.npy", _as_npy(leaf)) for i, leaf in enumerate(leaves)])
    structure: Any = jax.tree.structure(data.responses)
    leaves = [_read(place / f"{i}.npy", len(data.prompts)) for i in range(structure.num_leaves)]
    return data._replace(reference_logps=jax.tree.unflatten(structure, leaves))


def _rows(tokens: Any, rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "rows length"]:
    """Rows of tokens; a row of -1 has none."""
    return np.where(rows[:, None] >= 0, np.asarray(tokens)[rows], PADDING)


@functools.cache
def _scorer(decoder: Decoder, capacity: Capacity, mean: bool, mesh: Mesh | None) -> Callable[[Params, Any, Any], Any]:
    score = log_prob_fn(decoder, capacity=capacity, mean=mean, mesh=mesh)
    return jax.jit(score, compiler_options=precise_options())


def _finite(found: Any) -> Any:
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found)):
        raise FloatingPointError(
            "a log-probability under the reference is not finite: the model's parameters are at fault"
        )
    return found


def _as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _read(path: Path, num: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} is damaged: remove its folder to compute it again ({problem})") from None
    if array.shape != (num,) or not np.all(np.isfinite(array)):
        raise ValueError(f"{path} does not hold {num} log-probabilities: remove its folder to compute it again")
    return array
