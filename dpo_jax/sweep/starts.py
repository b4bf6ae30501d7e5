"""Starts: what the runs of a seed share, made once and handed to sweeps."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from dpo_jax.sweep.programs import Struct, is_key


@dataclass(frozen=True)
class Starts:
    """What the runs of each seed start from: `sweep.prepare` makes them, and `sweep.grid` takes them for its key.

    Attributes:
      values: a pytree of arrays with a leading axis of seeds; keys among them are typed keys.
      seeds: the seed of each row.
    """

    values: PyTree
    seeds: Sequence[int]

    @cached_property
    def struct(self) -> Struct:
        """The structure of the start of one seed."""
        return Struct.of(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.values))

    @cached_property
    def checksum(self) -> str:
        """Tells these starts from others."""
        checksum = zlib.crc32(repr([*self.seeds]).encode())
        for leaf in jax.tree.leaves(self.values):
            numbers = jax.random.key_data(leaf) if is_key(leaf.dtype) else leaf
            checksum = zlib.crc32(np.ascontiguousarray(numbers).tobytes(), checksum)
        return f"{checksum:08x}"

    def sel(self, seeds: Sequence[int]) -> "Starts":
        """The starts of some seeds.

        Raises:
          KeyError: there is no start for a seed.
        """
        rows = self._rows(seeds)
        return Starts(jax.tree.map(lambda leaf: leaf[rows], self.values), list(seeds))

    def chosen(self, num_seeds: int | None, seeds: Sequence[int] | None) -> Sequence[int]:
        """Which seeds a sweep takes: all of them, unless told otherwise."""
        if num_seeds is not None:
            raise ValueError("starts have their own seeds: choose among them by seeds")
        if seeds is None:
            return self.seeds
        self._rows(seeds)
        return [int(seed) for seed in seeds]

    def leaves(self, seeds: Sequence[int]) -> list[Any]:
        """The leaves of the starts of some seeds."""
        rows = self._rows(seeds)
        return [leaf[rows] for leaf in jax.tree.leaves(self.values)]

    @cached_property
    def _places(self) -> dict[int, int]:
        return {int(seed): row for row, seed in enumerate(self.seeds)}

    def _rows(self, seeds: Sequence[int]) -> np.ndarray:
        missing = [seed for seed in seeds if int(seed) not in self._places]
        if missing:
            raise KeyError(f"there is no start for seed {missing[0]}")
        return np.array([self._places[int(seed)] for seed in seeds], int)
