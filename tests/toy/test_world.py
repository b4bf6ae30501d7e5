import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import toy
from dpo_jax.types import Pair, Preferences

NUM = 20_000


# Compiled: noise is traced, so that one program serves all of it
make_world, all_preferences = jax.jit(toy.make_world), jax.jit(toy.all_preferences)
sample_demonstrations, sample_uniform_pairs, sample_policy_pairs, sample_preferences, sampled_reward = (
    jax.jit(sample, static_argnames="num")
    for sample in (
        toy.sample_demonstrations,
        toy.sample_uniform_pairs,
        toy.sample_policy_pairs,
        toy.sample_preferences,
        toy.sampled_reward,
    )
)
label_pairs = jax.jit(toy.label_pairs)


def test_world_has_the_notebooks_distribution(key):
    worlds = jax.jit(jax.vmap(toy.make_world))(jax.random.split(key, 400))
    assert worlds.embeddings.shape == (400, 5, 8)
    assert worlds.rewards.shape == (400, 5, 10)
    assert stats.kstest(np.ravel(worlds.embeddings), "norm").pvalue > 1e-3
    np.testing.assert_allclose(worlds.rewards.sum(-1), 1.0, rtol=1e-5)
    logits = np.log(worlds.rewards)
    centred = (logits - logits.mean(-1, keepdims=True)) / 2 / np.sqrt(1 - 1 / 10)
    assert stats.kstest(np.ravel(centred), "norm").pvalue > 1e-3


def test_sizes_and_sharpness_are_arguments(key):
    world = toy.make_world(key, num_prompts=2, num_responses=3, embedding_dim=4, sharpness=0.0)
    chex.assert_shape(world.embeddings, (2, 4))
    assert (world.num_prompts, world.num_responses) == (2, 3)
    np.testing.assert_allclose(world.rewards, 1 / 3, rtol=1e-6)


def test_demonstrations_follow_the_rewards(key, world):
    demos = sample_demonstrations(key, world, num=NUM)
    counts = np.zeros(world.rewards.shape)
    np.add.at(counts, (np.asarray(demos.prompts), np.asarray(demos.responses)), 1)
    expected = counts.sum(axis=1, keepdims=True) * np.float64(world.rewards)
    assert stats.chisquare(counts.ravel(), expected.ravel(), ddof=4, sum_check=False).pvalue > 1e-4
    assert stats.chisquare(np.bincount(demos.prompts)).pvalue > 1e-4


def test_demonstrations_follow_a_table_if_there_is_one(key, world):
    """Whatever the rewards are, and whatever constant is added to a row of the table."""
    probs = np.random.default_rng(0).dirichlet(np.ones(10), 5)
    table = jnp.log(jnp.asarray(probs, jnp.float32)) - 2.0
    demos = sample_demonstrations(key, world._replace(rewards=-world.rewards), num=NUM, log_probs=table)
    counts = np.zeros(world.rewards.shape)
    np.add.at(counts, (np.asarray(demos.prompts), np.asarray(demos.responses)), 1)
    expected = counts.sum(axis=1, keepdims=True) * probs
    common = expected > 8
    pooled = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    assert stats.chisquare(*(x[x > 0] for x in pooled), ddof=4, sum_check=False).pvalue > 1e-4
    assert stats.chisquare(np.bincount(demos.prompts)).pvalue > 1e-4


def test_the_table_of_rewards_draws_the_demonstrations_of_the_rewards(key, world):
    expected = sample_demonstrations(key, world, num=50)
    chex.assert_trees_all_equal(sample_demonstrations(key, world, num=50, log_probs=jnp.log(world.rewards)), expected)


def test_tables_that_demonstrate_are_checked(key, world):
    sample = inspect.unwrap(toy.sample_demonstrations)
    table = jnp.log(world.rewards)
    with pytest.raises(ValueError, match=r"shapes must be equal, got log_probs \(5, 9\), rewards \(5, 10\)"):
        sample(key, world, num=5, log_probs=table[:, 1:])
    with pytest.raises(ValueError, match="at least 1 responses of each prompt a positive weight, got 0 in row 2"):
        sample(key, world, num=5, log_probs=table.at[2].set(-jnp.inf))
    with pytest.raises(ValueError, match=r"got nan in row \(3, 4\)"):
        sample(key, world, num=5, log_probs=table.at[3, 4].set(jnp.nan))
    drawn = jax.jit(partial(toy.sample_demonstrations, num=50))(key, world, log_probs=table.at[3].set(jnp.nan))
    np.testing.assert_array_equal(np.asarray(drawn.responses) == -1, np.asarray(drawn.prompts) == 3)


def test_uniform_pairs_are_uniform_and_distinct(key, world):
    prompts, (first, second) = sample_uniform_pairs(key, world, num=NUM)
    assert not jnp.any(first == second)
    counts = np.zeros((world.num_prompts, world.num_responses, world.num_responses))
    np.add.at(counts, (np.asarray(prompts), np.asarray(first), np.asarray(second)), 1)
    different = ~np.eye(world.num_responses, dtype=bool)
    assert stats.chisquare(counts[:, different].ravel()).pvalue > 1e-4


