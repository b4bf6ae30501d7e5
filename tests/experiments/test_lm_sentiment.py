"""Parts of the experiment that need neither the model nor the lexicon."""

import itertools

import jax
import numpy as np
import pytest

from experiments import lm_sentiment
from experiments.lab.language import within_prompts

SCORES = np.random.default_rng(0).normal(size=(3, 6)).round(1)


@pytest.mark.parametrize("num", [1, 2, 4, 5])
def test_best_of_n_is_the_mean_over_all_subsets(num):
    every = [SCORES[:, list(subset)].max(axis=1) for subset in itertools.combinations(range(6), num)]
    found = lm_sentiment.best_of(SCORES, num)
    assert found["reward"]["mean"] == pytest.approx(np.mean(every))
    assert found["kl"]["mean"] == pytest.approx(np.log(num) - (num - 1) / num)


def test_the_error_of_best_of_n_is_that_of_other_samples_for_the_same_openings():
    draws = np.random.default_rng(2).normal(np.array([[0.0], [100.0], [-3.0]]), 1.0, (500, 3, 16))
    found = [lm_sentiment.best_of(scores, 4)["reward"] for scores in draws]
    expected = np.std([one["mean"] for one in found])
    assert np.mean([one["stderr"] for one in found]) == pytest.approx(expected, rel=0.12)


def test_pairs_are_of_one_opening_and_the_kinder_is_chosen(key):
    prompts, tokens = np.arange(3)[:, None], np.arange(18).reshape(3, 6, 1)
    pairs = lm_sentiment.ordered_pairs(key, prompts, tokens, SCORES, 30)
    chosen, rejected = (np.ravel(side) for side in pairs.responses)
    assert len({*zip(chosen, rejected, strict=True)}) == 30
    np.testing.assert_array_equal(chosen // 6, pairs.prompts[:, 0])
    np.testing.assert_array_equal(rejected // 6, pairs.prompts[:, 0])
    assert np.all(SCORES.ravel()[chosen] > SCORES.ravel()[rejected])


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="only 0 pairs differ in sentiment: lower --num-pairs"):
        lm_sentiment.ordered_pairs(
            jax.random.key(0), np.zeros((1, 1), int), np.zeros((1, 4, 1), int), np.zeros((1, 4)), 1
        )


def test_errors_are_those_within_prompts():
    values = np.random.default_rng(1).normal(np.array([[0.0], [100.0]]), [[1.0], [2.0]], (2, 4000))
    found = within_prompts(values)
    assert found["stderr"] == pytest.approx(np.sqrt((1 + 4) / 2 / 8000), rel=0.05)
    assert found["mean"] == pytest.approx(50, abs=0.1)


def test_openings_differ():
    assert len({*lm_sentiment.OPENINGS}) == 60
