"""Strictness: no silent rank promotion, and every annotated shape and dtype is checked at run time.

Warnings are errors too: see `filterwarnings` in pyproject.toml. Programs are small and run for milliseconds. Most of
the time is spent on compiling them: they are compiled with little optimisation, and kept from run to run.
"""

import gc
import os
import signal
from functools import cache
from importlib.metadata import version
from pathlib import Path

FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib") < "0.11":
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # a third of the time; newer versions do not know it
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/dpo_jax/tests").expanduser()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # nobody reads where an operation came from
gc.set_threshold(10_000)  # JAX clears a cache of its own at every collection
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore it

import jax  # noqa: E402
import jaxtyping  # noqa: E402


def lower_in_one_context():
    """JAX loads the dialects of its compiler anew for each program, which is half of the time that lowering takes.

    This reaches into JAX, so it does nothing where JAX looks different.
    """
    try:
        from jax._src.interpreters import mlir
        from jax._src.lib.mlir import ir

        make = mlir.make_ir_context
    except (ImportError, AttributeError):
        return
    shared = cache(make)

    def make_ir_context():
        return make() if ir.Context.current else shared()  # its own for a program inside of another

    mlir.make_ir_context = make_ir_context


lower_in_one_context()
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("dpo_jax", "beartype.beartype")

import pytest  # noqa: E402

from dpo_jax import toy  # noqa: E402
from dpo_jax.fast import compiling  # noqa: E402

compiling.CPU_OPTIONS.clear()  # sweeps compile as fast as all else


@pytest.fixture
def as_users_have_it():
    """Without the tests' checks of types and shapes, so that the library's own errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="session")
def world():
    return jax.jit(toy.make_world)(jax.random.key(7))
