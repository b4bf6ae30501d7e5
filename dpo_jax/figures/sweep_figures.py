"""Sweeps: means over seeds, over one axis or two."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from dpo_jax.figures.style import GREY, LINE_STYLES, PALETTE, as_written, named, panels
from dpo_jax.intervals import half_width

Curve = Mapping[str, Float[ndarray, " betas"]]
"""For each beta `expected_reward`, the reward gained on the reference, `gain`, their standard errors over seeds,
`expected_reward_stderr` and `gain_stderr`, how many seeds there were, `num_seeds`, and `kl_to_reference` (nats)."""


def reward_against_beta(
    betas: Float[ndarray, " betas"], curves: Mapping[str, Curve], *, sft_reward: float, of: str = ""
) -> Figure:
    """The reward that policies earn, and what they gain on the reference, for each beta, with 95 % intervals.

    Seeds are worlds, and worlds differ in what can be earned: the gain, taken world by world, is known better.

    Args:
      betas: the values of beta.
      curves: by the name of the loss.
      sft_reward: the expected reward of the reference policy.
      of: what the titles should say of the curves.
    """
    figure, panes = panels(11.0, 4.8, columns=2, legend_width=2.0)
    order = np.argsort(betas)
    columns = {"expected_reward": "Expected true reward", "gain": "Reward gained on SFT"}
    for axes, (column, label) in zip(panes, columns.items(), strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            mean = curve[column][order]
            spread = np.nan_to_num(half_width(curve[f"{column}_stderr"][order], curve["num_seeds"][order]))
            style = _style(i)
            axes.plot(betas[order], mean, marker="o", markersize=4, label=named(name), **style)
            axes.fill_between(betas[order], mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)
        zero = sft_reward if column == "expected_reward" else 0.0
        axes.axhline(zero, color=GREY, linestyle="--", label="SFT, the reference")
        axes.set(xscale="log", xlabel="β", ylabel=label, title=f"{of}, 95 % intervals" if of else "95 % intervals")
        axes.grid(alpha=0.3)
    panes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return as_written(figure)


def reward_against_kl(
    betas: Float[ndarray, " betas"], curves: Mapping[str, Curve], *, sft_reward: float, of: str = ""
) -> Figure:
    """Reward against KL to the reference: one line for each loss, its points the values of beta.

    Args:
      betas: the values of beta; the smallest one's point is the largest.
      curves: by the name of the loss.
      sft_reward: the expected reward of the reference policy.
      of: what the title should say of the curves.
    """
    figure, (axes,) = panels(8.0, 4.8, columns=1, legend_width=2.0)
    sizes = np.linspace(60, 15, len(betas))[np.argsort(np.argsort(betas))]
    for i, (name, curve) in enumerate(curves.items()):
        order, style = np.argsort(betas), _style(i)
        kl, reward = curve["kl_to_reference"], curve["expected_reward"]
        axes.plot(kl[order], reward[order], label=named(name), **style)
        axes.scatter(kl, reward, s=sizes, color=style["color"])
    axes.plot(0.0, sft_reward, "s", color=GREY, label="SFT, the reference")
    axes.set(xlabel="KL to the reference (nats)", ylabel="Expected true reward")
    axes.set_title(", ".join(filter(None, [of, "larger points: smaller β"])))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    return as_written(figure)


def heat_maps(
    values: Mapping[str, Float[ndarray, "rows columns"]], axes: Mapping[str, Sequence[float] | ndarray], *, title: str
) -> Figure:
    """One heat map for each name, over the same two axes, in the same colours.

    Args:
      values: by name.
      axes: the values of the columns' axis and of the rows', by its label, in this order.
      title: what the colours mean.
    """
    (column_label, columns), (row_label, rows) = axes.items()
    figure, panes = panels(1.6 + 3.4 * len(values), 4.0, columns=len(values), legend_width=1.1)
    finite = np.concatenate([np.ravel(table) for table in values.values()])
    low, high = np.nanmin(finite), np.nanmax(finite)
    image: Any = None
    for pane, (name, table) in zip(panes, values.items(), strict=True):
        image = pane.imshow(table, origin="lower", aspect="auto", cmap="cividis", vmin=low, vmax=high)
        pane.set(title=name, xlabel=column_label, xticks=range(len(columns)), yticks=range(len(rows)))
        pane.set_xticklabels([f"{value:g}" for value in columns])
        pane.set_yticklabels([f"{value:g}" for value in rows])
        for (i, j), value in np.ndenumerate(table):
            dark = value < (low + high) / 2
            pane.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    panes[0].set_ylabel(row_label)
    bar = figure.add_axes((1 - 1.05 / figure.get_figwidth(), 0.15, 0.15 / figure.get_figwidth(), 0.72))
    figure.colorbar(image, cax=bar).set_label(title)
    return as_written(figure)


def _style(i: int) -> dict[str, Any]:
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": LINE_STYLES[i // len(PALETTE) % len(LINE_STYLES)]}
