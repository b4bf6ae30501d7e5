"""The RLHF walk as a user runs it: one run for all tests of the script, one for the notebook."""

import json

import numpy as np
import pytest

from tests.experiments import walks

SCRIPT = walks.ROOT / "experiments" / "rlhf_tutorial.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
FIGURES = ("reward_model", "learned_rewards", "ppo_training", "overoptimisation", "grpo_training", "frontier")


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    out = tmp_path_factory.mktemp("rlhf_tutorial")
    done = walks.run("experiments.rlhf_tutorial", "--seed", "3", "--num-seeds", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout, json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_it_writes_a_summary_and_figures_and_nothing_else(walk):
    out, _, _ = walk
    assert {path.name for path in out.iterdir()} == {"summary.json", *(f"{name}.png" for name in FIGURES)}


@pytest.mark.slow
def test_its_results_make_sense(walk):
    _, printed, summary = walk
    policies = summary["policies"]
    assert policies["true optimum"]["expected_reward"] > policies["PPO"]["expected_reward"]
    assert policies["PPO"]["learned_reward"] > policies["SFT"]["learned_reward"]
    for name in ("expected_reward", "learned_reward"):  # up to the noise of its samples
        assert abs(policies["PPO"][name] - policies["optimum of the reward model"][name]) < 0.03
    assert 0.5 < summary["reward_model"]["ranking_accuracy"] < 1
    assert summary["overoptimisation"]["PPO, β = 0"]["kl"][-1] > summary["overoptimisation"]["PPO, β = 0.1"]["kl"][-1]
    assert np.isfinite(summary["ppo"]["loss"]).all()
    for policy in policies.values():
        assert f"{policy['expected_reward']:.4f}" in printed


def test_bad_options_end_in_one_line():
    done = walks.run("experiments.rlhf_tutorial", "--seed", "-1")
    assert done.returncode != 0
    assert "--seed must be at least 0, got -1" in done.stderr
    assert "Traceback" not in done.stderr


def test_script_and_notebook_are_the_same_walk():
    assert walks.cells_of(SCRIPT) == walks.cells_of(NOTEBOOK)


def test_the_notebook_comes_with_its_outputs():
    outputs = walks.outputs_of(NOTEBOOK)
    assert {"image/png", "text/html"} <= {kind for output in outputs for kind in output.get("data", {})}
    assert not any(output.output_type in ("error", "stream") for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    assert (walks.run_notebook(NOTEBOOK, tmp_path) / "summary.json").exists()
