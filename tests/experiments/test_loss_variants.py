import json
import subprocess
import sys
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpo_jax import losses, toy
from experiments import harness, loss_variants
from experiments.loss_variants import SETTINGS, Options, candidates, measure, prepare, run, summarise
from experiments.methods import METHODS, REFERENCE_FREE, Range

BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def start():
    return jax.jit(prepare)(jnp.uint32(3), SETTINGS["clean"])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_each_method_trains_under_vmap_over_its_hyperparameters(method, start):
    """With hyperparameters of which the second learns slower: everything finite, and the two not the same."""
    tried = candidates(method, 2)
    stacked = {name: jnp.array([h[name] for h in tried]) for name in tried[0]}
    measured = jax.jit(jax.vmap(lambda h: run(method, start, h)))(stacked)
    chex.assert_tree_all_finite(measured)
    assert measured["expected_reward"].shape == (2,)
    assert not jnp.allclose(measured["kl_to_reference"][0], measured["kl_to_reference"][1], rtol=1e-3)
    assert jnp.all(measured["kl_to_reference"] > 1e-5), "it did not learn"


def test_every_loss_takes_part():
    """But for those that differ from DPO only where responses have several tokens."""
    public = {name for name in dir(losses) if name.endswith("_loss")}
    source = (loss_variants.__file__).replace("loss_variants", "methods")
    used = {name for name in public if f"losses.{name}" in open(source, encoding="utf-8").read()}  # noqa: PTH123, SIM115
    assert public - used == {"length_normalized_dpo_loss", "length_regularized_dpo_loss"}


def test_settings_share_world_and_policy_but_not_labels(start):
    noisy = jax.jit(prepare)(jnp.uint32(3), SETTINGS["noisy"])
    chex.assert_trees_all_equal(noisy.world, start.world)
    chex.assert_trees_all_equal(noisy.params, start.params)
    pairs, others = start.feedback.pairs, noisy.feedback.pairs
    np.testing.assert_array_equal(pairs.prompts, others.prompts)
    flipped = np.asarray(pairs.responses.chosen == others.responses.rejected)
    assert stats.binomtest(int(flipped.sum()), flipped.size, 0.2).pvalue < 0.05 or 0.01 < flipped.mean() < 0.3


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
    measured = measure(start, log_probs, True)
    table, rewards = np.exp(np.float64(log_probs)), np.float64(start.world.rewards)
    np.testing.assert_allclose(measured["expected_reward"], (table * rewards).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(measured["regret"], 0.0, atol=1e-6)
    hits = [
        np.maximum(p := 1 / (1 + np.exp(b - a)), 1 - p) for row in rewards for i, a in enumerate(row) for b in row[:i]
    ]
    np.testing.assert_allclose(measured["accuracy"], np.mean(hits), rtol=1e-4)  # the optimum orders as the truth does
    pairs = start.feedback.pairs
    change = (np.float64(log_probs) - np.float64(start.log_probs))[pairs.prompts, pairs.responses.chosen]
    np.testing.assert_allclose(measured["chosen_logp_change"], change.mean(), rtol=1e-4)


def test_candidates_fill_their_ranges_and_are_equally_many():
    method = SimpleNamespace(ranges={"beta": Range(0.01, 10.0), "offset": Range(-1.0, 1.0, linear=True)})
    tried = candidates(method, 24)
    assert len(tried) == 24
    assert stats.kstest([np.log(h["beta"]) for h in tried], stats.uniform(np.log(0.01), np.log(1000)).cdf).pvalue > 0.5
    assert stats.kstest([h["offset"] for h in tried], stats.uniform(-1, 2).cdf).pvalue > 0.5
    assert len({h["learning_rate"] for h in tried}) == 24


def test_differences_are_paired():
    def result(rewards):
        return {"hyperparameters": {}, "expected_reward": np.array(rewards)}

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
    assert "clean labels, mean and 95% interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--losses", "dpo", "dpq"], "there is no 'dpq', only dpo, conservative dpo"),
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


def test_reference_free_methods_are_read_without_reference():
    assert {method.name for method in METHODS if not method.has_reference} == {
        method.name for method in METHODS if method.family == REFERENCE_FREE
    }
