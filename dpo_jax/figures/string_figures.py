"""The tree of all strings, and what policies make of it."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dpo_jax.figures.style import GREY, as_written
from dpo_jax.strings.space import Strings

WIDEST = 14.0
"""Points: the width of a branch of probability 1."""
STUB = 0.45
"""Length of the branch that ends a string, in letters."""


def prefix_tree(
    strings: Strings,
    policies: Mapping[str, Float[np.ndarray, " responses"]],
    advantages: Float[np.ndarray, "prefixes choices"],
) -> Figure:
    """All strings as a tree, a panel for each policy: wide branches are probable, and the colour says what is good.

    Args:
      strings: which strings there are, with an end token; a dozen or two.
      policies: for each name the probability of each string, for one prompt.
      advantages: of each next token: the colour of its branch.
    """
    figure = Figure(figsize=(0.8 + 4.2 * len(policies), 4.6))
    margins = {"left": 0.02, "right": 0.89, "bottom": 0.03, "top": 0.91, "wspace": 0.04}
    largest = float(np.max(np.abs(advantages)))
    scale = ScalarMappable(Normalize(-largest, largest), colormaps["coolwarm_r"])
    all_axes = figure.subplots(1, len(policies), squeeze=False, gridspec_kw=margins)[0]
    for axes, (name, probs) in zip(all_axes, policies.items(), strict=True):
        _draw(axes, strings, np.asarray(probs), scale, advantages)
        axes.set_title(name, fontsize=10)
    bar = figure.colorbar(scale, cax=figure.add_axes((0.91, 0.15, 0.012, 0.65)))
    bar.set_label("soft advantage of a token", fontsize=9)
    return as_written(figure)


def _draw(
    axes: Axes,
    strings: Strings,
    probs: Float[np.ndarray, " responses"],
    scale: ScalarMappable,
    advantages: Float[np.ndarray, "prefixes choices"],
) -> None:
    """Draws the tree from the left to the right, in alphabetical order from the top; a dot ends a string."""
    texts = strings.text(range(strings.num_responses))
    ids = {text: i for i, text in enumerate(texts)}
    below = {text: [other for other in texts if other.startswith(text)] for text in texts}
    end = {text: -place for place, text in enumerate(sorted(texts))}
    height = {text: float(np.mean([end[other] for other in below[text]])) for text in texts}

    def branch(x: tuple[float, float], y: tuple[float, float], prob: float, advantage: float) -> None:
        width = 0.4 + WIDEST * prob
        axes.plot(x, y, color=scale.to_rgba(np.asarray(advantage)), linewidth=width, solid_capstyle="round", zorder=1)

    for text, i in ids.items():
        size = len(text)
        if text:
            letter, before = strings.tokens[i, size - 1], ids[text[:-1]]
            prob = sum(probs[ids[other]] for other in below[text])
            branch((size - 1, size), (height[text[:-1]], height[text]), prob, advantages[before, letter])
        at = float(size)
        if size < strings.horizon:
            at += STUB
            branch((size, at), (height[text], end[text]), probs[i], advantages[i, strings.num_letters])
        axes.plot(at, end[text], "o", color=GREY, markersize=3)
        axes.annotate(
            text or "(empty)", (at, end[text]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(-0.1, strings.horizon + 0.5)
    axes.axis("off")
