"""Every loss of the library, with hyperparameters to test it by, and its equation in extended precision.

The equations are written from the papers with naive exponentials of NumPy's long doubles: other means than those of the
functions under test, and exact enough for the moderate log-ratios that they are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.types import Pair

SINGLE, BATCH, RANKED, REFERENCE_FREE, UNPAIRED = "single", "batch", "ranked", "reference-free", "unpaired"


@dataclass(frozen=True)
class Swept:
    """A hyperparameter and the values of it that tests try.

    Attributes:
      name: of the argument.
      low, high: a range of values at which the loss differs.
      bad: a value that the loss must refuse.
      must_be: what its error says that the value must be.
    """

    name: str
    low: float
    high: float
    bad: float
    must_be: str

    def at(self, share: float) -> float:
        """The value at a share of the range."""
        return self.low + share * (self.high - self.low)


BETA = Swept("beta", 0.05, 3.0, bad=0.0, must_be="in (0, inf)")
SMOOTHING = Swept("label_smoothing", 0.01, 0.45, bad=0.5, must_be="in [0, 0.5)")
ALPHA = Swept("alpha", 0.1, 0.9, bad=np.inf, must_be="in [0, inf)")
SHIFT = Swept("shift", -2.0, 2.0, bad=np.nan, must_be="finite")
GAMMA = Swept("gamma", 0.0, 2.0, bad=-0.1, must_be="in [0, inf)")


@dataclass(frozen=True)
class Case:
    """A loss and what is known of it.

    Attributes:
      name: of the function, or of what is made from it.
      loss: the function.
      equation: `(x, h) -> [batch]`, of `quantities` and of a namespace of hyperparameters.
      hyperparameters: values that are not special; beta is 0.3.
      paper: who published it, and where.
      kind: what it takes.
      swept: the hyperparameters that are numbers, and what to test of each.
      reaches_optimum: whether training on infinite data ends at the optimum of the RLHF objective (`test_optima`).
    """

    name: str
    loss: Callable[..., Any]
    equation: Callable[[Any, Any], np.ndarray]
    hyperparameters: dict[str, Any]
    paper: str
    kind: str = SINGLE
    swept: tuple[Swept, ...] = (BETA,)
    reaches_optimum: bool = False

    def at(self, share: float) -> dict[str, float]:
        """All swept hyperparameters, each at a share of its range."""
        return {swept.name: swept.at(share) for swept in self.swept}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def nls(x):
    """Minus the log-sigmoid."""
    return np.logaddexp(np.longdouble(0), -x)


def smoothed(z, e):
    return (1 - e) * nls(z) + e * nls(-z)


def chi(u):
    return np.exp(u) + u


def log_odds(logp):
    return np.log(np.exp(logp) / (1 - np.exp(logp)))


def alpha_reward(logp, alpha):
    return (1 - np.exp(logp) ** -alpha) / alpha


def discopop(z, tau):
    g = sigmoid(z / tau)
    return nls(z) * (1 - g) + np.exp(-z) * g


def exo(z, e):
    q, p = np.stack([sigmoid(z), 1 / (1 + np.exp(z))]), np.array([1 - e, e], np.longdouble)
    return sum(q[i] * np.log(q[i] / p[i]) for i in range(2))


def plackett_luce(x, h):
    """The product of the probabilities of the choices, best first."""
    worth = [np.exp(h.beta * u) for u in (x.C, x.M, x.R)]
    return -np.log(worth[0] / sum(worth) * worth[1] / (worth[1] + worth[2]))


def beta_dpo(x, h):
    beta = h.beta * (1 + h.alpha * (np.mean(x.D) - h.moments.mean))
    return nls(np.maximum(beta, 1e-3) * x.D)  # the authors' floor


def labelled(x, good, bad):
    return np.where(x.desirable, good, bad)


LENGTHS = (np.array([3, 1, 4, 1, 5, 9, 2, 6]), np.array([2, 7, 1, 8, 2, 8, 1, 8]))
MOMENTS = losses.MarginMoments(jax.random.key(0), mean=0.3, std=1.5)

GPO = "Tang 2024 (GPO), 2402.05749, Table 1"
DPO = "Rafailov 2023, 2305.18290"

CASES = [
    Case(
        "dpo_loss",
        losses.dpo_loss,
        lambda x, h: nls(h.beta * x.D),
        {"beta": 0.3},
        f"{DPO}, Eq. 7",
        reaches_optimum=True,
    ),
    Case(
        "dpo_loss, label_smoothing",
        losses.dpo_loss,
        lambda x, h: smoothed(h.beta * x.D, h.label_smoothing),
        {"beta": 0.3, "label_smoothing": 0.2},
        "Mitchell 2023, conservative DPO",
        swept=(BETA, SMOOTHING),
    ),
    Case(
        "robust_dpo_loss",
        losses.robust_dpo_loss,
        lambda x, h: (
            ((1 - h.label_smoothing) * nls(h.beta * x.D) - h.label_smoothing * nls(-h.beta * x.D))
            / (1 - 2 * h.label_smoothing)
        ),
        {"beta": 0.3, "label_smoothing": 0.2},
        "Chowdhury 2024, 2403.00409, Sec. 3.1",
        swept=(BETA, SMOOTHING),
        reaches_optimum=True,  # on labels that are flipped as often as it assumes
    ),
    Case(
        "ipo_loss",
        losses.ipo_loss,
        lambda x, h: (x.D - 1 / (2 * h.beta)) ** 2,
        {"beta": 0.3},
        "Azar 2023, 2310.12036, Eq. 17",
    ),
    Case(
        "hinge_loss",
        losses.hinge_loss,
        lambda x, h: np.maximum(0, 1 - h.beta * x.D),
        {"beta": 0.3},
        "Liu 2023 (RSO), 2309.06657",
    ),
    Case(
        "squared_loss",
        losses.squared_loss,
        lambda x, h: (h.beta * x.D - 1) ** 2,
        {"beta": 0.3},
        GPO,
    ),
    Case(
        "truncated_quadratic_loss",
        losses.truncated_quadratic_loss,
        lambda x, h: np.maximum(0, 1 - h.beta * x.D) ** 2,
        {"beta": 0.3},
        GPO,
    ),
    Case(
        "exponential_loss",
        losses.exponential_loss,
        lambda x, h: np.exp(-h.beta * x.D),
        {"beta": 0.3},
        GPO,
    ),
    Case(
        "savage_loss",
        losses.savage_loss,
        lambda x, h: 1 / (1 + np.exp(h.beta * x.D)) ** 2,
        {"beta": 0.3},
        GPO,
        reaches_optimum=True,
    ),
    Case(
        "exo_loss",
        losses.exo_loss,
        lambda x, h: exo(h.beta * x.D, h.label_smoothing),
        {"beta": 0.3, "label_smoothing": 0.1},
        "Ji 2024, 2402.00856, Eq. 16",
        swept=(BETA, replace(SMOOTHING, must_be="in (0, 0.5)")),
    ),
    Case(
        "discopop_loss",
        losses.discopop_loss,
        lambda x, h: discopop(h.beta * x.D, h.temperature),
        {"beta": 0.3, "temperature": 0.2},
        "Lu 2024, 2406.08414, Eq. 5",
        swept=(BETA, Swept("temperature", 0.05, 1.0, bad=1.5, must_be="in (0, 1]")),
    ),
    Case(
        "offset_dpo_loss",
        losses.offset_dpo_loss,
        lambda x, h: nls(h.beta * x.D - h.offset),
        {"beta": 0.3, "offset": 0.7},
        "Amini 2024, 2402.10571",
        swept=(BETA, Swept("offset", -2.0, 2.0, bad=np.inf, must_be="finite")),
    ),
    Case(
        "length_regularized_dpo_loss",
        losses.length_regularized_dpo_loss,
        lambda x, h: nls(h.beta * x.D + h.alpha * (x.lengths[0] - x.lengths[1])),
        {"beta": 0.3, "alpha": 0.1, "lengths": LENGTHS},
        "Park 2024, 2403.19159, Eq. 9",
        swept=(BETA, ALPHA),
    ),
    Case(
        "nca_loss",
        losses.nca_loss,
        lambda x, h: nls(h.beta * x.C) + (nls(-h.beta * x.C) + nls(-h.beta * x.R)) / 2,
        {"beta": 0.3},
        "Chen 2024, 2402.05369, Sec. 4.1",
    ),
    Case(
        "bco_pair_loss",
        losses.bco_pair_loss,
        lambda x, h: nls(h.beta * x.C - h.shift) + nls(-(h.beta * x.R - h.shift)),
        {"beta": 0.3, "shift": 0.4},
        "Jung 2024, 2404.04656",
        swept=(BETA, SHIFT),
    ),
    Case(
        "sppo_loss",
        losses.sppo_loss,
        lambda x, h: (x.C - 0.5 / h.beta) ** 2 + (x.R + 0.5 / h.beta) ** 2,
        {"beta": 0.3},
        "Wu 2024, 2405.00675, Eq. 4.7",
    ),
    Case(
        "apo_zero_loss",
        losses.apo_zero_loss,
        lambda x, h: 1 - sigmoid(h.beta * x.C) + sigmoid(h.beta * x.R),
        {"beta": 0.3},
        "D'Oosterlinck 2024, 2408.06266, Eq. 7",
    ),
    Case(
        "apo_down_loss",
        losses.apo_down_loss,
        lambda x, h: sigmoid(h.beta * x.C) + 1 - sigmoid(h.beta * x.D),
        {"beta": 0.3},
        "D'Oosterlinck 2024, 2408.06266, Eq. 8",
    ),
    Case(
        "dpo_positive_loss",
        losses.dpo_positive_loss,
        lambda x, h: nls(h.beta * (x.D - h.penalty * np.maximum(0, -x.C))),
        {"beta": 0.3, "penalty": 2.0},
        "Pal 2024, 2402.13228, Eq. 3",
        swept=(BETA, Swept("penalty", 0.0, 5.0, bad=-1.0, must_be="in [0, inf)")),
    ),
    Case(
        "chi_po_loss",
        losses.chi_po_loss,
        lambda x, h: nls(np.clip(h.beta * (chi(x.C) - chi(x.R)), -2 * h.max_reward, 2 * h.max_reward)),
        {"beta": 0.3, "max_reward": 2.0},
        "Huang 2024, 2407.13399, Algorithm 1",
        swept=(BETA, Swept("max_reward", 0.5, 5.0, bad=0.0, must_be="in (0, inf]")),
    ),
    Case(
        "length_normalized_dpo_loss",
        losses.length_normalized_dpo_loss,
        lambda x, h: nls(h.beta * (x.C / x.lengths[0] - x.R / x.lengths[1])),
        {"beta": 0.3, "lengths": LENGTHS},
        "Lambert 2024 (Tulu 3), 2411.15124",
    ),
    Case(
        "aot_loss",
        losses.aot_loss,
        lambda x, h: smoothed(h.beta * (np.sort(x.w - x.l) - np.sort((x.w - x.C) - (x.l - x.R))), h.label_smoothing),
        {"beta": 0.3, "label_smoothing": 0.1},
        "Melnyk 2024, 2406.05882",
        BATCH,
        (BETA, SMOOTHING),
    ),
    Case(
        "aot_unpaired_loss",
        losses.aot_unpaired_loss,
        lambda x, h: smoothed(h.beta * (np.sort(x.C) - np.sort(x.R)), h.label_smoothing),
        {"beta": 0.3, "label_smoothing": 0.1},
        "Melnyk 2024, 2406.05882",
        BATCH,
        (BETA, SMOOTHING),
    ),
    Case(
        "beta_dpo_loss",
        losses.beta_dpo_loss,
        beta_dpo,
        {"beta": 0.3, "alpha": 0.4, "moments": MOMENTS, "keep": 1.0},
        "Wu 2024, 2407.08639, Sec. 4",
        BATCH,
        (BETA, ALPHA),
    ),
    Case(
        "plackett_luce_loss",
        losses.plackett_luce_loss,
        plackett_luce,
        {"beta": 0.3},
        "Rafailov 2023, 2305.18290, Eq. 20",
        RANKED,
        reaches_optimum=True,
    ),
    Case(
        "simpo_loss",
        losses.simpo_loss,
        lambda x, h: nls(h.beta * (x.w - x.l) - h.gamma),
        {"beta": 0.3, "gamma": 0.5},
        "Meng 2024, 2405.14734, Eq. 6",
        REFERENCE_FREE,
        (BETA, GAMMA),
    ),
    Case(
        "alphapo_loss",
        losses.alphapo_loss,
        lambda x, h: nls(h.beta * (alpha_reward(x.w, h.alpha) - alpha_reward(x.l, h.alpha)) - h.gamma),
        {"beta": 0.3, "gamma": 0.5, "alpha": 0.25},
        "Gupta 2025, 2501.03884",
        REFERENCE_FREE,
        (BETA, GAMMA, replace(ALPHA, must_be="finite")),
    ),
    Case(
        "cpo_loss",
        losses.cpo_loss,
        lambda x, h: nls(h.beta * (x.w - x.l)) - h.sft_weight * x.w,
        {"beta": 0.3, "sft_weight": 0.8},
        "Xu 2024, 2401.08417, Eq. 3",
        REFERENCE_FREE,
        (BETA, Swept("sft_weight", 0.0, 2.0, bad=-1.0, must_be="in [0, inf)")),
    ),
    Case(
        "orpo_loss",
        losses.orpo_loss,
        lambda x, h: -x.w + h.odds_weight * nls(log_odds(x.w) - log_odds(x.l)),
        {"odds_weight": 0.3},
        "Hong 2024, 2403.07691, Eq. 6 and 7",
        REFERENCE_FREE,
        (Swept("odds_weight", 0.0, 2.0, bad=-1.0, must_be="in [0, inf)"),),
    ),
    Case(
        "unlikelihood_loss",
        losses.unlikelihood_loss,
        lambda x, h: -x.w + h.alpha * x.l,
        {"alpha": 0.3},
        "Rafailov 2023, 2305.18290, Sec. 6",
        REFERENCE_FREE,
        (replace(ALPHA, must_be="in [0, 1]"),),
    ),
    Case("sft_loss", losses.sft_loss, lambda x, _: -x.w, {}, "Rafailov 2023, 2305.18290, Sec. 6", REFERENCE_FREE, ()),
    Case(
        "kto_loss",
        losses.kto_loss,
        lambda x, h: labelled(
            x,
            h.desirable_weight * (1 - sigmoid(h.beta * (x.C - h.reference_point))),
            h.undesirable_weight * (1 - sigmoid(h.beta * (h.reference_point - x.C))),
        ),
        {"beta": 0.3, "reference_point": 0.6, "desirable_weight": 1.5, "undesirable_weight": 0.75},
        "Ethayarajh 2024, 2402.01306, Sec. 4.1",
        UNPAIRED,
        (
            BETA,
            Swept("reference_point", 0.0, 2.0, bad=-0.1, must_be="in [0, inf)"),
            Swept("desirable_weight", 0.0, 2.0, bad=-1.0, must_be="in [0, inf)"),
            Swept("undesirable_weight", 0.0, 2.0, bad=-1.0, must_be="in [0, inf)"),
        ),
    ),
    Case(
        "bco_loss",
        losses.bco_loss,
        lambda x, h: labelled(x, nls(h.beta * x.C - h.shift), nls(-(h.beta * x.C - h.shift))),
        {"beta": 0.3, "shift": 0.4},
        "Jung 2024, 2404.04656",
        UNPAIRED,
        (BETA, SHIFT),
    ),
    Case(
        "apo_zero_unpaired_loss",
        losses.apo_zero_unpaired_loss,
        lambda x, h: labelled(x, 1 - sigmoid(h.beta * x.C), sigmoid(h.beta * x.C)),
        {"beta": 0.3},
        "D'Oosterlinck 2024, 2408.06266, Eq. 7",
        UNPAIRED,
    ),
    *(
        Case(
            f"dpo_loss, {name}",
            losses.with_divergence(losses.dpo_loss, link),
            lambda x, h, score=score: nls(h.beta * (score(x.C) - score(x.R))),
            {"beta": 0.3},
            "Wang 2023 (f-DPO), 2309.16240, Table 1",
        )
        for name, link, score in [
            ("forward_kl", losses.forward_kl, lambda u: -1 / np.exp(u)),
            ("jensen_shannon", losses.jensen_shannon, lambda u: np.log(2 * np.exp(u) / (1 + np.exp(u)))),
            ("alpha_divergence", losses.alpha_divergence(0.4), lambda u: (1 - np.exp(u) ** -0.6) / 0.6),
            ("chi_square_kl", losses.chi_square_kl, chi),
        ]
    ),
    Case(
        "with_sft(dpo_loss)",
        losses.with_sft(losses.dpo_loss, weight=0.2),
        lambda x, h: nls(h.beta * x.D) - 0.2 * x.w,
        {"beta": 0.3},
        "Pang 2024 (RPO), 2404.19733, Eq. 1",
    ),
    Case(
        "weighted_sum (MPO)",
        losses.with_sft(
            losses.weighted_sum((0.8, losses.dpo_loss), (0.2, partial(losses.bco_pair_loss, shift=0.1))), weight=1.0
        ),
        lambda x, h: 0.8 * nls(h.beta * x.D) + 0.2 * (nls(h.beta * x.C - 0.1) + nls(-(h.beta * x.R - 0.1))) - x.w,
        {"beta": 0.3},
        "Wang 2024 (MPO), 2411.10442",
    ),
]
BY_NAME = {case.name: case for case in CASES}

OF_RLHF = {"bradley_terry_loss", "reinforce_loss", "ppo_loss", "grpo_loss", "value_loss", "xpo_loss"}
"""These have a menu and tests of their own: `rlhf_menu`."""


@dataclass(frozen=True)
class Inputs:
    """Log-probabilities of eight comparisons of three responses each, in float64."""

    policy: tuple[np.ndarray, np.ndarray, np.ndarray]
    reference: tuple[np.ndarray, np.ndarray, np.ndarray]
    desirable: np.ndarray

    def map(self, function):
        """The same, with a function applied to each array (to the labels, too, if it keeps them Boolean)."""
        policy, reference = (tuple(function(logps) for logps in side) for side in (self.policy, self.reference))
        desirable = function(self.desirable)
        return Inputs(policy, reference, desirable if desirable.dtype == bool else self.desirable)


def make_inputs(seed: int = 0, num: int = 8, scale: float = 2.0) -> Inputs:
    rng = np.random.default_rng(seed)
    reference = -rng.uniform(0.05, 6, (3, num))
    policy = np.minimum(reference + scale * rng.normal(size=(3, num)), -0.01)
    return Inputs(tuple(policy), tuple(reference), np.arange(num) % 3 != 0)


def quantities(inputs: Inputs, lengths=LENGTHS) -> SimpleNamespace:
    """What the equations speak of: log-probabilities w and l, log-ratios C, M (the middle one) and R, margin D."""
    policy, reference = (np.asarray(side, np.longdouble) for side in (inputs.policy, inputs.reference))
    ratios = policy - reference
    return SimpleNamespace(
        w=policy[0],
        l=policy[2],
        C=ratios[0],
        M=ratios[1],
        R=ratios[2],
        D=ratios[0] - ratios[2],
        desirable=inputs.desirable,
        lengths=lengths,
    )


def expected(case: Case, inputs: Inputs, **changed: Any) -> np.ndarray:
    """The losses by the equation."""
    return np.asarray(case.equation(quantities(inputs), SimpleNamespace(**(case.hyperparameters | changed))))


def evaluate(case: Case, policy: Any, inputs: Inputs, dtype: Any = jnp.float32, **changed: Any) -> jax.Array:
    """The losses by the function under test, for three arrays of the policy's log-probabilities."""
    hyperparameters = {**case.hyperparameters, **changed}
    if "lengths" in hyperparameters:
        hyperparameters["lengths"] = Pair(*(jnp.asarray(side) for side in hyperparameters["lengths"]))
    if case.kind == REFERENCE_FREE:
        return case.loss(Pair(policy[0], policy[2]), **hyperparameters)
    reference = inputs.reference and tuple(jnp.asarray(side, dtype) for side in inputs.reference)
    if case.kind == UNPAIRED:
        return case.loss(policy[0], reference and reference[0], jnp.asarray(inputs.desirable), **hyperparameters)
    if case.kind == RANKED:
        return case.loss(tuple(policy), reference, **hyperparameters)
    return case.loss(Pair(policy[0], policy[2]), reference and Pair(reference[0], reference[2]), **hyperparameters)


def with_log_ratios(ratios: Any) -> tuple[Any, Any]:
    """Policy and reference, neither above 0, whose log-ratios are these exactly."""
    return jax.tree.map(lambda u: jnp.minimum(u, 0), ratios), jax.tree.map(lambda u: -jnp.maximum(u, 0), ratios)


def policy_arrays(inputs: Inputs, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(side, dtype) for side in inputs.policy)
