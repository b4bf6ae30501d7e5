"""The walk through a language model as a user runs it: one run for all tests of the script, one for the notebook."""

import json

import pytest

from tests.experiments import walks

SCRIPT = walks.ROOT / "experiments" / "lm_tutorial.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


@pytest.mark.slow
def test_its_results_make_sense(tmp_path):
    done = walks.run("experiments.lm_tutorial", "--seed", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "frontier.png"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    reference, tuned, optimum = (summary[name] for name in ("reference", "tuned", "optimum"))
    assert reference["kl_to_reference"] == pytest.approx(0, abs=1e-4)
    assert reference["expected_reward"] < tuned["expected_reward"] < optimum["expected_reward"]
    assert optimum["regret"] == pytest.approx(0, abs=1e-4)
    assert tuned["regret"] < 0.3 * reference["regret"]
    for name, exact in (("reward", tuned["expected_reward"]), ("kl", tuned["kl_to_reference"])):
        found = summary["sampled"][name]
        assert abs(found["mean"] - exact) < 4 * found["stderr"] < 0.5
    kls = [found["kl_to_reference"] for found in summary["adapters"].values()]
    assert kls == sorted(kls, reverse=True)  # a larger beta stays closer


def test_script_and_notebook_are_the_same_walk():
    assert walks.cells_of(SCRIPT) == walks.cells_of(NOTEBOOK)


def test_the_notebook_comes_with_its_outputs():
    outputs = walks.outputs_of(NOTEBOOK)
    assert {"image/png", "text/html"} <= {kind for output in outputs for kind in output.get("data", {})}
    assert not any(output.output_type in ("error", "stream") for output in outputs)
