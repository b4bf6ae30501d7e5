"""Dense layers: the initial distribution and the derivatives of plain ones."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import toy


def test_network_starts_from_pytorchs_distribution(key):
    params = jax.vmap(lambda key: toy.ToyLM(num_responses=10).init(key, jnp.zeros((5, 8))))(jax.random.split(key, 300))[
        "params"
    ]
    for layer, fan_in, name, shape in (("Dense_0", 8, "kernel", (8, 32)), ("Dense_1", 32, "weight", (10, 32))):
        assert params[layer][name].shape[1:] == shape
        for values in params[layer].values():
            bound = fan_in**-0.5
            assert stats.kstest(np.ravel(values), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-3


@pytest.mark.parametrize("num_prompts", [1, 5, 40])
def test_derivatives_are_those_of_a_plain_network(key, num_prompts):
    class PlainLM(nn.Module):
        @nn.compact
        def __call__(self, embeddings):
            hidden = nn.relu(nn.Dense(32, precision="highest")(embeddings))
            return nn.Dense(10, precision="highest")(hidden)

    init_key, embedding_key, weight_key = jax.random.split(key, 3)
    embeddings = jax.random.normal(embedding_key, (num_prompts, 8))
    params = toy.ToyLM(num_responses=10).init(init_key, embeddings)
    weights = jax.random.normal(weight_key, (num_prompts, 10))

    def score(network, params, embeddings):
        return jnp.sum(weights * jax.nn.log_softmax(network.apply(params, embeddings)))

    def curvature(network, params, embeddings):  # forward over reverse, in the direction of the parameters
        gradient = partial(jax.grad(score, argnums=(1, 2)), network)
        return jax.jvp(gradient, (params, embeddings), (params, embeddings))

    ours = jax.jit(partial(curvature, toy.ToyLM(num_responses=10)))(params, embeddings)
    plain = jax.jit(partial(curvature, PlainLM()))(with_kernel(params), embeddings)
    chex.assert_trees_all_close(
        jax.tree.map(with_kernel, ours, is_leaf=lambda node: isinstance(node, dict)), plain, atol=1e-5
    )


def with_kernel(tree):
    """The last layer's weights as Flax keeps them: parameters of a `ToyLM`, or what has their structure."""
    if not isinstance(tree, dict):
        return tree
    last = tree["params"]["Dense_1"]
    return {"params": {**tree["params"], "Dense_1": {"kernel": last["weight"].T, "bias": last["bias"]}}}
