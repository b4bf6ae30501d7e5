"""Methods that know lengths where they are to equal DPO, judges who like length, and exact measures by NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import strings, toy, train
from dpo_jax.types import Pair, Preferences
from experiments.lab import string_worlds, tuning
from experiments.lab.feedback import Feedback, Setting
from experiments.lab.methods import METHODS, Setup
from experiments.lab.string_worlds import JUDGES, MEANS, OWN, STRING_METHODS, STRINGS, Judge, heard
from tests.experiments.small import PIPELINE as SMALL

SIZES = {name: getattr(SMALL, name) for name in ("num_demonstrations", "sft_epochs", "num_epochs", "batch_size")}
PIPELINE = dataclasses.replace(string_worlds.PIPELINE, num_preferences=240, **SIZES)
BY_NAME = {method.name: method for method in STRING_METHODS}
FAST = [*(method.name for method in OWN), *MEANS]
CANDIDATE = tuning.candidates(2, 4)[0]
BETA = 0.4


@pytest.fixture(scope="module")
def start():
    return jax.jit(PIPELINE.start)(jax.random.key(3))


@pytest.fixture(scope="module")
def moved(start):
    """Parameters of a policy away from the reference."""
    leaves, structure = jax.tree.flatten(start.params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [leaf + 0.3 * np.float32(rng.normal(size=leaf.shape)) for leaf in leaves])


@pytest.fixture(scope="module")
def pairs(start):
    return jax.jit(lambda: heard(PIPELINE, start, Judge()).pairs())()


def setup_of(start):
    return Setup(jax.random.key(5), PIPELINE.log_prob(start.world), PIPELINE.table(start.world), *start[2:4])


OBJECTIVES = {
    "dpo": ("dpo", {"beta": BETA}),
    "r-dpo": ("r-dpo", {"beta": BETA, "alpha": 0.2}),
    "r-dpo, neutral": ("r-dpo", {"beta": BETA, "alpha": 0.0}),
    "ld-dpo": ("ld-dpo", {"beta": BETA, "alpha": 0.3}),
    "ld-dpo, neutral": ("ld-dpo", {"beta": BETA, "alpha": 1.0}),
    "sampo": ("sampo", {"beta": BETA}),
    "ln-dpo": ("ln-dpo", {"beta": BETA}),
    "ln-dpo, four betas": ("ln-dpo", {"beta": 4 * BETA}),
    "ipo": ("ipo", {"beta": BETA}),
    "ipo on means": ("ipo on means", {"beta": BETA}),
    "simpo": ("simpo", {"beta": BETA, "gamma": 0.3}),
    "alphapo": ("alphapo", {"beta": BETA, "gamma": 0.3, "alpha": 0.5}),
    "orpo": ("orpo", {"odds_weight": 0.7}),
    "orpo on sums": ("orpo on sums", {"odds_weight": 0.7}),
}


@pytest.fixture(scope="module")
def objectives(start):
    return {name: BY_NAME[method].objective(setup_of(start), h) for name, (method, h) in OBJECTIVES.items()}


@pytest.fixture(scope="module")
def run(objectives, moved):
    """All of these losses, as one program of 24 comparisons."""

    @jax.jit
    def all_at_once(params, data):
        return {name: objective(params, data)[0] for name, objective in objectives.items()}

    return lambda data: all_at_once(moved, data)


@pytest.fixture(scope="module")
def run_backwards(objectives, moved):
    """Their gradients, too, which takes long to compile."""

    @jax.jit
    def all_at_once(params, data):
        return {name: jax.value_and_grad(lambda p, f=f: f(p, data)[0])(params) for name, f in objectives.items()}

    return lambda data: all_at_once(moved, data)


@pytest.fixture(scope="module")
def data(pairs):
    return jax.tree.map(lambda leaf: leaf[:24], pairs)


@pytest.fixture(scope="module")
def found(run, data):
    return run(data)


def assert_same(found, name, other):
    chex.assert_trees_all_close(found[name], found[other], rtol=1e-4, atol=1e-6)


NEUTRAL = pytest.mark.parametrize("name", ["r-dpo, neutral", "ld-dpo, neutral"])
EQUALLY_LONG = ("sampo", "ld-dpo", "r-dpo", "ln-dpo, four betas")


def test_methods_have_names_of_their_own_and_all_take_part():
    names = [method.name for method in STRING_METHODS]
    assert len({*names}) == len(names)
    assert {*names} >= {method.name for method in METHODS}
    assert not any("," in name for name in names)


def test_all_methods_that_know_lengths_are_compared():
    assert {method for method, _ in OBJECTIVES.values()} >= {*FAST}


@pytest.mark.slow
def test_methods_that_know_lengths_have_finite_gradients(run_backwards, data):
    found = run_backwards(data)
    chex.assert_tree_all_finite(found)
    for name, (_, gradient) in found.items():
        assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) > 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in FAST])
def test_all_other_methods_have_finite_gradients(name, start, moved):
    method = BY_NAME[name]
    data = jax.jit(lambda: method.data(heard(PIPELINE, start, Judge())))()
    objective = method.objective(setup_of(start), tuning.hyperparameters(method.ranges, CANDIDATE))
    initial = method.initial(jax.random.key(6), start)
    params = moved if jax.tree.structure(initial) == jax.tree.structure(moved) else initial
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(lambda p: objective(p, data)[0]))(params))


@NEUTRAL
def test_with_neutral_hyperparameters_they_are_dpo(found, name):
    assert_same(found, name, "dpo")


@pytest.mark.slow
@NEUTRAL
def test_with_neutral_hyperparameters_their_gradients_are_those_of_dpo(run_backwards, data, name):
    assert_same(run_backwards(data), name, "dpo")


def equally_long(start):
    equal = np.flatnonzero(STRINGS.num_tokens == 4)
    rng = np.random.default_rng(1)
    prompts, *sides = (jnp.asarray(ids, jnp.int32) for ids in (rng.integers(2, size=24), *rng.choice(equal, (2, 24))))
    log_prob = PIPELINE.log_prob(start.world)
    return jax.jit(lambda data: train.with_reference(log_prob, start.params, data))(Preferences(prompts, Pair(*sides)))


def test_where_the_two_are_equally_long_they_are_dpo(start, run):
    """SamPO and LD-DPO keep all tokens, and length-normalised DPO divides beta by their number."""
    found = run(equally_long(start))
    for name in EQUALLY_LONG:
        assert_same(found, name, "dpo")


@pytest.mark.slow
def test_where_the_two_are_equally_long_their_gradients_are_those_of_dpo(start, run_backwards):
    found = run_backwards(equally_long(start))
    for name in EQUALLY_LONG:
        assert_same(found, name, "dpo")


def tokens_by_hand(log_probs, prompts, responses):
    """The log-probabilities of the tokens of each string, as lists."""
    next_tokens = np.asarray(jax.jit(lambda table: strings.next_token_log_probs(table, STRINGS))(log_probs))
    return [
        [
            next_tokens[prompt, STRINGS.prefixes[response, place], STRINGS.tokens[response, place]]
            for place in range(STRINGS.num_tokens[response])
        ]
        for prompt, response in zip(np.asarray(prompts), np.asarray(responses), strict=True)
    ]


def test_each_loss_sees_the_tokens_that_its_paper_says(start, moved, data, found):
    own, other = (
        [tokens_by_hand(table, data.prompts, side) for side in data.responses]
        for table in (PIPELINE.table(start.world)(moved), start.log_probs)
    )
    n = [np.array([len(row) for row in side]) for side in own]
    letters = [STRINGS.lengths[np.asarray(side)] for side in data.responses]
    sums, reference_sums = ([np.array([sum(row) for row in side]) for side in sides] for sides in (own, other))
    ratios = [policy - reference for policy, reference in zip(sums, reference_sums, strict=True)]
    means = [total / num for total, num in zip(sums, n, strict=True)]
    common = np.minimum(*n)
    kept = [
        np.array(
            [
                sum((p - q) * (1 if place < least else 0.3) for place, (p, q) in enumerate(zip(*rows, strict=True)))
                for least, *rows in zip(common, policy, reference, strict=True)
            ]
        )
        for policy, reference in zip(own, other, strict=True)
    ]

    def nls(margin):
        return np.logaddexp(0, -margin).mean()

    def odds(logps):
        return logps - np.log1p(-np.exp(logps))

    expected = {
        "r-dpo": nls(BETA * (ratios[0] - ratios[1]) + 0.2 * (letters[0] - letters[1])),
        "ln-dpo": nls(BETA * (ratios[0] / n[0] - ratios[1] / n[1])),
        "ld-dpo": nls(BETA * (kept[0] - kept[1])),
        "ipo on means": np.mean((ratios[0] / n[0] - ratios[1] / n[1] - 0.5 / BETA) ** 2),
        "ipo": np.mean((ratios[0] - ratios[1] - 0.5 / BETA) ** 2),
        "simpo": nls(BETA * (means[0] - means[1]) - 0.3),
        "orpo": -means[0].mean() + 0.7 * nls(odds(means[0]) - odds(means[1])),
        "orpo on sums": -sums[0].mean() + 0.7 * nls(odds(sums[0]) - odds(sums[1])),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_sampo_draws_other_tokens_in_each_step_and_its_mean_is_that_of_means(start, moved, pairs):
    """The expected log-ratio of a response is the number of tokens that count, times the mean over all of them."""
    (row,) = np.flatnonzero(np.diff(np.array(strings.num_tokens_of(STRINGS, pairs.responses)), axis=0)[0] > 2)[:1]
    data = jax.tree.map(lambda leaf: leaf[row : row + 1], pairs)
    objective = BY_NAME["sampo"].objective(setup_of(start), {"beta": BETA})

    @jax.jit
    def margins(keys):
        def one(key):
            _, metrics, after = objective.apply(moved, data, key)
            return metrics["chosen_reward"], metrics["rejected_reward"], jax.random.key_data(after)

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.key(8), 2000)
    chosen, rejected, after = (np.asarray(leaf) for leaf in margins(keys))
    assert len(np.unique(np.concatenate([after, jax.random.key_data(keys)]), axis=0)) == 2 * len(keys)
    table, prompts = PIPELINE.table(start.world)(moved), data.prompts
    own, other = (
        [np.array(tokens_by_hand(t, prompts, side)[0]) for side in data.responses] for t in (table, start.log_probs)
    )
    ratios = [BETA * (p - q) for p, q in zip(own, other, strict=True)]
    np.testing.assert_allclose(chosen, ratios[0].sum(), rtol=1e-4)  # the shorter one keeps all of its tokens
    assert len(np.unique(rejected.round(5))) > 3
    error = rejected.std() / np.sqrt(len(rejected))
    assert abs(rejected.mean() - len(ratios[0]) * ratios[1].mean()) < 4 * error


def test_judges_like_length_by_what_they_add_to_a_string_of_full_length(start):
    assert {judge.liking for judge in JUDGES.values()} == {-2.0, 0.0, 2.0}
    feedback = heard(PIPELINE, start, Judge(liking=2.0, flip_probability=0.1, on_policy=0.5))
    added = feedback.start.world.rewards - start.world.rewards
    np.testing.assert_allclose(added, np.tile(2.0 * STRINGS.lengths / 6, (2, 1)), atol=1e-6)
    assert feedback.setting == Setting(flip_probability=0.1, on_policy=0.5)
    assert isinstance(feedback, Feedback)
    np.testing.assert_array_equal(feedback.start.log_probs, start.log_probs)


def test_worlds_say_nothing_about_length_and_demonstrators_prefer_good_strings(start):
    rewards = np.asarray(start.world.rewards)
    for length in range(7):
        np.testing.assert_allclose(rewards[:, STRINGS.lengths == length].mean(-1), 0, atol=1e-5)
    shown = np.exp(np.asarray(string_worlds.demonstrator(start.world)))
    plain = np.exp(np.asarray(strings.reference_log_probs(STRINGS, expected_length=3.0)))
    np.testing.assert_allclose(plain @ STRINGS.lengths, 3.0, rtol=1e-5)
    expected = plain * np.exp(rewards / 2)
    np.testing.assert_allclose(shown, expected / expected.sum(-1, keepdims=True), rtol=1e-4)


def test_measures_are_exact(start, moved):
    beta = string_worlds.BETA
    table = PIPELINE.table(start.world)(moved)
    found = jax.jit(lambda table: string_worlds.measured(start, table))(table)
    log_probs, reference, rewards = (np.float64(t) for t in (table, start.log_probs, start.world.rewards))
    probs = np.exp(log_probs)
    reward, kl = (probs * rewards).sum(-1).mean(), (probs * (log_probs - reference)).sum(-1).mean()
    partition = np.log(np.sum(np.exp(reference + rewards / beta), axis=-1))
    length = (probs @ STRINGS.lengths).mean()
    best = np.exp(np.asarray(toy.optimal_policy_at_kl(start.log_probs, start.world.rewards, kl=jnp.float32(kl))))
    optimal_length = (best @ STRINGS.lengths).mean()
    expected = {
        "expected_reward": reward,
        "kl_to_reference": kl,
        "regret": beta * partition.mean() - (reward - beta * kl),
        "merit": reward - beta * kl,
        "expected_length": length,
        "optimal_length": optimal_length,
        "longer": length - optimal_length,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose((best * (np.log(best) - reference)).sum(-1).mean(), kl, rtol=1e-3)
