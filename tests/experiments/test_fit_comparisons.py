import csv
import json

import numpy as np
import pytest

from dpo_jax import toy
from dpo_jax.types import Pair, Preferences
from experiments import example_comparisons, fit_comparisons
from experiments.lab import devices, files

EXAMPLE = example_comparisons.PATH


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "enable_compilation_cache", lambda: None)
        fit_comparisons.main(fit_comparisons.Options(EXAMPLE, out=out))
    return out, json.loads((out / "summary.json").read_text())


def test_the_example_is_what_its_script_makes():
    with EXAMPLE.open(newline="", encoding="utf-8") as file:
        assert [tuple(row) for row in csv.reader(file)] == example_comparisons.rows()


def test_it_writes_results_and_nothing_else(finished):
    out, summary = finished
    assert {path.name for path in out.iterdir()} == {"policy.npz", "ranking.csv", "training.png", "summary.json"}
    test = summary["test"]
    assert test["num_training"] + test["num_held_out"] == 600
    assert test["num_held_out"] == 120
    assert test["accuracy"]["mean"] > 0.5 + 2 * test["accuracy"]["stderr"]
    assert len(summary["history"]["held_out_loss"]) == 100
    assert summary["history"]["held_out_accuracy"][-1] == pytest.approx(test["accuracy"]["mean"])


def test_the_saved_policy_ranks_as_the_ranking_says(finished):
    out, _ = finished
    policy = toy.load_policy(out / "policy.npz")
    with (out / "ranking.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["prompt"] for row in rows} == set(example_comparisons.TIMES)
    for time in example_comparisons.TIMES:
        ranked = [(row["response"], float(row["probability"])) for row in rows if row["prompt"] == time]
        expected = policy.ranking(time)
        assert [name for name, _ in ranked] == [name for name, _ in expected]
        np.testing.assert_allclose([p for _, p in ranked], [p for _, p in expected], rtol=1e-5)


def test_the_policy_recovers_known_odds(tmp_path):
    """Of two responses, a wins three times as often as b: with beta = 1 it gets three times the probability."""
    path = tmp_path / "votes.csv"
    path.write_text("prompt,chosen,rejected\n" + "q,a,b\n" * 300 + "q,b,a\n" * 100)
    options = fit_comparisons.Options(path, held_out=0.01, out=tmp_path / "out")
    fit_comparisons.main(options)
    ranking = dict(toy.load_policy(tmp_path / "out" / "policy.npz").ranking("q"))
    assert ranking["a"] / ranking["b"] == pytest.approx(3.0, rel=0.05)


def test_accuracy_and_majority_by_hand():
    names = toy.Names(("q",), (("a", "b", "c"),))
    policy = toy.NamedPolicy(names, np.log([[0.5, 0.3, 0.2]]), np.log([[1 / 3] * 3]))

    def preferences(pairs, weights=None):
        chosen, rejected = np.array(pairs).T
        return Preferences(np.zeros(len(pairs), int), Pair(chosen, rejected), weights)

    training = preferences([(1, 0), (1, 0), (0, 1), (2, 0)])
    held_out = preferences([(0, 1), (1, 0), (0, 2), (1, 2)])
    test = fit_comparisons.evaluate(policy, training, held_out)
    assert test["accuracy"]["mean"] == 0.75  # all but (1, 0)
    assert test["majority_accuracy"]["mean"] == (0 + 1 + 0 + 0.5) / 4  # (1, 2) was never seen
    weighted = fit_comparisons.evaluate(policy, training, preferences([(0, 1), (1, 0)], np.array([3.0, 1.0])))
    assert weighted["accuracy"]["mean"] == 0.75
    np.testing.assert_allclose(weighted["accuracy"]["stderr"], 0.75 * 0.25 * np.sqrt(2))


def test_weights_average_one_in_both_parts_and_accuracies_are_shares(tmp_path):
    path = tmp_path / "weighted.csv"
    path.write_text("prompt,chosen,rejected,weight\n" + "q,a,b,1\nq,a,c,60\n" * 20)
    options = fit_comparisons.Options(path, out=tmp_path / "out", num_epochs=20)
    for part in fit_comparisons.split(options, toy.read_comparisons(path).preferences):
        assert part.weights.mean() == pytest.approx(1.0)
    fit_comparisons.main(options)
    history = json.loads((tmp_path / "out" / "summary.json").read_text())["history"]
    assert history["held_out_accuracy"][-1] == pytest.approx(1.0)
    assert history["accuracy"][-1] == pytest.approx(1.0)


def test_ties_count_half_wherever_an_accuracy_stands(tmp_path, capsys):
    """Of 50 prompts compared once each, those held out were never seen: all ties."""
    path = tmp_path / "votes.csv"
    path.write_text("\n".join(["prompt,chosen,rejected,judge", *(f"{i},a,b,me" for i in range(50))]))
    fit_comparisons.main(fit_comparisons.Options(path, out=tmp_path / "out", num_epochs=1))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    test = summary["test"]
    assert (test["accuracy"]["mean"], test["majority_accuracy"]["mean"], test["gain"]["mean"]) == (0.5, 0.5, 0.0)
    assert summary["history"]["held_out_accuracy"] == [0.5]
    assert summary["history"]["accuracy"] == [1.0]
    assert "Columns that are not used: 'judge'." in capsys.readouterr().out


def test_a_vote_is_tied_whatever_rounding_errors_its_weights_have():
    names = toy.Names(("q",), (("a", "b"),))
    policy = toy.NamedPolicy(names, np.log([[0.5, 0.5]]), np.log([[0.5, 0.5]]))
    weights = np.array([0.3, 0.6, 0.9], np.float32)  # the sum of the first two is not the third, by one digit
    training = Preferences(np.zeros(3, int), Pair(np.array([0, 0, 1]), np.array([1, 1, 0])), weights)
    test = fit_comparisons.evaluate(policy, training, training._replace(weights=None))
    assert test["majority_accuracy"] == {"mean": 0.5, "stderr": 0.0}
    assert test["accuracy"] == {"mean": 0.5, "stderr": 0.0}


def test_markup_in_names_is_left_alone(tmp_path, capsys):
    path = tmp_path / "votes.csv"
    path.write_text("prompt,chosen,rejected\n" + "q [bold],[/INST] yes,[red]ok\n" * 20)
    fit_comparisons.main(fit_comparisons.Options(path, out=tmp_path / "out[x]", num_epochs=2))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("q [bold]", "[/INST] yes", "[red]ok"))
    assert (tmp_path / "out[x]" / "policy.npz").exists()


