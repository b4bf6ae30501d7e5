"""Results as Matplotlib figures. Colours are those of Okabe and Ito (2008), told apart by the colour-blind too."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

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


def training(history: Mapping[str, Float[ndarray, " epochs"]], *, bayes: Mapping[str, Any] | None = None) -> Figure:
    """How preference training went: loss, accuracy and reward margin over epochs.

    Args:
      history: `loss` (nats), `accuracy` and `reward_margin`; where it also has `held_out_loss` or the like, that is
        drawn beside it.
      bayes: `loss` and `accuracy` of the true rewards on new comparisons, if known (`toy.bayes_prediction`).
    """
    figure, panels = _panels(13.0, 3.8, columns=3)
    titles = {"loss": "Training loss (nats) ↓", "accuracy": "Training accuracy ↑", "reward_margin": "Reward margin ↑"}
    if "held_out_loss" in history:
        titles |= {"loss": "Loss (nats) ↓", "accuracy": "Preference accuracy ↑"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        epochs = range(1, len(history[name]) + 1)
        held_out = history.get(f"held_out_{name}")
        axes.plot(epochs, history[name], color=BLUE, label=None if held_out is None else "training")
        if held_out is not None:
            axes.plot(epochs, held_out, color=VERMILION, label="held out")
        axes.set(xlabel="Epoch", ylabel=title[:-2], title=title)
        axes.grid(alpha=0.3)
    panels[0].axhline(np.log(2), color=GREY, linestyle="--", label="no preference: log 2")
    panels[1].axhline(0.5, color=GREY, linestyle="--", label="coin toss")
    for axes, name in zip(panels, ("loss", "accuracy"), strict=False):
        if bayes is not None:
            axes.axhline(bayes[name], color="black", linestyle=":", label="true rewards, new pairs")
    for axes in panels:
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best")
    return figure


def beta_ablation(
    betas: Sequence[float],
    losses: Float[ndarray, "betas epochs"],
    rewards: Float[ndarray, " betas"],
    *,
    optimal_rewards: Float[ndarray, " betas"],
    sft_reward: float,
    stderr: Float[ndarray, " betas"] | None = None,
) -> Figure:
    """What beta does: the loss over epochs, and the reward that the policies earn in the end.

    Args:
      betas: the values tried.
      losses: mean loss (nats) of each epoch, for each beta.
      rewards: expected true reward of the trained policies, for each beta.
      optimal_rewards: that of the closed-form optimum, for each beta.
      sft_reward: that of the policy which training started from.
      stderr: standard errors of `rewards`, drawn as error bars.
    """
    figure, (left, right) = _panels(12.0, 4.4, columns=2)
    labels, colours = [f"β = {beta:g}" for beta in betas], [PALETTE[i % len(PALETTE)] for i in range(len(betas))]
    for loss, label, colour in zip(losses, labels, colours, strict=True):
        left.plot(range(1, len(loss) + 1), loss, color=colour, label=label)
    left.set(xlabel="Epoch", ylabel="Training loss (nats)", title="DPO loss by β")
    left.legend(loc="best")
    left.grid(alpha=0.3)

    bars = right.bar(labels, rewards, yerr=stderr, capsize=4, color=colours, width=0.6)
    right.bar_label(bars, fmt="%.3f", label_type="center", color="white", fontweight="bold")
    right.plot(labels, optimal_rewards, "D", color="black", label="closed-form optimum")
    right.axhline(sft_reward, color=GREY, linestyle="--", label=f"SFT: {sft_reward:.3f}")
    right.set(ylabel="Expected true reward", title="Final reward by β", ylim=(0, 1.35 * float(max(optimal_rewards))))
    right.legend(loc="upper right", ncols=2)
    right.grid(alpha=0.3, axis="y")
    right.set_axisbelow(True)
    return figure


def frontier(
    curve: Mapping[str, Float[ndarray, " points"]],
    learned: Mapping[str, Float[ndarray, " betas"]],
    betas: Sequence[float],
    optima: Mapping[str, Float[ndarray, " betas"]],
    *,
    sft_reward: float,
) -> Figure:
    """Reward against KL to the reference: the best that can be had, and what was learnt.

    Each mapping has `kl_to_reference` (nats) and `expected_reward`, means over prompts.

    Args:
      curve: the exact frontier.
      learned: the trained policies, one for each beta.
      betas: the values of beta.
      optima: the closed-form optimum for each beta.
      sft_reward: the expected reward of the reference policy.
    """
    figure, (axes,) = _panels(7.5, 4.8, columns=1, legend_width=2.0)
    axes.plot(curve["kl_to_reference"], curve["expected_reward"], color="black", label="exact frontier")
    axes.plot(0.0, sft_reward, "s", color=GREY, label="SFT, the reference")
    for i, beta in enumerate(betas):
        colour = PALETTE[i % len(PALETTE)]
        start, end = ((points["kl_to_reference"][i], points["expected_reward"][i]) for points in (optima, learned))
        axes.plot(*zip(start, end, strict=True), color=colour, linestyle=":")
        axes.plot(*start, "D", color=colour, markerfacecolor="white", label=f"optimum, β = {beta:g}")
        axes.plot(*end, "o", color=colour, label=f"learnt, β = {beta:g}")
    axes.set(xlabel="KL to the reference (nats)", ylabel="Expected true reward", title="Reward against KL")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    return figure


class LossFamily(NamedTuple):
    """Losses that eat the same, as two panels, one above the other.

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
    return figure


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
    panels[0].set_yticks([len(rows) - row for row in range(len(rows))], [name for name, _ in rows])
    for tick, (_, is_family) in zip(panels[0].get_yticklabels(), rows, strict=True):
        tick.set(fontweight="bold" if is_family else "normal", fontsize=8.5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=5, frameon=False)
    return figure


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
        axes.errorbar(mean, y, xerr=half, fmt=marker, color=colour, markersize=4, linewidth=1.2, label=setting)
        if reference in by_name:
            axes.axvline(by_name[reference][0], color=colour, linewidth=0.9, linestyle=":")
    axes.plot([], [], ":", color=GREY, label=reference)
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
        axes.set(xlabel="KL to the reference (nats)", ylabel="Expected true reward", title=setting.capitalize())
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="upper center", ncols=5, frameon=False)
    return figure


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
        axes.plot(*known.T, "osD^vPX"[i], color=colours[i], markersize=5, alpha=0.8, linestyle="none", label=family)
    axes.margins(x=0.22, y=0.15)
    axes.grid(alpha=0.3)
    _label(axes, {name: points[name] for name in labelled if name in points})


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
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


def _draw_family(family: LossFamily, upper: Axes, lower: Axes) -> None:
    for place, (axes, (ylabel, limits)) in enumerate(((upper, family.upper), (lower, family.lower))):
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        for i, (label, lines) in enumerate(family.curves.items()):
            colour = PALETTE[(i - 1) % len(PALETTE)] if i else "black"
            style = LINE_STYLES[i % len(LINE_STYLES)]
            axes.plot(family.x, lines[place], color=colour, linestyle=style, linewidth=1.8, label=label)
        axes.set(ylabel=ylabel, ylim=limits, xlim=(family.x[0], family.x[-1]))
        axes.yaxis.set_label_coords(-0.17, 0.5)
        axes.grid(alpha=0.3)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel(family.xlabel)


def _panels(width: float, height: float, *, columns: int, legend_width: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    """A row of axes with margins set by hand (in inches): Matplotlib's layout engines are slow."""
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.9 / width, "right": 1 - (0.15 + legend_width) / width, "bottom": 0.55 / height}
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={**margins, "top": 1 - 0.35 / height, "wspace": 0.25})
    return figure, list(axes[0])
