"""How a language model was tuned."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.figures.style import BLUE, GREY, VERMILION, panels

TITLES = {
    "loss": "Loss ↓",
    "accuracy": "Accuracy ↑",
    "reward_margin": "Reward margin ↑",
    "logp_margin": "Margin (nats) ↑",
}


def tuning(
    history: Mapping[str, Any], held_out: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None
) -> Figure:
    """Metrics of batches over optimizer steps, with a running mean; and of held-out pairs before and after.

    Args:
      history: metrics by name, `[steps]`.
      held_out: `before` and `after`: for each metric its `mean` and `stderr`.
    """
    names = [name for name in TITLES if name in history]
    figure, all_axes = panels(4.3 * len(names), 3.6, columns=len(names))
    for axes, name in zip(all_axes, names, strict=True):
        values = np.asarray(history[name], float)
        steps, width = np.arange(1, len(values) + 1), max(1, len(values) // 10)
        axes.plot(steps, values, ".", color=GREY, markersize=3, alpha=0.6, label="batches")
        smooth = np.convolve(values, np.ones(width), "valid") / width
        axes.plot(steps[width - 1 :] - (width - 1) / 2, smooth, color=BLUE, label=f"mean of {width}")
        for place, when in zip((0, len(values) + 1), ("before", "after"), strict=True):
            if held_out and name in held_out[when]:
                found = held_out[when][name]
                label = "held out, ± 2 standard errors" if place else None
                axes.errorbar(place, found["mean"], 2 * found["stderr"], fmt="o", color=VERMILION, label=label)
        axes.set(xlabel="Optimizer step", title=TITLES[name])
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=8)
    return figure
