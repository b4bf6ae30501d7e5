"""Labels and rankings: their distributions against the exact weights, and these against the models by hand."""

from functools import partial
from itertools import permutations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import toy
from dpo_jax.types import Labels, Pair, Preferences

NUM = 20_000
REWARDS = np.array([[0.0, 1.0, 0.5, 0.25], [0.5, -0.5, 0.125, 1.5]], np.float32)
NOISE = [(1.0, 0.0), (0.5, 0.0), (2.0, 0.25), (0.0, 0.0), (0.0, 0.1)]


@pytest.fixture(scope="module")
def world():
    return toy.World(embeddings=jnp.eye(2), rewards=jnp.asarray(REWARDS))


# The noise is traced, so one program serves all of it
sample_labels, sample_preferences = (
    jax.jit(sample, static_argnames="num") for sample in (toy.sample_labels, toy.sample_preferences)
)
sample_rankings = jax.jit(toy.sample_rankings, static_argnames=("num", "num_ranked"))
all_rankings = jax.jit(toy.all_rankings, static_argnames="num_ranked")
all_preferences, all_labels = jax.jit(toy.all_preferences), jax.jit(toy.all_labels)


def ids(*columns):
    return tuple(np.asarray(column) for column in columns)


def assert_distributed(sample, weights):
    """Counts follow the weights of the same cells; what weighs nothing does not occur."""
    sample, weights = np.ravel(sample), np.ravel(np.float64(weights))
    assert not np.any(sample[weights == 0])
    sample, weights = sample[weights > 0], weights[weights > 0]
    expected = weights / weights.sum() * sample.sum()
    assert expected.min() > 5
    assert stats.chisquare(sample, expected, sum_check=False).pvalue > 1e-4


def table(shape, cells, weights=1.0):
    """Sums the weights of each cell."""
    sums = np.zeros(shape)
    np.add.at(sums, cells, weights)
    return sums


# Labels


def label_table(labels):
    """The weight of each prompt, response and label."""
    weights = 1.0 if labels.weights is None else np.asarray(labels.weights)
    return table((2, 4, 2), ids(labels.prompts, labels.responses, np.int32(labels.desirable)), weights)


@pytest.mark.parametrize(
    ("temperature", "flip", "expected"),
    [
        (1.0, 0.0, 1 / (1 + np.exp(-np.array([-1.0, 0.0, 1.0])))),
        (0.5, 0.0, 1 / (1 + np.exp(-np.array([-2.0, 0.0, 2.0])))),
        (0.5, 0.25, 0.25 + 0.5 / (1 + np.exp(-np.array([-2.0, 0.0, 2.0])))),
        (0.0, 0.0, [0.0, 0.5, 1.0]),
        (0.0, 0.1, [0.1, 0.5, 0.9]),
        (1.0, 0.5, [0.5, 0.5, 0.5]),
    ],
)
def test_label_probability_by_hand(temperature, flip, expected):
    rewards = jnp.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
    probability = toy.label_probability(rewards, temperature=temperature, flip_probability=flip)
    np.testing.assert_allclose(probability, [expected, expected], rtol=1e-6)


def test_each_prompt_judges_by_its_own_mean(world):
    probability = toy.label_probability(world.rewards, temperature=0.0)
    np.testing.assert_array_equal(probability, [[0, 1, 1, 0], [1, 0, 0, 1]])


@pytest.mark.parametrize(("temperature", "flip"), NOISE)
def test_labels_are_sampled_as_often_as_they_weigh(key, world, temperature, flip):
    noise = {"temperature": temperature, "flip_probability": flip}
    sample, everything = sample_labels(key, world, num=NUM, **noise), all_labels(world, **noise)
    assert sample.weights is None
    assert sample.desirable.dtype == bool
    assert_distributed(label_table(sample), label_table(everything))


def test_prompts_and_responses_of_labels_are_uniform(key, world):
    labels = sample_labels(key, world, num=NUM, temperature=1.0, flip_probability=0.0)
    assert_distributed(table((2, 4), ids(labels.prompts, labels.responses)), np.ones(8))


