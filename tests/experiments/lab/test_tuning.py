import numpy as np
import pytest
import xarray
from scipy import stats

from experiments.lab import tuning
from experiments.lab.feedback import SETTINGS, Setting
from experiments.lab.tuning import Range, Seeds, at_edge, candidates, hyperparameters, tune

RANGES = {"learning_rate": Range(1e-5, 1e-2), "beta": Range(0.01, 10.0), "offset": Range(-1.0, 1.0, linear=True)}


def test_candidates_fill_their_ranges():
    tried = [hyperparameters(RANGES, point) for point in candidates(24, 3)]
    assert stats.kstest([np.log(h["beta"]) for h in tried], stats.uniform(np.log(0.01), np.log(1000)).cdf).pvalue > 0.5
    assert stats.kstest([h["offset"] for h in tried], stats.uniform(-1, 2).cdf).pvalue > 0.5
    assert len({float(h["learning_rate"]) for h in tried}) == 24


def test_what_comes_first_does_not_depend_on_what_follows():
    np.testing.assert_array_equal(candidates(24, 2), candidates(24, 4)[:, :2])


def test_values_at_the_end_of_a_range_are_reported():
    assert at_edge(RANGES, np.array([0.5, 0.02, 0.5, 0.01])) == ["beta"]  # the last dimension is another method's
    assert at_edge(RANGES, np.array([0.99, 0.5, 0.04])) == ["learning_rate", "offset"]


def test_the_first_round_is_a_quarter_of_the_tuning_worlds_and_never_none():
    assert [len(Seeds.of(3, num).first_round) for num in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_trials_are_all_settings_with_all_their_candidates():
    points = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    tried = tuning.trials([Setting(), Setting(on_policy=1.0)], points)
    assert tried.setting.on_policy.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(tried.candidate, points.reshape(6, 2))
    assert len(set(tried.place)) == 6


@pytest.mark.parametrize("num", [1, 3, 6])
def test_tuning_finds_the_best_where_it_may_look(num):
    """With known scores: the second candidate is the best, and the first diverges in the noisy setting."""
    asked, points, names = [], candidates(num, 2), ["dpo", "ipo"]
    best = points[min(1, num - 1)]
    settings = [SETTINGS["clean"], SETTINGS["noisy"]]

    def rigged(methods, trials, seeds):
        asked.append((list(methods), len(trials.place), seeds))
        score = -np.abs(trials.candidate - best).sum(-1)
        score[(trials.candidate == points[0]).all(-1) & (trials.setting.flip_probability > 0)] = np.nan
        shape = (len(methods), len(score), len(seeds))
        values = np.broadcast_to(score[:, None], shape)
        return xarray.Dataset({"expected_reward": (("method", "trial", "seed"), values)})

    seeds = Seeds.of(3, 8)
    chosen = tune(rigged, names, settings, seeds, points=points)
    assert chosen.shape == (2, 2, 2)
    np.testing.assert_array_equal(chosen, np.broadcast_to(best, chosen.shape))
    finalists = min(num, tuning.NUM_FINALISTS)
    assert asked == [(names, 2 * num, range(3, 5)), *(([name], 2 * finalists, range(3, 11)) for name in names)]
    num_runs = sum(len(methods) * num_trials * len(seeds) for methods, num_trials, seeds in asked)
    assert num_runs + 2 * 2 * 3 == tuning.num_runs(seeds, 2, 2, num)


def test_each_setting_has_finalists_of_its_own():
    """The best candidate of one setting is the worst of the other."""
    points, settings = candidates(6, 1), [SETTINGS["clean"], SETTINGS["noisy"]]

    def rigged(methods, trials, seeds):
        sign = np.where(trials.setting.flip_probability > 0, -1, 1)
        scores = np.broadcast_to((sign * trials.candidate[:, 0])[:, None], (len(methods), len(sign), len(seeds)))
        return xarray.Dataset({"expected_reward": (("method", "trial", "seed"), scores)})

    chosen = tune(rigged, ["dpo"], settings, Seeds.of(3, 8), points=points)
    np.testing.assert_array_equal(chosen, [[points.max(0), points.min(0)]])


def test_what_diverges_in_one_world_is_not_chosen():
    points = candidates(6, 1)

    def rigged(methods, trials, seeds):
        scores = np.tile(trials.candidate[:, :1], (len(methods), 1, len(seeds)))
        scores[scores[..., -1] == points.max(), 0] = np.nan
        return xarray.Dataset({"expected_reward": (("method", "trial", "seed"), scores)})

    chosen = tune(rigged, ["dpo"], [Setting()], Seeds.of(3, 8), points=points)
    np.testing.assert_array_equal(chosen[0, 0], np.sort(points, axis=0)[-2])