@pytest.mark.slow
def test_options_matter(tmp_path):
    def ranking(**changes):
        options = fit_comparisons.Options(EXAMPLE, num_epochs=5, out=tmp_path / "out", **changes)
        fit_comparisons.main(options)
        with (tmp_path / "out" / "ranking.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    usual = ranking()
    assert ranking() == usual
    for changes in ({"seed": 1}, {"label_smoothing": 0.3}, {"beta": 0.3}):
        assert ranking(**changes) != usual, changes
    first, last = usual[0], usual[len(example_comparisons.TEAS) - 1]
    assert int(float(first["wins"])) > int(float(first["losses"]))
    assert int(float(last["wins"])) < int(float(last["losses"]))
    assert float(first["implicit_reward"]) > 0 > float(last["implicit_reward"])


def test_divergence_ends_in_one_line(tmp_path):
    options = fit_comparisons.Options(EXAMPLE, learning_rate=3e38, out=tmp_path / "out")
    with pytest.raises(SystemExit, match="not finite in step"):
        fit_comparisons.main(options)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "--beta must be in .0, inf., got 0.0"),
        ({"learning_rate": -1.0}, "--learning-rate must be in .0, inf., got -1.0"),
        ({"label_smoothing": 0.5}, "--label-smoothing must be in .0, 0.5., got 0.5"),
        ({"held_out": 1.0}, "--held-out must lie between 0 and 1, got 1.0"),
        ({"held_out": 1e-9}, "--held-out 1e-09 of 600 comparisons leaves none"),
        ({"num_epochs": 0}, "--num-epochs must be at least 1, got 0"),
        ({"file": EXAMPLE.with_name("nowhere.csv")}, "nowhere.csv"),
    ],
)
def test_bad_options_end_in_one_line_and_write_nothing(tmp_path, changes, message):
    options = fit_comparisons.Options(**{"file": EXAMPLE, "out": tmp_path / "out", **changes})
    with pytest.raises(SystemExit, match=message):
        fit_comparisons.main(options)
    assert not (tmp_path / "out").exists()


def test_a_bad_file_ends_in_one_line_and_writes_nothing(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("prompt,chosen,rejected\na,b,b\n")
    with pytest.raises(SystemExit, match="line 2: chosen and rejected are the same, 'b'"):
        fit_comparisons.main(fit_comparisons.Options(path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half(unfinished):
        unfinished.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.save(path, write_half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