@pytest.mark.parametrize(("temperature", "flip"), NOISE)
def test_all_labels_are_every_response_called_good_and_called_bad(world, temperature, flip):
    noise = {"temperature": temperature, "flip_probability": flip}
    labels = all_labels(world, **noise)
    cells = {*zip(labels.prompts.tolist(), labels.responses.tolist(), labels.desirable.tolist(), strict=True)}
    assert len(cells) == len(labels.prompts) == 16
    np.testing.assert_allclose(labels.weights.mean(), 1.0, rtol=1e-6)
    good = toy.label_probability(world.rewards, **noise)[labels.prompts, labels.responses]
    np.testing.assert_allclose(labels.weights, 2 * np.where(labels.desirable, good, 1 - good), atol=1e-6)


# Comparisons as labels

PREFERENCES = Preferences(
    prompts=jnp.array([0, 1, 1]),
    responses=Pair(jnp.array([3, 1, 0]), jnp.array([2, 0, 3])),
    weights=jnp.array([0.5, 2.0, 1.0]),
    reference_logps=Pair(jnp.array([-1.0, -2.0, -3.0]), jnp.array([-4.0, -5.0, -6.0])),
    columns={"score": jnp.array([7.0, 8.0, 9.0])},
)
SPLIT = Labels(
    prompts=jnp.array([0, 1, 1, 0, 1, 1]),
    responses=jnp.array([3, 1, 0, 2, 0, 3]),
    desirable=jnp.array([True, True, True, False, False, False]),
    weights=jnp.array([0.5, 2.0, 1.0, 0.5, 2.0, 1.0]),
    reference_logps=jnp.array([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]),
)


def test_split_pairs_by_hand():
    chex.assert_trees_all_equal(toy.split_pairs(PREFERENCES), SPLIT)
    chex.assert_trees_all_equal(jax.jit(toy.split_pairs)(PREFERENCES), SPLIT)


def test_split_pairs_without_weights_and_reference():
    bare = PREFERENCES._replace(weights=None, reference_logps=None)
    chex.assert_trees_all_equal(toy.split_pairs(bare), SPLIT._replace(weights=None, reference_logps=None))


def test_responses_of_split_pairs_are_good_as_often_as_they_win(world):
    """Each response wins against a uniform other one with the mean Bradley-Terry probability."""
    labels = toy.split_pairs(jax.tree.map(np.asarray, all_preferences(world, temperature=1.0, flip_probability=0.0)))
    weights = label_table(labels)
    versus = 1 / (1 + np.exp(REWARDS[:, None, :] - REWARDS[:, :, None]))
    np.testing.assert_allclose(weights[..., 1] / weights.sum(-1), (versus.sum(-1) - 0.5) / 3, rtol=1e-5)


# Rankings


def ranking_table(rankings, num_ranked):
    """The weight of each prompt and order."""
    weights = 1.0 if rankings.weights is None else np.asarray(rankings.weights)
    return table((2,) + (4,) * num_ranked, ids(rankings.prompts, *rankings.responses), weights)


def turned_around(weights):
    return np.moveaxis(weights, range(1, weights.ndim), range(weights.ndim - 1, 0, -1))


@pytest.mark.parametrize("num_ranked", [3, 4])
@pytest.mark.parametrize(("temperature", "flip"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.25), (1.0, 1.0)])
def test_rankings_are_sampled_as_often_as_they_weigh(key, world, num_ranked, temperature, flip):
    sample = sample_rankings(key, world, num=NUM, num_ranked=num_ranked, temperature=temperature, flip_probability=flip)
    weights = ranking_table(all_rankings(world, num_ranked=num_ranked, temperature=temperature), num_ranked)
    assert sample.weights is None
    assert_distributed(ranking_table(sample, num_ranked), (1 - flip) * weights + flip * turned_around(weights))


@pytest.mark.parametrize(("temperature", "flip"), NOISE)
def test_rankings_of_two_are_preferences(key, world, temperature, flip):
    noise = {"temperature": temperature, "flip_probability": flip}
    exact = ranking_table(all_preferences(world, **noise), 2)
    assert_distributed(ranking_table(sample_rankings(key, world, num=NUM, num_ranked=2, **noise), 2), exact)
    assert_distributed(ranking_table(sample_preferences(key, world, num=NUM, **noise), 2), exact)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_all_rankings_of_two_are_all_preferences(world, temperature):
    np.testing.assert_allclose(
        ranking_table(all_rankings(world, num_ranked=2, temperature=temperature), 2),
        ranking_table(all_preferences(world, temperature=temperature, flip_probability=0.0), 2),
        rtol=1e-5,
    )


