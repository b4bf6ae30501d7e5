"""All losses in one figure: their values and gradients.

A loss acts on the policy through its gradient alone. Beside each value the figure shows minus the derivative with
respect to the loss's input, by `jax.grad` of the library's functions.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo_jax import figures, losses
from dpo_jax.types import Pair
from experiments.lab import commands, console, devices, files

BENDS = np.linspace(-0.3, 0.3, 25).round(3)  # where DiscoPOP does
REWARDS = np.union1d(np.linspace(-4, 4, 65), [*BENDS, 0.999])
PROBABILITIES = np.linspace(0.02, 0.98, 65).round(3)

MARGIN, CHOSEN_RATIO, RATIO = "margin βΔ", "log-ratio βC of the chosen; R = −C", "log-ratio βu"
PULL = "pull on the margin"
ON_CHOSEN, ON_REJECTED = "pull on the chosen", "pull on the rejected"

Curves: TypeAlias = tuple[np.ndarray, np.ndarray]
"""What the upper and the lower panel show."""


@dataclass(frozen=True)
class Options:
    """The family of losses in one picture."""

    out: Path = Path("results/loss_family")
    """Folder for summary.json and the figure."""


def of_margin(loss: Callable[..., Array], margins: Float[Array, " points"]) -> Curves:
    """Values, and the pull towards a larger margin; with beta = 1, so that the margin is in units of reward."""
    zeros = jnp.zeros_like(margins)

    def of(margins: Float[Array, " points"]) -> Float[Array, " points"]:
        return loss(Pair(jnp.minimum(margins, 0), -jnp.maximum(margins, 0)), Pair(zeros, zeros), beta=1.0)

    return np.asarray(of(margins)), pulls(of, margins)


def of_divergence(link: losses.divergences.Divergence, ratios: Float[Array, " points"]) -> Curves:
    """The link function, and how DPO with it pulls at the chosen response."""
    pull, _ = of_both(losses.with_divergence(losses.dpo_loss, link), ratios)
    return np.asarray(link(ratios)), pull


def of_both(loss: Callable[..., Array], ratios: Float[Array, " points"]) -> Curves:
    """The pulls on the chosen and on the rejected response, whose log-ratio is minus that of the chosen one."""
    zeros = jnp.zeros_like(ratios)
    return pulls(lambda policy: loss(policy, Pair(zeros, zeros), beta=1.0), Pair(ratios, -ratios))


def of_single(loss: Callable[..., Array], ratios: Float[Array, " points"]) -> Curves:
    """The pulls on a good and on a bad response."""

    def of(ratios: Float[Array, " points"], desirable: bool) -> Float[Array, " points"]:
        return loss(ratios, jnp.zeros_like(ratios), jnp.full(ratios.shape, desirable), beta=1.0)

    return pulls(partial(of, desirable=True), ratios), pulls(partial(of, desirable=False), ratios)


def of_policy(loss: Callable[..., Array], probabilities: Float[Array, " points"]) -> Curves:
    """The pulls on a chosen response of this probability and on a rejected one that has the rest."""
    return pulls(loss, Pair(jnp.log(probabilities), jnp.log1p(-probabilities)))


def pulls(of: Callable[[Any], Float[Array, " points"]], logps: Any) -> Any:
    """Minus the gradient of an elementwise loss."""
    slopes = jax.grad(lambda logps: jnp.sum(of(logps)))(logps)
    return jax.tree.map(lambda slope: -np.asarray(slope), slopes)


def families() -> list[figures.LossFamily]:
    """Everything that the picture shows."""
    return [
        family(
            "Losses of the margin: logistic kin",
            of_margin,
            {
                "dpo": losses.dpo_loss,
                "conservative, ε = 0.2": partial(losses.dpo_loss, label_smoothing=0.2),
                "robust, ε = 0.2": partial(losses.robust_dpo_loss, label_smoothing=0.2),
                "exo, ε = 0.1": partial(losses.exo_loss, label_smoothing=0.1),
                "savage": losses.savage_loss,
                "discopop, τ = 0.05": losses.discopop_loss,
            },
            MARGIN,
            {"loss": (-1.6, 5.0), PULL: (-1.3, 1.6)},
        ),
        family(
            "Losses of the margin: other convex",
            of_margin,
            {
                "dpo": losses.dpo_loss,
                "ipo": losses.ipo_loss,
                "hinge": losses.hinge_loss,
                "squared": losses.squared_loss,
                "truncated quadratic": losses.truncated_quadratic_loss,
                "exponential": losses.exponential_loss,
            },
            MARGIN,
            {"loss": (-0.3, 6.3), PULL: (-3.2, 6.3)},
        ),
        family(
            "Other divergences than KL",
            of_divergence,
            {
                "reverse KL: dpo": losses.reverse_kl,
                "forward KL": losses.forward_kl,
                "Jensen-Shannon": losses.jensen_shannon,
                "α = 0.5": losses.alpha_divergence(0.5),
                "χ² + KL: chi_po": losses.chi_square_kl,
            },
            "log-ratio u (nats); below, C = −R = u",
            {"score f'(exp u)": (-4.2, 4.2), ON_CHOSEN: (-0.15, 3.15)},
        ),
        family(
            "Losses of both log-ratios",
            of_both,
            {
                "dpo": losses.dpo_loss,
                "nca": losses.nca_loss,
                "bco_pair, δ = 0": partial(losses.bco_pair_loss, shift=0.0),
                "sppo": losses.sppo_loss,
                "apo_zero": losses.apo_zero_loss,
                "apo_down": losses.apo_down_loss,
                "dpo_positive, λ = 1": partial(losses.dpo_positive_loss, penalty=1.0),
            },
            CHOSEN_RATIO,
            {ON_CHOSEN: (-1.05, 2.1), ON_REJECTED: (-2.1, 1.05)},
        ),
        family(
            "Losses of single responses",
            of_single,
            {
                "kto, z₀ = 0; apo_zero": partial(losses.kto_loss, reference_point=0.0),
                "kto, z₀ = 1": partial(losses.kto_loss, reference_point=1.0),
                "bco, δ = 0": partial(losses.bco_loss, shift=0.0),
                "bco, δ = 1": partial(losses.bco_loss, shift=1.0),
            },
            RATIO,
            {"pull on a good one": (-0.05, 1.05), "pull on a bad one": (-1.05, 0.05)},
        ),
        family(
            "Losses without a reference",
            of_policy,
            {
                "sft": losses.sft_loss,
                "cpo, β = 1": partial(losses.cpo_loss, beta=1.0),
                "simpo, β = 2, γ = 1": partial(losses.simpo_loss, beta=2.0, gamma=1.0),
                "alphapo, α = 0.25": partial(losses.alphapo_loss, beta=2.0, gamma=1.0, alpha=0.25),
                "orpo, λ = 1": partial(losses.orpo_loss, odds_weight=1.0),
                "unlikelihood, α = 0.5": partial(losses.unlikelihood_loss, alpha=0.5),
            },
            "chosen: probability p; rejected: 1 − p",
            {ON_CHOSEN: (-0.2, 4.2), ON_REJECTED: (-4.2, 0.2)},
            PROBABILITIES,
        ),
    ]


def family(
    title: str,
    curves_of: Callable[[Any, Array], Curves],
    members: Mapping[str, Any],
    xlabel: str,
    panels: Mapping[str, tuple[float, float]],
    x: np.ndarray = REWARDS,
) -> figures.LossFamily:
    """Two panels that show one line for each member.

    Args:
      title: what they have in common.
      curves_of: from a member and `x` to its two lines.
      members: losses or link functions by label.
      xlabel: what `x` is.
      panels: labels of the two y axes, and their limits.
      x: where to evaluate.
    """
    curves = {label: curves_of(member, jnp.asarray(x, jnp.float32)) for label, member in members.items()}
    upper, lower = panels.items()
    return figures.LossFamily(title, xlabel, x, upper, lower, curves)


def main(options: Options) -> None:
    """Draws the picture and writes what it shows."""
    out = files.output_folder(options.out)
    devices.enable_compilation_cache()
    clock = time.perf_counter()
    with console.waiting("Evaluating the losses and their gradients"):
        drawn = families()
    files.save_figure(figures.loss_family(drawn), out / "family.png")
    rounded = [
        {**entry._asdict(), "curves": {label: np.round(lines, 5) for label, lines in entry.curves.items()}}
        for entry in drawn
    ]
    files.save_summary({"families": rounded, **files.provenance(run=time.perf_counter() - clock)}, out)
    console.say(f"The figure and summary.json are in {out}.")


if __name__ == "__main__":
    main(commands.parse(Options))
