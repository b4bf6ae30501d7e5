"""Strictness: no silent rank promotion, and every annotated shape and dtype is checked at run time.

Warnings are errors too: see `filterwarnings` in pyproject.toml.
"""

import os
from importlib.metadata import version

FLAGS = ["--xla_backend_optimization_level=0"]  # most programs run for milliseconds: compile them fast
if version("jaxlib") < "0.11":
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # a third of the time; newer versions do not know it
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402
import jaxtyping  # noqa: E402

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
    return toy.make_world(jax.random.key(7))
