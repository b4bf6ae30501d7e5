import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy import stats

from dpo_jax import toy
from dpo_jax.toy.policy import invert_cumulative
from dpo_jax.types import Pair


def test_network_matches_the_formula(key, world):
    variables = toy.ToyLM(num_responses=10).init(key, world.embeddings)
    first, second = (
        {name: np.float64(values) for name, values in variables["params"][layer].items()}
        for layer in ("Dense_0", "Dense_1")
    )
    hidden = np.maximum(np.float64(world.embeddings) @ first["kernel"] + first["bias"], 0)
    logits = hidden @ second["weight"].T + second["bias"]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = toy.table_fn(toy.ToyLM(num_responses=10), world.embeddings)(variables)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-6)


def test_table_policy_starts_uniform(key, world):
    policy = toy.TablePolicy(num_responses=10)
    log_probs = toy.table_fn(policy, world.embeddings)(policy.init(key, world.embeddings))
    np.testing.assert_allclose(log_probs, -np.log(10), rtol=1e-6)


def test_log_prob_scores_any_structure_of_responses(key, world):
    policy = toy.ToyLM(num_responses=10)
    params = policy.init(key, world.embeddings)
    table = toy.table_fn(policy, world.embeddings)(params)
    prompts, responses = jnp.array([0, 3, 3]), Pair(jnp.array([1, 2, 9]), jnp.array([0, 0, 0]))
    logps = toy.log_prob_fn(policy, world.embeddings)(params, prompts, responses)
    assert isinstance(logps, Pair)
    assert logps.chosen.tolist() == [table[0, 1], table[3, 2], table[3, 9]]
    assert logps.rejected.tolist() == [table[0, 0], table[3, 0], table[3, 0]]


def test_network_runs_once_for_each_prompt_and_not_for_each_pair(key, world):
    policy = toy.ToyLM(num_responses=10)
    params = policy.init(key, world.embeddings)
    log_prob = toy.log_prob_fn(policy, world.embeddings)
    ids = jnp.zeros(1000, jnp.int32)
    jaxpr = jax.make_jaxpr(log_prob)(params, ids, Pair(ids, ids))
    assert list(products(jaxpr.jaxpr)) == [(5, 32), (5, 10)]


