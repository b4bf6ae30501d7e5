"""Means over seeds as files hold them, and the seconds that sweeps took."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from dpo_jax import sweep

if TYPE_CHECKING:
    import xarray


@dataclass
class Seconds:
    """Adds up the seconds that sweeps spent compiling and running."""

    compile: float = 0.0
    run: float = 0.0

    def count(self, results: "xarray.Dataset") -> "xarray.Dataset":
        """Adds those of a sweep, and returns its results."""
        self.compile += results.attrs["compile_seconds"]
        self.run += results.attrs["run_seconds"]
        return results


def mean_and_stderr(values: Any) -> dict[str, np.ndarray]:
    """Mean over the first axis (seeds) and its standard error, NaN for a single seed."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return {"mean": values.mean(axis=0), "stderr": spread / np.sqrt(len(values))}


def by_name(results: "xarray.Dataset") -> dict[str, np.ndarray]:
    """What a sweep found, as arrays with the seed last, by name."""
    return {str(name): results[name].transpose(..., "seed").values for name in results.data_vars}


def over_seeds(function: Callable[[Any], PyTree], starts: sweep.Starts) -> PyTree:
    """A cheap function of each start, as NumPy arrays with the seed first."""
    return jax.device_get(jax.jit(partial(jax.lax.map, function, batch_size=16))(starts.values))


def seed_last(found: PyTree) -> PyTree:
    """Arrays with the seed last, which had it first."""
    return jax.tree.map(lambda values: np.moveaxis(values, 0, -1), found)
