"""The tables on the page of results are those of the reported results."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import fast
from experiments import beta_ablation, dpo_vs_rlhf, length, lm_beta_ablation, lm_sentiment, loss_variants
from experiments.benchmark import report
from experiments.lab import page
from experiments.lm_benchmark import __main__ as lm_benchmark
from experiments.lm_benchmark import described

PAGE = page.PAGE.read_text(encoding="utf-8")


def reported(name):
    return json.loads((page.REPORTED / name / "summary.json").read_text(encoding="utf-8"))


SCRIPTS = [beta_ablation, dpo_vs_rlhf, length, loss_variants]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_table_is_that_of_its_reported_results(script):
    name = script.__name__.rpartition(".")[2]
    assert page.between(PAGE, name) == script.page_table(reported(name))


def test_what_is_said_of_sharpening_is_what_was_measured():
    summary = reported("loss_variants")
    (dpo,) = (e for e in summary["losses"] if (e["name"], e["setting"]) == ("dpo", "clean"))
    sharpened = summary["baselines"]["clean"]["sharpened"]
    at_its_kl = np.interp(
        dpo["kl_to_reference"]["mean"],
        sharpened["kl_to_reference"]["mean"],
        sharpened["expected_reward"]["mean"],
    )
    said = f"earns {at_its_kl:.3f} at the KL where DPO on clean labels earns {dpo['expected_reward']['mean']:.3f}"
    assert said in " ".join(PAGE.split())


def test_the_tables_of_speed_are_those_of_the_reported_benchmark():
    for name, table in report.page_tables(reported("benchmark")).items():
        assert page.between(PAGE, name) == table


@pytest.mark.parametrize("script", [lm_beta_ablation, lm_benchmark, lm_sentiment], ids=lambda script: script.__name__)
def test_a_table_of_language_models_is_that_of_its_reported_results(script):
    name = script.page_table.__module__.removesuffix(".__main__").rpartition(".")[2]
    text = page.LANGUAGE_MODELS.read_text(encoding="utf-8")
    assert page.between(text, name) == script.page_table(reported(name))


@pytest.mark.parametrize("device", ["h200", "v5e"])
def test_the_memory_of_language_models_on_described_devices_is_that_of_the_report(device):
    text, name = page.LANGUAGE_MODELS.read_text(encoding="utf-8"), f"lm_described_{device}"
    assert page.between(text, name) == described.page_table(reported(name))


@pytest.mark.parametrize("device", ["h200", "v5e"])
def test_what_described_devices_would_do_is_that_of_the_report(device):
    text = " ".join((Path(fast.__file__).parent / "README.md").read_text(encoding="utf-8").split())
    summary = reported(f"described_devices/{device}")
    assert f"{summary['kernels_per_step']:.0f} kernels a step" in text
    assert f"{summary['bytes_per_step_and_run']:,.0f} bytes per step and run" in text
    if device == "h200":
        times = summary["bytes_per_step_and_run"] / summary["least_bytes_per_step_and_run"]
        assert f"{times:.1f} times the least" in text
        assert f"notebooks take about {summary['seconds_at_least_for_100000']:.1f} s at least" in text
    else:
        assert f"{summary['num']} notebooks take {summary['memory']['temp'] / 1e6:.0f} MB of temporaries" in text


def test_a_table_is_written_between_its_markers_and_only_for_reported_results(tmp_path, monkeypatch):
    copy = tmp_path / "README.md"
    copy.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n", encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", copy)
    monkeypatch.setattr(page, "REPORTED", tmp_path / "reported")
    page.update({"x": "new"}, tmp_path / "elsewhere" / "x")
    assert "old" in copy.read_text()
    page.update({"x": page.table(["β", "n"], [["1", "2"]], numbers=True)}, tmp_path / "reported" / "x")
    assert copy.read_text() == "a\n<!-- x -->\n| β | n |\n| --- | ---: |\n| 1 | 2 |\n<!-- end of x -->\nb\n"
    with pytest.raises(ValueError, match="no markers <!-- y -->"):
        page.update({"y": "new"}, tmp_path / "reported" / "y")
