"""One training, and what beta does to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from dpo_jax.figures.style import BLUE, GREY, VERMILION, ordered_colours, panels


def training(history: Mapping[str, Float[ndarray, " epochs"]], *, bayes: Mapping[str, Any] | None = None) -> Figure:
    """A preference training: loss, accuracy and reward margin over epochs.

    Args:
      history: `loss` (nats), `accuracy` and `reward_margin`; where it also has `held_out_loss` or the like, that is
        drawn beside it.
      bayes: `loss` and `accuracy` of the true rewards on new comparisons, which nothing beats (`toy.bayes_prediction`).
    """
    figure, all_axes = panels(13.0, 3.8, columns=3)
    titles = {"loss": "Training loss (nats) ↓", "accuracy": "Training accuracy ↑", "reward_margin": "Reward margin ↑"}
    if "held_out_loss" in history:
        titles |= {"loss": "Loss (nats) ↓", "accuracy": "Preference accuracy ↑"}
    for axes, (name, title) in zip(all_axes, titles.items(), strict=True):
        epochs = range(1, len(history[name]) + 1)
        held_out = history.get(f"held_out_{name}")
        axes.plot(epochs, history[name], color=BLUE, label=None if held_out is None else "training")
        if held_out is not None:
            axes.plot(epochs, held_out, color=VERMILION, label="held out")
        axes.set(xlabel="Epoch", ylabel=title[:-2], title=title)
        axes.grid(alpha=0.3)
    all_axes[0].axhline(np.log(2), color=GREY, linestyle="--", label="no preference: log 2")
    all_axes[1].axhline(0.5, color=GREY, linestyle="--", label="coin toss")
    for axes, name in zip(all_axes, ("loss", "accuracy"), strict=False):
        if bayes is not None:
            axes.axhline(bayes[name], color="black", linestyle=":", label="best possible on new pairs")
    for axes in all_axes:
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
    figure, (left, right) = panels(12.0, 4.4, columns=2)
    labels, colours = [f"β = {beta:g}" for beta in betas], ordered_colours(betas)
    for loss, label, colour in zip(losses, labels, colours, strict=True):
        left.plot(range(1, len(loss) + 1), loss, color=colour, label=label)
    left.set(xlabel="Epoch", ylabel="Training loss (nats)", title="DPO loss by β")
    left.legend(loc="best")
    left.grid(alpha=0.3)

    bars = right.bar(labels, rewards, yerr=stderr, capsize=4, color=colours, width=0.6)
    right.bar_label(bars, fmt="%.3f", label_type="center", color="white", fontweight="bold")
    right.plot(labels, optimal_rewards, "D", color="black", label="closed-form optimum")
    right.axhline(sft_reward, color=GREY, linestyle="--", label=f"SFT: {sft_reward:.3f}")
    right.set(
        ylabel="Expected true reward",
        title=f"Final reward by β{'' if stderr is None else ' (± standard error)'}",
        ylim=(0, 1.35 * float(max(optimal_rewards))),
    )
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
    """Reward against KL to the reference: the exact frontier, and the trained policies.

    Each mapping has `kl_to_reference` (nats) and `expected_reward`, means over prompts.

    Args:
      curve: the exact frontier.
      learned: the trained policies, one for each beta.
      betas: the values of beta.
      optima: the closed-form optimum for each beta.
      sft_reward: the expected reward of the reference policy.
    """
    figure, (axes,) = panels(7.5, 4.8, columns=1, legend_width=2.0)
    axes.plot(curve["kl_to_reference"], curve["expected_reward"], color="black", label="exact frontier")
    axes.plot(0.0, sft_reward, "s", color=GREY, label="SFT, the reference")
    for i, (beta, colour) in enumerate(zip(betas, ordered_colours(betas), strict=True)):
        start, end = ((points["kl_to_reference"][i], points["expected_reward"][i]) for points in (optima, learned))
        axes.plot(*zip(start, end, strict=True), color=colour, linestyle=":")
        axes.plot(*start, "D", color=colour, markerfacecolor="white", label=f"optimum, β = {beta:g}")
        axes.plot(*end, "o", color=colour, label=f"learned, β = {beta:g}")
    axes.set(xlabel="KL to the reference (nats)", ylabel="Expected true reward", title="Reward against KL")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.grid(alpha=0.3)
    return figure
