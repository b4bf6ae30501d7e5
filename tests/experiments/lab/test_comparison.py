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
    """With clean labels a high learning rate is best, with noisy ones a low one; smoothing always costs something."""

    def run(method, start, setting, hyperparameters):
        height = jnp.log(hyperparameters["learning_rate"])
        cost = hyperparameters.get("label_smoothing", 0.0)
        return {
            "score": jnp.where(setting.flip_probability > 0, -height, height) - 0.1 * cost,
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
    rates = {"clean": RATES.at(points.max()), "noisy": RATES.at(points.min())}
    assert found.keys() == SETTINGS.keys() and seconds.run > 0
    for name, entries in found.items():
        for method, entry in zip((DPO, CONSERVATIVE), entries, strict=True):
            assert entry["hyperparameters"].keys() == {"learning_rate", *method.ranges}
            assert entry["hyperparameters"]["learning_rate"] == pytest.approx(rates[name])
            for results in (entry["results"], entry["control"]):
                np.testing.assert_allclose(results["height"], [np.log(rates[name])] * 3, rtol=1e-5)
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


def test_an_unknown_name_ends_the_command():
    with pytest.raises(SystemExit, match="--losses: there is no 'dpq'; perhaps 'dpo'"):
        chosen_methods(("dpq",), METHODS)


def test_the_learning_rate_is_tuned_first_and_beta_second():
    for method in METHODS:
        names = list(ranges_of(method, RATES))
        assert names[0] == "learning_rate" and ("beta" not in names or names[1] == "beta")
