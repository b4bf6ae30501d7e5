"""The seconds of a step of `lm.tune`, and of generation."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import lm, losses, train
from dpo_jax.types import Pair
from experiments.lm_benchmark import workload

PLANNED_STEPS = 50
"""Steps of a short run, such as one over 200 pairs in batches of 4."""


class _EnoughError(Exception):
    """Ends a run of which enough was seen."""


def peak_flops(dtype: Any = jnp.float32, seconds: float = 2.0) -> float:
    """FLOP/s of a product of square matrices, the best of a second or two."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step_seconds(
    model: lm.LanguageModel,
    *,
    num_steps: int,
    num_pairs: int = 4,
    batch_size: int | None = None,
    lora: lm.LoRA | None = None,
    num_adapters: int | None = None,
    planned_steps: int | None = None,
) -> dict[str, Any]:
    """Seconds of optimizer steps, compiling apart, and the memory that they took.

    Args:
      model: of any weights.
      num_steps: how many, or, if batches differ, how many epochs; the first warms up and is not among them, and steps
        that run a program for the first time are not, either.
      num_pairs: pairs to train on.
      batch_size: pairs per step; by default all, the same in each step.
      lora: trains adapters of this kind; `None` trains all parameters.
      num_adapters: how many at once, each with its own beta.
      planned_steps: of a longer run, of which these are the first: it is worth more shapes. By default, no more.
    """
    zeros = np.zeros(num_pairs, np.float32)
    data = workload.pairs(model.decoder.config.vocab_size, num_pairs)._replace(reference_logps=Pair(zeros, zeros))
    dpo = partial(train.preference_objective, loss=losses.dpo_loss)
    steps: list[lm.Step] = []
    per_epoch = -(-num_pairs // (batch_size or num_pairs))
    wanted = (num_steps + 1) * per_epoch

    def report(step: lm.Step) -> None:
        steps.append(step._replace(params=None))
        if step.done == wanted:
            raise _EnoughError

    tune = partial(
        lm.tune,
        jax.random.key(0),
        model,
        data,
        objective=dpo if num_adapters else partial(dpo, beta=0.1),
        optimizer=lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-6)),
        num_epochs=-(-max(planned_steps or 0, wanted) // per_epoch),
        batch_size=batch_size or num_pairs,
        lora=lora,
        points={"beta": np.geomspace(0.01, 1, num_adapters)} if num_adapters else None,
        preflight=False,
        report=report,
    )
    with suppress(_EnoughError):
        tune()
    capacity = lm.capacity_of(data.prompts, data.responses)
    return {
        "seconds": [step.seconds for step in steps[per_epoch:] if not step.compiling],
        "compiling": [step.compiling for step in steps if step.compiling],
        "first_runs": [step.seconds for step in steps if step.compiling],
        "tokens": capacity.tokens,
        "least_flop": workload.least_work(model.decoder.config, capacity, num_pairs),
        "peak_bytes": peak_bytes(),
    }


def tokens_per_second(model: lm.LanguageModel, *, num_prompts: int, max_tokens: int) -> float:
    """How fast prompts are answered, without stopping early, and compiling apart."""
    prompts = jnp.asarray(workload.pairs(model.decoder.config.vocab_size, num_prompts).prompts)
    room = int(jnp.sum(prompts >= 0))
    generate = lm.generate_fn(model.decoder, max_tokens=max_tokens, stops=(), prompt_tokens=room)
    write = jax.jit(generate, compiler_options=lm.precise_options())
    compiled = write.lower(jax.random.key(0), model.params, prompts).compile()
    best = np.inf
    for i in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(jax.random.key(i), model.params, prompts))
        best = min(best, time.perf_counter() - start)
    return num_prompts * max_tokens / best


def peak_bytes() -> int:
    """The most memory that this process or its accelerator has held."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
