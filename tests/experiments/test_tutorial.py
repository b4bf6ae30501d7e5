"""The tutorial as a user runs it: one run for all tests of the script, one for the notebook."""

import json
import math
from functools import partial

import numpy as np
import pytest

from tests.experiments import walks

SCRIPT = walks.ROOT / "experiments" / "tutorial.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
run = partial(walks.run, "experiments.tutorial")


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    out = tmp_path_factory.mktemp("tutorial")
    done = run("--seed", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout, json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_it_writes_a_summary_and_figures_and_nothing_else(tutorial):
    out, _, _ = tutorial
    names = {"summary.json", "dpo_training.png", "beta_ablation.png", "frontier.png"}
    assert {path.name for path in out.iterdir()} == names


@pytest.mark.slow
def test_its_summary_has_the_agreed_keys(tutorial):
    _, _, summary = tutorial
    assert {"sft", "dpo", "ablation", "seconds", "device", "versions"} <= summary.keys()
    assert summary["seconds"].keys() == {"total"}
    for stage in ("sft", "dpo"):
        assert len(summary[stage]["expected_reward"]) == len(summary[stage]["sampled_reward"]) == 5
        assert math.isclose(
            summary[stage]["mean_expected_reward"], np.mean(summary[stage]["expected_reward"]), rel_tol=1e-5
        )
    assert summary["dpo"]["beta"] == 0.1
    assert all(len(summary["dpo"][name]) == 50 for name in ("loss", "accuracy", "reward_margin"))
    assert [entry["beta"] for entry in summary["ablation"]] == [0.01, 0.1, 0.5, 2.0]
    keys = {"beta", "mean_expected_reward", "mean_sampled_reward", "kl_to_reference", "optimal_reward", "loss"}
    assert all(keys <= entry.keys() for entry in summary["ablation"])


@pytest.mark.slow
def test_its_results_make_sense(tutorial):
    _, _, summary = tutorial
    by_beta = {entry["beta"]: entry for entry in summary["ablation"]}
    assert by_beta[0.1]["mean_expected_reward"] == summary["dpo"]["mean_expected_reward"]
    assert by_beta[0.1]["loss"] == summary["dpo"]["loss"][-1] < math.log(2)
    kls = [entry["kl_to_reference"] for entry in summary["ablation"]]
    assert kls == sorted(kls, reverse=True)
    assert summary["sft"]["loss"][-1] < summary["sft"]["loss"][0]
    for entry in summary["ablation"]:
        # 5 prompts, 200 samples each, rewards between 0 and 1: the standard error is at most 0.5 / sqrt(1000)
        assert abs(entry["mean_sampled_reward"] - entry["mean_expected_reward"]) < 4 * 0.5 / 1000**0.5


@pytest.mark.slow
def test_it_prints_what_the_notebook_prints(tutorial):
    _, printed, summary = tutorial
    assert f"[{math.log(2):.4f}" in printed
    assert f"{summary['dpo']['loss'][-1]:.4f}" in printed
    assert f"{summary['sft']['mean_expected_reward']:.4f}" in printed
    assert all(f"{entry['mean_sampled_reward']:.4f}" in printed for entry in summary["ablation"])


@pytest.mark.slow
def test_many_seeds_are_summarised_too(tmp_path):
    done = run("--seed", "3", "--num-seeds", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["over_seeds"]["num_seeds"] == 3
    assert "3 seeds, mean ± standard error" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-seeds", "0"], "--num-seeds must be at least 1, got 0"),
        pytest.param(["--seed", "-1"], "--seed must be at least 0, got -1", marks=pytest.mark.slow),
        pytest.param(["--out", str(SCRIPT)], "File exists", marks=pytest.mark.slow),
    ],
)
def test_bad_options_end_in_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
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
