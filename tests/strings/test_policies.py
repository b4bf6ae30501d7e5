"""Policies against loops over tokens, samples against tables, strings of one letter against the one-token world."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import losses, strings, toy, train
from dpo_jax.types import Pair
from tests.strings import naive

SPACE, FIXED = strings.Strings(3, 3), strings.Strings(2, 4, fixed_length=True)
EMBEDDINGS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
POLICIES = [
    make(space)
    for make in (partial(strings.CausalMLP, hidden_dim=5), strings.PrefixTable, strings.Markov)
    for space in (SPACE, FIXED)
]
FEW = [("SPACE", 1), ("FIXED", 8)]
"""How many strings share no prefix, and prefixes at some of the places; `facts` shares them at all places."""
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__}-{p.strings.horizon}")


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@cache
def params_of(policy, size=1.0):
    """Random parameters, the same for the same policy."""
    shapes = jax.eval_shape(partial(policy.init, method="outputs"), jax.random.key(0), EMBEDDINGS)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32), shapes)


def strings_first(outputs):
    """`[horizon, outputs, n]` as `[n, horizon, outputs]`."""
    return jnp.moveaxis(outputs, -1, 0)


def every_string(space):
    return naive.listed(space.num_letters, space.horizon, space.fixed_length)


def ids_of_all(space):
    """Each prompt with each string."""
    return [jnp.asarray(ids.ravel(), jnp.int32) for ids in np.indices((len(EMBEDDINGS), space.num_responses))]


@cache
def facts(policy):
    """What the package says about a policy, both ways in."""
    prompts, responses = ids_of_all(policy.strings)

    log_prob = strings.log_prob_fn(policy, EMBEDDINGS)

    @jax.jit
    def all_at_once(params):
        tokens = strings.token_log_prob_fn(policy, EMBEDDINGS)(params, prompts, responses)
        return {
            "table": toy.table_fn(policy, EMBEDDINGS)(params),
            "outputs": policy.apply(params, EMBEDDINGS, method="outputs"),
            "outputs by paths": strings.outputs_by_paths(policy, params, EMBEDDINGS),
            "tokens": tokens.values,
            "mask": tokens.mask,
            "sums": log_prob(params, prompts, responses),
            "means": strings.log_prob_fn(policy, EMBEDDINGS, mean=True)(params, prompts, responses),
            "by the table": toy.log_prob_fn(policy, EMBEDDINGS)(params, prompts, responses),
            "gradient on paths": jax.grad(lambda p: weighed(log_prob(p, prompts, responses)))(params),
            "gradient of the table": jax.grad(lambda p: weighed(toy.table_fn(policy, EMBEDDINGS)(p)))(params),
        }

    return jax.tree.map(np.asarray, all_at_once(params_of(policy)))


def weighed(numbers):
    """Different weights for all entries."""
    return jnp.sum(jnp.cos(jnp.arange(numbers.size)) * numbers.ravel())


def logits_by_hand(policy, prompt, prefix):
    """The logits after one prefix."""
    params = jax.tree.map(np.float64, params_of(policy)["params"])
    if isinstance(policy, strings.PrefixTable):
        number = naive.listed(policy.strings.num_letters, policy.strings.horizon - 1).index(prefix)
        return params["logits"][prompt, number]
    if isinstance(policy, strings.Markov):
        return params["logits"][prompt, 1 + prefix[-1] if prefix else 0]
    hidden = np.float64(EMBEDDINGS)[prompt] @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    for place, letter in enumerate(prefix):
        hidden = hidden + params["letters"][place, letter]
    return params["Dense_1"]["weight"] @ np.maximum(hidden, 0) + params["Dense_1"]["bias"]


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@cache
def by_hand(policy):
    """Log-probabilities of the tokens of all strings, zero behind the end."""
    space = policy.strings
    found = np.zeros((len(EMBEDDINGS), space.num_responses, space.horizon))
    for prompt in range(len(EMBEDDINGS)):
        for row, string in enumerate(every_string(space)):
            for place, token in enumerate(naive.tokens_of(string, space.num_letters, space.horizon)):
                found[prompt, row, place] = log_softmax(logits_by_hand(policy, prompt, string[:place]))[token]
    return found


@policies
def test_tables_and_paths_are_the_sums_of_tokens(policy):
    space, expected = policy.strings, by_hand(policy)
    found = facts(policy)
    np.testing.assert_allclose(found["table"], expected.sum(-1), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(np.exp(np.float64(found["table"])).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found["tokens"].reshape(expected.shape), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(found["mask"].reshape(expected.shape), np.tile(space.mask, (2, 1, 1)))
    np.testing.assert_allclose(found["sums"].reshape(2, -1), expected.sum(-1), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(found["means"].reshape(2, -1), expected.sum(-1) / space.num_tokens, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(found["by the table"], found["table"].ravel())


@pytest.mark.parametrize(
    ("policy", "num"),
    [
        pytest.param(policy, num, marks=[] if (name, num) in FEW else pytest.mark.slow, id=f"{name}-{num}")
        for name, policy in zip(("SPACE", "FIXED"), POLICIES[:2], strict=True)
        for num in (1, 3, 8, 20, 60)
    ],
)
def test_few_strings_are_scored_as_all_are(policy, num):
    """Few of them share no prefix with each other, and run along their own paths."""
    rng = np.random.default_rng(num)
    rows = rng.integers(0, [[len(EMBEDDINGS)], [policy.strings.num_responses]], (2, num))
    prompts, responses = jnp.asarray(rows, jnp.int32)
    log_prob = strings.log_prob_fn(policy, EMBEDDINGS)

    @jax.jit
    def both(params):
        functions = (
            lambda p: log_prob(p, prompts, responses),
            lambda p: toy.table_fn(policy, EMBEDDINGS)(p)[prompts, responses],
        )
        return [(f(params), jax.grad(lambda p, f=f: weighed(f(p)))(params)) for f in functions]

    chex.assert_trees_all_close(*both(params_of(policy)), rtol=1e-4, atol=2e-5)


@policies
def test_outputs_after_all_prefixes_are_those_along_paths(policy):
    space = policy.strings
    prefixes = naive.listed(space.num_letters, space.horizon - 1)
    expected = [[logits_by_hand(policy, prompt, prefix) for prefix in prefixes] for prompt in range(2)]
    for name in ("outputs", "outputs by paths"):
        np.testing.assert_allclose(facts(policy)[name], expected, rtol=1e-5, atol=1e-5)


@policies
def test_gradients_are_the_same_both_ways(policy):
    found = facts(policy)
    chex.assert_trees_all_close(found["gradient on paths"], found["gradient of the table"], rtol=1e-4, atol=2e-4)


@policies
def test_no_output_depends_on_later_tokens(policy):
    """Not by a bit, whatever stands there."""
    space, rng = policy.strings, np.random.default_rng(0)
    outputs = jax.jit(
        lambda prompts, tokens: strings_first(
            policy.apply(params_of(policy), EMBEDDINGS, prompts, tokens, method="outputs")
        )
    )
    tokens = rng.integers(space.num_letters, size=(6, space.horizon)).astype("i")
    prompts = jnp.array([0, 1] * 3)
    before = np.asarray(outputs(prompts, jnp.asarray(tokens)))
    for place in range(space.horizon):
        changed = tokens.copy()
        changed[:, place:] = rng.integers(-1, space.num_choices, size=changed[:, place:].shape)
        changed[:, place] = (tokens[:, place] + 1) % space.num_letters
        after = np.asarray(outputs(prompts, jnp.asarray(changed)))
        np.testing.assert_array_equal(after[:, : place + 1], before[:, : place + 1])
        if place + 1 < space.horizon:
            assert np.all(np.any(after[:, place + 1] != before[:, place + 1], axis=-1))


def test_the_end_and_padding_add_nothing_to_the_network():
    tokens = jnp.array([[1, 3, -1], [3, -1, -1], [2, 0, 1]])
    outputs = jax.jit(partial(POLICIES[0].apply, method="outputs"))
    found = np.moveaxis(outputs(params_of(POLICIES[0]), EMBEDDINGS, jnp.array([0, 1, 0]), tokens), -1, 0)
    np.testing.assert_array_equal(found[0, 2], found[0, 1])
    np.testing.assert_array_equal(found[1, 1:], np.stack([found[1, 0]] * 2))
    assert np.all(found[2, 2] != found[2, 1])


def test_no_output_has_a_slope_by_letters_of_its_own_or_later_places():
    policy = POLICIES[0]
    tokens = jnp.array([[0, 2, 1]])

    @jax.jit
    @jax.jacobian
    def slopes(letters):
        params = {"params": params_of(policy)["params"] | {"letters": letters}}
        return policy.apply(params, EMBEDDINGS, jnp.array([1]), tokens, method="outputs")[..., 0].sum(-1)

    found = np.any(slopes(params_of(policy)["params"]["letters"]) != 0, axis=-1)  # [place, place of letter, letter]
    expected = np.zeros((3, 2, 3), bool)
    expected[1, 0, 0] = expected[2, 0, 0] = expected[2, 1, 2] = True
    np.testing.assert_array_equal(found, expected)


def test_gradients_of_the_network_are_finite_differences(double):
    policy = POLICIES[0]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params_of(policy))
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    prompts, responses = ids_of_all(SPACE)
    log_prob = strings.log_prob_fn(policy, EMBEDDINGS.astype(jnp.float64))

    @jax.jit
    def moved(step):
        return weighed(log_prob(jax.tree.map(lambda x, d: x + step * d, params, direction), prompts, responses))

    step = 1e-6
    slope = jax.jit(jax.grad(moved))(0.0)
    assert float(slope) == pytest.approx(float(moved(step) - moved(-step)) / (2 * step), rel=1e-7)


# What they can be


def test_a_table_of_prefixes_can_be_any_policy_and_starts_uniform(key):
    policy = POLICIES[2]
    start, table = jax.jit(policy.init)(key, EMBEDDINGS), jax.jit(toy.table_fn(policy, EMBEDDINGS))
    np.testing.assert_allclose(table(start)[0], -np.log(4) * SPACE.num_tokens, rtol=1e-6)
    probs = np.random.default_rng(0).dirichlet(np.ones(40), 2)
    probs[:, 13:22] = 0  # no string of three letters begins with a
    probs /= probs.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        tokens = [np.log(naive.next_tokens(row + 1e-300, 3, 3)) for row in probs]
        log_probs = np.log(probs)
    params = {"params": {"logits": jnp.asarray(np.where(np.array(tokens) < -300, -np.inf, tokens), jnp.float32)}}
    prompts, responses = ids_of_all(SPACE)
    on_paths = jax.jit(strings.log_prob_fn(policy, EMBEDDINGS))(params, prompts, responses).reshape(2, -1)
    for found in map(np.asarray, (table(params), on_paths)):
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(log_probs))
        np.testing.assert_allclose(np.exp(found), probs, rtol=1e-4, atol=1e-7)


def test_a_markov_policy_cannot_repeat_the_letter_before_the_last():
    """Its best fit to strings xyx is uniform: the divergence is convex there, and has no slope."""
    space = strings.Strings(2, 3, fixed_length=True)
    policy, target = strings.Markov(space), np.array([string[0] == string[2] for string in every_string(space)]) / 4

    def divergence(logits):
        log_probs = policy.apply({"params": {"logits": logits}}, EMBEDDINGS[:1])[0]
        return jnp.sum(jax.scipy.special.xlogy(target, target) - target * log_probs)

    value, slope = jax.jit(jax.value_and_grad(divergence))(jnp.zeros((1, 3, 2)))
    assert value == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


# Samples


sampled = pytest.mark.parametrize(
    "policy", [POLICIES[0], POLICIES[3], POLICIES[4]], ids=lambda p: f"{type(p).__name__}-{p.strings.horizon}"
)


@sampled
def test_samples_follow_the_table(key, policy):
    params = params_of(policy, 0.5)
    probs = np.exp(np.float64(jax.jit(toy.table_fn(policy, EMBEDDINGS))(params)))
    sample = strings.sample_fn(policy, EMBEDDINGS)

    @jax.jit
    def draw(key):
        tokens = sample(key, params, jnp.repeat(jnp.arange(2), 6000))
        groups = strings.respond_fn(policy, EMBEDDINGS, group_size=3000)(key, params, jnp.array([1, 0, 1]))
        return tokens, policy.strings.ids(tokens), groups

    tokens, ids, (groups, weights) = draw(key)
    np.testing.assert_array_equal(tokens, policy.strings.tokens[ids])
    for prompt in range(2):
        naive.assert_distributed(ids.reshape(2, -1)[prompt], probs[prompt])
    assert (groups.shape, weights) == ((3, 3000), None)
    for prompt, group in zip([1, 0, 1], groups, strict=True):
        naive.assert_distributed(group, probs[prompt])
    assert np.mean(groups[0] == groups[2]) < 0.9


@sampled
def test_greedy_takes_the_most_probable_token_each_time(policy):
    space, greedy = policy.strings, jax.jit(strings.greedy_fn(policy, EMBEDDINGS))
    ids = jax.jit(space.ids)(greedy(params_of(policy), jnp.array([1, 0])))
    for prompt, text in zip([1, 0], space.text(ids), strict=True):
        prefix = ()
        while len(prefix) < space.horizon:
            token = int(np.argmax(logits_by_hand(policy, prompt, prefix)))
            if token == space.num_letters:
                break
            prefix += (token,)
        assert text == "".join("abc"[letter] for letter in prefix)


def test_the_greedy_string_need_not_be_the_most_probable():
    space = strings.Strings(2, 2, fixed_length=True)
    log_probs = jnp.log(jnp.array([[0.3, 0.3, 0.4, 0.0001]]))

    @jax.jit
    def greedy(log_probs):
        params = {"params": {"logits": strings.next_token_log_probs(log_probs, space)}}
        return strings.greedy_fn(strings.PrefixTable(space), EMBEDDINGS[:1])(params, jnp.array([0]))

    assert greedy(log_probs).tolist() == [[0, 0]]
    assert toy.greedy(log_probs).tolist() == [2]


def test_nothing_is_drawn_from_what_is_not_a_number(key):
    policy = POLICIES[2]
    logits = np.zeros((2, 13, 4), np.float32)
    logits[0, 0, 1] = logits[1, 2, 0] = np.nan
    logits[1, 0, 1] = 99.0
    params = {"params": {"logits": jnp.asarray(logits)}}
    tokens = jax.jit(strings.sample_fn(policy, EMBEDDINGS))(key, params, jnp.array([0, 1]))
    assert tokens.tolist() == [[-1, -1, -1], [1, -1, -1]]
    assert jax.jit(strings.greedy_fn(policy, EMBEDDINGS))(params, jnp.array([0, 1])).tolist() == tokens.tolist()
    respond = strings.respond_fn(policy, EMBEDDINGS, group_size=2)
    assert jax.jit(respond)(key, params, jnp.array([0, 1])).responses.tolist() == [[-1, -1]] * 2


def test_rare_tokens_are_drawn_in_few_bits_too(key):
    space = strings.Strings(100, 1, fixed_length=True)
    logits = jnp.log(jnp.array([[[0.9] + [0.00101] * 99]])).astype(jnp.bfloat16)
    policy = strings.PrefixTable(space)
    sample = strings.sample_fn(policy, EMBEDDINGS[:1].astype(jnp.bfloat16))
    drawn = jax.jit(sample)(key, {"params": {"logits": logits}}, jnp.zeros(20_000, jnp.int32))
    naive.assert_distributed(drawn, np.exp(np.asarray(logits, np.float64)))


# Wrong ids


@pytest.mark.parametrize(("prompt", "response"), [(2, 0), (-1, 0), (0, 40), (0, -1)])
def test_unknown_ids_are_refused_and_never_clamped(prompt, response):
    policy, params = POLICIES[0], params_of(POLICIES[0])
    name, wrong, most = ("prompts", prompt, 1) if response == 0 else ("responses", response, 39)
    prompts, responses = jnp.array([0, prompt]), jnp.array([0, response])
    value = strings.CausalMLP(SPACE, num_outputs=1)
    functions = {
        "sums": (strings.log_prob_fn(policy, EMBEDDINGS), params),
        "tokens": (lambda *args: strings.token_log_prob_fn(policy, EMBEDDINGS)(*args).values[..., 0], params),
        "values": (lambda *args: strings.token_value_fn(value, EMBEDDINGS)(*args)[..., 0], params_of(value)),
    }
    for function, own in functions.values():
        with pytest.raises(ValueError, match=f"^{name} must be between 0 and {most}, got {wrong} in row 1"):
            function(own, prompts, responses)
    found = jax.jit(lambda p, r: {n: function(own, p, r) for n, (function, own) in functions.items()})(
        prompts, responses
    )
    for numbers in found.values():
        assert jnp.isnan(numbers).tolist() == [False, True]


def test_the_wrong_side_of_a_pair_is_named():
    log_prob, params = strings.log_prob_fn(POLICIES[4], EMBEDDINGS), params_of(POLICIES[4])
    good, wrong = jnp.array([0, 1]), jnp.array([3, 40])
    for side, pair in {"chosen": Pair(wrong, good), "rejected": Pair(good, wrong)}.items():
        with pytest.raises(ValueError, match=rf"responses\.{side} must be between 0 and 39, got 40 in row 1"):
            log_prob(params, good, pair)
    with pytest.raises(ValueError, match=r"shapes must be equal, got prompts \(1,\), responses\.chosen \(2,\)"):
        log_prob(params, good[:1], Pair(good, good))


def test_pairs_and_arrays_of_any_axes_are_scored():
    policy = POLICIES[0]
    table, log_prob = facts(policy)["table"], jax.jit(strings.log_prob_fn(policy, EMBEDDINGS))
    prompts, first, second = (np.array(ids) for ids in ([[0, 1], [1, 1]], [[0, 5], [39, 7]], [[1, 2], [3, 4]]))
    found = log_prob(params_of(policy), jnp.asarray(prompts), Pair(jnp.asarray(first), jnp.asarray(second)))
    for numbers, ids in zip(found, (first, second), strict=True):
        np.testing.assert_allclose(numbers, table[prompts, ids], rtol=1e-5)
    assert log_prob(params_of(policy), jnp.array(1), jnp.array(7)) == pytest.approx(float(table[1, 7]), rel=1e-5)


def test_ids_that_do_not_match_are_refused(key, as_users_have_it):
    policy, params = POLICIES[4], params_of(POLICIES[4])
    with pytest.raises(ValueError, match=r"shapes must be equal, got prompts \(1,\), responses \(2,\)"):
        strings.token_log_prob_fn(policy, EMBEDDINGS)(params, jnp.array([0]), jnp.array([0, 1]))
    with pytest.raises(TypeError, match="responses must hold integers"):
        strings.log_prob_fn(policy, EMBEDDINGS)(params, jnp.array([0]), jnp.array([0.0]))
    with pytest.raises(TypeError, match="key must be a typed key"):
        strings.sample_fn(policy, EMBEDDINGS)(0, params, jnp.array([0]))
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        strings.respond_fn(policy, EMBEDDINGS, group_size=0)


def test_unknown_prompts_get_no_string(key):
    policy, params = POLICIES[4], params_of(POLICIES[4])
    for sample in (strings.greedy_fn(policy, EMBEDDINGS), partial(strings.sample_fn(policy, EMBEDDINGS), key)):
        with pytest.raises(ValueError, match="prompts must be between 0 and 1, got 2 in row 1"):
            sample(params, jnp.array([0, 2]))
        tokens = jax.jit(sample)(params, jnp.array([0, 2, -1]))
        assert tokens[1:].tolist() == [[-1, -1, -1]] * 2
        assert jax.jit(SPACE.ids)(tokens)[1:].tolist() == [-1, -1]
    respond = jax.jit(strings.respond_fn(policy, EMBEDDINGS, group_size=2))
    assert respond(key, params, jnp.array([2])).responses.tolist() == [[-1, -1]]


def test_values_belong_to_the_prefix_before_a_token():
    for make in (partial(strings.CausalMLP, hidden_dim=5), strings.PrefixTable):
        network = make(SPACE, num_outputs=1)
        prompts, responses = ids_of_all(SPACE)
        found = jax.jit(strings.token_value_fn(network, EMBEDDINGS))(params_of(network), prompts, responses)
        expected = [
            [logits_by_hand(network, prompt, string[:place])[0] for place in range(min(len(string) + 1, 3))]
            for prompt in range(2)
            for string in every_string(SPACE)
        ]
        for row, values in zip(np.asarray(found), expected, strict=True):
            np.testing.assert_allclose(row[: len(values)], values, rtol=1e-5, atol=1e-5)


# One letter


@pytest.fixture(scope="module")
def one_letter():
    """A world, and a network of letters that is the network of the one-token world."""
    key = jax.random.key(0)
    world = toy.make_world(key, num_prompts=3, num_responses=6, embedding_dim=4)
    network, letters = toy.ToyLM(num_responses=6), strings.CausalMLP(strings.Strings(6, 1, fixed_length=True))
    start, params = jax.jit(lambda key: [policy.init(key, world.embeddings) for policy in (network, letters)])(key)
    assert params["params"].pop("letters").shape == (0, 6, 32)
    chex.assert_trees_all_equal(params, start)
    params["params"]["letters"] = jnp.zeros((0, 6, 32))
    return world, network, letters, start, params


def test_at_a_horizon_of_one_it_is_the_one_token_world(one_letter):
    world, network, letters, start, params = one_letter
    space = letters.strings

    @jax.jit
    def facts(start, params):
        table, again = (
            toy.table_fn(policy, world.embeddings)(own) for policy, own in ((network, start), (letters, params))
        )
        optimum = toy.optimal_policy(table, world.rewards, beta=0.5)
        return {
            "table": (table, again),
            "next": (optimum, strings.next_token_log_probs(optimum, space)[:, 0]),
            "soft": (
                toy.implicit_reward(optimum, table, beta=0.5),
                strings.soft_advantages(table, world.rewards, space, beta=0.5)[:, 0],
            ),
            "kl": (toy.kl_to_reference(optimum, table), strings.kl_by_place(optimum, table, space)[:, 0]),
        }

    found = facts(start, params)
    np.testing.assert_allclose(*found["table"], rtol=1e-6)
    np.testing.assert_allclose(*found["next"], rtol=1e-6)
    np.testing.assert_allclose(*found["soft"], atol=1e-6)
    np.testing.assert_allclose(*found["kl"], atol=1e-6)


@pytest.mark.slow
def test_at_a_horizon_of_one_training_is_that_of_the_one_token_world(key, one_letter):
    world, network, letters, start, params = one_letter
    table = toy.table_fn(network, world.embeddings)(start)
    chex.assert_trees_all_equal(toy.table_fn(letters, world.embeddings)(params), table)
    data = toy.sample_preferences(jax.random.key(1), world, num=60, log_probs=table)
    again = toy.sample_preferences(
        jax.random.key(1), world, num=60, log_probs=toy.table_fn(letters, world.embeddings)(params)
    )
    chex.assert_trees_all_equal(data, again)

    def fitted(log_prob, params):
        labelled = train.with_reference(log_prob, params, data)
        objective = train.preference_objective(log_prob, losses.dpo_loss, beta=0.3)
        return train.fit(
            key, params, labelled, objective=objective, optimizer=optax.sgd(0.5), num_epochs=3, batch_size=20
        )

    expected, history = jax.jit(partial(fitted, toy.log_prob_fn(network, world.embeddings)))(start)
    for make in (toy.log_prob_fn, strings.log_prob_fn):
        found, own = jax.jit(partial(fitted, make(letters, world.embeddings)))(params)
        np.testing.assert_allclose(own["loss"], history["loss"], rtol=1e-5)
        assert np.all(np.diff(own["loss"]) < 0)
        del found["params"]["letters"]
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


# Many strings


@pytest.mark.slow
def test_many_strings_are_listed_and_scored(key):
    space = strings.Strings(4, 8, fixed_length=True)
    assert (space.num_responses, space.num_prefixes) == (65_536, 21_845)
    policy = strings.CausalMLP(space, hidden_dim=4)
    params = params_of(policy, 0.3)
    some = np.array([0, 1, 4097, 30_000, 65_535])
    digits = [[number // 4**place % 4 for place in reversed(range(8))] for number in some]
    assert space.tokens[some].tolist() == digits
    assert space.ids(jnp.asarray(digits)).tolist() == some.tolist()
    table = jax.jit(toy.table_fn(policy, EMBEDDINGS))(params)
    np.testing.assert_allclose(np.exp(np.float64(table)).sum(-1), 1, rtol=1e-4)
    scores = strings.log_prob_fn(policy, EMBEDDINGS)(params, jnp.ones(5, jnp.int32), jnp.asarray(some))
    np.testing.assert_allclose(scores, table[1, some], rtol=1e-5)
