import csv
import json
import math

import numpy as np
import pytest

from dpo_jax import votes
from dpo_jax.types import Pair
from experiments import example_comparisons
from experiments.fit_comparisons import __main__ as command
from experiments.fit_comparisons.held_out import Split, evaluate, predict
from experiments.fit_comparisons.ranking import Model, with_effective_weights
from experiments.fit_comparisons.report import sureness
from experiments.lab import devices

EXAMPLE = example_comparisons.PATH


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)


def run(out, file=EXAMPLE, **options):
    command.main(command.Options(file, out=out, **{"num_fits": 20, **options}))
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "enable_compilation_cache", lambda: None)
        return out, run(out)


def write(path, text):
    path.write_text(text)
    return path


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_example_is_what_its_script_makes():
    with EXAMPLE.open(newline="", encoding="utf-8") as file:
        assert [tuple(row) for row in csv.reader(file)] == example_comparisons.rows()


@pytest.mark.slow
def test_it_writes_results_and_nothing_else(finished):
    out, summary = finished
    tables = {"ranking.csv", "pairs.csv", "calibration.csv", "summary.json"}
    assert {path.name for path in out.iterdir()} == tables | {
        "strengths.png",
        "win_probabilities.png",
        "calibration.png",
    }
    test = summary["test"]
    assert (test["num_training"], test["num_held_out"]) == (480, 120)
    assert test["accuracy"]["mean"] > 0.5 + 2 * test["accuracy"]["stderr"]
    assert summary["history"]["held_out_accuracy"][-1] == pytest.approx(test["accuracy"]["mean"])
    assert summary["history"]["loss"][0] == pytest.approx(math.log(2), rel=1e-5)
    assert summary["history"]["loss"] == sorted(summary["history"]["loss"], reverse=True)
    assert sum(entry["votes"] for entry in test["calibration"]) == 120


@pytest.mark.slow
def test_rankings_are_of_all_votes_and_complete(finished):
    out, summary = finished
    assert list(summary["rankings"]) == ["overall", *votes.read(EXAMPLE).columns["prompt"].names]
    for name, ranking in summary["rankings"].items():
        assert [entry["rank"] for entry in ranking] == list(range(1, len(ranking) + 1))
        strengths = [entry["strength"] for entry in ranking]
        assert strengths == sorted(strengths, reverse=True)
        assert abs(np.mean(strengths)) < 1e-5
        for entry in ranking:
            assert entry["low"] < entry["strength"] < entry["high"]
            assert 1 <= entry["rank_low"] <= entry["rank_high"] <= len(ranking)
        if name == "overall":
            assert sum(entry["wins"] for entry in ranking) == sum(entry["losses"] for entry in ranking) == 600
    rows = table(out / "ranking.csv")
    assert [row["response"] for row in rows if row["category"] == "overall"] == [
        entry["response"] for entry in summary["rankings"]["overall"]
    ]
    assert sum(int(row["wins"]) for row in rows) == 1200


@pytest.mark.slow
def test_matrices_and_pairs_say_the_same(finished):
    out, summary = finished
    rows = table(out / "pairs.csv")
    for name, matrix in summary["win_probabilities"].items():
        place = {response: i for i, response in enumerate(matrix["responses"])}
        fitted, observed = (np.array(matrix[key], float) for key in ("fitted", "observed"))
        np.testing.assert_allclose(fitted + fitted.T, np.where(np.eye(len(place)), np.nan, 1), atol=1e-5)
        for row in (row for row in rows if row["category"] == name):
            i, j = place[row["response"]], place[row["opponent"]]
            assert fitted[i, j] >= 0.5
            total = sum(int(row[key]) for key in ("wins", "losses", "ties"))
            if total:
                share = (int(row["wins"]) + int(row["ties"]) / 2) / total
                np.testing.assert_allclose([observed[i, j], observed[j, i]], [share, 1 - share])
                assert float(row["low"]) < float(row["win_probability"]) < float(row["high"])


@pytest.mark.slow
def test_wins_in_pairs_add_up_to_those_of_the_rankings(finished):
    out, summary = finished
    for name, ranking in summary["rankings"].items():
        wins = dict.fromkeys((entry["response"] for entry in ranking), 0)
        for row in (row for row in table(out / "pairs.csv") if row["category"] == name):
            wins[row["response"]] += int(row["wins"])
            wins[row["opponent"]] += int(row["losses"])
        assert wins == {entry["response"]: entry["wins"] for entry in ranking}


