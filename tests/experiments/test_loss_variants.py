import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import toy
from experiments import harness, loss_variants, tuning
from experiments.loss_variants import SETTINGS, Options, measure, prepare, run, summarise
from experiments.methods import METHODS

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def start():
    return jax.jit(prepare)(jnp.uint32(3), SETTINGS["clean"])


def test_settings_share_world_and_policy_but_not_labels(start):
    noisy = jax.jit(prepare)(jnp.uint32(3), SETTINGS["noisy"])
    chex.assert_trees_all_equal(noisy.world, start.world)
    chex.assert_trees_all_equal(noisy.params, start.params)
    np.testing.assert_array_equal(start.feedback.pairs.prompts, noisy.feedback.pairs.prompts)
    moved = jnp.mean(start.feedback.pairs.responses.chosen == noisy.feedback.pairs.responses.rejected)
    assert 0 < moved < 0.1  # the same draws: only comparisons near the edge change sides


@pytest.mark.parametrize(("name", "on_policy"), [("clean", False), ("on-policy", True)])
def test_people_judge_what_the_setting_says(name, on_policy):
    setting = jax.jit(prepare)(jnp.uint32(3), SETTINGS[name])
    labels, probs = setting.feedback.labels, np.exp(np.float64(setting.log_probs))
    shown = probs[labels.prompts, labels.responses].mean()
    uniform, own = 0.1, (probs**2).sum(-1).mean()
    assert abs(shown - (own if on_policy else uniform)) < 0.1 * (own - uniform)


def test_coin_tosses_say_nothing():
    for name, setting in SETTINGS.items():
        toss = loss_variants.CONTROLS[loss_variants.control(name)]
        assert toss.on_policy == setting.on_policy
        noise = {"temperature": toss.temperature, "flip_probability": toss.flip_probability}
        assert toy.preference_probability(jnp.float32(0.9), jnp.float32(0.1), **noise) == 0.5


def test_deterministic_labels_are_those_of_the_better_response():
    certain = jax.jit(prepare)(jnp.uint32(3), SETTINGS["deterministic"])
    chosen, rejected = toy.lookup(
        certain.world.rewards, certain.feedback.pairs.prompts, certain.feedback.pairs.responses
    )
    assert jnp.all(chosen >= rejected)


def test_a_run_that_stops_is_marked(start):
    broken = {"beta": jnp.float32(0.1), "learning_rate": jnp.float32(jnp.inf)}
    measured = jax.jit(lambda h: run(BY_NAME["dpo"], start, h))(broken)
    assert all(jnp.isnan(value) for value in measured.values())


def test_measures_by_hand(start):
    log_probs = toy.optimal_policy(start.log_probs, start.world.rewards, beta=0.1)
    measured = measure(start, log_probs)
    table, rewards = np.exp(np.float64(log_probs)), np.float64(start.world.rewards)
    np.testing.assert_allclose(measured["expected_reward"], (table * rewards).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(measured["regret"], 0.0, atol=1e-6)
    taus = [stats.kendalltau(*row).statistic for row in zip(np.asarray(log_probs), rewards, strict=True)]
    np.testing.assert_allclose(measured["accuracy"], (1 + np.mean(taus)) / 2, rtol=1e-5)
    np.testing.assert_allclose(measured["implicit_accuracy"], 1.0)  # the optimum moves as the truth orders
    pairs = start.feedback.pairs
    change = (np.float64(log_probs) - np.float64(start.log_probs))[pairs.prompts, pairs.responses.chosen]
    np.testing.assert_allclose(measured["chosen_logp_change"], change.mean(), rtol=1e-4)


def test_a_policy_that_has_not_moved_orders_nothing(start):
    assert measure(start, start.log_probs)["implicit_accuracy"] == 0.5


def test_differences_are_paired():
    def result(rewards):
        tossed = {"expected_reward_of_coin_tosses": np.array([0.1, 0.4])}
        return {"hyperparameters": {"learning_rate": 1e-3, "beta": 1.0}, "expected_reward": np.array(rewards), **tossed}

    found = {
        "baseline": {"sft": {"expected_reward": np.array([0.1, 0.5])}},
        "methods": [result([0.2, 0.6]), result([0.3, 0.7])],
    }
    summary = summarise({"clean": found}, [BY_NAME["dpo"], BY_NAME["ipo"]])
    entry = summary["losses"][1]
    assert (entry["name"], entry["setting"]) == ("ipo", "clean")
    np.testing.assert_allclose([entry["gain"]["mean"], entry["gain"]["stderr"]], [0.2, 0.0], atol=1e-12)
    np.testing.assert_allclose(
        [entry["gain_over_dpo"]["mean"], entry["gain_over_dpo"]["stderr"]], [0.1, 0.0], atol=1e-12
    )


def test_the_script_writes_table_figures_and_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(loss_variants, "RUNS_PER_CHUNK", 4)
    monkeypatch.setattr(tuning, "RUNS_PER_CHUNK", 4)
    options = Options(num_seeds=3, num_tuning_seeds=2, num_candidates=2, losses=("dpo", "simpo"), out=tmp_path)
    loss_variants.main(options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(e["name"], e["setting"]) for e in summary["losses"]] == [
        (name, setting) for setting in SETTINGS for name in ("dpo", "simpo")
    ]
    for entry in summary["losses"]:
        for name in ("expected_reward", "kl_to_reference", "regret"):
            assert entry[name].keys() == {"mean", "stderr"}
        assert entry["hyperparameters"].keys() == {"learning_rate", *BY_NAME[entry["name"]].ranges}
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "gains.png", "frontiers.png"}
    printed = capsys.readouterr().out
    assert printed.startswith("2 losses on feedback of 4 kinds: 96 runs in 3 worlds, and 2 more for tuning.")
    assert "clean labels, mean and 95% interval" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "dpo", "dpq"], "there is no 'dpq'; perhaps 'dpo'"),
        (["--num-candidates", "0"], "--num-candidates must be at least 1, got 0"),
        (["--num-seeds", "0"], "--num-seeds must be at least 1"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "experiments.loss_variants", *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
