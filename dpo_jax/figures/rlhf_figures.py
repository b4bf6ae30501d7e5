"""RLHF beside DPO: reward against KL, overoptimisation, learning rates."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from dpo_jax.figures.style import BLUE, GREEN, GREY, LINE_STYLES, ORANGE, PURPLE, SKY, VERMILION, as_written, named

COLOURS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY, GREY, "#7F4F24")
MARKERS = "osD^vPX*"


class Points(NamedTuple):
    """Policies in the plane of reward and distance.

    Attributes:
      kl: KL to the reference (nats).
      gain: expected true reward, beyond that of the reference.
      learned_gain: the same by a reward model, if there is one.
    """

    kl: Float[ndarray, " points"]
    gain: Float[ndarray, " points"]
    learned_gain: Float[ndarray, " points"] | None = None


def rlhf_frontier(
    judges: Mapping[str, Mapping[str, Points]], bounds: Mapping[str, Points], *, limits: tuple[float, float]
) -> Figure:
    """Reward against KL, a panel for each judge, a line for each method.

    Args:
      judges: for each judge its methods by name, and the points of each, one for each strength of the pull.
      bounds: what limits them all, by name: the exact frontier first, drawn in black in every panel.
      limits: the largest KL to show, and the smallest gain.
    """
    figure, panels = _row(len(judges), height=5.0, below=1.5, above=0.75, width=max(6.5, 4.0 * len(judges)))
    for axes, (judge, methods) in zip(panels, judges.items(), strict=True):
        for i, (name, points) in enumerate(bounds.items()):
            axes.plot(points.kl, points.gain, color="black", linestyle=("-", "--", ":")[i], label=named(name))
        for i, (name, points) in enumerate(methods.items()):
            axes.plot(
                points.kl,
                points.gain,
                linewidth=1,
                markersize=5,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)] if len(points.kl) <= 10 else None,
                label=named(name),
            )
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        axes.set(xlabel="KL to the reference (nats)", title=judge, xlim=(-0.03, limits[0]), ylim=(limits[1], None))
        handles, names = axes.get_legend_handles_labels()
        own = slice(len(bounds), None)
        axes.legend(
            handles[own],
            names[own],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=2,
            frameon=False,
            fontsize=9,
        )
    panels[0].set_ylabel("Gain in true reward over SFT")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles[: len(bounds)], names[: len(bounds)], loc="upper center", ncols=2, frameon=False)
    return as_written(figure)


def overoptimisation(courses: Mapping[str, Points], *, largest_kl: float | None = None) -> Figure:
    """True reward and the reward model's score of a policy, while training moves it away from the reference.

    Args:
      courses: for each method its policies, from the start on.
      largest_kl: the largest KL to show; by default all.
    """
    figure, (axes,) = _row(1, height=4.6, below=0.6, width=6.6, right=2.4)
    for i, (name, points) in enumerate(courses.items()):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(points.kl, points.gain, color=colour, label=named(name), linewidth=1.8)
        if points.learned_gain is not None:
            axes.plot(points.kl, points.learned_gain, color=colour, linestyle="--", linewidth=1.2)
    axes.plot([], [], color="black", label="true reward", linewidth=1.8)
    axes.plot([], [], color="black", linestyle="--", label="by the reward model", linewidth=1.2)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.set(xlabel="KL to the reference (nats)", ylabel="Gain in reward over SFT", xlim=(-0.03, largest_kl))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return as_written(figure)


def learning_rates(
    rates: Sequence[float],
    gains: Mapping[str, Float[ndarray, " rates"]],
    worse: Mapping[str, Float[ndarray, " rates"]],
) -> Figure:
    """What a learning rate does to each method.

    Args:
      rates: the learning rates.
      gains: mean gain in true reward over SFT, for each method.
      worse: share of runs that end worse than SFT, for each method.
    """
    figure, panels = _row(2, height=4.4, below=0.6, width=8.2, right=2.2)
    content = ((gains, "Gain in true reward over SFT"), (worse, "Share of runs worse than SFT"))
    for axes, (curves, label) in zip(panels, content, strict=True):
        for i, (name, values) in enumerate(curves.items()):
            style = LINE_STYLES[(i // len(COLOURS)) % len(LINE_STYLES)]
            axes.plot(
                rates,
                values,
                linestyle=style,
                linewidth=1.2,
                markersize=4,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                label=named(name),
            )
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        axes.set(xscale="log", xlabel="Learning rate", title=label)
    panels[0].set_ylabel("Gain")
    panels[1].set_ylabel("Share")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5)
    return as_written(figure)


def learned_rewards(true: Float[ndarray, "prompts responses"], learned: Float[ndarray, "prompts responses"]) -> Figure:
    """What a reward model makes of each response, against its true reward; both relative to the mean of their prompt.

    Args:
      true: the true rewards.
      learned: those of the model.
    """
    figure, (axes,) = _row(1, height=4.4, below=0.6, width=5.6, right=1.4)
    x, y = (table - table.mean(axis=-1, keepdims=True) for table in (np.asarray(true), np.asarray(learned)))
    for prompt in range(len(x)):
        axes.plot(
            x[prompt],
            y[prompt],
            linestyle="none",
            markersize=6,
            alpha=0.85,
            color=COLOURS[prompt % len(COLOURS)],
            marker=MARKERS[prompt % len(MARKERS)],
            label=f"prompt {prompt}",
        )
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=GREY, linestyle="--", label="no error")
    axes.set(xlabel="True reward, less the mean of the prompt", ylabel="Learned reward, likewise")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return as_written(figure)


def reinforcement(history: Mapping[str, Float[ndarray, " epochs"]]) -> Figure:
    """How reinforcement learning went, over optimizer steps.

    Args:
      history: `step`, `sampled_reward`, `learned_reward` and `expected_reward`, `sampled_kl` and `kl_to_reference`,
        `ratio_change`.
    """
    content: dict[str, dict[str, str]] = {
        "Reward": {
            "sampled_reward": "score of its samples",
            "learned_reward": "score, exact",
            "expected_reward": "true reward, exact",
        },
        "KL to the reference (nats)": {"sampled_kl": "of its samples", "kl_to_reference": "exact"},
    }
    if np.any(np.asarray(history["ratio_change"]) > 0):
        content["Mean |ratio - 1| within a round"] = {"ratio_change": ""}
    figure, panels = _row(len(content), height=3.9, below=0.6, width=4.0 * len(content))
    for axes, (title, lines) in zip(panels, content.items(), strict=True):
        for i, (name, label) in enumerate(lines.items()):
            sampled = name.startswith("sampled")
            colour = GREY if sampled else (BLUE, ORANGE, VERMILION)[i]
            axes.plot(history["step"], history[name], color=colour, linewidth=1.0 if sampled else 1.8, label=label)
        axes.set(xlabel="Optimizer step", title=title)
        if len(lines) > 1:
            axes.legend(loc="best")
    return as_written(figure)


def _row(
    columns: int, *, height: float, below: float, above: float = 0.35, width: float = 12.0, right: float = 0.15
) -> tuple[Figure, list[Axes]]:
    """Axes side by side with room (in inches) below, above and to the right of them, and a grid."""
    full = width + (right if right > 0.2 else 0)
    figure = Figure(figsize=(full, height))
    margins = {"left": 0.9 / full, "right": 1 - right / full, "bottom": below / height, "top": 1 - above / height}
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={**margins, "wspace": 0.24})[0]
    for each in axes:
        each.grid(alpha=0.3)
    return figure, list(axes)
