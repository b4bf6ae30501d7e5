import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import pytest

from dpo_jax import losses
from experiments import methods
from experiments.loss_variants import SETTINGS, prepare, ranges_of, run
from experiments.methods import METHODS
from experiments.tuning import candidates
from tests.losses.menu import OF_RLHF

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def start():
    return jax.jit(prepare)(jnp.uint32(3), SETTINGS["clean"])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_each_method_trains_under_vmap_over_its_hyperparameters(method, start):
    """With hyperparameters of which the second learns slower: everything finite, and the two not the same."""
    tried = candidates(ranges_of(method), 2)
    stacked = {name: jnp.array([h[name] for h in tried]) for name in tried[0]}
    measured = jax.jit(jax.vmap(lambda h: run(method, start, h)))(stacked)
    chex.assert_tree_all_finite(measured)
    assert measured["expected_reward"].shape == (2,)
    assert not jnp.allclose(measured["kl_to_reference"][0], measured["kl_to_reference"][1], rtol=1e-3)
    assert jnp.all(measured["kl_to_reference"] > 1e-5), "it did not learn"


def test_every_loss_takes_part(start, monkeypatch):
    """But for those that differ from DPO only where responses have several tokens."""
    called = set()
    public = {name for name in dir(losses) if name.endswith("_loss")} - OF_RLHF
    for name in public:
        monkeypatch.setattr(losses, name, noting(called, name, getattr(losses, name)))
    for method in importlib.reload(methods).METHODS:
        chosen = {name: float(value) for name, value in candidates(ranges_of(method), 1)[0].items()}
        jax.eval_shape(lambda method=method, chosen=chosen: run(method, start, chosen))
    assert public - called == {"length_normalized_dpo_loss", "length_regularized_dpo_loss"}


def noting(called, name, function):
    @functools.wraps(function)
    def noted(*args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)

    return noted


def test_methods_share_learning_rates_and_betas():
    dpo, cdpo = (candidates(ranges_of(BY_NAME[name]), 24) for name in ("dpo", "conservative dpo"))
    for name in ("learning_rate", "beta"):
        assert [h[name] for h in dpo] == [h[name] for h in cdpo]
