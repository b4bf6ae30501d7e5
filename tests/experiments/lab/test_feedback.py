import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import toy
from experiments.lab.feedback import NUM_RANKED, SETTINGS, Feedback, coin_tosses
from tests.experiments.small import PIPELINE, more


@pytest.fixture(scope="module")
def start():
    return jax.jit(PIPELINE.start)(jax.random.key(3))


@pytest.fixture(scope="module")
def draw(start):
    """Feedback of a setting, drawn by one compiled program for all settings; ten times as much as usual."""

    @jax.jit
    def drawn(setting):
        feedback = Feedback(more(10), jax.random.key(4), start, setting)
        return feedback.pairs(), feedback.labels(), feedback.rankings()

    return lambda name: drawn(SETTINGS[name])


def test_settings_share_prompts_but_not_labels(draw):
    clean, noisy = draw("clean")[0], draw("noisy")[0]
    np.testing.assert_array_equal(clean.prompts, noisy.prompts)
    moved = np.mean(np.asarray(clean.responses.chosen) == np.asarray(noisy.responses.rejected))
    assert 0 < moved < 0.2  # the same draws: only comparisons near the edge change sides


@pytest.mark.parametrize(("name", "on_policy"), [("clean", False), ("on-policy", True)])
def test_people_judge_what_the_setting_says(draw, start, name, on_policy):
    labels, probs = draw(name)[1], np.exp(np.float64(start.log_probs))
    shown = probs[labels.prompts, labels.responses].mean()
    uniform, own = 0.1, (probs**2).sum(-1).mean()
    assert abs(shown - (own if on_policy else uniform)) < 0.15 * (own - uniform)


def test_coin_tosses_say_nothing():
    for setting in SETTINGS.values():
        toss = coin_tosses(setting)
        assert toss.on_policy == setting.on_policy
        noise = {"temperature": toss.judge_temperature, "flip_probability": toss.flip_probability}
        assert toy.preference_probability(jnp.float32(0.9), jnp.float32(0.1), **noise) == 0.5


def test_deterministic_labels_are_those_of_the_better_response(draw, start):
    pairs = draw("deterministic")[0]
    chosen, rejected = toy.lookup(start.world.rewards, pairs.prompts, pairs.responses)
    assert jnp.all(chosen >= rejected)


def test_all_kinds_cost_about_as_many_judgements_and_carry_their_reference(draw):
    pairs, labels, rankings = draw("clean")
    num = PIPELINE.num_preferences * 10
    assert [len(data.prompts) for data in (pairs, labels, rankings)] == [num, 2 * num, num // (NUM_RANKED - 1)]
    assert all(data.reference_logps is not None for data in (pairs, labels, rankings))


def test_split_pairs_are_the_pairs(start):
    feedback = Feedback(PIPELINE, jax.random.key(4), start, SETTINGS["clean"])
    chex.assert_trees_all_equal(*jax.jit(lambda: (feedback.split_pairs(), toy.split_pairs(feedback.pairs())))())


def test_each_kind_is_drawn_by_a_key_of_its_own(draw):
    drawn = [data.prompts for data in draw("clean")]
    num = min(map(len, drawn))
    for first, second in itertools.combinations(drawn, 2):
        assert abs(jnp.mean(first[:num] == second[:num]) - 0.2) < 0.1  # five prompts
