"""Values, advantages and divergences by token, against loops over strings and an automaton's dynamic programming."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import strings, toy
from tests.strings import naive

SIZES = [(3, 4, False), (2, 4, True), (4, 1, False)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
BETA = 0.7


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def tables(size):
    """For two prompts, the probabilities of a policy and of a reference, and rewards."""
    rng, num = np.random.default_rng(5), strings.Strings(*size).num_responses
    return rng.dirichlet(np.full(num, 0.7), 2), rng.dirichlet(np.full(num, 2.0), 2), rng.normal(size=(2, num))


@partial(jax.jit, static_argnums=0)
def all_at_once(space, policy, reference, rewards):
    optimum = toy.optimal_policy(reference, rewards, beta=BETA)
    return {
        "next tokens": strings.next_token_log_probs(policy, space),
        "back": strings.string_log_probs(strings.next_token_log_probs(policy, space), space),
        "prefixes": strings.prefix_log_probs(policy, space),
        "ratios": strings.token_log_ratios(policy, reference, space),
        "ratios of the optimum": strings.token_log_ratios(optimum, reference, space),
        "soft values": strings.soft_values(reference, rewards, space, beta=BETA),
        "soft advantages": strings.soft_advantages(reference, rewards, space, beta=BETA),
        "sums of soft advantages": strings.string_log_probs(
            strings.soft_advantages(reference, rewards, space, beta=BETA), space
        ),
        "log Z": toy.log_partition(reference, rewards, beta=BETA),
        "values": strings.values(policy, rewards, space),
        "advantages": strings.advantages(policy, rewards, space),
        "sums of advantages": strings.string_log_probs(strings.advantages(policy, rewards, space), space),
        "token KL": strings.token_kl(policy, reference, space),
        "KL by place": strings.kl_by_place(policy, reference, space),
        "KL": toy.kl_to_reference(policy, reference),
        "lengths": strings.length_distribution(policy, space),
        "expected length": strings.expected_length(policy, space),
    }


@cache
def facts(size, dtype=np.float64):
    """What the package says."""
    policy, reference, rewards = tables(size)
    with jax.enable_x64(dtype == np.float64):
        arguments = [jnp.asarray(table, dtype) for table in (np.log(policy), np.log(reference), rewards)]
        found = all_at_once(strings.Strings(*size), *arguments)
        assert {leaf.dtype for leaf in found.values()} == {np.dtype(dtype)}
        return {name: np.float64(leaf) for name, leaf in found.items()}


def close(found, expected, tolerance=1e-10):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@sizes
def test_next_tokens_are_conditional_probabilities(size):
    for prompt, probs in enumerate(tables(size)[0]):
        found = facts(size)["next tokens"][prompt]
        close(np.exp(found), naive.next_tokens(probs, *size))
        close(np.exp(found).sum(-1), 1)
        close(np.exp(facts(size)["prefixes"][prompt]), [p for p, _ in naive.prefix_probs(probs, *size).values()])
    close(facts(size)["prefixes"][:, 0], 0)


@sizes
def test_strings_have_the_product_of_their_tokens(size):
    close(facts(size)["back"], np.log(tables(size)[0]))
    with jax.enable_x64(True):
        numbers = np.random.default_rng(1).normal(size=facts(size)["next tokens"].shape)
        sums = strings.string_log_probs(jnp.asarray(numbers), strings.Strings(*size))
    prefixes = {prefix: i for i, prefix in enumerate(naive.listed(size[0], size[1] - 1))}
    expected = [
        [
            sum(of_prompt[prefixes[string[:t]], token] for t, token in enumerate(naive.tokens_of(string, *size[:2])))
            for string in naive.listed(*size)
        ]
        for of_prompt in numbers
    ]
    close(sums, expected)


@sizes
def test_log_ratios_of_tokens(size):
    policy, reference, _ = tables(size)
    for prompt, found in enumerate(facts(size)["ratios"]):
        own, other = (naive.next_tokens(table[prompt], *size) for table in (policy, reference))
        close(found, np.log(own) - np.log(other))
        close(facts(size)["token KL"][prompt], np.sum(own * np.log(own / other), axis=-1))


@sizes
def test_soft_values_are_those_of_continuations(size):
    _, reference, rewards = tables(size)
    for prompt, found in enumerate(facts(size)["soft values"]):
        tilted, _ = naive.continued(reference[prompt], np.exp(rewards[prompt] / BETA), *size)
        close(found, BETA * np.log(tilted))
    close(facts(size)["soft values"][:, 0], BETA * facts(size)["log Z"])


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"), [*((size, np.float64, 1e-10) for size in SIZES), (SIZES[0], np.float32, 2e-6)]
)
def test_soft_advantages_are_the_log_ratios_of_the_optimum(size, dtype, tolerance):
    found = facts(size, dtype)
    close(found["soft advantages"], BETA * found["ratios of the optimum"], tolerance)
    close(found["sums of soft advantages"], tables(size)[2] - BETA * found["log Z"][:, None], tolerance)
    close(found["soft advantages"], facts(size)["soft advantages"], tolerance)


@sizes
def test_soft_advantages_are_what_a_token_adds_to_the_optimal_value(size):
    _, reference, rewards = tables(size)
    for prompt, found in enumerate(facts(size)["soft advantages"]):
        before, after = naive.continued(reference[prompt], np.exp(rewards[prompt] / BETA), *size)
        close(found, BETA * (np.log(after) - np.log(before)[:, None]))


@sizes
def test_values_and_advantages_are_means_over_continuations(size):
    policy, _, rewards = tables(size)
    for prompt in range(2):
        before, after = naive.continued(policy[prompt], rewards[prompt], *size)
        close(facts(size)["values"][prompt], before)
        close(facts(size)["advantages"][prompt], after - before[:, None])
    expected = np.sum(policy * rewards, axis=-1)
    close(facts(size)["values"][:, 0], expected)
    close(facts(size)["sums of advantages"], rewards - expected[:, None])
    close(np.sum(np.exp(facts(size)["next tokens"]) * facts(size)["advantages"], axis=-1), 0)


@sizes
def test_divergence_by_place_adds_up_to_the_divergence(size):
    policy, reference, _ = tables(size)
    found = facts(size)["KL by place"]
    assert found.shape == (2, size[1])
    close(found.sum(-1), np.sum(policy * np.log(policy / reference), axis=-1))
    close(found.sum(-1), facts(size)["KL"])
    for prompt in range(2):
        own, other = (naive.next_tokens(table[prompt], *size) for table in (policy, reference))
        expected = np.zeros(size[1])
        for row, (prefix, (reached, _)) in enumerate(naive.prefix_probs(policy[prompt], *size).items()):
            expected[len(prefix)] += reached * np.sum(own[row] * np.log(own[row] / other[row]))
        close(found[prompt], expected)


@sizes
def test_lengths_are_counted(size):
    policy, lengths = tables(size)[0], np.array([len(string) for string in naive.listed(*size)])
    expected = [[probs[lengths == length].sum() for length in range(size[1] + 1)] for probs in policy]
    close(facts(size)["lengths"], expected)
    close(facts(size)["expected length"], policy @ lengths)


@pytest.mark.parametrize("size", [(3, 5, False), (3, 4, True)], ids=str)
def test_an_automaton_and_a_markov_reference_have_an_optimum_without_any_list(double, size):
    """Dynamic programming over the product of both, in which no string is listed."""
    rng, space = np.random.default_rng(3), strings.Strings(*size)
    transitions = np.array([[1, 0, 2], [2, 2, 0], [0, 1, 1]])
    weights, final, beta = rng.normal(size=(3, 3)), rng.normal(size=3), 0.4
    chain = rng.dirichlet(np.ones(space.num_choices), 4)
    expected, log_prob = naive.automaton_optimum(
        transitions, weights, final, chain, beta=beta, horizon=size[1], fixed_length=size[2]
    )

    @jax.jit
    def enumerated(chain, weights, final):
        states = strings.states_of(space, strings.previous_letter(space))
        reference = strings.string_log_probs(jnp.log(chain)[states], space)
        rewards = strings.path_rewards(space, transitions, weights, final)
        optimum = toy.optimal_policy(reference, rewards, beta=beta)
        return optimum, {
            "log_partition": toy.log_partition(reference, rewards, beta=beta),
            "expected_reward": toy.expected_reward(optimum, rewards),
            "kl_to_reference": toy.kl_to_reference(optimum, reference),
            "kl_by_place": strings.kl_by_place(optimum, reference, space).sum(),
            "lengths": strings.length_distribution(optimum, space),
            "expected_length": strings.expected_length(optimum, space),
        }

    optimum, found = enumerated(*map(jnp.asarray, (chain, weights, final)))
    close(optimum, [log_prob(string) for string in naive.listed(*size)])
    expected["kl_by_place"] = expected["kl_to_reference"]
    expected["expected_length"] = expected["lengths"] @ np.arange(size[1] + 1)
    assert found.keys() == expected.keys()
    for name, number in found.items():
        close(number, expected[name])


@pytest.mark.parametrize("size", [(3, 3, False), (2, 3, True)], ids=str)
def test_advantages_make_the_policy_gradient(double, size):
    """The slope of the expected reward by a logit is P(prefix) P(token) A(prefix, token)."""
    policy, _, rewards = tables(size)
    space, logits = strings.Strings(*size), jnp.asarray(naive.next_tokens(policy[0], *size))

    def expected_reward(logits):
        log_probs = strings.string_log_probs(jax.nn.log_softmax(logits), space)
        return jnp.sum(jnp.exp(log_probs) * rewards[0])

    @jax.jit
    def predicted(logits):
        tokens = jax.nn.log_softmax(logits)
        log_probs = strings.string_log_probs(tokens, space)
        reached = strings.prefix_log_probs(log_probs, space)
        return jnp.exp(reached[:, None] + tokens) * strings.advantages(log_probs, jnp.asarray(rewards[0]), space)

    close(jax.jit(jax.grad(expected_reward))(logits), predicted(logits))


def test_what_never_occurs_is_followed_by_anything():
    space = strings.Strings(2, 2)
    probs = np.array([0.5, 0.0, 0.0, 0.0, 0.0, 0.2, 0.3])  # no string begins with a
    with np.errstate(divide="ignore"):
        log_probs = jnp.log(jnp.asarray(probs))

    @jax.jit
    def all_at_once(log_probs):
        tokens = strings.next_token_log_probs(log_probs, space)
        prefixes = strings.prefix_log_probs(log_probs, space)
        value = strings.values(log_probs, jnp.arange(7.0), space)[0]
        kl = strings.kl_by_place(log_probs, jnp.full(7, -np.log(7)), space).sum()
        back = strings.string_log_probs(tokens, space)
        return (*map(jnp.exp, (tokens, prefixes, back)), value, kl, strings.length_distribution(log_probs, space))

    tokens, prefixes, back, value, kl, lengths = all_at_once(log_probs)
    np.testing.assert_allclose(tokens, [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3], [0.4, 0.6, 0]], rtol=1e-6)
    np.testing.assert_allclose(prefixes, [1, 0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(back, probs, rtol=1e-6)
    assert value == pytest.approx(2.8)
    assert kl == pytest.approx(np.log(7) + np.sum(probs * np.log(np.where(probs, probs, 1))))
    np.testing.assert_allclose(lengths, [0.5, 0, 0.5], rtol=1e-6)


def test_a_value_that_is_not_a_number_stays_with_its_prompt():
    space = strings.Strings(2, 2)
    table = jnp.log(jnp.full((2, 7), 1 / 7)).at[0, 6].set(jnp.nan)
    measures = (strings.next_token_log_probs, lambda table, space: strings.values(table, jnp.zeros((2, 7)), space))
    for found in jax.jit(lambda table: [measure(table, space) for measure in measures])(table):
        assert jnp.isnan(found[0]).any()
        assert not jnp.isnan(found[1]).any()


def test_tables_of_other_strings_are_refused(as_users_have_it):
    space, good, wrong = strings.Strings(2, 2), jnp.zeros((2, 7)), jnp.zeros((2, 8))
    for name, call in {
        "table": lambda: strings.next_token_log_probs(wrong, space),
        "log_probs": lambda: strings.length_distribution(wrong, space),
        "log_probs ": lambda: strings.expected_length(wrong, space),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{name.strip()} must have an entry for each of the 7 strings, got shape"
        ):
            call()
    with pytest.raises(ValueError, match=r"next_tokens must have 3 prefixes and 3 choices, got shape \(2, 7\)"):
        strings.string_log_probs(good, space)
    for call in (
        lambda: strings.token_log_ratios(good, good[:1], space),
        lambda: strings.token_kl(good, wrong, space),
        lambda: strings.soft_values(good, good[0], space, beta=1.0),
        lambda: strings.values(good, wrong, space),
    ):
        with pytest.raises(ValueError, match="shapes must be equal, got"):
            call()
    with pytest.raises(ValueError, match=r"beta must be in \(0, inf\), got 0"):
        strings.soft_advantages(good, good, space, beta=0.0)


def test_beta_is_traced_and_prompts_may_have_any_axes():
    _, reference, rewards = (jnp.asarray(table)[None] for table in tables(SIZES[0]))
    advantages = partial(strings.soft_advantages, jnp.log(reference), rewards, strings.Strings(*SIZES[0]))
    several = jax.jit(jax.vmap(lambda beta: advantages(beta=beta)))(jnp.array([0.2, BETA]))
    close(several[1, 0], facts(SIZES[0])["soft advantages"], 4e-6)
