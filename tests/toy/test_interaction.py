"""Prompts, responses and judgements against the tables they come from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import toy

EMBEDDINGS = jnp.eye(3)
PROBS = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.05, 0.45]])
REFERENCE = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.3, 0.3, 0.1, 0.3]])
POLICY = toy.TablePolicy(num_responses=4)
PARAMS = {"params": {"logits": jnp.asarray(np.log(PROBS) + 2.0, jnp.float32)}}
REWARDS = np.array([[0.0, 1.0, 0.5, -0.25], [0.5, -0.5, 0.125, 1.5], [2.0, 0.0, 0.0, 1.0]], np.float32)
UPPER = np.array([[0.9, 0.2, 0.6], [0.0, 1.0, 0.5], [0.25, 0.75, 0.125]])

PROMPTS, RESPONSES, OTHERS = (jnp.array(ids) for ids in ([0, 2, 1, 2], [1, 3, 0, 2], [3, 0, 0, 1]))


def cyclic():
    """For each prompt a table of three responses in which no response need be the best."""
    (over, under), table = np.triu_indices(3, 1), np.full((3, 3, 3), 0.5)
    table[:, over, under], table[:, under, over] = UPPER, 1 - UPPER
    return table


def assert_distributed(sample, probs):
    """The sample, ids, has the stated probabilities; what is impossible does not occur."""
    counts, probs = np.bincount(np.ravel(sample), minlength=np.size(probs)), np.ravel(probs)
    assert len(counts) == len(probs)
    assert not np.any(counts[probs == 0])
    expected = probs[probs > 0] * counts.sum()
    assert expected.min() > 5
    assert stats.chisquare(counts[probs > 0], expected, sum_check=False).pvalue > 1e-4


# Prompts


def test_prompts_are_asked_uniformly(key, world):
    prompts = toy.ask_uniformly(world, num=5000)(key)
    chex.assert_shape(prompts, (5000,))
    assert jnp.issubdtype(prompts.dtype, jnp.integer)
    assert_distributed(prompts, np.full(5, 0.2))


def test_each_key_asks_anew_and_the_same_key_the_same(key, world):
    ask = toy.ask_uniformly(world, num=50)
    keys = jax.random.split(key, 2)
    first, second = jax.jit(jax.vmap(ask))(keys)
    assert first.tolist() == jax.jit(ask)(keys[0]).tolist() != second.tolist()


def test_everything_is_asked_once_whatever_the_key(key, world):
    asked = jax.vmap(toy.ask_everything(world))(jax.random.split(key, 2))
    assert asked.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_number_of_prompts_is_checked(as_users_have_it, world):
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        toy.ask_uniformly(world, num=0)
    with pytest.raises(TypeError, match="num must be a whole number known before tracing, got 2.5"):
        toy.ask_uniformly(world, num=2.5)


# Responses


@pytest.mark.parametrize("mix", [None, 0.0, 0.25, 1.0])
def test_responses_follow_the_policy_mixed_with_the_reference(key, mix):
    mixture = {} if mix is None else {"reference_log_probs": jnp.log(jnp.asarray(REFERENCE)), "mix": mix}
    respond = toy.respond_fn(POLICY, EMBEDDINGS, group_size=4000, **mixture)
    prompts = jnp.array([2, 0, 1, 0])
    responses, weights = jax.jit(respond)(key, PARAMS, prompts)
    assert weights is None
    chex.assert_shape(responses, (4, 4000))
    expected = PROBS ** (1 - (mix or 0)) * REFERENCE ** (mix or 0)
    expected /= expected.sum(-1, keepdims=True)
    for prompt, group in zip(prompts, responses, strict=True):
        assert_distributed(group, expected[prompt])


def test_reference_is_not_mixed_in_unless_told(key):
    prompts = jnp.arange(3)
    plain = toy.respond_fn(POLICY, EMBEDDINGS, group_size=100)
    mixed = toy.respond_fn(POLICY, EMBEDDINGS, group_size=100, reference_log_probs=jnp.log(jnp.asarray(REFERENCE)))
    plain, mixed = (jax.jit(respond)(key, PARAMS, prompts).responses for respond in (plain, mixed))
    assert np.mean(plain == mixed) > 0.99


@pytest.mark.parametrize(
    ("mix", "expected"),
    [(0.0, PROBS[0]), (0.5, np.sqrt([1, 2, 0, 0]) / (1 + np.sqrt(2))), (1.0, np.array([0.5, 0.5, 0.0, 0.0]))],
)
def test_what_the_reference_never_says_is_said_only_if_it_has_no_share(key, mix, expected):
    reference = jnp.log(jnp.array([[0.5, 0.5, 0.0, 0.0]] * 3))
    respond = toy.respond_fn(POLICY, EMBEDDINGS, group_size=4000, reference_log_probs=reference, mix=mix)
    assert_distributed(jax.jit(respond)(key, PARAMS, jnp.array([0])).responses, expected)


def test_members_of_a_group_are_independent(key):
    respond = toy.respond_fn(POLICY, EMBEDDINGS, group_size=2)
    responses = jax.jit(respond)(key, PARAMS, jnp.zeros(6000, jnp.int32)).responses
    pairs = np.outer(PROBS[0], PROBS[0])
    assert_distributed(4 * responses[:, 0] + responses[:, 1], pairs)
    assert_distributed(4 * responses[::2, 0] + responses[1::2, 0], pairs)


@pytest.mark.parametrize(
    "respond",
    [
        toy.respond_fn(POLICY, EMBEDDINGS, group_size=5, reference_log_probs=jnp.log(jnp.asarray(REFERENCE)), mix=0.5),
        toy.enumerate_fn(POLICY, EMBEDDINGS),
    ],
    ids=["samples", "all"],
)
def test_responses_under_vmap_are_those_one_by_one(key, respond):
    keys, prompts = jax.random.split(key, 2), jnp.array([0, 2])
    policies = PARAMS, jax.tree.map(jnp.negative, PARAMS)
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *policies)
    together = jax.jit(jax.vmap(respond, in_axes=(0, 0, None)))(keys, many, prompts)
    alone = [jax.jit(respond)(*each, prompts) for each in zip(keys, policies, strict=True)]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), rtol=1e-6)


def test_share_of_the_reference_can_be_swept(key):
    def respond(mix):
        reference = jnp.log(jnp.asarray(REFERENCE))
        return toy.respond_fn(POLICY, EMBEDDINGS, group_size=4000, reference_log_probs=reference, mix=mix)(
            key, PARAMS, jnp.array([0])
        ).responses

    only_policy, only_reference = jax.jit(jax.vmap(respond))(jnp.array([0.0, 1.0]))
    assert_distributed(only_policy, PROBS[0])
    assert_distributed(only_reference, REFERENCE[0])


def test_unknown_prompts_get_no_response(key):
    respond = toy.respond_fn(POLICY, EMBEDDINGS, group_size=2)
    for prompt in (-1, 3):
        with pytest.raises(ValueError, match=f"prompts must be between 0 and 2, got {prompt}"):
            respond(key, PARAMS, jnp.array([0, prompt]))
    assert jax.jit(respond)(key, PARAMS, jnp.array([3, -1])).responses.tolist() == [[-1, -1]] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        ({"group_size": 1.5}, TypeError, "group_size must be a whole number"),
        ({"group_size": 1, "mix": -0.1}, ValueError, "mix must be in .0, 1., got -0.1"),
        ({"group_size": 1, "mix": 1.5}, ValueError, "mix must be in .0, 1., got 1.5"),
    ],
)
def test_group_size_and_share_are_checked(as_users_have_it, arguments, error, message):
    with pytest.raises(error, match=message):
        toy.respond_fn(POLICY, EMBEDDINGS, **arguments)


# All responses


def test_every_response_is_given_with_the_weight_that_makes_means_exact(key):
    prompts = jnp.array([2, 0, 1, 0])
    responses, weights = toy.enumerate_fn(POLICY, EMBEDDINGS)(key, PARAMS, prompts)
    assert responses.tolist() == [[0, 1, 2, 3]] * 4
    np.testing.assert_allclose(weights / 4, PROBS[prompts], rtol=1e-5)
    anything = np.random.default_rng(0).normal(size=(3, 4))[prompts]
    np.testing.assert_allclose((weights * anything).mean(-1), (PROBS[prompts] * anything).sum(-1), rtol=1e-5)


def test_no_gradient_flows_through_the_weights(key):
    enumerate_all = toy.enumerate_fn(POLICY, EMBEDDINGS)
    weigh = lambda params: jnp.sum(enumerate_all(key, params, jnp.arange(3)).weights * REWARDS)  # noqa: E731
    slope = jax.jit(jax.grad(weigh))(PARAMS)
    chex.assert_trees_all_equal(slope, jax.tree.map(jnp.zeros_like, PARAMS))


def test_the_policy_gradient_of_all_responses_is_that_of_the_expected_reward(key):
    prompts = jnp.array([0, 1, 2, 1])

    def surrogate(params):
        responses, weights = toy.enumerate_fn(POLICY, EMBEDDINGS)(key, params, prompts)
        repeated = jnp.broadcast_to(prompts[:, None], responses.shape)
        logps = toy.log_prob_fn(POLICY, EMBEDDINGS)(params, repeated, responses)
        return jnp.mean(weights * logps * toy.reward_fn(jnp.asarray(REWARDS))(repeated, responses))

    def expected(params):
        log_probs = toy.table_fn(POLICY, EMBEDDINGS)(params)
        return jnp.mean(toy.expected_reward(log_probs, jnp.asarray(REWARDS))[prompts])

    chex.assert_trees_all_close(*(jax.jit(jax.grad(f))(PARAMS) for f in (surrogate, expected)), atol=1e-6)


def test_unknown_prompts_have_no_weights(key):
    enumerate_all = toy.enumerate_fn(POLICY, EMBEDDINGS)
    for prompt in (-1, 3):
        with pytest.raises(ValueError, match=f"prompts must be between 0 and 2, got {prompt} in row 1"):
            enumerate_all(key, PARAMS, jnp.array([0, prompt]))
    assert jnp.all(jnp.isnan(jax.jit(enumerate_all)(key, PARAMS, jnp.array([3, -1])).weights))


# Judgements


def test_rewards_are_those_of_the_table():
    reward = toy.reward_fn(jnp.asarray(REWARDS))
    expected = REWARDS[PROMPTS, RESPONSES].tolist()
    for run in (reward, jax.jit(jax.vmap(reward))):
        assert run(PROMPTS, RESPONSES).tolist() == expected


@pytest.mark.parametrize("flip", [0.0, 0.25])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_people_who_judge_by_rewards(temperature, flip):
    judge = toy.preference_fn(jnp.asarray(REWARDS), temperature=temperature, flip_probability=flip)
    margin = np.float64(REWARDS[PROMPTS, RESPONSES]) - REWARDS[PROMPTS, OTHERS]
    wins = 1 / (1 + np.exp(-margin / temperature)) if temperature else (1 + np.sign(margin)) / 2
    expected = (1 - flip) * wins + flip * (1 - wins)
    for run in (judge, jax.jit(jax.vmap(judge))):
        np.testing.assert_allclose(run(PROMPTS, RESPONSES, OTHERS), expected, rtol=1e-6)
    table = toy.preference_table(jnp.asarray(REWARDS), temperature=temperature, flip_probability=flip)
    np.testing.assert_allclose(
        toy.general_preference_fn(table)(PROMPTS, RESPONSES, OTHERS), expected, rtol=1e-6, atol=1e-7
    )


def test_a_preference_may_be_cyclic():
    table = cyclic()
    judge = toy.general_preference_fn(jnp.asarray(table))
    prompts, responses, others = jnp.indices(table.shape).reshape(3, -1)
    for run in (judge, jax.jit(jax.vmap(judge))):
        np.testing.assert_allclose(run(prompts, responses, others), table.ravel(), rtol=1e-6)


def test_preferences_may_be_numpy_arrays(as_users_have_it):
    judge = toy.general_preference_fn(cyclic())
    np.testing.assert_allclose(judge(np.array([1]), np.array([0]), np.array([1])), [UPPER[1, 0]])


def test_judges_can_be_made_under_jit():
    table = jnp.asarray(cyclic())
    wins = jax.jit(lambda ids: toy.general_preference_fn(table)(ids, ids, ids))(jnp.arange(3))
    assert wins.tolist() == [0.5] * 3
    wins = jax.jit(lambda table, ids: toy.general_preference_fn(table)(ids, ids, 0 * ids))(table, jnp.arange(3))
    np.testing.assert_allclose(wins, table[np.arange(3), np.arange(3), 0], rtol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize(
    ("judge", "names"),
    [
        (toy.reward_fn(jnp.asarray(REWARDS[:, :3])), ["prompts", "responses"]),
        (toy.preference_fn(jnp.asarray(REWARDS[:, :3])), ["prompts", r"responses\[0\]", r"responses\[1\]"]),
        (toy.general_preference_fn(jnp.asarray(cyclic())), ["prompts", "responses", "others"]),
    ],
    ids=["reward", "preference", "general"],
)
def test_unknown_ids_are_refused_and_never_clamped(judge, names, wrong):
    for place, name in enumerate(names):
        ids = [jnp.array([0, wrong if place == i else 1]) for i in range(len(names))]
        with pytest.raises(ValueError, match=f"^{name} must be between 0 and 2, got {wrong} in row 1"):
            judge(*ids)
        assert jnp.isnan(jax.jit(judge)(*ids)).tolist() == [False, True]


def test_ids_that_do_not_match_are_refused(as_users_have_it):
    for judge in (toy.preference_fn(jnp.asarray(REWARDS)), toy.general_preference_fn(jnp.asarray(cyclic()))):
        with pytest.raises(ValueError, match="shapes must be equal"):
            judge(jnp.array([0, 1]), jnp.array([0, 1]), jnp.array([2]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((0, 0, 0, 0.5001), "preference.* must be 1 for all i and j"),
        ((1, 0, 1, 0.4), "preference.* must be 1 for all i and j"),
        ((2, 1, 0, 1.5), r"preference must be in .0, 1., got 1.5 in row \(2, 1, 0\)"),
        ((2, 1, 0, -0.5), r"preference must be in .0, 1., got -0.5 in row \(2, 1, 0\)"),
        ((0, 2, 2, np.nan), r"preference must be in .0, 1., got nan in row \(0, 2, 2\)"),
    ],
)
def test_what_is_no_preference_is_refused(entry, message):
    *place, value = entry
    table = cyclic()
    table[tuple(place)] = value
    with pytest.raises(ValueError, match=message):
        toy.general_preference_fn(jnp.asarray(table))
