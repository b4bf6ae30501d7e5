"""Compiler options for many small runs, and for large products of matrices; functions that are called as one."""

from __future__ import annotations

from functools import cache, partial

import jax

as_one = partial(jax.jit, inline=True)
"""Compiles a function of many operations into one call outside of `jax.jit`; no effect inside."""

CPU_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "1", "xla_cpu_prefer_vector_width": "512"}
"""The widest vectors, and not the optimisations that only cost time here."""

PRECISE_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Without the kernels of YNNPACK."""


def compile_fast(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles; on a CPU, with `CPU_OPTIONS` if XLA knows them."""
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=CPU_OPTIONS)
    except jax.errors.JaxRuntimeError:  # another version of XLA
        return lowered.compile()


@cache
def precise_options() -> dict[str, str | bool]:
    """Options for `jax.jit` where products of large matrices shall round less: `PRECISE_OPTIONS` if XLA knows them.

    On a CPU, YNNPACK's kernels make steps of training faster, but the largest error of logits twice as large
    (`tests/golden/scripts/written_in_transformers.py`), and a program slower when it is first run.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=PRECISE_OPTIONS)
    except jax.errors.JaxRuntimeError:  # another version of XLA
        return {}
    return PRECISE_OPTIONS
