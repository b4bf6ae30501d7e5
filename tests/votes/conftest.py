import jax
import numpy as np
import pytest

from dpo_jax.types import Pair
from dpo_jax.votes import Votes


@pytest.fixture
def double():
    """Double precision, so that errors are those of the method."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def draw():
    """Draws votes between random pairs by the Bradley-Terry model."""

    def drawn(seed, strengths, num, ties=0.0):
        rng = np.random.default_rng(seed)
        a = rng.integers(len(strengths), size=num)
        b = (a + rng.integers(1, len(strengths), size=num)) % len(strengths)
        won = rng.random(num) < 1 / (1 + np.exp(strengths[b] - strengths[a]))
        tied = rng.random(num) < ties if ties else None
        return Votes(Pair(np.where(won, a, b), np.where(won, b, a)), tied)

    return drawn
