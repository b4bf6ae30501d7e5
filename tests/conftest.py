"""Strictness: no silent rank promotion, and every annotated shape and dtype is checked at run time.

Warnings are errors too: see `filterwarnings` in pyproject.toml.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"  # compiles faster

import jax
import jaxtyping

jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("dpo_jax", "beartype.beartype")

import pytest  # noqa: E402

from dpo_jax import toy  # noqa: E402


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