def test_policy_pairs_are_independent_samples_given_that_they_differ(key, world):
    policy = jnp.log(world.rewards)
    _, pair = sample_policy_pairs(key, policy[:1], num=NUM)
    probs = np.float64(world.rewards[0])
    expected = np.outer(probs, probs) * ~np.eye(len(probs), dtype=bool)
    counts = np.zeros_like(expected)
    np.add.at(counts, tuple(np.asarray(side) for side in pair), 1)
    assert counts.trace() == 0
    expected *= NUM / expected.sum()
    common = expected > 5
    pooled = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(
    ("temperature", "flip", "expected"),
    [
        (1.0, 0.0, 1 / (1 + np.exp(-0.5))),
        (0.25, 0.0, 1 / (1 + np.exp(-2.0))),
        (0.0, 0.0, 1.0),
        (0.0, 0.2, 0.8),
        (1.0, 1.0, 1 / (1 + np.exp(0.5))),
    ],
)
def test_preference_probability_by_hand(temperature, flip, expected):
    probability = toy.preference_probability(
        jnp.array([0.75]), jnp.array([0.25]), temperature=temperature, flip_probability=flip
    )
    np.testing.assert_allclose(probability, expected, rtol=1e-6)


def test_equal_rewards_are_a_coin_toss_even_without_noise():
    equal = jnp.array([0.3])
    probability, slope = jax.value_and_grad(
        lambda temperature: toy.preference_probability(equal, equal, temperature=temperature)[0]
    )(0.0)
    assert probability == 0.5
    assert jnp.isfinite(slope)


@pytest.mark.parametrize(("temperature", "flip"), [(1.0, 0.0), (0.2, 0.3), (0.0, 0.0), (0.0, 0.25)])
def test_labels_have_the_stated_probability(key, world, temperature, flip):
    prompts = jnp.zeros(NUM, jnp.int32)
    pair = (jnp.full(NUM, 2), jnp.full(NUM, 5))
    labelled = label_pairs(key, world, prompts, pair, temperature=temperature, flip_probability=flip)
    wins = int(jnp.sum(labelled.responses.chosen == 2))
    expected = float(
        toy.preference_probability(
            world.rewards[0, 2], world.rewards[0, 5], temperature=temperature, flip_probability=flip
        )
    )
    assert stats.binomtest(wins, NUM, expected).pvalue > 1e-4
    assert jnp.all(labelled.responses.chosen + labelled.responses.rejected == 7)


def test_noise_is_traced_and_everything_fits_in_one_jit(key):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(key, temperature, flip_probability):
        world = toy.make_world(key)
        policy = jnp.log(world.rewards)
        return toy.sample_preferences(
            key, world, num=100, log_probs=policy, temperature=temperature, flip_probability=flip_probability
        )

    noiseless = run(key, 0.0, 0.0)
    flipped = run(key, 0.0, 1.0)
    chex.assert_trees_all_equal(noiseless.responses.chosen, flipped.responses.rejected)


def test_all_preferences_are_every_ordered_pair_with_its_probability(world):
    everything = all_preferences(world, temperature=0.5)
    chosen, rejected = everything.responses
    assert len(everything.prompts) == 5 * 10 * 9
    assert len({*zip(*(column.tolist() for column in (everything.prompts, chosen, rejected)), strict=True)}) == 450
    assert not jnp.any(chosen == rejected)
    np.testing.assert_allclose(everything.weights.mean(), 1.0, rtol=1e-6)
    difference = np.float64(world.rewards[everything.prompts, chosen] - world.rewards[everything.prompts, rejected])
    np.testing.assert_allclose(everything.weights, 2 / (1 + np.exp(-difference / 0.5)), rtol=1e-5)


def test_sampled_reward_estimates_the_expected_reward(key, world):
    rewards = np.float64(world.rewards)
    probs = np.random.default_rng(0).dirichlet(np.ones(10), 5)
    exact = (probs * rewards).sum(-1)
    spread = np.sqrt((probs * rewards**2).sum(-1) - exact**2)
    sampled = sampled_reward(key, world, jnp.asarray(np.log(probs), jnp.float32), num=NUM)
    z = (sampled - exact) / (spread / NUM**0.5)
    assert np.all(np.abs(z) < 4), z


def test_same_key_same_bits(key, world):
    chex.assert_trees_all_equal(*(sample_preferences(key, world, num=50) for _ in range(2)))


