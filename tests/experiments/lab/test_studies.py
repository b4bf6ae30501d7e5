"""How studies begin and end."""

import json
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from experiments.lab import devices, studies


@dataclass(frozen=True)
class Options(studies.Options):
    num_candidates: int = 4
    losses: tuple[str, ...] = ()
    quick: bool = True


@pytest.fixture(autouse=True)
def without_a_cache(monkeypatch):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"num_seeds": 1}, "--num-seeds must be at least 2, got 1"),
        ({"num_tuning_seeds": 0}, "--num-tuning-seeds must be at least 1, got 0"),
        ({"num_candidates": 0}, "--num-candidates must be at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_options_end_the_command_before_anything_is_made(tmp_path, wrong, message):
    with pytest.raises(SystemExit, match=message):
        studies.begin(Options(**wrong), tmp_path / "out", at_least=2)
    assert not (tmp_path / "out").exists()


def test_worlds_are_prepared_for_reports_and_for_tuning(tmp_path, key):
    study = studies.begin(Options(seed=3, num_seeds=2, num_tuning_seeds=3), tmp_path)
    starts = study.prepare(lambda key: key, "keys")
    assert list(starts.seeds) == [0, 1, 2, 3, 4]
    assert (list(study.seeds.reported), list(study.seeds.tuning)) == ([0, 1], [2, 3, 4])


def test_sweeps_have_the_seed_last_and_are_split_by_it(tmp_path):
    study = studies.begin(Options(num_seeds=2, num_tuning_seeds=3), tmp_path)
    starts = study.prepare(lambda key: jax.random.uniform(key), "numbers")
    found = study.grid(lambda start, *, scale: {"x": scale * start}, starts, lambda _: None, scale=[1.0, 2.0])
    np.testing.assert_allclose(found["x"], np.outer([1, 2], starts.values), rtol=1e-6)
    parts = study.split(found)
    assert parts.keys() == {"reported", "tuning"} and study.seconds.run > 0
    np.testing.assert_array_equal(parts["reported"]["x"], found["x"][:, :2])
    np.testing.assert_array_equal(parts["tuning"]["x"], found["x"][:, 2:])


def test_a_summary_has_sizes_results_and_provenance(tmp_path, capsys):
    study = studies.begin(Options(), tmp_path)
    study.announce("12 runs")
    study.seconds.count(type("Results", (), {"attrs": {"compile_seconds": 2.0, "run_seconds": 3.0}}))
    saved = study.save({"losses": [1.0]})
    study.end()
    found = json.loads((tmp_path / "summary.json").read_text())
    sizes = ["seed", "num_seeds", "num_tuning_seeds", "num_candidates"]
    assert list(found) == [*sizes, "losses", "seconds", "device", "versions"]
    assert found["seconds"] == {"total": pytest.approx(saved["seconds"]["total"]), "compile": 2.0, "run": 3.0}
    printed = " ".join(capsys.readouterr().out.split())
    assert "12 runs in 64 worlds, and 32 more for tuning." in printed
    assert "s in all; sweeps took 2 s to compile and 3 s to run." in printed
