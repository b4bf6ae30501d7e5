"""The page of rankings: its code runs, and its numbers are those of the reported results."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import votes
from experiments import vote_coverage
from experiments.lab import page

PAGE = Path(votes.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_code_runs(as_users_have_it, monkeypatch, capsys):
    monkeypatch.chdir(Path(votes.__file__).parents[2])
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, scope)
    assert float(capsys.readouterr().out) < 0.001
    assert 0.8 < scope["comparison"].better < 0.99
    spread = np.sqrt(np.diag(scope["covariance"])[:8])
    np.testing.assert_allclose(scope["refits"].std(axis=0), spread, rtol=0.3)


def test_the_answer_in_words_is_that_of_the_reported_results():
    rows = (page.REPORTED / "fit_comparisons" / "summary.json").read_text(encoding="utf-8")
    overall = json.loads(rows)["rankings"]["overall"]
    with (page.REPORTED / "fit_comparisons" / "pairs.csv").open(newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if (row["response"], row["opponent"]) == ("Sencha", "Assam"))
    share, low, high = (float(row[name]) for name in ("win_probability", "low", "high"))
    met = int(row["wins"]) + int(row["losses"]) + int(row["ties"])
    assert f"against Assam is {share:.0%} ({low:.0%} to {high:.0%}). They met in {met} of the votes." in PAGE
    best, second = overall[:2]
    assert (best["response"], second["response"]) == ("Sencha", "Assam")
    for page_ in (PAGE, Path(votes.__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")):
        assert f"that Sencha is better is {best['better_than_next']:.1%}" in " ".join(
            page_.replace("\n> ", " ").split()
        )


def test_the_table_is_that_of_the_reported_results():
    summary = json.loads((page.REPORTED / "vote_coverage" / "summary.json").read_text(encoding="utf-8"))
    assert page.between(PAGE, "vote_coverage") == page.table(*vote_coverage.table(summary["coverage"]))
    shares = {(entry["votes"], entry["method"], entry["of"]): entry["mean"] for entry in summary["coverage"]}
    assert all(0.93 < share < 0.97 for (_, method, _), share in shares.items() if method == "curvature")
    assert all(0.93 < share < 0.97 for (num, method, _), share in shares.items() if num > 50)
    assert all(share < 0.93 for (num, method, _), share in shares.items() if num == 50 and method == "bootstrap")
