"""The walk through strings as a user runs it: one run for all tests of the script, one for the notebook."""

import json

import pytest

from tests.experiments import walks

SCRIPT = walks.ROOT / "experiments" / "strings_tutorial.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


@pytest.mark.slow
def test_its_results_make_sense(tmp_path):
    done = walks.run("experiments.strings_tutorial", "--seed", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "tree.png"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    policies, beta = summary["policies"], summary["beta"]
    merit = {name: found["expected_reward"] - beta * found["kl_to_reference"] for name, found in policies.items()}
    assert max(merit, key=merit.get) == "optimum"
    fond, truthful = (
        policies[f"DPO, {judge}"]["expected_length"] for judge in ("judge fond of length", "truthful judge")
    )
    assert policies["R-DPO, judge fond of length"]["expected_length"] < fond > truthful
    assert 0.5 < summary["credit"] < 1
    for found in policies.values():
        assert f"{found['expected_reward']:.3f}" in done.stdout


def test_script_and_notebook_are_the_same_walk():
    assert walks.cells_of(SCRIPT) == walks.cells_of(NOTEBOOK)


def test_the_notebook_comes_with_its_outputs():
    outputs = walks.outputs_of(NOTEBOOK)
    assert {"image/png", "text/html"} <= {kind for output in outputs for kind in output.get("data", {})}
    assert not any(output.output_type in ("error", "stream") for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    assert (walks.run_notebook(NOTEBOOK, tmp_path) / "summary.json").exists()
