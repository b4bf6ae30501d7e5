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

    @jax.jit
    def draw(key):
        moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
        return train.with_reference(log_prob, moved, toy.sample_labels(key, world, num=40))

    return draw(jax.random.key(4))


@pytest.fixture(scope="session")
def make_start():
    return _make_start


def _make_start():
    """A world, how it scores, a network's initial parameters, demonstrations, and comparisons with their reference."""
    world, params, demos, preferences = _draw(jax.random.key(1))
    return world, toy.log_prob_fn(POLICY, world.embeddings), params, demos, preferences


@jax.jit
def _draw(key):
    keys = jax.random.split(key, 4)
    world = toy.make_world(keys[0])
    params = POLICY.init(keys[1], world.embeddings)
    demos = toy.sample_demonstrations(keys[2], world, num=50)
    preferences = toy.sample_preferences(keys[3], world, num=70)
    log_prob = toy.log_prob_fn(POLICY, world.embeddings)
    return world, params, demos, train.with_reference(log_prob, params, preferences)
