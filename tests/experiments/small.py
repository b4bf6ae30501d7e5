"""A pipeline with the tutorial's steps and few data: seconds to compile, milliseconds to run."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from experiments.lab.pipeline import Pipeline

PIPELINE = Pipeline(num_demonstrations=64, num_preferences=96, sft_epochs=4, num_epochs=4, batch_size=24)


def more(factor: int) -> Pipeline:
    """The same with so many times as many comparisons."""
    return replace(PIPELINE, num_preferences=factor * PIPELINE.num_preferences)


def slow_but(names: Iterable[str], *fast: str) -> list[object]:
    """Parameters of a test, all slow but for a few."""
    assert {*fast} <= {*names}
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]
