"""How a language model was tuned."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_jax.figures.style import BLUE, GREY, PALETTE, VERMILION, as_written, named, panels

TITLES = {
    "loss": "Loss ↓",
    "accuracy": "Accuracy ↑",
    "reward_margin": "Reward margin ↑",
    "logp_margin": "Margin (nats) ↑",
}


def tuning(
    history: Mapping[str, Any], held_out: Mapping[int, Mapping[str, Mapping[str, float]]] | None = None
) -> Figure:
    """Metrics of batches over optimizer steps, with a running mean; and of held-out rows.

    Args:
      history: metrics by name, `[steps]`.
      held_out: by the number of steps done, for each metric its `mean` and `stderr`.
    """
    held_out = held_out or {}
    names = [name for name in TITLES if name in history]
    figure, all_axes = panels(4.3 * len(names), 3.6, columns=len(names))
    for axes, name in zip(all_axes, names, strict=True):
        values = np.asarray(history[name], float)
        steps, width = np.arange(1, len(values) + 1), max(1, len(values) // 10)
        axes.plot(steps, values, ".", color=GREY, markersize=3, alpha=0.6, label="batches")
        smooth = np.convolve(values, np.ones(width), "valid") / width
        axes.plot(steps[width - 1 :] - (width - 1) / 2, smooth, color=BLUE, label=f"mean of {width}")
        known = {done: found[name] for done, found in sorted(held_out.items()) if name in found}
        if known:
            means, errors = ([found[what] for found in known.values()] for what in ("mean", "stderr"))
            label = "held out, ± 2 standard errors"
            axes.errorbar([*known], means, 2 * np.asarray(errors), fmt="o", color=VERMILION, label=label)
        axes.set(xlabel="Optimizer step", title=TITLES[name])
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize=8)
    return figure


def language_betas(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Margins, accuracy and KL of adapters against beta, a colour for each loss and learning rate.

    Args:
      entries: each with `loss_name`, `beta`, `learning_rate`, and a `mean` and `stderr` of `accuracy`, `reward_margin`
        (or `logp_margin`) and `kl`.
    """
    titles = {
        "accuracy": "Held-out accuracy ↑",
        "reward_margin": "Held-out reward margin ↑",
        "kl": "KL of answers (nats)",
    }
    names = [name for name in titles if any(name in entry for entry in entries)]
    figure, all_axes = panels(4.3 * len(names), 3.6, columns=len(names))
    several = len({entry["learning_rate"] for entry in entries}) > 1
    betas = sorted({entry["beta"] for entry in entries})
    labels = [entry["loss_name"] + (f", rate {entry['learning_rate']:.2g}" if several else "") for entry in entries]
    for axes, name in zip(all_axes, names, strict=True):
        for colour, label in zip(PALETTE * len(labels), dict.fromkeys(labels), strict=False):
            own = [entry for entry, own in zip(entries, labels, strict=True) if own == label and name in entry]
            axes.errorbar(
                [entry["beta"] for entry in own],
                [entry[name]["mean"] for entry in own],
                [2 * entry[name]["stderr"] for entry in own],
                fmt="o-",
                capsize=3,
                color=colour,
                label=named(label),
            )
        axes.set(xscale="log", xlabel="β", title=titles[name])
        axes.set_xticks(betas, labels=[f"{beta:.3g}" for beta in betas])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    all_axes[0].legend(loc="best", fontsize=8)
    return as_written(figure)


def language_frontier(
    frontier: Sequence[tuple[float, float]],
    policies: Mapping[str, Sequence[tuple[float, float]]],
    *,
    sampled: tuple[Mapping[str, float], Mapping[str, float]] | None = None,
) -> Figure:
    """Reward against KL: the exact frontier, policies below it, and one of them as samples estimate it.

    Args:
      frontier: KL (nats) and reward of the best policies, in the order of KL.
      policies: by name, KL and reward of policies; several of one name are joined.
      sampled: estimates of KL and reward, each with its `mean` and `stderr`.
    """
    figure, (axes,) = panels(6.0, 4.2, columns=1)
    axes.plot(*zip(*frontier, strict=True), color="black", label="exact frontier")
    for colour, marker, (name, points) in zip(PALETTE, "so^Dv<", policies.items(), strict=False):
        style = "-" if len(points) > 1 else ""
        axes.plot(*zip(*points, strict=True), style, marker=marker, color=colour, label=named(name))
    if sampled is not None:
        kl, reward = sampled
        errors, label = (2 * reward["stderr"], 2 * kl["stderr"]), "from samples, ± 2 standard errors"
        axes.errorbar(kl["mean"], reward["mean"], *errors, fmt="none", capsize=3, color=GREY, label=label)
    axes.set(xlabel="KL to the reference (nats)", ylabel="Expected reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return as_written(figure)


def estimated_frontier(
    points: Mapping[str, Sequence[tuple[Mapping[str, float], Mapping[str, float]]]],
    labels: Mapping[str, Sequence[str]],
    *,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Rewards against KL, both estimated: points of a name are joined, and have bars of two standard errors.

    Args:
      points: by name, KL and reward of policies, each with its `mean` and `stderr`.
      labels: by name, a label for each point, if they have any.
      xlabel, ylabel: what the axes show.
    """
    figure, (axes,) = panels(6.4, 4.4, columns=1)
    for colour, marker, (name, own) in zip(PALETTE, "o^sD", points.items(), strict=False):
        x, y = ([point[i]["mean"] for point in own] for i in range(2))
        up, aside = ([2 * point[i]["stderr"] for point in own] for i in (1, 0))
        line = "-" if len(own) > 1 else "none"
        axes.errorbar(x, y, up, aside, marker=marker, linestyle=line, color=colour, capsize=2, label=named(name))
        for place, label in zip(zip(x, y, strict=True), labels.get(name, []), strict=False):
            usual: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": colour}
            axes.annotate(label, place, xytext=(5, -6), rotation=-50, va="top", rotation_mode="anchor", **usual)
    roots = lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2
    axes.set_xscale("function", functions=roots)  # or many crowd at the left
    axes.margins(x=0.1)
    left, right = axes.get_xlim()
    axes.set_xticks([tick for tick in (0, 0.25, 1, 2.5, 5, 10, 20, 40, 80) if tick <= right])
    axes.set_xlim(left, right)
    axes.set(xlabel=f"{xlabel}, drawn by its square root", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return as_written(figure)
