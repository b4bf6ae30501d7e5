"""What commands that tune language models share: objectives, an optimizer, held-out pairs."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from dpo_jax import lm
from dpo_jax.types import LogProbFn, Objective, Preferences
from experiments.lab.methods import Method, Setup

OF_MEANS = ("simpo", "alphapo", "orpo")
"""Losses that take means over tokens."""


def objective_of(method: Method, h: Mapping[str, float]) -> Callable[..., Objective]:
    """Makes the objective of a method that needs nothing but log-probabilities."""

    def make(log_prob: LogProbFn, **varied: Any) -> Objective:
        nothing: Any = None
        setup = Setup(jax.random.key(0), log_prob, nothing, nothing, nothing)
        return method.objective(setup, {**h, **varied})

    return make


def optimizer_of(learning_rate: Any, num_steps: int) -> optax.GradientTransformation:
    """Adam with a short warm-up, a cosine to zero, and gradients of at most norm 1; the rate may be traced."""
    shape = optax.warmup_cosine_decay_schedule(0.1, 1.0, max(1, num_steps // 20), max(2, num_steps))
    descent = optax.scale_by_learning_rate(lambda step: learning_rate * shape(step))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), descent)


def split(
    key: Key[Array, ""], data: Preferences, *, held_out: float, at_most: int | None
) -> tuple[Preferences, Preferences]:
    """Pairs to train on, and a share of them that is held out.

    Raises:
      ValueError: too few would be left on a side.
    """
    order = np.asarray(jax.random.permutation(key, len(data.prompts)))[:at_most]
    num = round(held_out * len(order))
    if num < 2 or num >= len(order):
        raise ValueError(f"--held-out: {held_out} of {len(order)} pairs leaves too few to judge or to train on")
    rest, out = order[num:], order[:num]
    return jax.tree.map(lambda leaf: leaf[rest], data), jax.tree.map(lambda leaf: leaf[out], data)


def judged(make: Any, data: Preferences, logps: Any) -> dict[str, dict[str, float]]:
    """Means over held-out pairs, with their standard errors."""
    rows = lm.evaluate_rows(make, data, logps)
    sides = zip(("chosen", "rejected"), data.responses, strict=True)
    lengths = {f"{name}_tokens": np.sum(tokens >= 0, axis=1) for name, tokens in sides}
    return {name: lm.mean_and_stderr(values) for name, values in {**rows, **lengths}.items()}


def within_prompts(values: Float[np.ndarray, "prompts samples"]) -> dict[str, float]:
    """The mean over samples for given prompts, which count equally, and its standard error."""
    values = np.asarray(values, np.float64)
    error = np.sqrt(values.var(axis=1, ddof=1).mean() / values.size)
    return {"mean": float(values.mean()), "stderr": float(error)}


@cache
def writer(decoder: lm.Decoder, max_tokens: int, stops: tuple[int, ...], num: int = 1) -> Any:
    """`lm.generate_fn`, compiled once for all policies."""
    return jax.jit(lm.generate_fn(decoder, max_tokens=max_tokens, stops=stops, group_size=num))


@cache
def kl_along(decoder: lm.Decoder) -> Any:
    """`lm.kl_fn`, compiled once for all policies."""
    return jax.jit(lm.kl_fn(decoder))
