"""Every loss of pairs, with its gradient, on one large batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo_jax import losses
from dpo_jax.types import Pair
from experiments.benchmark import measuring
from experiments.benchmark.least_work import DPO_GRADIENT, DPO_VALUE, Work
from experiments.benchmark.measuring import Clock
from experiments.lab.pipeline import BETA


def with_lengths(loss: Callable[..., Array]) -> Callable[..., Array]:
    """A loss whose chosen responses have 7 tokens and whose rejected ones have 5."""
    return lambda policy, reference, **rest: loss(
        policy, reference, lengths=Pair(jnp.full_like(policy[0], 7), jnp.full_like(policy[1], 5)), **rest
    )


LOSSES: dict[str, Callable[..., Array]] = {
    "dpo": losses.dpo_loss,
    "conservative dpo": partial(losses.dpo_loss, label_smoothing=0.1),
    "robust dpo": partial(losses.robust_dpo_loss, label_smoothing=0.1),
    "ipo": losses.ipo_loss,
    "hinge": losses.hinge_loss,
    "squared": losses.squared_loss,
    "truncated quadratic": losses.truncated_quadratic_loss,
    "exponential": losses.exponential_loss,
    "savage": losses.savage_loss,
    "exo": partial(losses.exo_loss, label_smoothing=0.1),
    "discopop": losses.discopop_loss,
    "offset dpo": partial(losses.offset_dpo_loss, offset=0.5),
    "length-regularized dpo": with_lengths(partial(losses.length_regularized_dpo_loss, alpha=0.1)),
    "nca": losses.nca_loss,
    "bco, pairs": partial(losses.bco_pair_loss, shift=0.1),
    "sppo": losses.sppo_loss,
    "apo-zero": losses.apo_zero_loss,
    "apo-down": losses.apo_down_loss,
    "dpo-positive": partial(losses.dpo_positive_loss, penalty=1.0),
    "chi-po": losses.chi_po_loss,
    "length-normalized dpo": with_lengths(losses.length_normalized_dpo_loss),
    "dpo, forward KL": losses.with_divergence(losses.dpo_loss, losses.forward_kl),
    "dpo, Jensen-Shannon": losses.with_divergence(losses.dpo_loss, losses.jensen_shannon),
    "dpo, alpha 0.5": losses.with_divergence(losses.dpo_loss, losses.alpha_divergence(0.5)),
}


def all_losses(names: tuple[str, ...], num_pairs: int, clock: Clock) -> dict[str, dict[str, Any]]:
    """Every loss of pairs with its gradient, on a big batch that is spread over all devices."""
    shape = (num_pairs,)
    logps = [-np.random.default_rng(i).exponential(3.0, shape).astype(np.float32) for i in range(4)]
    policy, reference = Pair(*logps[:2]), Pair(*logps[2:])
    entries = {}
    for name in names:
        program = measuring.compile_on(
            jax.local_device_count(), partial(values_and_gradients, LOSSES[name]), policy, reference
        )
        data = program.place((policy, reference))
        measure = partial(measuring.median_seconds, partial(program, *data), clock.repeats)
        counts = program.xla_counts  # of one device's part
        flops = (counts.get("flops", 0) + counts.get("transcendentals", 0)) * jax.local_device_count()
        least = (DPO_VALUE + DPO_GRADIENT) * shape[0]
        work = least if name == "dpo" else Work(flops, least.bytes)
        entries[name] = {
            "compile_seconds": program.compile_seconds,
            **clock.timed(measure, work, values=shape[0]),
            "xla_flops_per_value": flops / shape[0],
        }
    return entries


def values_and_gradients(loss: Callable[..., Array], policy: Pair, reference: Pair) -> tuple[Array, Pair]:
    """A loss of each pair, and its gradient with respect to the policy's log-probabilities."""
    values, pull_back = jax.vjp(lambda policy: loss(policy, reference, beta=BETA), policy)
    (gradient,) = pull_back(jnp.ones_like(values))
    return values, gradient