@pytest.mark.slow
def test_known_odds_are_recovered_with_everything_that_a_file_may_hold(tmp_path, capsys):
    """Of two responses, x wins three times as often as y, whoever judges; one vote in nine is a tie."""
    rows = ["model_a,model_b,winner,judge,first,language,height"]
    rows += ["x,y,model_a,me,a,en,1", "y,x,x,you,a,en,1"] * 150 + ["x,y,y,me,a,en,2", "y,x,y,you,a,en,2"] * 50
    rows += ["x,y,tie,me,,de,1"] * 50
    path = write(tmp_path / "votes.csv", "\n".join(rows))
    options = {"by": "language", "clusters": "judge", "compare": ("y", "x"), "prior": 0.0, "ties": "davidson"}
    summary = run(tmp_path / "out", path, **options)
    (best, worst), printed = summary["rankings"]["overall"], " ".join(capsys.readouterr().out.split())
    assert (best["response"], best["wins"], best["losses"], best["ties"]) == ("x", 300, 100, 50)
    assert best["strength"] - worst["strength"] == pytest.approx(math.log(3), abs=1e-3)
    assert list(summary["rankings"]) == ["overall", "en", "de"]
    assert "Columns that are not used: 'height'." in printed
    assert "overall: y is worse than x." in printed
    assert summary["shown_first"]["win_probability"] == pytest.approx(0.5, abs=1e-3)
    assert "the one shown first wins with probability 50.0%" in printed
    assert "2 judges. Two of them" in printed
    assert [row["judge"] for row in table(tmp_path / "out" / "judges.csv")] == ["me", "you", "overall"]


def test_three_votes_prove_little(tmp_path, capsys):
    path = write(tmp_path / "votes.csv", "chosen,rejected\n" + "a,b\n" * 3)
    summary = run(tmp_path / "out", path, held_out=0.0, num_fits=200, compare=("a", "b"))
    assert summary["test"] is None
    assert summary["history"] == {}
    assert len(summary["warnings"]) == 2
    assert list(summary["rankings"]) == ["overall"]
    best = summary["rankings"]["overall"][0]
    assert 0.7 < 1 / (1 + math.exp(-2 * best["strength"])) < 0.95
    assert not (tmp_path / "out" / "calibration.png").exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert "a never lost in 3 votes" in printed
    assert ("a and b are not separable" in printed) == (best["low"] < 0)


@pytest.mark.slow
def test_without_a_prior_what_has_no_maximum_has_no_strength(tmp_path):
    rows = "q,a,b\nq,b,a\nq,a,b\nr,a,b\nr,a,b\n"
    summary = run(
        tmp_path / "out", write(tmp_path / "v.csv", "prompt,chosen,rejected\n" + rows), prior=0.0, held_out=0.0
    )
    assert [entry["strength"] for entry in summary["rankings"]["r"]] == [None, None]
    assert summary["rankings"]["q"][0]["strength"] == pytest.approx(math.log(2) / 2, abs=1e-3)
    assert [sentence for sentence in summary["warnings"] if "(r)" in sentence]


def test_accuracy_and_majority_by_hand():
    chosen, rejected = np.array([(1, 0), (1, 0), (0, 1), (2, 0), (0, 1), (1, 0), (0, 2), (1, 2)]).T
    contest = votes.entrants(votes.Votes(Pair(chosen, rejected)))
    parts = Split(np.arange(4), np.arange(4, 8))
    model = Model()
    test, _ = evaluate(contest, parts, model)
    assert test["majority_accuracy"]["mean"] == (0 + 1 + 0 + 0.5) / 4  # (1, 2) was never seen
    assert test["accuracy"]["mean"] == (0 + 1 + 0 + 0) / 4  # 2 won against 0, and is put before 1
    weighted = contest._replace(votes=contest.votes._replace(weights=np.array([1.0] * 4 + [3, 1, 1, 1])))
    test, _ = evaluate(weighted, parts, model)
    assert test["majority_accuracy"]["mean"] == (0 + 1 + 0 + 0.5) / 6
    tied = contest._replace(votes=contest.votes._replace(ties=np.arange(8) > 5))
    assert evaluate(tied, parts, model)[0]["accuracy"]["mean"] == (0 + 1 + 0.5 + 0.5) / 4


