"""Figures of rankings from votes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_jax.figures.style import BLUE, GREY, as_written

NAME_LENGTH = 40


def strengths(rankings: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Strengths with their 95 % intervals, a panel for each ranking, the best response on top.

    Args:
      rankings: for each title the responses from best to worst: mappings with `response`, `strength`, `low` and `high`
        (nats).
    """
    rows = max(map(len, rankings.values()))
    columns = 2 if len(rankings) == 4 else min(3, len(rankings))
    lines = -(-len(rankings) // columns)
    figure = Figure(figsize=(4.8 * columns, lines * (0.27 * rows + 1.2)), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for axes, (title, ranking) in zip(grid, rankings.items(), strict=False):
        place = np.arange(len(ranking))
        values, low, high = (np.array([row[key] for row in ranking], float) for key in ("strength", "low", "high"))
        axes.errorbar(values, place, xerr=np.abs([values - low, high - values]), fmt="o", color=BLUE, capsize=2, ms=4)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_yticks(place, [_short(row["response"]) for row in ranking], parse_math=False)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_title(_short(title))
        axes.grid(axis="x", alpha=0.3)
    for number, axes in enumerate(grid):
        axes.set_visible(number < len(rankings))
        axes.tick_params(labelbottom=number + columns >= len(rankings))
    label = "strength above average, 95 % interval" + ("\n" if columns == 1 else " ")
    figure.supxlabel(f"{label}(nats: who is 1 stronger wins 73 %)", fontsize="medium")
    return as_written(figure)


def win_probabilities(
    title: str,
    responses: Sequence[str],
    predicted: Float[np.ndarray, "n n"],
    observed: Float[np.ndarray, "n n"],
) -> Figure:
    """Probability that the response of a row wins against that of a column: as fitted, and as voted (ties half).

    Args:
      title: what was ranked.
      responses: from best to worst.
      predicted: the fitted probabilities.
      observed: shares of votes; NaN where two responses were not compared.
    """
    size = 0.42 * len(responses) + 2.2
    figure = Figure(figsize=(2 * size + 1.5, size), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, table, name in zip(panels, (predicted, observed), ("fitted", "observed"), strict=True):
        image = _heat_map(axes, np.asarray(table, float), responses)
        axes.set_title(name)
    figure.colorbar(image, ax=panels, label="probability of winning against ...", shrink=0.8)
    figure.suptitle(_short(title))
    return as_written(figure)


def calibration(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """How often the predicted favourite won in held-out votes, by the predicted probability.

    Args:
      bins: mappings with `predicted`, `observed`, `half_width` (of its 95 % interval) and `votes`.
    """
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, label="perfectly calibrated")
    predicted, observed, half = (
        np.array([row[key] for row in bins], float) for key in ("predicted", "observed", "half_width")
    )
    axes.errorbar(predicted, observed, yerr=half, fmt="o", color=BLUE, capsize=2, label="held-out votes, 95 % interval")
    for x, y, row in zip(predicted, observed, bins, strict=True):
        axes.annotate(f"{row['votes']:,}", (x, y), (6, -10), textcoords="offset points", fontsize="small", color=GREY)
    axes.set_xlabel("predicted probability that the favourite wins")
    axes.set_ylabel("share won by the favourite (a tie is half)")
    axes.legend(loc="upper left")
    return as_written(figure)


def _heat_map(axes: Axes, table: np.ndarray, responses: Sequence[str]) -> Any:
    image = axes.imshow(table, cmap="PuOr", vmin=0, vmax=1)
    names = [_short(name, 24) for name in responses]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 20:
        for row, column in np.argwhere(~np.isnan(table)):
            value = table[row, column]
            colour = "white" if abs(value - 0.5) > 0.35 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _short(text: str, length: int = NAME_LENGTH) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
