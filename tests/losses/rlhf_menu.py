"""The elementwise functions of RLHF, and the equation of each in extended precision, as in `menu`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from tests.losses.menu import nls


@dataclass(frozen=True)
class Case:
    """A function and what is known of it.

    Attributes:
      name: of the function, or of what is made from it.
      function: of the arrays, in this order, and of hyperparameters.
      equation: `(x, h) -> [batch]`, of two namespaces: the arrays and the hyperparameters.
      arrays: their names.
      hyperparameters: likewise.
    """

    name: str
    function: Callable[..., Any]
    equation: Callable[[Any, Any], np.ndarray]
    arrays: tuple[str, ...]
    hyperparameters: tuple[str, ...] = ()


NUM = 8
RANGES = {
    **dict.fromkeys(("logps", "old_logps", "reference"), (-4.0, -0.01)),
    **dict.fromkeys(("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"), (-6.0, -0.01)),
    **dict.fromkeys(("advantages", "rewards_chosen", "rewards_rejected"), (-3.0, 3.0)),
    **dict.fromkeys(("values", "old_values", "returns"), (-1.0, 1.0)),
    "beta": (0.05, 2.0),
    "clip": (0.05, 0.9),
    "clip_high": (0.05, 2.0),
    "margin": (-2.0, 2.0),
    "centring": (0.0, 0.5),
    "alpha": (0.0, 1.0),
}


def surrogate(x, clip, clip_high):
    ratio = np.exp(x.logps - x.old_logps)
    return np.maximum(-ratio * x.advantages, -np.clip(ratio, 1 - clip, 1 + clip_high) * x.advantages)


def k2(x):
    return (x.logps - x.reference) ** 2 / 2


def k3(x):
    return np.exp(x.reference) / np.exp(x.logps) - 1 + x.logps - x.reference


def squared_error(x, clip):
    kept = np.clip(x.values, x.old_values - clip, x.old_values + clip)
    return np.maximum((x.values - x.returns) ** 2, (kept - x.returns) ** 2) / 2


def bradley_terry(x, h):
    return (
        nls(x.rewards_chosen - x.rewards_rejected - h.margin)
        + h.centring * (x.rewards_chosen + x.rewards_rejected) ** 2
    )


def xpo(x, h):
    margin = x.policy_chosen - x.reference_chosen - (x.policy_rejected - x.reference_rejected)
    return nls(h.beta * margin) + h.alpha * np.where(reference_won(margin), x.policy_chosen, x.policy_rejected)


def reference_won(logps):
    return np.arange(len(logps)) % 3 == 0


def of_pair(chosen, rejected, **hyperparameters):
    return losses.bradley_terry_loss((chosen, rejected), **hyperparameters)


def of_pairs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, **hyperparameters):
    pairs = (policy_chosen, policy_rejected), (reference_chosen, reference_rejected)
    won = jnp.asarray(reference_won(policy_chosen))
    return losses.xpo_loss(*pairs, reference_won=won, **hyperparameters)


def with_reference(logps, old_logps, advantages, reference, **hyperparameters):
    return losses.grpo_loss(logps, old_logps, advantages, reference=reference, **hyperparameters)


SAMPLES = ("logps", "old_logps", "advantages")
PAIRS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
VALUES = ("values", "old_values", "returns")
CASES = [
    Case("bradley_terry_loss", of_pair, bradley_terry, ("rewards_chosen", "rewards_rejected"), ("margin", "centring")),
    Case("reinforce_loss", losses.reinforce_loss, lambda x, h: -x.advantages * x.logps, ("logps", "advantages")),
    Case("ppo_loss", losses.ppo_loss, lambda x, h: surrogate(x, h.clip, h.clip), SAMPLES, ("clip",)),
    Case(
        "ppo_loss, clip_high",
        losses.ppo_loss,
        lambda x, h: surrogate(x, h.clip, h.clip_high),
        SAMPLES,
        ("clip", "clip_high"),
    ),
    Case(
        "grpo_loss",
        with_reference,
        lambda x, h: surrogate(x, h.clip, h.clip_high) + h.beta * k3(x),
        (*SAMPLES, "reference"),
        ("beta", "clip", "clip_high"),
    ),
    Case(
        "grpo_loss, defaults",
        with_reference,
        lambda x, h: surrogate(x, 0.2, 0.2) + h.beta * k3(x),
        (*SAMPLES, "reference"),
        ("beta",),
    ),
    Case(
        "grpo_loss, k2",
        partial(with_reference, kl=losses.k2_estimate),
        lambda x, h: surrogate(x, h.clip, h.clip) + h.beta * k2(x),
        (*SAMPLES, "reference"),
        ("beta", "clip"),
    ),
    Case("value_loss", losses.value_loss, lambda x, h: squared_error(x, h.clip), VALUES, ("clip",)),
    Case("value_loss, defaults", losses.value_loss, lambda x, h: (x.values - x.returns) ** 2 / 2, VALUES),
    Case("k1_estimate", losses.k1_estimate, lambda x, h: x.logps - x.reference, ("logps", "reference")),
    Case("k2_estimate", losses.k2_estimate, lambda x, h: k2(x), ("logps", "reference")),
    Case("k3_estimate", losses.k3_estimate, lambda x, h: k3(x), ("logps", "reference")),
    Case("xpo_loss", of_pairs, xpo, PAIRS, ("beta", "alpha")),
]


def make_arrays(case: Case, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(*RANGES[name], NUM) for name in case.arrays]


def make_hyperparameters(case: Case, share: float = 0.3) -> dict[str, float]:
    """So far between the lowest and the highest that are tested."""
    return {name: (1 - share) * RANGES[name][0] + share * RANGES[name][1] for name in case.hyperparameters}


def evaluate(case: Case, arrays: Any, dtype: Any = jnp.float32, **hyperparameters: Any) -> jax.Array:
    """By the function under test, at the call."""
    return case.function(*(jnp.asarray(array, dtype) for array in arrays), **hyperparameters)


@cache
def compiled(case: Case, dtype: Any) -> Callable[..., Any]:
    """`(arrays, hyperparameters) -> values, gradients of their sum by both`."""

    def values(arrays, hyperparameters):
        values = case.function(*arrays, **hyperparameters)
        return values.astype(jnp.promote_types(dtype, jnp.float32)).sum(), values

    gradient = jax.jit(jax.value_and_grad(values, argnums=(0, 1), has_aux=True))

    def call(arrays, hyperparameters):
        arrays = tuple(jnp.asarray(array, dtype) for array in arrays)
        (_, result), slopes = gradient(arrays, hyperparameters)
        return result, slopes

    return call


def expected(case: Case, arrays: Any, hyperparameters: dict[str, Any]) -> np.ndarray:
    """By the equation."""
    extended = (np.asarray(array, np.longdouble) for array in arrays)
    return case.equation(
        SimpleNamespace(**dict(zip(case.arrays, extended, strict=True))), SimpleNamespace(**hyperparameters)
    )


def slopes(case: Case, arrays: Any, hyperparameters: dict[str, Any], step: float = 1e-6) -> tuple[list, dict]:
    """Central differences of the equation, by each array and by each hyperparameter."""

    def difference(of):
        return np.float64((of(np.longdouble(step)) - of(np.longdouble(-step))) / (2 * step))

    def moved(place, by):
        return [array + by if i == place else array for i, array in enumerate(np.asarray(arrays, np.longdouble))]

    by_arrays = [
        difference(lambda by, place=place: expected(case, moved(place, by), hyperparameters))
        for place in range(len(arrays))
    ]
    by_hyperparameters = {
        name: difference(
            lambda by, name=name: expected(case, arrays, hyperparameters | {name: hyperparameters[name] + by}).sum()
        )
        for name in hyperparameters
    }
    return by_arrays, by_hyperparameters
