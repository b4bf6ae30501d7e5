"""Compiler options change how long a program takes, and not what it computes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.fast.compiling import compile_fast


@pytest.mark.parametrize("optimise", [True, False])
def test_a_program_computes_the_same(key, optimise):
    numbers = jax.random.normal(key, (7, 5))
    program = compile_fast(jax.jit(lambda x: jnp.exp(x) @ x.T).lower(numbers), optimise=optimise)
    np.testing.assert_allclose(program(numbers), jnp.exp(numbers) @ numbers.T, rtol=1e-5)


def test_a_compiler_that_does_not_know_the_options_compiles_without_them(monkeypatch):
    class Lowered:
        def compile(self, **options):
            if options:
                raise jax.errors.JaxRuntimeError("no such option")
            return "compiled"

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert inspect.unwrap(compile_fast)(Lowered()) == "compiled"