def test_your_own_ids_are_checked(world):
    preferences = toy.preferences(world, [0, 1], np.array([2, 3]), jnp.array([4, 5]), weights=[0.5, 1.5])
    expected = Preferences(jnp.array([0, 1]), Pair(jnp.array([2, 3]), jnp.array([4, 5])), jnp.array([0.5, 1.5]))
    chex.assert_trees_all_equal(preferences, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 5], [1, 2], [3, 4]), ValueError, "prompts must be between 0 and 4, got 5 in row 1"),
        (([0, 1], [1, 2], [3, -1]), ValueError, "rejected must be between 0 and 9, got -1 in row 1"),
        (([0, 1], [1, 4], [3, 4]), ValueError, "chosen and rejected must differ, but both are 4 in row 1"),
        (([0, 1], np.array([1.0, 4.0]), [3, 4]), TypeError, "chosen must hold integers"),
        (([0, 1], [1], [3, 4]), ValueError, "ragged"),
        (([0, 1], np.array(["a", "b"]), [3, 4]), TypeError, "chosen must hold integers"),
        (([], [], []), ValueError, "no rows"),
        (([0, 1], [1, 2], [3, 4], [1.0, -1.0]), ValueError, r"weights must be zero or positive.* got -1.0 in row 1"),
        (([0, 1], [1, 2], [3, 4], [1.0, 1e-60]), ValueError, "weights must be .*between 1e-30 and 1e.30, got 1e-60 in"),
        (([0, 1], [1, 2], [3, 4], [1.0, 1e60]), ValueError, "weights must be .*between 1e-30 and 1e.30, got 1e.60 in"),
        (([0, 1], [1, 2], [3, 4], [0.0, 0.0]), ValueError, "weights must not all be 0"),
        (([0, 1], [1, 2], [3, 4], [1.0]), ValueError, r"prompts \(2,\), weights \(1,\)"),
    ],
)
def test_bad_ids_are_refused_by_row(world, arguments, error, message):
    with pytest.raises(error, match=message):
        toy.preferences(world, *arguments)


def test_bad_demonstrations_are_refused(world):
    with pytest.raises(ValueError, match="responses must be between 0 and 9, got 10 in row 2"):
        toy.demonstrations(world, [0, 1, 2], [0, 9, 10])


def test_a_policy_that_cannot_differ_makes_no_pairs(key):
    certain = jnp.log(jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="at least 2 responses of each prompt a positive weight, got 1 in row 1"):
        toy.sample_policy_pairs(key, certain, num=4)
    prompts, (first, second) = jax.jit(lambda table: toy.sample_policy_pairs(key, table, num=50))(certain)
    assert jnp.all(jnp.where(prompts == 1, (first == -1) & (second != -1) | (second == -1), first != second))


def test_worlds_of_your_own_are_checked(key, world):
    broken = world._replace(rewards=world.rewards.at[2, 3].set(jnp.nan))
    with pytest.raises(ValueError, match=r"world\.rewards must be finite, got nan in row \(2, 3\)"):
        toy.sample_preferences(key, broken, num=3)
    with pytest.raises(ValueError, match=r"a row for each prompt, got shapes \(3, 8\) and \(5, 10\)"):
        toy.sample_demonstrations(key, world._replace(embeddings=world.embeddings[:3]), num=3)
    for rewards in ([[0.0, 1.0]], jnp.array([[0, 1]])):
        with pytest.raises(TypeError, match=r"world\.rewards must"):
            toy.sample_preferences(key, toy.World(jnp.eye(1), rewards), num=3)
    with pytest.raises(ValueError, match="got 0 in row 1"):
        toy.sample_demonstrations(key, world._replace(rewards=world.rewards.at[1].set(0.0)), num=3)
    with pytest.raises(ValueError, match=r"world\.num_responses must be at least 2, got 1"):
        toy.sample_preferences(key, world._replace(rewards=world.rewards[:, :1]), num=3)
    with pytest.raises(ValueError, match="chosen and rejected must differ, but both are 2 in row 0"):
        toy.label_pairs(key, world, jnp.array([0]), (jnp.array([2]), jnp.array([2])))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda key, world: toy.make_world(7), TypeError, "key must be a typed key made by jax.random.key"),
        (lambda key, world: toy.make_world(jax.random.split(key)), ValueError, "key must be a single key"),
        (
            lambda key, world: toy.make_world(key, num_responses=1),
            ValueError,
            "num_responses must be at least 2, got 1",
        ),
        (lambda key, world: toy.make_world(key, num_prompts=2.5), TypeError, "num_prompts must be a whole number"),
        (lambda key, world: toy.make_world(key, sharpness=-1.0), ValueError, "sharpness must be in .0, inf."),
        (lambda key, world: toy.sample_demonstrations(key, world, num=0), ValueError, "num must be at least 1, got 0"),
        (
            lambda key, world: toy.sample_preferences(key, world, num=3, temperature=-1.0),
            ValueError,
            "temperature must be in .0, inf., got -1.0",
        ),
        (
            lambda key, world: toy.sample_preferences(key, world, num=3, flip_probability=1.5),
            ValueError,
            "flip_probability must be in .0, 1., got 1.5",
        ),
        (
            lambda key, world: toy.sample_preferences(key, world, num=3, log_probs=jnp.zeros((5, 9))),
            ValueError,
            r"shapes must be equal, got log_probs \(5, 9\), rewards \(5, 10\)",
        ),
    ],
)
def test_bad_arguments_are_refused(key, world, call, error, message, monkeypatch):
    for name in ("make_world", "sample_demonstrations", "sample_preferences"):
        monkeypatch.setattr(toy, name, inspect.unwrap(getattr(toy, name)))
    with pytest.raises(error, match=message):
        call(key, world)