def test_being_shown_first_counts_in_predictions():
    ballots = votes.Votes(Pair(np.array([0, 0, 0]), np.array([1, 1, 1])), first=np.array([1, -1, 0]))
    fitted = votes.Fit(np.array([0.1, -0.1]), 0.0, first=0.5, ties=0.0, steps=1, last_step=0.0)
    predicted = predict(fitted, ballots, Model())
    np.testing.assert_allclose(predicted.margins, [0.7, -0.3, 0.2])
    assert predicted.right.tolist() == [1, 0, 1]


def test_a_vote_is_tied_whatever_rounding_errors_its_weights_have():
    weights = np.array([0.3, 0.6, 0.9, 1.0])  # the sum of the first two is not the third, by one digit
    ballots = votes.Votes(Pair(np.array([0, 0, 1, 0]), np.array([1, 1, 0, 1])), weights=weights)
    test, _ = evaluate(votes.entrants(ballots), Split(np.arange(3), np.array([3])), Model())
    assert test["majority_accuracy"]["mean"] == 0.5


def test_sureness_in_words():
    shares = (float("nan"), 0.7, 0.97, 0.98, 0.9999, 0.0)
    words = ("", "70%: not separable", "97%: not separable", "98.0%", "over 99.9%", "under 0.1%")
    assert tuple(map(sureness, shares)) == words


@pytest.mark.slow
def test_markup_in_names_is_left_alone(tmp_path, capsys):
    path = write(tmp_path / "votes.csv", "prompt,chosen,rejected\n" + "q [bold],[/INST] yes,[red]ok $x$\n" * 20)
    run(tmp_path / "out[x]", path)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("q [bold]", "[/INST] yes", "[red]ok $x$"))


def test_one_heavy_vote_is_about_one_vote():
    ballots = votes.Votes(Pair(np.zeros(10, int), np.ones(10, int)), weights=np.array([0.001] * 9 + [9.991]))
    assert with_effective_weights(ballots).weights.sum() == pytest.approx(1.0, abs=0.01)
    equal = ballots._replace(weights=np.full(10, 3.0))
    np.testing.assert_allclose(with_effective_weights(equal).weights, 1.0)


def test_ties_alone_need_a_prior(tmp_path):
    path = write(tmp_path / "votes.csv", "model_a,model_b,winner\n" + "x,y,tie\n" * 4)
    with pytest.raises(SystemExit, match="all votes are ties"):
        run(tmp_path / "out", path, prior=0.0, ties="davidson")


@pytest.mark.slow
def test_options_matter(tmp_path):
    usual = run(tmp_path)["rankings"]["overall"]
    assert run(tmp_path)["rankings"]["overall"] == usual
    for changes in ({"seed": 1}, {"prior": 20.0}, {"intervals": "bootstrap"}):
        assert run(tmp_path, **changes)["rankings"]["overall"] != usual, changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior": -1.0}, "--prior must be in .0, inf., got -1.0"),
        ({"held_out": 1.0}, "--held-out must be in .0, 1., got 1.0"),
        ({"held_out": 1e-9}, "--held-out 1e-09 of 600 comparisons leaves none"),
        ({"num_fits": 1}, "--num-fits must be at least 2, got 1"),
        ({"by": "judge"}, "no column judge; found prompt, chosen, rejected"),
        ({"clusters": "taster"}, "no column taster; found prompt, chosen, rejected"),
        ({"compare": ("Assam", "Senchaa")}, "--compare: no response 'Senchaa'. Is it 'Sencha'?"),
        ({"file": EXAMPLE.with_name("nowhere.csv")}, "nowhere.csv"),
    ],
)
def test_bad_options_end_in_one_line_and_write_nothing(tmp_path, changes, message):
    options = command.Options(**{"file": EXAMPLE, "out": tmp_path / "out", **changes})
    with pytest.raises(SystemExit, match=message):
        command.main(options)
    assert not (tmp_path / "out").exists()


def test_a_bad_file_ends_in_one_line_and_writes_nothing(tmp_path):
    path = write(tmp_path / "bad.csv", "prompt,chosen,rejected\na,b,b\n")
    with pytest.raises(SystemExit, match="line 2: chosen and rejected are the same, 'b'"):
        command.main(command.Options(path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
