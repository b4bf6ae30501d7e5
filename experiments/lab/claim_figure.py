"""The figure of a claim."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.figures.rlhf_figures import COLOURS, MARKERS
from dpo_jax.figures.style import GREY, as_written, named


class Measured(NamedTuple):
    """Means with their intervals, as a line over numbers or as marks over names.

    Attributes:
      x: numbers, or names.
      mean: one for each.
      half: half the width of its 95 % interval.
    """

    x: Sequence[Any]
    mean: Sequence[float]
    half: Sequence[float]


def draw(panels: Mapping[str, Mapping[str, Measured]], *, xlabel: str, title: str = "", log: bool = False) -> Figure:
    """The measurements behind a claim: a panel for each quantity, a series for each label.

    Args:
      panels: for each quantity, whose name is the label of the y axis, its series.
      xlabel: of all panels.
      title: the claim and its verdict.
      log: whether the x axis is logarithmic.
    """
    width = 4.6 * len(panels) + 0.6
    lines = textwrap.wrap(title, int(11.5 * (width - 0.9)))
    above = 0.3 + 0.17 * len(lines)
    height = 3.2 + above
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.9 / width, "right": 1 - 0.15 / width, "bottom": 0.6 / height, "top": 1 - above / height}
    all_axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={**margins, "wspace": 0.24})[0]
    figure.suptitle("\n".join(lines), x=0.9 / width, y=1 - 0.1 / height, ha="left", va="top", fontsize=10)
    for axes, (quantity, series) in zip(all_axes, panels.items(), strict=True):
        for i, (name, measured) in enumerate(series.items()):
            by_name = isinstance(measured.x[0], str)
            places = np.arange(len(measured.x)) + (0.12 * (i - (len(series) - 1) / 2) if by_name else 0)
            axes.errorbar(
                places if by_name else measured.x,
                measured.mean,
                yerr=measured.half,
                capsize=3,
                markersize=5,
                linestyle="none" if by_name else "-",
                linewidth=1.3,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                label=named(name),
            )
            if by_name:
                axes.set_xticks(range(len(measured.x)), measured.x, parse_math=False)
                axes.set_xlim(-0.6, len(measured.x) - 0.4)
        axes.grid(alpha=0.3)
        axes.set(xlabel=xlabel, ylabel=quantity)
        axes.margins(y=0.12)
        low, high = axes.get_ylim()
        if low < 0.3 * (high - low):
            axes.axhline(0.0, color=GREY, linewidth=0.8)
        if log:
            axes.set_xscale("log")
        if len(series) > 1:
            axes.legend(loc="best", fontsize=8.5)
    return as_written(figure)
