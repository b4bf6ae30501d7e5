import jax
import pytest

from dpo_jax import toy, train

POLICY = toy.ToyLM(num_responses=10)


@pytest.fixture(scope="session")
def start(make_start):
    return make_start()


@pytest.fixture(scope="session")
def labels(start):
    world, log_prob, params, _, _ = start
    data = toy.sample_labels(jax.random.key(4), world, num=40)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    return train.with_reference(log_prob, moved, data)


@pytest.fixture(scope="session")
def make_start():
    return _make_start


def _make_start():
    """A world, how it scores, a network's initial parameters, demonstrations, and comparisons with their reference."""
    keys = jax.random.split(jax.random.key(1), 4)
    world = toy.make_world(keys[0])
    params = POLICY.init(keys[1], world.embeddings)
    demos = toy.sample_demonstrations(keys[2], world, num=50)
    preferences = toy.sample_preferences(keys[3], world, num=70)
    log_prob = toy.log_prob_fn(POLICY, world.embeddings)
    return world, log_prob, params, demos, train.with_reference(log_prob, params, preferences)