def products(jaxpr):
    """Shapes of all matrix products, those in nested functions among them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def test_scores_are_the_outputs_of_the_network(key, world):
    network = toy.ToyLM(num_responses=10)
    params = network.init(key, world.embeddings)
    table = network.apply(params, world.embeddings)
    chex.assert_trees_all_equal(toy.score_table_fn(network, world.embeddings)(params), table)
    score = toy.score_fn(network, world.embeddings)
    prompts, responses = jnp.array([0, 3, 3]), Pair(jnp.array([1, 2, 9]), jnp.array([0, 0, 0]))
    scores = score(params, prompts, responses)
    assert isinstance(scores, Pair)
    assert scores.chosen.tolist() == [table[0, 1], table[3, 2], table[3, 9]]
    assert scores.rejected.tolist() == [table[0, 0], table[3, 0], table[3, 0]]
    chex.assert_shape(score(params, prompts[:, None], prompts[:, None]), (3, 1))


def test_values_are_the_one_output_of_the_network(key, world):
    network = toy.ToyLM(num_responses=1)
    params = network.init(key, world.embeddings)
    value, table = toy.value_fn(network, world.embeddings), network.apply(params, world.embeddings)
    prompts = jnp.array([4, 0, 4, 2])
    assert value(params, prompts).tolist() == table[prompts, 0].tolist()
    np.testing.assert_allclose(jax.jit(value)(params, prompts), table[prompts, 0], rtol=1e-6)
    chex.assert_shape(value(params, prompts[:, None]), (4, 1))


@pytest.mark.parametrize("prompt", [-1, 5])
def test_unknown_prompts_have_neither_score_nor_value(key, world, prompt):
    ids = jnp.array([0, prompt])
    message = f"prompts must be between 0 and 4, got {prompt} in row 1"
    for make, num_responses, rest in ((toy.score_fn, 4, (jnp.array([0, 0]),)), (toy.value_fn, 1, ())):
        network = toy.TablePolicy(num_responses=num_responses)
        params, function = network.init(key, world.embeddings), make(network, world.embeddings)
        with pytest.raises(ValueError, match=message):
            function(params, ids, *rest)
        assert jnp.isnan(jax.jit(function)(params, ids, *rest)).tolist() == [False, True]


def test_unknown_responses_have_no_score(key, world):
    network = toy.TablePolicy(num_responses=4)
    score, params = toy.score_fn(network, world.embeddings), network.init(key, world.embeddings)
    prompts, responses = jnp.array([0, 0, 0]), jnp.array([0, 4, -1])
    with pytest.raises(ValueError, match="responses must be between 0 and 3, got 4 in row 1"):
        score(params, prompts, responses)
    assert jnp.isnan(jax.jit(score)(params, prompts, responses)).tolist() == [False, True, True]


def test_generation_follows_the_table(key):
    probs = np.array([[0.5, 0.0, 0.2, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0]])
    with np.errstate(divide="ignore"):
        log_probs = jnp.log(jnp.asarray(probs))
    num = 30_000
    responses = toy.generate(key, log_probs, jnp.tile(jnp.arange(3)[:, None], (1, num)))
    for row in range(3):
        counts = np.bincount(responses[row], minlength=5)
        assert counts[probs[row] == 0].sum() == 0
        possible = probs[row] > 0
        assert stats.chisquare(counts[possible], num * probs[row][possible]).pvalue > 1e-4 or possible.sum() == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rare_responses_are_drawn_in_every_dtype(key, dtype):
    """In a sum of bfloat16, 0.9 + 0.00101 is 0.9: of 99 rare responses 21 were drawn, some 4.5 times too often."""
    log_probs = jnp.log(jnp.array([[0.9] + [0.00101] * 99])).astype(dtype)
    drawn = toy.generate(key, log_probs, jnp.zeros(20_000, jnp.int32))
    counts = np.bincount(drawn, minlength=100)
    probs = np.exp(np.asarray(log_probs[0], np.float64))
    assert stats.chisquare(counts, 20_000 * probs / probs.sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["pairs", *(pytest.param(n, marks=pytest.mark.slow) for n in ("labels", "rankings"))])
def test_a_table_of_bfloat16_is_sampled_as_the_same_table_in_float32(key, name):
    narrow = jax.tree.map(lambda table: table.astype(jnp.bfloat16), toy.make_world(key, num_responses=40))
    wide = jax.tree.map(lambda table: table.astype(jnp.float32), narrow)
    log_probs = jnp.log(wide.rewards).astype(jnp.bfloat16)
    samplers = {
        "pairs": lambda world, table: toy.sample_preferences(key, world, num=5000, log_probs=table),
        "labels": lambda world, table: toy.sample_labels(key, world, num=5000, log_probs=table),
        "rankings": lambda world, table: toy.sample_rankings(
            key, world, num=5000, num_ranked=3, log_probs=table, flip_probability=jnp.array(0.01, table.dtype)
        ),
    }
    sample = jax.jit(samplers[name])
    drawn, expected = (sample(world, log_probs.astype(world.rewards.dtype)) for world in (narrow, wide))
    chex.assert_trees_all_equal(drawn, expected)


def test_weights_of_zero_are_never_drawn_at_the_edges():
    weights = jnp.array([0.0, 0.3, 0.0, 0.1, 0.0])
    below_one = np.nextafter(np.float32(1), np.float32(0))
    drawn = invert_cumulative(jnp.array([0.0, 0.74, 0.76, below_one]), jnp.tile(weights, (4, 1)))
    assert drawn.tolist() == [1, 1, 3, 3]


def test_many_weights_of_bfloat16_are_added_up_in_float32():
    weights = jnp.ones((2, 300), jnp.bfloat16)  # in bfloat16, 256 + 1 is 256
    assert invert_cumulative(jnp.array([0.5, 0.999]), weights).tolist() == [150, 299]


def test_greedy_picks_the_most_probable():
    assert toy.greedy(jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]))).tolist() == [1, 0]


def test_greedy_never_picks_what_is_not_a_number():
    table = jnp.array([[0.0, -1.0], [-1.0, jnp.nan], [-jnp.inf, -jnp.inf]])
    assert jax.jit(toy.greedy)(table).tolist() == [0, -1, -1]
    with pytest.raises(ValueError, match=r"log_probs must be a number, not NaN, got nan in row \(1, 1\)"):
        toy.greedy(table)
    with pytest.raises(ValueError, match="at least 1 responses of each prompt a positive weight, got 0 in row 1"):
        toy.greedy(table[::2])


def test_ids_out_of_range_are_refused_and_never_clamped(world):
    table = jnp.log(world.rewards)
    with pytest.raises(ValueError, match=r"responses\.chosen must be between 0 and 9, got 10 in row 1"):
        toy.lookup(table, jnp.array([0, 1]), Pair(jnp.array([0, 10]), jnp.array([1, 1])))
    with pytest.raises(ValueError, match="prompts must be between 0 and 4, got 5 in row 0"):
        toy.lookup(table, jnp.array([5]), jnp.array([0]))
    for prompt, response in ((0, 10), (0, -1), (5, 0), (-1, 0)):
        assert jnp.isnan(jax.jit(toy.lookup)(table, jnp.array([prompt]), jnp.array([response])))


def test_stacked_ids_out_of_range_find_nothing_in_their_neighbours(world):
    tables = jnp.log(jnp.stack([world.rewards, world.rewards[::-1]]))
    prompts, responses = jnp.array([[0, 5, -1], [4, 0, 0]]), jnp.array([[0, 0, 0], [9, 10, -1]])

    def look(table, prompts, responses):
        found, pull = jax.vjp(lambda table: toy.lookup(table, prompts, responses), table)
        return found, pull(jnp.ones(3))[0]

    found, slopes = jax.vmap(look)(tables, prompts, responses)
    assert jnp.isnan(found).tolist() == [[False, True, True], [False, True, True]]
    assert (found[0, 0], found[1, 0]) == (tables[0, 0, 0], tables[1, 4, 9])
    assert jnp.argwhere(slopes).tolist() == [[0, 0, 0], [1, 4, 9]]


def test_nothing_is_nan_that_need_not_be(world):
    with jax.debug_nans(True):
        toy.lookup(jnp.log(world.rewards), jnp.array([0, 1]), jnp.array([1, 2]))


def test_a_network_takes_one_prompt_too(key, world):
    network = toy.ToyLM(num_responses=10)
    params = network.init(key, world.embeddings)
    table = network.apply(params, world.embeddings)
    one_by_one = jax.vmap(lambda embedding: network.apply(params, embedding))(world.embeddings)
    np.testing.assert_allclose(one_by_one, table, rtol=1e-5, atol=1e-6)


def test_ids_that_do_not_match_are_refused(world):
    lookup = inspect.unwrap(toy.lookup)
    with pytest.raises(ValueError, match=r"prompts \(2,\), responses \(3,\)"):
        lookup(world.rewards, jnp.array([0, 1]), jnp.array([0, 1, 2]))
    with pytest.raises(TypeError, match="responses must hold integers"):
        lookup(world.rewards, jnp.array([0]), jnp.array([0.0]))
    with pytest.raises(TypeError, match="table must"):
        lookup(jnp.arange(6).reshape(2, 3), jnp.array([0]), jnp.array([0]))


def test_a_prompt_without_possible_response_gets_none():
    table = jnp.array([[0.0, -jnp.inf], [-jnp.inf, -jnp.inf], [jnp.nan, 0.0]])
    key = jax.random.key(0)
    assert jax.jit(toy.generate)(key, table, jnp.array([0, 1, 2, 3, -1])).tolist() == [0, -1, -1, -1, -1]
    with pytest.raises(ValueError, match="at least 1 responses of each prompt a positive weight, got 0 in row 1"):
        toy.generate(key, table[:2], jnp.array([0]))
    with pytest.raises(ValueError, match=r"got nan in row \(0, 0\)"):
        toy.generate(key, table[2:], jnp.array([0]))
    with pytest.raises(ValueError, match="prompts must be between 0 and 0, got 1 in row 0"):
        toy.generate(key, table[:1], jnp.array([1]))


def test_tables_may_be_numpy_arrays(world):
    lookup = inspect.unwrap(toy.lookup)  # as users have it, without the tests' type checks
    assert lookup(np.asarray(world.rewards), np.array([2]), np.array([3])) == world.rewards[2, 3]


def test_generate_wants_a_typed_key(world):
    with pytest.raises(TypeError, match="key must be a typed key"):
        inspect.unwrap(toy.generate)(jnp.zeros(2, jnp.uint32), jnp.log(world.rewards), jnp.array([0]))


def test_same_key_same_bits(key, world):
    samples = [toy.generate(key, jnp.log(world.rewards), jnp.zeros(50, jnp.int32)) for _ in range(2)]
    chex.assert_trees_all_equal(*samples)
