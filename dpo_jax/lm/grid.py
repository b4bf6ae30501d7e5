"""Adapters over a product of axes, trained by one program, with labelled results."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.lm.adapters import LoRA
from dpo_jax.lm.folder import LanguageModel
from dpo_jax.lm.tuning import tune
from dpo_jax.types import Params

if TYPE_CHECKING:
    import xarray


class Grid(NamedTuple):
    """Adapters and what they did.

    Attributes:
      adapters: their parameters, a leading axis for all of them.
      points: the hyperparameters of each, by name, `[runs]`.
      results: metrics of batches, with a dimension for each axis, `seed` and `step`.
    """

    adapters: Params
    points: Mapping[str, np.ndarray]
    results: xarray.Dataset

    def adapter(self, **point: Any) -> Params:
        """One adapter, by its hyperparameters: `grid.adapter(beta=0.1, seed=0)`.

        Raises:
          KeyError: there is no such point, or more than one.
        """
        which = np.ones(len(self.points["seed"]), bool)
        for name, value in point.items():
            which &= np.isclose(self.points[name], value)
        if which.sum() != 1:
            raise KeyError(f"{point} describes {which.sum()} adapters, not one; there are {dict(self.points)}")
        return jax.tree.map(lambda leaf: leaf[int(np.argmax(which))], self.adapters)


def tune_grid(
    key: Key[Array, ""],
    model: LanguageModel,
    data: Any,
    *,
    lora: LoRA,
    num_seeds: int = 1,
    axes: Mapping[str, Any],
    **options: Any,
) -> Grid:
    """Trains an adapter for each point of a product of axes and seeds, all in one program. See `tune`.

    All see the same batches, so differences between points are paired. A seed is that of a new adapter.

    Args:
      key: typed PRNG key.
      model: where training starts.
      data: of tokens.
      lora: which matrices have adapters.
      num_seeds: how many adapters each point gets.
      axes: for each hyperparameter its values: `{"beta": [0.03, 0.1, 0.3], "learning_rate": [2e-4]}`.
      **options: of `tune`.

    Raises:
      ValueError: an axis has no values, or one twice, or is called `seed` or `step`.
    """
    checks.size("num_seeds", num_seeds)
    for name, values in axes.items():
        if name in ("seed", "step") or not len(values) or len({*map(float, values)}) < len(values):
            raise ValueError(f"the axis {name} must have values, each once, and another name than seed and step")
    every: dict[str, Sequence[Any]] = {name: list(map(float, values)) for name, values in axes.items()}
    every["seed"] = list(range(num_seeds))
    table = list(itertools.product(*every.values()))
    points: dict[str, Any] = {
        name: np.array(column, np.float32) for name, column in zip(every, zip(*table, strict=True), strict=True)
    }
    points["seed"] = points["seed"].astype(np.int32)
    tuned = tune(key, model, data, lora=lora, points=points, **options)
    return Grid(tuned.params, points, _labelled(tuned.history, every))


def _labelled(history: Mapping[str, np.ndarray], axes: Mapping[str, Sequence[Any]]) -> xarray.Dataset:
    import xarray

    shape, dims = [len(values) for values in axes.values()], (*axes, "step")
    arrays = {name: (dims, values.reshape(*shape, values.shape[-1])) for name, values in history.items()}
    num_steps = next(iter(history.values())).shape[-1]
    return xarray.Dataset(arrays, {**axes, "step": np.arange(1, num_steps + 1)})
