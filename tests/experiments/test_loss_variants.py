import json

import numpy as np
import pytest

from experiments import loss_variants
from experiments.lab import devices
from experiments.lab.feedback import SETTINGS
from experiments.lab.methods import METHODS
from experiments.loss_variants import Options, summarise
from tests.experiments.small import PIPELINE

BY_NAME = {method.name: method for method in METHODS}


def test_differences_are_paired():
    def result(rewards):
        told = {"hyperparameters": {"learning_rate": 1e-3, "beta": 1.0}, "at_edge": []}
        results = {"expected_reward": np.array(rewards), "sft_reward": np.array([0.1, 0.5])}
        return {**told, "results": results, "control": {"expected_reward": np.array([0.1, 0.4])}}

    known = {"clean": {"sft": {"expected_reward": np.array([0.1, 0.5])}}}
    summary = summarise({"clean": [result([0.2, 0.6]), result([0.3, 0.8])]}, known, [BY_NAME["dpo"], BY_NAME["ipo"]])
    entry = summary["losses"][1]
    assert (entry["name"], entry["setting"], summary["num_seeds"]) == ("ipo", "clean", 2)
    np.testing.assert_allclose([entry["gain"]["mean"], entry["gain"]["stderr"]], [0.25, 0.05], atol=1e-12)
    np.testing.assert_allclose(entry["gain_over_dpo"]["mean"], 0.15)
    np.testing.assert_allclose(entry["gain_from_labels"]["mean"], 0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_the_script_writes_table_figures_and_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)
    options = Options(num_seeds=3, num_tuning_seeds=2, num_candidates=2, losses=("dpo", "simpo"), out=tmp_path)
    loss_variants.main(options, PIPELINE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(e["name"], e["setting"]) for e in summary["losses"]] == [
        (name, setting) for setting in SETTINGS for name in ("dpo", "simpo")
    ]
    for entry in summary["losses"]:
        for name in ("expected_reward", "kl_to_reference", "regret"):
            assert entry[name].keys() == {"mean", "stderr"}
        assert entry["hyperparameters"].keys() == {"learning_rate", *BY_NAME[entry["name"]].ranges}
        assert entry["gain"]["mean"] == pytest.approx(
            entry["expected_reward"]["mean"] - summary["baselines"]["clean"]["sft"]["expected_reward"]["mean"], abs=1e-6
        )
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "gains.png", "frontiers.png"}
    printed = capsys.readouterr().out
    assert printed.startswith("2 losses on feedback of 4 kinds: 96 runs in 3 worlds, and 2 more for tuning.")
    assert "clean labels, mean and 95% interval" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ("dpo", "dpq")}, "there is no 'dpq'; perhaps 'dpo'"),
        ({"num_candidates": 0}, "--num-candidates must be at least 1, got 0"),
        ({"num_seeds": 0}, "--num-seeds must be at least 1"),
    ],
)
def test_bad_options_end_in_one_line(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        loss_variants.main(Options(**{"out": tmp_path / "out", **options}))
