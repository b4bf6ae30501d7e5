"""Compiler options change how long a program takes, and not what it computes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.fast import compiling
from dpo_jax.fast.compiling import compile_fast, precise_options


def test_a_program_computes_the_same(key, monkeypatch):
    monkeypatch.setitem(compiling.CPU_OPTIONS, "xla_backend_optimization_level", "1")
    numbers = jax.random.normal(key, (7, 5))
    program = compile_fast(jax.jit(lambda x: jnp.exp(x) @ x.T).lower(numbers))
    np.testing.assert_allclose(program(numbers), jnp.exp(numbers) @ numbers.T, rtol=1e-5)


def test_a_compiler_that_does_not_know_the_options_compiles_without_them(monkeypatch):
    class Lowered:
        def compile(self, **options):
            if options:
                raise jax.errors.JaxRuntimeError("no such option")
            return "compiled"

    assert inspect.unwrap(compile_fast)(Lowered()) == "compiled"


@pytest.mark.parametrize("known", [True, False])
def test_precise_options_are_those_that_the_compiler_knows(monkeypatch, known):
    monkeypatch.setattr(compiling, "PRECISE_OPTIONS", {"xla_cpu_use_acl" if known else "xla_of_another_time": False})
    found = inspect.unwrap(precise_options)()
    assert found == (compiling.PRECISE_OPTIONS if known else {})
    assert jax.jit(lambda x: x @ x, compiler_options=found)(jnp.eye(2)).tolist() == [[1, 0], [0, 1]]
