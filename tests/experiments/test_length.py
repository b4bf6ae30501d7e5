import dataclasses
import json

import numpy as np
import pytest

from experiments import length
from experiments.lab import console, devices, string_worlds
from experiments.lab.string_worlds import JUDGES, STRING_METHODS
from experiments.length import MEASURES, SHOWN, Options, page_table, save_figure, summarise

SIZES = {"num_demonstrations": 64, "num_preferences": 96, "sft_epochs": 4, "num_epochs": 4, "batch_size": 24}
PIPELINE = dataclasses.replace(string_worlds.PIPELINE, **SIZES)
BY_NAME = {method.name: method for method in STRING_METHODS}


SFT = {measure: np.array([0.1, 0.5]) for measure in MEASURES}


def entry(**numbers):
    """Of two worlds; all measures are 0 and 1 but for the given ones."""
    results = {**{measure: np.array([0.0, 1.0]) for measure in MEASURES}, **numbers}
    return {"hyperparameters": {"beta": 0.1}, "at_edge": [], "results": results}


def small_summary(*names):
    found = {
        judge: [entry(merit=np.array([0.3, 0.9]) + i, longer=np.array([1.0, 2.0]) * i) for _ in names]
        for i, judge in enumerate(JUDGES)
    }
    return {"num_seeds": 2, **summarise(found, [BY_NAME[name] for name in names], SFT)}


def test_gains_are_paired_by_world():
    found = small_summary("dpo", "simpo")["losses"][1]
    assert (found["name"], found["judge"]) == ("dpo", "fond of length")
    np.testing.assert_allclose([found["gain"]["mean"], found["gain"]["stderr"]], [1.3, 0.1], atol=1e-12)
    np.testing.assert_allclose([found["longer"]["mean"], found["longer"]["stderr"]], [1.5, 0.5], atol=1e-12)


def test_the_page_has_a_row_for_each_loss_that_is_shown():
    rows = page_table(small_summary("dpo", "simpo", "exo")).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["dpo", "simpo"]
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == [
        *(f"letters, {judge}" for judge in JUDGES),
        "gain, indifferent",
    ]
    shown = console.interval({"mean": 1.5, "stderr": 0.5}, 2, sign=True)
    assert rows[2].split("|")[3].strip() == shown


def test_the_figure_is_made_only_if_there_is_something_to_show(tmp_path):
    save_figure(small_summary("exo"), tmp_path)
    assert not list(tmp_path.iterdir())
    save_figure(small_summary("dpo"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["length.png"]


def test_what_is_shown_exists():
    assert {*SHOWN} <= BY_NAME.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_the_script_writes_table_figure_and_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)
    names = ("dpo", "r-dpo")
    options = Options(num_seeds=3, num_tuning_seeds=2, num_candidates=2, losses=names, out=tmp_path)
    length.main(options, PIPELINE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(e["name"], e["judge"]) for e in summary["losses"]] == [(name, j) for name in names for j in JUDGES]
    for found in summary["losses"]:
        assert found["hyperparameters"].keys() == {"learning_rate", *BY_NAME[found["name"]].ranges}
        for name in ("expected_reward", "kl_to_reference", "regret", "expected_length", "optimal_length"):
            assert found[name].keys() == {"mean", "stderr"}
            assert np.isfinite(found[name]["mean"])
        assert found["longer"]["mean"] == pytest.approx(
            found["expected_length"]["mean"] - found["optimal_length"]["mean"], abs=1e-5
        )
        assert found["merit"]["mean"] == pytest.approx(
            found["expected_reward"]["mean"] - summary["beta"] * found["kl_to_reference"]["mean"], abs=1e-5
        )
        assert found["gain"]["mean"] == pytest.approx(
            found["merit"]["mean"] - summary["sft"]["merit"]["mean"], abs=1e-5
        )
    assert summary["judges"] == {name: judge._asdict() for name, judge in JUDGES.items()}
    assert summary["sft"]["kl_to_reference"]["mean"] == pytest.approx(0, abs=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "length.png"}
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("2 losses, 3 judges: ")
    assert "Judges fond of length, mean and 95% interval" in printed


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
        length.main(Options(**{"out": tmp_path / "out", **options}))
