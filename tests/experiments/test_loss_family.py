import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import figures
from experiments import loss_family
from experiments.lab import devices

REPORTED = Path(loss_family.__file__).parent / "reported" / "loss_family" / "summary.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "enable_compilation_cache", lambda: None)
        loss_family.main(loss_family.Options(out=out))
    return out, json.loads((out / "summary.json").read_text())


def by_title(summary):
    return {family["title"]: family for family in summary["families"]}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.slow
def test_it_writes_the_figure_and_the_curves(finished):
    out, summary = finished
    assert {path.name for path in out.iterdir()} == {"summary.json", "family.png"}
    assert summary["versions"]["jax"] == jax.__version__
    for family in summary["families"]:
        assert all(np.shape(lines) == (2, len(family["x"])) for lines in family["curves"].values())
        assert all(np.all(np.isfinite(lines)) for lines in family["curves"].values())


@pytest.mark.slow
def test_curves_are_the_closed_forms(finished):
    families = by_title(finished[1])
    family = families["Losses of the margin: logistic kin"]
    z = np.array(family["x"])
    np.testing.assert_allclose(family["curves"]["dpo"], [np.log1p(np.exp(-z)), sigmoid(-z)], atol=2e-5)
    family = families["Losses of both log-ratios"]
    c = np.array(family["x"])
    up, down = sigmoid(-c) - sigmoid(c) / 2, -sigmoid(-c) / 2
    np.testing.assert_allclose(family["curves"]["nca"], [up, down], atol=2e-5)
    family = families["Losses of single responses"]
    u = np.array(family["x"])
    np.testing.assert_allclose(family["curves"]["bco, δ = 1"], [sigmoid(1 - u), -sigmoid(u - 1)], atol=2e-5)
    family = families["Losses without a reference"]
    p = np.array(family["x"])
    odds = 2 * np.log(p / (1 - p))
    up, down = 1 + sigmoid(-odds) / (1 - p), -sigmoid(-odds) / p
    np.testing.assert_allclose(family["curves"]["orpo, λ = 1"], [up, down], rtol=2e-5, atol=2e-5)
    family = families["Other divergences than KL"]
    u = np.array(family["x"])
    chi = sigmoid(np.exp(-u) - np.exp(u) - 2 * u) * (1 + np.exp(u))
    np.testing.assert_allclose(family["curves"]["χ² + KL: chi_po"], [np.exp(u) + u, chi], rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_what_is_reported_is_what_it_writes(finished):
    reported, made = by_title(json.loads(REPORTED.read_text())), by_title(finished[1])
    assert reported.keys() == made.keys()
    for title, family in made.items():
        assert reported[title]["curves"].keys() == family["curves"].keys()
        for label, lines in family["curves"].items():
            np.testing.assert_allclose(reported[title]["curves"][label], lines, rtol=1e-4, atol=2e-5, err_msg=label)


def test_the_figure_shows_every_curve_twice_and_names_it_once():
    x, lines = np.linspace(0, 1, 3), (np.zeros(3), np.ones(3))
    family = figures.LossFamily("a title", "x", x, ("up", (-1, 2)), ("down", (-2, 1)), {"one": lines, "two": lines})
    figure = figures.loss_family([family] * 4)
    assert len(figure.axes) == 8
    upper, lower = figure.axes[:2]
    assert [upper.get_ylabel(), upper.get_ylim()] == ["up", (-1, 2)]
    assert [lower.get_ylabel(), lower.get_ylim()] == ["down", (-2, 1)]
    assert [axes.lines[1].get_ydata().tolist() for axes in (upper, lower)] == [[0.0] * 3, [1.0] * 3]
    assert [text.get_text() for text in figure.legends[3].get_texts()] == ["one", "two"]
    assert [text.get_text() for text in figure.texts] == ["a title"] * 4
