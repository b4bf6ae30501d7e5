"""What losses come to with infinite data where responses have lengths: a policy on a table of next tokens.

The optimum of RLHF is that of one token; what differs is a loss that knows lengths, or takes means over tokens.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from dpo_jax import losses, strings, toy
from dpo_jax.types import Pair
from tests.losses.menu import CASES, RANKED, SINGLE

BETA, FLIP = 0.3, 0.2
NO_SLOPE, CLEAR_SLOPE = 1e-12, 1e-4
SPACE = strings.Strings(2, 3)
NUM_TOKENS, LETTERS = SPACE.num_tokens.astype(float), SPACE.lengths.astype(float)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@cache
def make_world():
    return jax.jit(lambda key: strings.make_world(key, SPACE))(jax.random.key(3))


@cache
def make_reference():
    shape = (2, SPACE.num_prefixes, SPACE.num_choices)
    return jax.jit(lambda key: table_of(jax.random.normal(key, shape)))(jax.random.key(4))


def table_of(logits):
    """The table of strings, from logits of the next tokens."""
    return strings.string_log_probs(jax.nn.log_softmax(logits), SPACE)


def mean_loss(loss, data, *, means=False, **hyperparameters):
    """The population loss as a function of the logits of next tokens, of sums over tokens or of means."""

    def scores(table):
        return toy.lookup(table / NUM_TOKENS[None] if means else table, data.prompts, data.responses)

    def mean(logits):
        values = loss(scores(table_of(logits)), scores(make_reference()), **hyperparameters)
        return jnp.mean(values if data.weights is None else data.weights * values)

    return mean


def on_pairs(loss, *, world=None, **options):
    return mean_loss(loss, all_preferences(world or make_world()), **options)


all_preferences = jax.jit(toy.all_preferences)


def slope_at(loss, table):
    logits = strings.next_token_log_probs(jnp.asarray(table), SPACE)
    return float(jnp.max(jnp.abs(jax.jit(jax.grad(loss))(logits))))


def distance(table, other):
    return 0.5 * np.abs(np.exp(np.asarray(table)) - np.exp(np.asarray(other))).sum(-1).max()


def assert_reaches(loss, target):
    """It has no slope at this table, and descending from the reference leads there."""
    start = np.asarray(strings.next_token_log_probs(make_reference(), SPACE))
    loss_and_slope = jax.jit(jax.value_and_grad(loss))

    def flat(logits):
        value, slope = loss_and_slope(logits.reshape(start.shape))
        return float(value), np.ravel(slope)

    at_target = loss_and_slope(strings.next_token_log_probs(jnp.asarray(target), SPACE))[1]
    np.testing.assert_allclose(at_target, 0, atol=NO_SLOPE)
    found = optimize.minimize(flat, start.ravel(), jac=True, method="BFGS", options={"gtol": 1e-10})
    assert distance(table_of(jnp.asarray(found.x.reshape(start.shape))), target) < 1e-5
    assert distance(make_reference(), target) > 0.1


def optimum(rewards=None, beta=BETA):
    return toy.optimal_policy(make_reference(), make_world().rewards if rewards is None else rewards, beta=beta)


# With sums over tokens, strings are responses like others


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case.kind == RANKED else [], id=case.name)
        for case in CASES
        if case.reaches_optimum and case.kind in (SINGLE, RANKED)
    ],
)
def test_what_reaches_the_optimum_reaches_it_token_by_token(case):
    noise = {"flip_probability": FLIP} if "label_smoothing" in case.hyperparameters else {}
    rankings = jax.jit(partial(toy.all_rankings, num_ranked=3))
    data = (rankings if case.kind == RANKED else all_preferences)(make_world(), **noise)
    assert case.hyperparameters["beta"] == BETA
    assert_reaches(mean_loss(case.loss, data, **case.hyperparameters), optimum())


# Prices of length


def r_dpo(alpha, lengths, **options):
    loss = partial(losses.length_regularized_dpo_loss, alpha=alpha, beta=BETA)
    data = toy.all_preferences(make_world())
    return on_pairs(partial(loss, lengths=lengths(SPACE, data.responses)), **options)


def test_r_dpo_finds_the_optimum_of_a_reward_that_pays_for_letters():
    assert_reaches(r_dpo(0.2, strings.lengths_of), optimum(make_world().rewards - 0.2 * LETTERS[None]))


def test_r_dpo_undoes_what_judges_who_like_length_do():
    """At the price of a letter, but not at that of a token: the longest strings have no end token."""
    liking = 0.2
    seen = strings.judged(make_world(), SPACE, liking=liking * SPACE.horizon)
    loss = r_dpo(liking, strings.lengths_of, world=seen)
    assert_reaches(loss, optimum())
    misled = optimum(make_world().rewards + liking * LETTERS[None])
    assert slope_at(on_pairs(losses.dpo_loss, world=seen, beta=BETA), misled) < NO_SLOPE
    assert distance(misled, optimum()) > 0.05
    assert slope_at(r_dpo(liking, strings.num_tokens_of, world=seen), optimum()) > CLEAR_SLOPE


# Means over tokens


def normalised(log_probs):
    """A table of log-probabilities `log_probs(constant)`, with the constant that makes each row sum to one."""

    def row(prompt):
        def excess(constant):
            return special.logsumexp(log_probs(prompt, constant))

        return log_probs(prompt, optimize.brentq(excess, -50, 50, xtol=1e-15))

    return jnp.asarray([row(prompt) for prompt in range(2)])


def test_length_normalised_dpo_multiplies_rewards_by_numbers_of_tokens():
    """Its implicit reward is a mean: log-ratio = tokens * (r + constant) / beta, with a constant for each prompt."""
    rewards, reference = np.asarray(make_world().rewards), np.asarray(make_reference())
    target = normalised(lambda prompt, c: reference[prompt] + NUM_TOKENS * (rewards[prompt] + c) / BETA)
    nums = strings.num_tokens_of(SPACE, toy.all_preferences(make_world()).responses)
    loss = on_pairs(losses.length_normalized_dpo_loss, beta=BETA, lengths=nums)
    assert_reaches(loss, target)
    assert_same(loss, on_pairs(losses.dpo_loss, means=True, beta=BETA))
    assert distance(target, optimum()) > 0.1
    assert slope_at(loss, optimum()) > CLEAR_SLOPE


def assert_same(loss, other):
    logits = jax.random.normal(jax.random.key(5), (2, SPACE.num_prefixes, SPACE.num_choices))
    np.testing.assert_allclose(loss(logits), other(logits), rtol=1e-12)


def test_ipo_on_means_multiplies_probabilities_of_winning_by_numbers_of_tokens():
    """On sums, the log-ratio is the mean probability of winning over beta; see `tests/losses/test_optima.py`."""
    rewards, reference = np.asarray(make_world().rewards), np.asarray(make_reference())
    wins = special.expit(rewards[:, :, None] - rewards[:, None, :]).mean(-1)
    target = normalised(lambda prompt, c: reference[prompt] + NUM_TOKENS * (wins[prompt] / BETA + c))
    assert_reaches(on_pairs(losses.ipo_loss, means=True, beta=BETA), target)


def without_reference(loss):
    return lambda policy, reference, **hyperparameters: loss(policy, **hyperparameters)


def test_simpo_without_a_margin_has_a_closed_form():
    """Log-probability = tokens * (r + constant) / beta: the reference is forgotten."""
    rewards = np.asarray(make_world().rewards)
    target = normalised(lambda prompt, c: NUM_TOKENS * (rewards[prompt] + c) / BETA)
    loss = on_pairs(without_reference(losses.simpo_loss), means=True, beta=BETA, gamma=0.0)
    assert_reaches(loss, target)
    assert slope_at(loss, optimum()) > CLEAR_SLOPE


@pytest.mark.parametrize(
    ("loss", "hyperparameters"),
    [(losses.simpo_loss, {"beta": BETA, "gamma": 0.5}), (losses.orpo_loss, {"odds_weight": 1.0})],
    ids=["simpo", "orpo"],
)
def test_others_without_a_reference_have_a_slope_at_the_optimum(loss, hyperparameters):
    assert slope_at(on_pairs(without_reference(loss), means=True, **hyperparameters), optimum()) > CLEAR_SLOPE


# Tokens that count for less


def ld_dpo(alpha):
    data = toy.all_preferences(make_world())
    nums = strings.num_tokens_of(SPACE, data.responses)
    common = jnp.minimum(*nums)

    def pair(next_tokens):
        sides = (strings.token_lookup(next_tokens, SPACE, data.prompts, side) for side in data.responses)
        return Pair(
            *(
                losses.length_desensitized_logps(side.values, num, common, alpha=alpha)
                for side, num in zip(sides, nums, strict=True)
            )
        )

    def mean(logits):
        reference = strings.next_token_log_probs(make_reference(), SPACE)
        return jnp.mean(data.weights * losses.dpo_loss(pair(jax.nn.log_softmax(logits)), pair(reference), beta=BETA))

    return mean


def test_ld_dpo_finds_the_optimum_only_where_all_tokens_count():
    assert slope_at(ld_dpo(1.0), optimum()) < NO_SLOPE
    assert_same(ld_dpo(1.0), on_pairs(losses.dpo_loss, beta=BETA))
    for alpha in (0.0, 0.5, 0.9):
        assert slope_at(ld_dpo(alpha), optimum()) > CLEAR_SLOPE
