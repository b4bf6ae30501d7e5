"""Methods compared, with runs whose results are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sweep
from experiments.lab import tuning
from experiments.lab.comparison import chosen_methods, compare, ranges_of
from experiments.lab.feedback import Setting
from experiments.lab.methods import METHODS
from experiments.lab.statistics import Seconds
from experiments.lab.tuning import Range, Seeds

DPO, CONSERVATIVE = chosen_methods(("dpo", "conservative dpo"), METHODS)
RATES = Range(1e-4, 1e-2)
SETTINGS = {"clean": Setting(), "noisy": Setting(flip_probability=0.2)}


def test_each_method_is_tuned_in_each_setting_and_its_control_shares_what_was_chosen(key):
    """High learning rates are best where labels are clean, low ones where they are noisy; or the other way round."""

    def run(method, start, setting, hyperparameters):
        height = jnp.log(hyperparameters["learning_rate"])
        wanted = jnp.where(setting.flip_probability > 0, -height, height)
        return {
            "score": wanted if method is DPO else -wanted,
            "height": height,
            "world": start,
            "flipped": jnp.asarray(setting.flip_probability),
        }

    starts = sweep.prepare(lambda key: jax.random.uniform(key), key, num_seeds=5)
    found = compare(
        run,
        [DPO, CONSERVATIVE],
        SETTINGS,
        starts,
        Seeds.of(3, 2),
        learning_rate=RATES,
        num_candidates=6,
        seconds=(seconds := Seconds()),
        score="score",
        control=lambda setting: setting._replace(flip_probability=setting.flip_probability + 0.5),
    )
    points = tuning.candidates(6, 3)[:, 0]
    low, high = RATES.at(points.min()), RATES.at(points.max())
    rates = {"clean": (high, low), "noisy": (low, high)}
    assert found.keys() == SETTINGS.keys() and seconds.run > 0
    for name, entries in found.items():
        for method, entry, rate in zip((DPO, CONSERVATIVE), entries, rates[name], strict=True):
            assert entry["hyperparameters"].keys() == {"learning_rate", *method.ranges}
            assert entry["hyperparameters"]["learning_rate"] == pytest.approx(rate)
            for results in (entry["results"], entry["control"]):
                np.testing.assert_allclose(results["height"], [np.log(rate)] * 3, rtol=1e-5)
                np.testing.assert_allclose(results["world"], starts.values[:3])
            flips = SETTINGS[name].flip_probability
            np.testing.assert_allclose(entry["results"]["flipped"], [flips] * 3)
            np.testing.assert_allclose(entry["control"]["flipped"], [flips + 0.5] * 3)


def test_without_a_control_there_is_none(key):
    starts = sweep.prepare(lambda key: jax.random.uniform(key), key, num_seeds=2)
    found = compare(
        lambda method, start, setting, hyperparameters: {"expected_reward": start},
        [DPO],
        {"clean": Setting()},
        starts,
        Seeds.of(1, 1),
        learning_rate=RATES,
        num_candidates=1,
        seconds=Seconds(),
    )
    assert found["clean"][0]["control"] is None


def test_all_methods_are_chosen_if_none_is_named():
    assert chosen_methods((), METHODS) == list(METHODS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("dpq",), "--losses: there is no 'dpq'; perhaps 'dpo'"),
        (("ipo", "dpo", "dpo"), "--losses names 'dpo' twice"),
    ],
)
def test_names_that_make_no_sense_end_the_command(names, message):
    with pytest.raises(SystemExit, match=message):
        chosen_methods(names, METHODS)


def test_the_learning_rate_is_tuned_first_and_beta_second():
    for method in METHODS:
        names = list(ranges_of(method, RATES))
        assert names[0] == "learning_rate" and ("beta" not in names or names[1] == "beta")
