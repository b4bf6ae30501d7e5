"""What losses do to length."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from dpo_jax.figures.style import BLUE, GREEN, GREY, VERMILION, as_written, named

COLOURS, MARKERS = (GREEN, VERMILION, BLUE), ("o", "^", "v")


def lengths(rows: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]) -> Figure:
    """Losses from top to bottom: how many letters too long their strings are, and what they gain.

    Args:
      rows: for each loss and each judge, `longer` (letters beyond the best policy at equal KL) and `gain` (reward less
        beta times KL, over SFT): a mean and half the width of its interval.
    """
    judges = list(dict.fromkeys(judge for row in rows.values() for judge in row))
    height = 1.12 + 0.3 * len(rows)
    figure = Figure(figsize=(9.0, height))
    margins = {"left": 0.19, "right": 0.985, "bottom": 0.62 / height, "top": 1 - 0.5 / height, "wspace": 0.06}
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={**margins, "width_ratios": [1.5, 1]})
    for axes, name in ((left, "longer"), (right, "gain")):
        for i, judge in enumerate(judges):
            shown = [(place, row[judge][name]) for place, row in enumerate(rows.values()) if judge in row]
            axes.errorbar(
                [mean for _, (mean, _) in shown],
                [place + 0.2 * (i - (len(judges) - 1) / 2) for place, _ in shown],
                xerr=[half for _, (_, half) in shown],
                linestyle="none",
                markersize=6,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                label=named(f"judge {judge}"),
            )
        axes.axvline(0, color=GREY, linewidth=1.2)
        axes.grid(axis="x", alpha=0.3)
        for place in range(1, len(rows)):
            axes.axhline(place - 0.5, color=GREY, linewidth=0.3, alpha=0.5)
    left.set_yticks(range(len(rows)), list(rows), parse_math=False)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("← too short   letters beyond the best policy's at equal KL   too long →")
    right.set_xlabel("reward − β KL, gain over SFT")
    figure.legend(*left.get_legend_handles_labels(), loc="upper right", ncols=len(judges), fontsize=9, frameon=False)
    figure.suptitle("What each loss does to length", x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontsize=11)
    return as_written(figure)