@pytest.mark.parametrize("num_ranked", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_all_rankings_weigh_what_the_model_says(world, num_ranked, temperature):
    """Draws from an urn without replacement, all subsets equally often; in units of the mean."""
    rankings = all_rankings(world, num_ranked=num_ranked, temperature=temperature)
    orders = list(permutations(range(4), num_ranked))
    assert len(rankings.prompts) == 2 * len(orders)
    np.testing.assert_allclose(np.mean(rankings.weights), 1.0, rtol=1e-5)
    found = ranking_table(rankings, num_ranked)
    for prompt, order in ((prompt, order) for prompt in range(2) for order in orders):
        urn = [np.exp(np.float64(REWARDS[prompt, response]) / temperature) for response in order]
        chance = np.prod([urn[place] / sum(urn[place:]) for place in range(num_ranked)])
        np.testing.assert_allclose(found[prompt, *order], chance * len(list(permutations(order))), rtol=1e-5)


def test_rankings_consist_of_distinct_responses_and_all_sets_are_equally_likely(key, world):
    rankings = sample_rankings(key, world, num=NUM, num_ranked=3, temperature=1.0, flip_probability=0.0)
    assert isinstance(rankings.responses, tuple)
    assert len(rankings.responses) == 3
    ranked = np.sort(np.stack(rankings.responses), axis=0)
    assert np.all(np.diff(ranked, axis=0) > 0)
    assert (ranked.min(), ranked.max()) == (0, 3)
    left_out = 6 - ranked.sum(0)
    assert_distributed(table((2, 4), ids(rankings.prompts, left_out)), np.ones(8))


def test_without_noise_rankings_follow_the_rewards_and_flips_turn_them_around(key, world):
    best_first, worst_first = (
        sample_rankings(key, world, num=NUM, num_ranked=3, temperature=0.0, flip_probability=flip)
        for flip in (0.0, 1.0)
    )
    rewards = REWARDS[np.asarray(best_first.prompts), np.stack(best_first.responses)]
    assert np.all(np.diff(rewards, axis=0) < 0)
    chex.assert_trees_all_equal(best_first.responses, worst_first.responses[::-1])


def test_without_noise_equals_are_ranked_at_random(key, world):
    tied = world._replace(rewards=jnp.array([[1.0, 1.0, 1.0, 0.0], [2.0, 2.0, 3.0, 3.0]]))
    rankings = sample_rankings(key, tied, num=NUM, num_ranked=4, temperature=0.0, flip_probability=0.0)
    possible = np.zeros((2, 4, 4, 4, 4))
    for order in permutations(range(3)):
        possible[0, *order, 3] = 1
    for better, worse in ((b, w) for b in ((2, 3), (3, 2)) for w in ((0, 1), (1, 0))):
        possible[1, *better, *worse] = 1.5
    assert_distributed(ranking_table(rankings, 4), possible)


# Transformations and refusals


def samplers(world):
    return {
        "labels": lambda key, **noise: toy.sample_labels(key, world, num=NUM, **noise),
        "rankings": lambda key, **noise: toy.sample_rankings(key, world, num=NUM, num_ranked=3, **noise),
    }


def test_sampling_works_under_vmap_with_traced_noise(key, world):
    temperatures, flips, keys = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 0.5, 1.0]), jax.random.split(key, 3)
    looped = [
        sample_labels(key, world, num=NUM, temperature=temperature, flip_probability=flip)
        for key, temperature, flip in zip(keys, temperatures.tolist(), flips.tolist(), strict=True)
    ]
    mapped = jax.jit(jax.vmap(lambda key, t, f: samplers(world)["labels"](key, temperature=t, flip_probability=f)))(
        keys, temperatures, flips
    )
    chex.assert_trees_all_equal(mapped, jax.tree.map(lambda *rows: np.stack(rows), *looped))
    assert not np.all(looped[0].prompts == looped[1].prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "rankings"])
