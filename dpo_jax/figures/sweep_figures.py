"""Figures of a sweep's summary (`dpo_jax.sweep.summarise`): colours for one axis, panels for all others."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_jax.figures.style import GREY, LINE_STYLES, PALETTE, as_written, named

if TYPE_CHECKING:
    import xarray

PANELS_PER_ROW = 3
NAMES_PER_COLUMN = 22
WIDTH, HEIGHT = 4.6, 3.9
"""Inches of a panel."""


def lines(
    summary: "xarray.Dataset", name: str, *, x: str, colour: str, label: str = "", title: str = "", level: float = 0.0
) -> Figure:
    """A result against an axis, mean and 95 % interval: a line for each value of another axis.

    Args:
      summary: what `sweep.summarise` returned.
      name: of the result.
      x: the axis of numbers to draw against; logarithmic if all of them are positive.
      colour: the axis whose values have a line each. All further axes of more than one value have panels.
      label: of the result; by default its name.
      title: of the figure.
      level: where a dashed horizontal line is drawn.
    """
    figure, panes = _panels(summary, (x, colour), title)
    for axes, here in panes:
        for style, value, line in _styled(here, colour):
            line = line.sortby(x)
            mean, low, high = (line[name].sel(statistic=which) for which in ("mean", "low", "high"))
            axes.plot(line[x], mean, marker="o", markersize=4, label=named(str(value)), **style)
            axes.fill_between(line[x], low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1)
        axes.set(xscale="log" if np.all(summary[x] > 0) else "linear", xlabel=x, ylabel=label or name)
    return _finished(figure)


def frontiers(
    summary: "xarray.Dataset",
    *,
    along: str,
    colour: str,
    x: str = "kl_to_reference",
    y: str = "gain",
    optimum: tuple[str, str] = ("optimal_kl", "optimal_gain"),
    labels: tuple[str, str] = ("KL to the reference (nats)", "Reward gained over the reference"),
    title: str = "",
) -> Figure:
    """One result against another, with 95 % intervals of both: a line for each value of an axis, points along another.

    Args:
      summary: what `sweep.summarise` returned.
      along: the axis whose values are the points of a line, beta for instance; they are written beside the optimum.
      colour: the axis whose values have a line each. All further axes of more than one value have panels.
      x, y: names of the results.
      optimum: names of the results at the exact optimum; not drawn if the summary has none.
      labels: of both axes.
      title: of the figure.
    """
    figure, panes = _panels(summary, (along, colour), title)
    for axes, here in panes:
        if optimum[0] in here:
            best = here.isel({colour: 0}).sortby(along).sel(statistic="mean")
            axes.plot(best[optimum[0]], best[optimum[1]], "k--s", markersize=4, label="exact optimum")
            for value, kl, reward in zip(best[along].values, best[optimum[0]], best[optimum[1]], strict=True):
                axes.annotate(_written(value), (kl, reward), xytext=(3, 4), textcoords="offset points", fontsize=7)
        for style, value, line in _styled(here, colour):
            line = line.sortby(along)
            centre = {which: line[which].sel(statistic="mean") for which in (x, y)}
            bars = {which: centre[which] - line[which].sel(statistic="low") for which in (x, y)}
            error: dict[str, Any] = {"xerr": bars[x], "yerr": bars[y], "elinewidth": 0.8}
            axes.errorbar(centre[x], centre[y], **error, marker="o", markersize=3.5, label=named(str(value)), **style)
        axes.axhline(0.0, color=GREY, linestyle="--", linewidth=1)
        axes.set(xlabel=labels[0], ylabel=labels[1])
    return _finished(figure)


def heat_maps(summary: "xarray.Dataset", name: str, *, x: str, y: str, label: str = "", title: str = "") -> Figure:
    """The mean of a result over two axes, in the same colours for all panels: one for each point of the other axes.

    Args:
      summary: what `sweep.summarise` returned.
      name: of the result.
      x, y: the axes of columns and rows.
      label: what the colours mean; by default the result's name.
      title: of the figure.
    """
    figure, panes = _panels(summary, (x, y), title)
    means = summary[name].sel(statistic="mean")
    low, high = float(means.min()), float(means.max())
    image: Any = None
    for axes, here in panes:
        table = here[name].sel(statistic="mean").transpose(y, x).values
        image = axes.imshow(table, origin="lower", aspect="auto", cmap="cividis", vmin=low, vmax=high)
        axes.set(xlabel=x, ylabel=y, xticks=range(table.shape[1]), yticks=range(table.shape[0]))
        axes.set_xticklabels(map(_written, here[x].values), parse_math=False)
        axes.set_yticklabels(map(_written, here[y].values), parse_math=False)
        axes.grid(visible=False)
        for (i, j), value in np.ndenumerate(table):
            dark = value < (low + high) / 2
            axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    width = figure.get_figwidth()
    bar = figure.add_axes((1 - 1.05 / width, 0.2, 0.15 / width, 0.6))
    figure.colorbar(image, cax=bar).set_label(label or name)
    return as_written(figure)


def _panels(
    summary: "xarray.Dataset", shown: Sequence[str], title: str
) -> tuple[Figure, list[tuple[Axes, "xarray.Dataset"]]]:
    """A figure with a panel for each point of the axes that are not shown, and what belongs into each."""
    conditions = list(_conditions(summary, shown))
    num_names = math.prod(summary.sizes[axis] for axis in shown[1:])
    legend = 2.6 * math.ceil(num_names / NAMES_PER_COLUMN)
    columns = min(PANELS_PER_ROW, len(conditions))
    rows = math.ceil(len(conditions) / columns)
    width, height = WIDTH * columns + legend, HEIGHT * rows + 0.5
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        rows,
        columns,
        sharex=True,
        sharey=True,
        squeeze=False,
        gridspec_kw={
            "left": 0.75 / width,
            "right": 1 - (legend + 0.1) / width,
            "bottom": 0.6 / height,
            "top": 1 - 0.75 / height,
            "wspace": 0.28,
            "hspace": 0.38,
        },
    )
    figure.suptitle(title, x=0.75 / width, ha="left", fontsize=11)
    for axes in grid.flat[len(conditions) :]:
        axes.remove()
    panes = []
    for axes, (name, here) in zip(grid.flat, conditions, strict=False):
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True, labelleft=True)
        panes.append((axes, here))
    return figure, panes


def _conditions(summary: "xarray.Dataset", shown: Sequence[str]) -> Iterator[tuple[str, "xarray.Dataset"]]:
    """Every point of the axes that are not shown, with a name for it."""
    others = [str(axis) for axis in summary.indexes if axis not in (*shown, "statistic")]
    for values in itertools.product(*(summary[axis].values for axis in others)):
        point = dict(zip(others, values, strict=True))
        varied = [f"{axis} {_written(value)}" for axis, value in point.items() if summary.sizes[axis] > 1]
        yield ", ".join(varied), summary.sel(point)


def _styled(here: "xarray.Dataset", colour: str) -> Iterator[tuple[dict[str, Any], Any, "xarray.Dataset"]]:
    for i, value in enumerate(here[colour].values):
        style = {"color": PALETTE[i % len(PALETTE)], "linestyle": LINE_STYLES[i // len(PALETTE) % len(LINE_STYLES)]}
        yield style, value, here.isel({colour: i})


def _finished(figure: Figure) -> Figure:
    """With one legend for all panels."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = math.ceil(len(names) / NAMES_PER_COLUMN)
    anchor = figure.axes[min(PANELS_PER_ROW, len(figure.axes)) - 1]
    anchor.legend(
        handles, names, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=9, ncols=columns
    )
    return as_written(figure)


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
