"""What figures share. Colours are those of Okabe and Ito (2008), which the colour-blind can distinguish."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
PALETTE = (VERMILION, GREEN, BLUE, PURPLE, ORANGE, SKY)
GREY = "#666666"
LINE_STYLES = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (3, 1)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
)


def ordered_colours(values: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """A colour for each value, from dark to light in the order of the values."""
    ranks = np.argsort(np.argsort(values))
    return [colormaps["viridis"](0.85 * rank / max(1, len(values) - 1)) for rank in ranks]


def panels(width: float, height: float, *, columns: int, legend_width: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    """A row of axes with margins set by hand (in inches): Matplotlib's layout engines are slow."""
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.9 / width, "right": 1 - (0.15 + legend_width) / width, "bottom": 0.55 / height}
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={**margins, "top": 1 - 0.35 / height, "wspace": 0.25})
    return figure, list(axes[0])


HIDDEN = "\u2060"
"""Stands before labels that begin with `_`, which Matplotlib would leave out of legends, until the legend is made."""


def named(name: str) -> str:
    """A label that appears in legends, whatever the name; `as_written` takes away what that needs."""
    return name if name and not name.startswith("_") else HIDDEN + name


def as_written(figure: Figure) -> Figure:
    """Shows every text of a figure but its tick labels as it was given: `$` starts no mathematics.

    (Those of logarithmic axes are mathematics. Ticks with names take `parse_math=False` themselves.)
    """
    legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
    titles = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    for text in [*figure.texts, *titles, *(text for legend in legends for text in legend.get_texts())]:
        text.set_parse_math(False)
        text.set_text(text.get_text().removeprefix(HIDDEN))
    return figure


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes names to the right of their points, from the highest down, none over another."""
    low, high = axes.get_ylim()
    free = high
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        height = min(y, free)
        axes.annotate(
            name,
            (x, y),
            xytext=(x + 0.03 * (axes.get_xlim()[1] - axes.get_xlim()[0]), height),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6},
        )
        free = height - 0.055 * (high - low)
