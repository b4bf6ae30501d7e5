import json

import jax
import numpy as np
import pytest

from experiments import vote_coverage
from experiments.lab import devices


def test_ballots_are_votes_by_the_model():
    truth = np.array([2.0, 0.0, 0.0, 0.0, -2.0])
    _, counts, kinds = vote_coverage.ballots(jax.random.key(0), truth, 20_000)
    table = np.asarray(counts).reshape(5, 5)
    assert table.sum() == 20_000
    assert np.diag(table).sum() == 0
    np.testing.assert_array_equal(np.bincount(kinds, minlength=25), table.ravel())
    expected = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    np.testing.assert_allclose(
        (table / (table + table.T + np.eye(5)))[~np.eye(5, dtype=bool)], expected[~np.eye(5, dtype=bool)], atol=0.04
    )


@pytest.mark.slow
def test_it_counts_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)
    vote_coverage.main(vote_coverage.Options(num_polls=20, num_votes=(30,), num_fits=10, out=tmp_path))
    coverage = json.loads((tmp_path / "summary.json").read_text())["coverage"]
    assert len(coverage) == 4
    assert all(0.5 < entry["mean"] <= 1 for entry in coverage)
    assert "How often 95 % intervals hold the truth" in capsys.readouterr().out
