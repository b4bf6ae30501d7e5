"""The family of losses, and what each of them does."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from dpo_jax.figures.style import (
    BLUE,
    GREEN,
    GREY,
    LINE_STYLES,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILION,
    as_written,
    label_points,
    named,
)


class LossFamily(NamedTuple):
    """Losses of the same input, as two panels, one above the other.

    Attributes:
      title: what they have in common.
      xlabel: what `x` is.
      x: where the losses were evaluated.
      upper, lower: what each panel shows, and the limits of its y axis.
      curves: two lines for each loss by label, for the upper and the lower panel. The first is drawn in black.
    """

    title: str
    xlabel: str
    x: Float[ndarray, " points"]
    upper: tuple[str, tuple[float, float]]
    lower: tuple[str, tuple[float, float]]
    curves: Mapping[str, tuple[Float[ndarray, " points"], Float[ndarray, " points"]]]


def loss_family(families: Sequence[LossFamily], *, columns: int = 3) -> Figure:
    """Losses and their pulls: for each family a title, a legend and two panels.

    Args:
      families: what to draw, row by row.
      columns: how many stand side by side.
    """
    rows = [families[first : first + columns] for first in range(0, len(families), columns)]
    headings = [0.5 + 0.17 * -(-max(len(family.curves) for family in row) // 2) for row in rows]
    width, panel, left, gap, between, below = 11.0, 2.05, 0.75, 0.73, 0.1, 0.72  # inches
    panel_width = (width - 0.1 - left + gap) / columns - gap
    heights = [heading + 2 * panel + between + below for heading in headings]
    height = sum(heights)
    figure = Figure(figsize=(width, height))
    for i, row in enumerate(rows):
        top = height - sum(heights[:i])
        for j, family in enumerate(row):
            x = left + j * (panel_width + gap)
            bottoms = top - headings[i] - panel, top - headings[i] - 2 * panel - between
            upper, lower = (
                figure.add_axes((x / width, bottom / height, panel_width / width, panel / height)) for bottom in bottoms
            )
            _draw_family(family, upper, lower)
            figure.text((x - 0.58) / width, (top - 0.1) / height, family.title, va="top", size=12, weight="bold")
            figure.legend(
                *upper.get_legend_handles_labels(),
                loc="upper left",
                bbox_to_anchor=((x - 0.64) / width, (top - 0.33) / height),
                ncols=2,
                frameon=False,
                fontsize=9,
                handlelength=2.4,
                handletextpad=0.5,
                columnspacing=0.8,
                labelspacing=0.25,
                borderpad=0.0,
            )
    return as_written(figure)


def loss_gains(
    families: Mapping[str, Sequence[str]],
    gains: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]],
    *,
    reference: str = "dpo",
) -> Figure:
    """What each loss gains: a row for each, grouped by family, with a mark and an interval for each setting.

    Args:
      families: for each family the names of its losses, in the order of the rows.
      gains: for each panel, for each setting (four at most), and for each name, the mean gain and half the width of its
        interval.
      reference: the name of the loss that all are compared with: its gain is drawn as a line for each setting.
    """
    rows: list[tuple[str, bool]] = []
    for family, names in families.items():
        rows += [(family, True), *((name, False) for name in names)]
    width, height = 10.5, 0.215 * len(rows) + 1.1
    figure = Figure(figsize=(width, height))
    margins = {"left": 1.9 / width, "right": 1 - 0.1 / width, "bottom": 0.6 / height, "top": 1 - 0.5 / height}
    panels = figure.subplots(1, len(gains), sharey=True, squeeze=False, gridspec_kw={**margins, "wspace": 0.05})[0]
    heights = {name: len(rows) - row for row, (name, is_family) in enumerate(rows) if not is_family}
    for axes, (label, by_setting) in zip(panels, gains.items(), strict=True):
        _draw_gains(axes, by_setting, heights, reference)
        axes.set(ylim=(0.3, len(rows) + 0.7), xlabel=label)
    panels[0].set_yticks([len(rows) - row for row in range(len(rows))], [name for name, _ in rows], parse_math=False)
    for tick, (_, is_family) in zip(panels[0].get_yticklabels(), rows, strict=True):
        tick.set(fontweight="bold" if is_family else "normal", fontsize=8.5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=5, frameon=False)
    return as_written(figure)


def _draw_gains(
    axes: Axes,
    by_setting: Mapping[str, Mapping[str, tuple[float, float]]],
    heights: Mapping[str, int],
    reference: str,
) -> None:
    for i, (setting, by_name) in enumerate(by_setting.items()):
        colour, marker = (BLUE, VERMILION, GREEN, PURPLE)[i], "os^D"[i]
        shift = 0.6 * (0.5 - (i + 0.5) / len(by_setting))
        names = [name for name in heights if name in by_name]
        mean, half = np.array([by_name[name] for name in names]).T
        y = np.array([heights[name] for name in names]) + shift
        axes.errorbar(mean, y, xerr=half, fmt=marker, color=colour, markersize=4, linewidth=1.2, label=named(setting))
        if reference in by_name:
            axes.axvline(by_name[reference][0], color=colour, linewidth=0.9, linestyle=":")
    axes.plot([], [], ":", color=GREY, label=named(reference))
    axes.axvline(0.0, color=GREY, linewidth=0.9)
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.3, axis="x")


def loss_frontiers(
    settings: Mapping[str, Mapping[str, Any]], families: Mapping[str, Sequence[str]], *, labelled: Sequence[str] = ()
) -> Figure:
    """Reward against KL of many losses, a panel for each setting, with the exact frontier.

    Args:
      settings: for each its curves `frontier` and `sharpened` (`kl_to_reference` and `expected_reward` of the exact
        frontier, and of the sharpened SFT policy), `sft_reward`, and `points`: for each name of a loss its KL (nats)
        and reward.
      families: for each family the names of its losses; each has a colour and a mark.
      labelled: names to be written beside their points.
    """
    num_rows = -(-len(settings) // 2)
    width, height = 10.5, 3.6 * num_rows + 0.9
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.8 / width, "right": 1 - 0.1 / width, "bottom": 0.55 / height, "top": 1 - 1.1 / height}
    panels = figure.subplots(num_rows, 2, squeeze=False, gridspec_kw={**margins, "hspace": 0.35, "wspace": 0.18})
    for axes in panels.flat[len(settings) :]:
        axes.set_visible(False)
    for axes, (setting, content) in zip(panels.flat, settings.items(), strict=False):
        _draw_frontier(axes, content, families, labelled)
        axes.set(xlabel="KL to the reference (nats)", ylabel="Expected true reward", title=setting)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="upper center", ncols=5, frameon=False)
    return as_written(figure)


def _draw_frontier(
    axes: Axes, content: Mapping[str, Any], families: Mapping[str, Sequence[str]], labelled: Sequence[str]
) -> None:
    points = content["points"]
    for name, style, label in (("frontier", "-", "exact frontier"), ("sharpened", "--", "SFT, only sharpened")):
        axes.plot(content[name]["kl_to_reference"], content[name]["expected_reward"], style, color="black", label=label)
    axes.plot(0.0, content["sft_reward"], "s", color=GREY, label="SFT, the reference")
    colours = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "black")
    for i, (family, names) in enumerate(families.items()):
        known = np.array([points[name] for name in names if name in points]).reshape(-1, 2)
        axes.plot(
            *known.T, "osD^vPX"[i], color=colours[i], markersize=5, alpha=0.8, linestyle="none", label=named(family)
        )
    axes.margins(x=0.22, y=0.15)
    axes.grid(alpha=0.3)
    label_points(axes, {name: points[name] for name in labelled if name in points})


def _draw_family(family: LossFamily, upper: Axes, lower: Axes) -> None:
    for place, (axes, (ylabel, limits)) in enumerate(((upper, family.upper), (lower, family.lower))):
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        for i, (label, lines) in enumerate(family.curves.items()):
            colour = PALETTE[(i - 1) % len(PALETTE)] if i else "black"
            style = LINE_STYLES[i % len(LINE_STYLES)]
            axes.plot(family.x, lines[place], color=colour, linestyle=style, linewidth=1.8, label=named(label))
        axes.set(ylabel=ylabel, ylim=limits, xlim=(family.x[0], family.x[-1]))
        axes.yaxis.set_label_coords(-0.17, 0.5)
        axes.grid(alpha=0.3)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel(family.xlabel)
