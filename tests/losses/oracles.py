"""The numbers of independent implementations (`tests/golden`), and how far ours are from them."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from dpo_jax.types import Pair

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = json.loads((GOLDEN / "loss_inputs.json").read_text())
FILES = sorted(GOLDEN.glob("losses_in_*.json"))
ENTRIES = [
    {"oracle": content["oracle"], **entry}
    for content in (json.loads(path.read_text()) for path in FILES)
    for entry in content["entries"]
]


@cache
def pair(name: str, dtype: Any) -> Pair:
    return Pair(*(jnp.asarray(INPUTS[name][side], dtype) for side in ("chosen", "rejected")))


def divergence(entry: dict[str, Any]) -> Any:
    """The link function that an entry speaks of."""
    name = entry["divergence"]["name"]
    return losses.alpha_divergence(entry["divergence"]["alpha"]) if name == "alpha" else getattr(losses, name)


def loss_of(entry: dict[str, Any], dtype: Any) -> tuple[Any, Any]:
    """Our loss as a function of what the oracle differentiates by, and the point at which it was asked."""
    name, hyperparameters = entry["loss"], dict(entry["hyperparameters"])
    policy, reference, lengths = pair("policy", dtype), pair("reference", dtype), pair("lengths", jnp.int32)
    if entry["takes"] == "means":
        policy, reference = _per_token(policy, lengths), _per_token(reference, lengths)
    if name == "ld_dpo":
        return _length_desensitized(hyperparameters, lengths, dtype)
    if name == "mpo":
        return _mixed(hyperparameters, entry["reduction"], reference, lengths), policy
    if name == "wpo":
        return _weighted(hyperparameters, reference, lengths, dtype), policy
    if name == "orpo_odds_ratio":
        return _odds_ratio(hyperparameters), policy
    loss = getattr(losses, name)
    if name == "length_normalized_dpo_loss":
        hyperparameters["lengths"] = lengths
    if name in ("simpo_loss", "alphapo_loss", "cpo_loss"):
        return partial(loss, **hyperparameters), policy
    if name in ("kto_loss", "bco_loss", "apo_zero_unpaired_loss"):
        desirable = jnp.asarray(INPUTS["desirable"])
        return lambda policy: loss(policy, reference.chosen, desirable, **hyperparameters), policy.chosen
    if entry["divergence"]:
        loss = losses.with_divergence(loss, divergence(entry))
    return lambda policy: loss(policy, reference, **hyperparameters), policy


def _per_token(logps, lengths):
    return Pair(*(side / length for side, length in zip(logps, lengths, strict=True)))


def _odds_ratio(hyperparameters):
    """TRL's `losses` are without the NLL, and have the other sign."""
    return lambda policy: -hyperparameters["beta"] * (losses.orpo_loss(policy, odds_weight=1.0) + policy.chosen)


def _length_desensitized(hyperparameters, lengths, dtype):
    desensitized = partial(losses.length_desensitized_logps, alpha=hyperparameters["ld_alpha"])
    common = jnp.minimum(*lengths)

    def logps(tokens):
        return Pair(*(desensitized(side, length, common) for side, length in zip(tokens, lengths, strict=True)))

    reference = logps(pair("reference_tokens", dtype))
    policy = pair("policy_tokens", dtype)
    return lambda tokens: losses.dpo_loss(logps(tokens), reference, beta=hyperparameters["beta"]), policy


def _mixed(hyperparameters, reduction, reference, lengths):
    """TRL averages the NLL over the tokens of a row, or of the batch."""
    total = lengths.chosen if reduction == "none" else jnp.mean(lengths.chosen)
    preference = losses.weighted_sum((0.8, losses.dpo_loss), (0.2, partial(losses.bco_pair_loss, shift=0.0)))

    def loss(policy):
        nll = losses.sft_loss(policy) / total
        return preference(policy, reference, beta=hyperparameters["beta"]) + nll

    return loss


def _weighted(hyperparameters, reference, lengths, dtype):
    def loss(policy):
        weights = losses.wpo_weights(_per_token(policy, lengths), pair("alignment", dtype))
        return losses.with_weights(losses.dpo_loss)(policy, reference, beta=hyperparameters["beta"], weights=weights)

    return loss


def compare(entry: dict[str, Any], dtype: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (ours, theirs) of losses and of gradients, flat, without the rows that the oracle could not compute."""
    loss, point = loss_of(entry, dtype)
    is_mean = entry["reduction"] == "mean"
    values, pull_back = jax.vjp(loss, point)
    (gradient,) = pull_back(jnp.full_like(values, 1 / values.size if is_mean else 1))
    ours = [np.mean(values) if is_mean else values]
    theirs = [entry["values"]]
    sides = {"policy": gradient} if "policy" in entry["gradients"] else gradient._asdict()
    for side, slope in sides.items():
        ours.append(slope)
        theirs.append(entry["gradients"][side])
    return [_finite(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(ours, theirs, strict=True)]


def _finite(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert np.all(np.isfinite(ours)), "ours is not finite"
    known = np.isfinite(theirs)
    return ours[known], theirs[known]


def deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the oracle's number, or to the largest one (at most 1) where that is more."""
    floor = min(1.0, float(np.max(np.abs(theirs))))
    return float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), floor)))
