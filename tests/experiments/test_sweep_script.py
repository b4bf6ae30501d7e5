import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import sweep as script
from experiments.lab import methods
from tests.experiments.small import PIPELINE

grid_module = sys.modules["dpo_jax.sweep.grid"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep: its options, and what it printed."""
    options = script.Options(
        loss=("dpo", "orpo"), beta=(0.1, 0.5), learning_rate=(1e-3, 3e-3), num_seeds=3, out=tmp_path_factory.mktemp("s")
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        script.main(options, PIPELINE)
    return options, said.getvalue()


@pytest.fixture
def options(swept):
    return swept[0]


@pytest.mark.slow
def test_tables_and_figures_say_what_the_runs_said(swept):
    options, said = swept
    runs = pq.read_table(options.out / "runs.parquet").to_pandas()
    assert len(runs) == 2 * 2 * 2 * 3
    with (options.out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        here = runs[(runs.loss == row["loss"]) & np.isclose(runs.beta, float(row["beta"]))]
        here = here[np.isclose(here.learning_rate, float(row["learning_rate"]))]
        assert float(row["expected_reward_mean"]) == pytest.approx(here.expected_reward.mean(), rel=1e-6)
        assert float(row["gain_stderr"]) == pytest.approx(
            (here.expected_reward - here.sft_reward).std() / 3**0.5, rel=1e-4
        )
        dpo = runs[(runs.loss == "dpo") & (runs.beta == here.beta.iloc[0])]
        dpo = dpo[dpo.learning_rate == here.learning_rate.iloc[0]]
        difference = here.expected_reward.mean() - dpo.expected_reward.mean()
        assert float(row["expected_reward_difference_mean"]) == pytest.approx(difference, abs=1e-6)
    assert {path.name for path in options.out.glob("*.png")} == {"reward.png", "frontier.png", "heat_map.png"}
    assert json.loads((options.out / "summary.json").read_text())["options"]["num_seeds"] == 3
    assert {"orpo", "first"} <= set(said.split()), "a row for each loss, and its gain over the first one"
    orpo = runs[runs.loss == "orpo"]  # has no beta
    assert np.allclose(orpo[orpo.beta == 0.1].expected_reward, orpo[orpo.beta == 0.5].expected_reward)
    assert not np.allclose(runs[runs.beta == 0.1].expected_reward[:6], runs[runs.beta == 0.5].expected_reward[:6])


@pytest.mark.usefixtures("as_users_have_it")
def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "summary.csv").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds other files \(summary.csv\) and no sweep"):
        script.main(script.Options(num_seeds=1, out=tmp_path), PIPELINE)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]
    assert (tmp_path / "summary.csv").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_one_seed_has_no_interval(tmp_path, capsys):
    script.main(script.Options(num_seeds=1, beta=(0.5, 0.1), out=tmp_path), PIPELINE)
    assert "±" not in capsys.readouterr().out.split("dpo")[-1]
    with (tmp_path / "summary.csv").open() as file:
        assert all(np.isnan(float(row["gain_stderr"])) for row in csv.DictReader(file))


@pytest.mark.usefixtures("as_users_have_it")
def test_stopped_from_outside_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    for stopped, code in ((KeyboardInterrupt(), 130), (SystemExit(143), 143)):
        monkeypatch.setattr(script.sweep, "grid", lambda stopped=stopped, **_: (_ for _ in ()).throw(stopped))
        with pytest.raises(SystemExit) as ended:
            script.main(script.Options(num_seeds=2, out=tmp_path), PIPELINE)
        assert ended.value.code == code
        assert "the same command goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_ends_the_command_with_one_line(tmp_path):
    def begin(name):
        out, script = tmp_path / name, [sys.executable, "-m", "experiments.sweep", "--num-seeds", "2", "--loss"]
        options = ["dpo", "ipo", "simpo", "orpo", "--out", str(out)]
        environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        return out, subprocess.Popen([*script, *options], stdout=-1, stderr=-2, text=True, env=environment)

    processes = {number: begin(number.name) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, (out, process) in processes.items():
        while not out.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)  # into tracing or compiling
        process.send_signal(number)
    for number, (_, process) in processes.items():
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert said == "Stopped. What is done is stored: the same command goes on from there.\n"


def test_a_loop_of_links_is_told_in_one_line(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(SystemExit, match="error: .*out is in a loop of symbolic links"):
        script.main(script.Options(num_seeds=1, out=tmp_path / "out"), PIPELINE)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_the_same_command_goes_on_and_another_one_is_refused(options, monkeypatch):
    computed = []
    monkeypatch.setattr(grid_module, "_dispatched", lambda work, blocks: iter(computed.extend(blocks) or ()))
    script.main(options, PIPELINE)
    assert computed == []
    with pytest.raises(SystemExit, match="holds another sweep: key was"):
        script.main(replace(options, seed=1), PIPELINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": ("dop",)}, "did you mean 'dpo'"),
        ({"loss": ("dpo", "dpo")}, "--loss names a loss twice"),
        ({"beta": (-1.0,)}, "--beta must be in .0, inf."),
        ({"beta": ()}, "axis beta has no values"),
        ({"label_noise": (2.0,)}, "--label-noise"),
        ({"fixed": {"gama": 1.0}}, "no loss has 'gama'"),
        ({"vary": ("gamma=1,2",)}, "--vary: no loss has 'gamma'; there are: label_smoothing"),
        ({"loss": ("simpo",), "vary": ("gamma",)}, "--vary must be a name and numbers, as in gamma=0.5,1,2"),
        ({"loss": ("nowhere.py:mine",)}, "there is no file nowhere.py"),
        ({"loss": ("nowhere.py",)}, "name a function of the file, as in nowhere.py:my_loss"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"fixed": {"label_smoothing": float("nan")}}, "--fixed label_smoothing must be finite"),
        ({"log_every": 0.0}, "--log-every must be in .0, inf."),
    ],
)
def test_bad_options_end_with_one_line(tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        script.main(script.Options(**{"out": tmp_path / "out", "num_seeds": 2, **change}), PIPELINE)


@pytest.mark.usefixtures("as_users_have_it")
def test_a_dry_run_says_how_much_there_is_to_do(tmp_path, capsys):
    script.main(script.Options(num_seeds=5, dry_run=True, out=tmp_path / "none"), PIPELINE)
    said = capsys.readouterr().out
    assert "20 runs: 4 points, 5 seeds each" in said
    assert "1 programs (traced: beta, learning_rate, label_noise; static: loss)" in said
    assert "0 are done already" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_a_dry_run_says_how_much_is_done(options, capsys):
    script.main(replace(options, dry_run=True), PIPELINE)
    assert "2 are done already" in capsys.readouterr().out


FOCAL = """
import jax
from dpo_jax import losses

def margin_loss(policy, reference, *, beta, gamma):
    return jax.nn.softplus(gamma - beta * (policy[0] - policy[1] - reference[0] + reference[1]))

def focal_loss(policy, reference, *, beta, focus):
    ratios = losses.log_ratios(policy, reference)
    wrong = jax.nn.sigmoid(-beta * (ratios.chosen - ratios.rejected))
    return -(wrong**focus) * jax.numpy.log1p(-wrong)
"""


def test_values_that_nobody_chose_are_those_of_the_losses():
    dpo, simpo = methods.OF_PAIRS["dpo"], methods.OF_PAIRS["simpo"]
    assert script.hyperparameters(dpo, {"beta": 0.1}) == {"beta": 0.1}, "its smoothing stays at its default"
    assert script.hyperparameters(dpo, {"beta": 0.1, "label_smoothing": 0.2, "gamma": 1})["label_smoothing"] == 0.2
    assert script.hyperparameters(simpo, {"beta": 2.0}) == {"beta": 2.0, "gamma": 0.1}
    assert script.hyperparameters(simpo, {"beta": 2.0, "gamma": 0.7})["gamma"] == 0.7


@pytest.mark.usefixtures("as_users_have_it")
def test_a_loss_of_ones_own_must_be_in_its_file_and_have_its_hyperparameters(tmp_path):
    file = tmp_path / "my_losses.py"
    file.write_text(FOCAL)
    options = script.Options(beta=(0.1,), num_seeds=2, out=tmp_path / "out")
    for name, missing in (("focal_loss", "focus"), ("margin_loss", "gamma")):  # also where the library has a value
        with pytest.raises(SystemExit, match=f"{name} also needs {missing}: --fixed {missing} 0.5, or --vary"):
            script.main(replace(options, loss=(f"{file}:{name}",)), PIPELINE)
    with pytest.raises(SystemExit, match="has no function 'fokal'; it has: margin_loss, focal_loss"):
        script.main(replace(options, loss=(f"{file}:fokal",), vary=("focus=0,2",)), PIPELINE)
    script.main(replace(options, loss=("dpo", f"{file}:focal_loss"), vary=("focus=0,2",), dry_run=True), PIPELINE)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_a_loss_of_ones_own_is_swept_from_its_file(tmp_path):
    file = tmp_path / "my_losses.py"
    file.write_text(FOCAL)
    options = script.Options(loss=("dpo", f"{file}:focal_loss"), beta=(0.1,), num_seeds=2, out=tmp_path / "out")
    script.main(replace(options, vary=("focus=0,2",)), PIPELINE)
    runs = pq.read_table(tmp_path / "out" / "runs.parquet").to_pandas()
    assert sorted(set(runs.loss)) == ["dpo", "focal_loss"]
    pivot = runs.pivot_table(values="expected_reward", index="seed", columns=["loss", "focus"])
    np.testing.assert_allclose(pivot["focal_loss", 0.0], pivot["dpo", 0.0], rtol=1e-4)  # with focus 0 it is DPO
    assert not np.allclose(pivot["focal_loss", 2.0], pivot["dpo", 2.0], rtol=1e-4)
