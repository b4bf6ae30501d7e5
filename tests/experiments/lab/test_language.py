import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import lm
from experiments.lab.language import kl_along
from tests.lm import tiny


def test_kl_is_that_of_the_policy_to_the_model():
    model, data = tiny.model(), tiny.pairs()
    policy = jax.tree.map(lambda leaf: 1.1 * leaf, model.params)
    tokens = jnp.asarray(data.responses.chosen)
    expected = jax.jit(lm.kl_fn(model.decoder))(policy, model.params, jnp.asarray(data.prompts), tokens)
    found = kl_along(model, policy, data.prompts, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.min() > 0
