import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import rlhf

CONTROL = rlhf.AdaptiveKL(initial=0.2, target=6.0, gain=0.1)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (5.7, 0.995), (60.0, 1.02), (0.0, 0.98)],  # the error is clipped at a fifth
)
def test_it_is_ziegler_et_als_equation(kl, factor):
    updated = rlhf.update_coefficient(jnp.float32(0.5), jnp.float32(kl), control=CONTROL)
    np.testing.assert_allclose(updated, 0.5 * factor, rtol=1e-6)


def test_it_is_traced():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def updated(target):
        control = CONTROL._replace(target=target)
        return rlhf.update_coefficient(jnp.float32(0.5), jnp.float32(6.0), control=control)

    np.testing.assert_allclose([updated(6.0), updated(3.0)], [0.5, 0.51], rtol=1e-6)
