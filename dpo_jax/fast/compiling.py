"""Compiler options for many small runs."""

from __future__ import annotations

import jax

CPU_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "1", "xla_cpu_prefer_vector_width": "512"}
"""The widest vectors, and not the optimisations that only cost time here."""


def compile_fast(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles; on a CPU, with `CPU_OPTIONS` if XLA knows them."""
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=CPU_OPTIONS)
    except jax.errors.JaxRuntimeError:  # another version of XLA
        return lowered.compile()