def test_sampling_works_under_jit_and_vmap_with_traced_noise(key, world, name):
    sample = samplers(world)[name]
    temperatures, flips, keys = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 0.5, 1.0]), jax.random.split(key, 3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def once(key, temperature, flip):
        return sample(key, temperature=temperature, flip_probability=flip)

    chex.clear_trace_counter()
    looped = [once(*row) for row in zip(keys, temperatures, flips, strict=True)]
    chex.assert_trees_all_equal(looped[1], sample(keys[1], temperature=1.0, flip_probability=0.5))
    mapped = jax.jit(jax.vmap(lambda key, t, f: sample(key, temperature=t, flip_probability=f)))(
        keys, temperatures, flips
    )
    chex.assert_trees_all_equal(mapped, jax.tree.map(lambda *rows: np.stack(rows), *looped))
    assert not jnp.all(looped[0].prompts == looped[1].prompts)


def test_exact_weights_are_functions_of_rewards_and_noise(world):
    """All labels and rankings under jit and vmap; a hotter crowd is less decided."""

    def weights(rewards, temperature):
        hotter = world._replace(rewards=rewards)
        labels = toy.all_labels(hotter, temperature=temperature)
        rankings = toy.all_rankings(hotter, num_ranked=3, temperature=temperature)
        return labels.weights, rankings.weights

    temperatures = jnp.array([0.5, 1.0, 4.0])
    mapped = jax.jit(jax.vmap(weights, in_axes=(None, 0)))(world.rewards, temperatures)
    alone = jax.jit(weights)
    looped = [alone(world.rewards, temperature) for temperature in temperatures.tolist()]
    chex.assert_trees_all_close(mapped, jax.tree.map(lambda *rows: jnp.stack(rows), *looped), rtol=1e-5)
    for spread in jax.tree.map(lambda rows: jnp.std(rows, axis=1), mapped):
        assert jnp.all(jnp.diff(spread) < 0)


def test_same_key_same_bits_other_key_others(world):
    noise = {"temperature": 1.0, "flip_probability": 0.0}
    for sample in (partial(sample_labels, num=NUM), partial(sample_rankings, num=NUM, num_ranked=3)):
        first, again, other = (sample(jax.random.key(seed), world, **noise) for seed in (1, 1, 2))
        chex.assert_trees_all_equal(first, again)
        assert not jnp.all(first.prompts == other.prompts)


BAD = [
    ({"num": 0}, ValueError, "num must be at least 1, got 0"),
    ({"num": 2.5}, TypeError, "num must be a whole number known before tracing, got 2.5"),
    ({"temperature": -1.0}, ValueError, "temperature must be in .0, inf., got -1.0"),
    ({"temperature": np.inf}, ValueError, "temperature must be in .0, inf., got inf"),
    ({"flip_probability": 1.5}, ValueError, "flip_probability must be in .0, 1., got 1.5"),
    ({"key": 7}, TypeError, "key must be a typed key made by jax.random.key"),
    ({"key": jax.random.PRNGKey(0)}, TypeError, "key must be a typed key made by jax.random.key"),
    (
        {"world": toy.World(np.eye(2), np.where(REWARDS == 1.5, np.nan, REWARDS))},
        ValueError,
        r"world\.rewards must be finite, got nan in row \(1, 3\)",
    ),
]
BAD_RANKS = [
    (1, ValueError, "num_ranked must be at least 2, got 1"),
    (2.0, TypeError, "num_ranked must be a whole number known before tracing, got 2.0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
@pytest.mark.parametrize(
    ("sample", "static"),
    [(toy.sample_labels, {}), (toy.sample_rankings, {"num_ranked": 3})],
    ids=["labels", "rankings"],
)
@pytest.mark.usefixtures("as_users_have_it")
def test_bad_arguments_are_refused(key, world, sample, static, changed, error, message):
    with pytest.raises(error, match=message):
        sample(**{"key": key, "world": world, "num": 3, **static, **changed})


@pytest.mark.parametrize(("num_ranked", "error", "message"), BAD_RANKS)
@pytest.mark.usefixtures("as_users_have_it")
def test_rankings_of_too_few_are_refused(key, world, num_ranked, error, message):
    with pytest.raises(error, match=message):
        toy.sample_rankings(key, world, num=3, num_ranked=num_ranked)
    with pytest.raises(error, match=message):
        toy.all_rankings(world, num_ranked=num_ranked)


@pytest.mark.usefixtures("as_users_have_it")
def test_rankings_of_more_responses_than_there_are_are_refused(key, world):
    with pytest.raises(ValueError, match="num_ranked must be at most 4.*got 5"):
        toy.sample_rankings(key, world, num=3, num_ranked=5)


@pytest.mark.usefixtures("as_users_have_it")
def test_all_rankings_of_more_responses_than_there_are_are_refused(world):
    with pytest.raises(ValueError, match="num_ranked must be at most 4"):
        toy.all_rankings(world, num_ranked=5)


@pytest.mark.usefixtures("as_users_have_it")
def test_bad_noise_is_refused_by_the_exact_weights_too(world):
    with pytest.raises(ValueError, match="temperature must be in .0, inf., got 0.0"):
        toy.all_rankings(world, num_ranked=2, temperature=0.0)
    with pytest.raises(ValueError, match="temperature must be in .0, inf., got -1.0"):
        toy.all_labels(world, temperature=-1.0)
    with pytest.raises(ValueError, match="flip_probability must be in .0, 1., got -0.5"):
        toy.all_labels(world, flip_probability=-0.5)


def test_equals_are_ranked_at_random_whoever_responds(key, world):
    """Not in the order in which an uneven policy happens to propose them."""
    equal = world._replace(rewards=jnp.zeros_like(world.rewards))
    proposal = jnp.log(jnp.tile(jnp.array([0.85, 0.05, 0.05, 0.05]), (world.num_prompts, 1)))
    options = {"num_ranked": 2, "log_probs": proposal, "temperature": 0.0}
    first, second = map(np.asarray, sample_rankings(key, equal, num=4000, **options).responses)
    met = (first == 0) | (second == 0)
    assert stats.binomtest(int(np.sum(first[met] == 0)), int(met.sum())).pvalue > 1e-3


def test_the_policy_that_responds_decides_what_is_labelled_and_ranked(key, world):
    proposal = jnp.log(jnp.tile(jnp.array([0.7, 0.2, 0.1, 0.0]), (world.num_prompts, 1)))
    labels = sample_labels(key, world, num=4000, log_probs=proposal)
    counts = np.bincount(labels.responses, minlength=4)
    assert counts[3] == 0
    assert stats.chisquare(counts[:3], 4000 * np.array([0.7, 0.2, 0.1])).pvalue > 1e-3
    rankings = sample_rankings(key, world, num=4000, num_ranked=2, log_probs=proposal, temperature=1.0)
    pairs = np.sort(np.stack(rankings.responses), axis=0)
    odds = np.array([p * q * (1 / (1 - p) + 1 / (1 - q)) for p, q in ((0.7, 0.2), (0.7, 0.1), (0.2, 0.1))])
    met = [np.sum((pairs[0] == i) & (pairs[1] == j)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert stats.chisquare(met, 4000 * odds).pvalue > 1e-3
    with pytest.raises(ValueError, match="must give at least 4 responses of each prompt a positive weight, got 3"):
        toy.sample_rankings(key, world, num=3, num_ranked=4, log_probs=proposal)


def test_rankings_cannot_be_split_into_labels(key, world):
    rankings = sample_rankings(key, world, num=NUM, num_ranked=3, temperature=1.0, flip_probability=0.0)
    with pytest.raises(ValueError, match="split_pairs takes comparisons of two, got rankings of 3"):
        toy.split_pairs(rankings)


def test_what_is_not_known_is_not_judged(key):
    """Where tables are traced, a reward that is NaN and a response that is impossible yield the id -1."""
    world = toy.World(jnp.eye(2), jnp.asarray(REWARDS[:, :3]))
    table = jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]))

    @jax.jit
    def judged(rewards, table):
        judges = world._replace(rewards=rewards)
        return {
            "preferences": toy.sample_preferences(key, judges, num=40),
            "labels": toy.sample_labels(key, judges, num=40),
            "rankings": toy.sample_rankings(key, judges, num=40, num_ranked=3, log_probs=table),
        }

    for rewards, log_probs, names in (
        (world.rewards.at[0].set(jnp.nan), table.at[0].set(-1.0), ("preferences", "labels", "rankings")),
        (world.rewards, table, ("rankings",)),
        (world.rewards, table.at[0, 2].set(jnp.nan), ("rankings",)),
    ):
        for name, data in judged(rewards, log_probs).items():
            for ids in map(np.asarray, jax.tree.leaves(data.responses)):
                assert np.all((ids == -1) == ((np.asarray(data.prompts) == 0) & (name in names))), name
