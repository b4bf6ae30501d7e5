"""Compiler options: code for the widest vectors of the processor, compiled quickly."""

from __future__ import annotations

import jax


def compile_fast(lowered: jax.stages.Lowered, *, optimise: bool = True) -> jax.stages.Compiled:
    """Compiles a program; on a CPU, for its widest vectors, without optimisations that do not pay here.

    Args:
      lowered: the program.
      optimise: whether XLA optimises the code. It does not pay for a program that runs for milliseconds.
    """
    if jax.default_backend() != "cpu":
        return lowered.compile()
    quick: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": False}
    usual: dict[str, str | bool] = {"xla_backend_optimization_level": "1", "xla_cpu_prefer_vector_width": "512"}
    try:
        return lowered.compile(compiler_options=usual if optimise else quick)
    except jax.errors.JaxRuntimeError:  # another version of XLA, without these options
        return lowered.compile()
