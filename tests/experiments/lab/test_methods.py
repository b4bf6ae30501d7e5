import dataclasses
import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, train
from experiments.lab import methods, tuning
from experiments.lab.comparison import ranges_of
from experiments.lab.feedback import SETTINGS, Feedback
from experiments.lab.methods import METHODS, Setup
from experiments.loss_variants import LEARNING_RATE
from tests.experiments.small import PIPELINE, slow_but
from tests.losses.menu import OF_RLHF

BY_NAME = {method.name: method for method in METHODS}
CANDIDATES = tuning.candidates(2, 4)


@pytest.fixture(scope="module")
def feedback():
    start = jax.jit(PIPELINE.start)(jax.random.key(3))
    return Feedback(PIPELINE, jax.random.key(4), start, SETTINGS["clean"])


@pytest.fixture(scope="module")
def data(feedback):
    """Feedback of each kind, drawn once."""
    kinds = (Feedback.pairs, Feedback.labels, Feedback.rankings, Feedback.split_pairs)
    return dict(zip(kinds, jax.jit(lambda: [kind(feedback) for kind in kinds])(), strict=True))


def objective_of(method, feedback, candidate):
    start = feedback.start
    log_prob, table = PIPELINE.log_prob(start.world), PIPELINE.table(start.world)
    setup = Setup(jax.random.key(5), log_prob, table, start.params, start.log_probs)
    return method.objective(setup, tuning.hyperparameters(method.ranges, candidate))


def steps(method, feedback, data, candidate):
    """Two optimizer steps of a method: its parameters, and the metrics of the second step."""
    objective, optimizer = objective_of(method, feedback, candidate), optax.sgd(0.1)
    initial = method.initial(jax.random.key(6), feedback.start)
    state = train.init_state(initial, objective=objective, optimizer=optimizer)
    state, _ = train.update(state, data, objective=objective, optimizer=optimizer)
    state, metrics = train.update(state, data, objective=objective, optimizer=optimizer)
    return state.params, metrics


@pytest.mark.parametrize("name", slow_but(BY_NAME, "dpo", "kto on labels"))
def test_each_method_trains_under_vmap_over_its_hyperparameters(name, feedback, data):
    method = BY_NAME[name]
    run = functools.partial(steps, method, feedback, data[method.data])
    params, metrics = jax.jit(jax.vmap(run))(jnp.asarray(CANDIDATES))
    chex.assert_tree_all_finite((params, metrics))
    assert metrics["loss"].shape == (2,)
    moved = jax.tree.map(lambda new, old: jnp.max(jnp.abs(new - old[None])), params, feedback.start.params)
    assert max(jax.tree.leaves(moved)) > 1e-6, "it did not learn"
    if method.ranges:
        assert not np.allclose(metrics["loss"][0], metrics["loss"][1], rtol=1e-5)


def test_every_loss_takes_part(feedback, data, monkeypatch):
    """But for those that differ from DPO only where responses have several tokens."""
    called = set()
    public = {name for name in dir(losses) if name.endswith("_loss")} - OF_RLHF
    for name in public:
        monkeypatch.setattr(losses, name, noting(called, name, getattr(losses, name)))
    by_name = {kind.__name__: drawn for kind, drawn in data.items()}
    for method in importlib.reload(methods).METHODS:
        objective = objective_of(method, feedback, CANDIDATES[0])
        jax.eval_shape(objective, feedback.start.params, by_name[method.data.__name__])
    elsewhere = {"length_normalized_dpo_loss", "length_regularized_dpo_loss"}
    missing = public - called - elsewhere
    assert public - called == elsewhere, f"METHODS in experiments/lab/methods.py has no method of {missing}"


def noting(called, name, function):
    @functools.wraps(function)
    def noted(*args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)

    return noted


def test_names_can_stand_in_a_list():
    assert not any("," in method.name for method in METHODS)
    assert len({method.name for method in METHODS}) == len(METHODS)


def test_methods_share_learning_rates_and_betas():
    known = {method.name: method for method in METHODS}
    dpo, cdpo = (
        tuning.hyperparameters(ranges_of(known[name], LEARNING_RATE), CANDIDATES[0])
        for name in ("dpo", "conservative dpo")
    )
    assert {name: cdpo[name] for name in dpo} == dpo


def focal(policy, reference, *, beta, focus, sharpness=1.0):
    return beta * focus * sharpness * (policy[0] - policy[1] - reference[0] + reference[1])


def test_a_method_of_a_loss_of_your_own_has_its_keywords_without_default():
    method = methods.method_of("focal", focal)
    assert method.ranges.keys() == {"beta", "focus"}
    assert method.optional == ("sharpness",)
    assert dataclasses.replace(methods.method_of("focal", focal), name="other").name == "other"


def test_beta_may_have_a_default():
    method = methods.method_of("mine", lambda policy, reference, *, beta=0.1: beta * policy[0])
    assert method.ranges.keys() == {"beta"}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda policy, reference, *, gamma: 0, "mine must take beta"),
        (lambda a, b, c, d, *, beta: 0, r"mine must take \(policy\), .*it takes \(a, b, c, d\)"),
    ],
)
def test_losses_of_another_shape_are_refused(loss, message):
    with pytest.raises(TypeError, match=message):
        methods.method_of("mine", loss)
