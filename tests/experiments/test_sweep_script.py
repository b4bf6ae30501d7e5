import csv
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
import xarray

from experiments import sweep as script

grid_module = sys.modules["dpo_jax.sweep.grid"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return script.Options(
        loss=("dpo", "orpo"), beta=(0.1, 0.5), learning_rate=(1e-3, 3e-3), num_seeds=3, out=tmp_path_factory.mktemp("s")
    )


@pytest.fixture
def short(monkeypatch):
    """A notebook of few epochs."""
    monkeypatch.setattr(script, "NUM_EPOCHS", 2)


@pytest.mark.usefixtures("as_users_have_it")
def test_tables_and_figures_say_what_the_runs_said(options, short, capsys):
    script.main(options)
    runs = pq.read_table(options.out / "runs.parquet").to_pandas()
    assert len(runs) == 2 * 2 * 2 * 3
    with (options.out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        here = runs[(runs.loss == row["loss"]) & np.isclose(runs.beta, float(row["beta"]))]
        here = here[np.isclose(here.learning_rate, float(row["learning_rate"]))]
        assert float(row["expected_reward"]) == pytest.approx(here.expected_reward.mean(), rel=1e-6)
        assert float(row["gain_stderr"]) == pytest.approx(
            (here.expected_reward - here.sft_reward).std() / 3**0.5, rel=1e-4
        )
        assert float(row["finished"]) == 1
    assert {path.name for path in options.out.glob("*.png")} == {"reward.png", "frontier.png", "heat_map.png"}
    assert json.loads((options.out / "summary.json").read_text())["options"]["num_seeds"] == 3
    assert "dpo" in capsys.readouterr().out
    orpo = runs[runs.loss == "orpo"]  # has no beta
    assert np.allclose(orpo[orpo.beta == 0.1].expected_reward, orpo[orpo.beta == 0.5].expected_reward)
    assert not np.allclose(runs[runs.beta == 0.1].expected_reward[:6], runs[runs.beta == 0.5].expected_reward[:6])


@pytest.mark.usefixtures("as_users_have_it")
def test_other_files_are_left_alone(tmp_path, short):
    (tmp_path / "summary.csv").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds other files \(summary.csv\) and no sweep"):
        script.main(script.Options(num_seeds=1, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["summary.csv"]
    assert (tmp_path / "summary.csv").read_text() == "mine"


@pytest.mark.usefixtures("as_users_have_it")
def test_one_seed_has_no_interval(tmp_path, short, capsys):
    script.main(script.Options(num_seeds=1, beta=(0.5, 0.1), out=tmp_path))
    assert "±" not in capsys.readouterr().out.split("dpo")[-1]
    with (tmp_path / "summary.csv").open() as file:
        assert all(np.isnan(float(row["gain_stderr"])) for row in csv.DictReader(file))


def test_means_and_standard_errors_are_of_the_numbers_there_are():
    values = np.array([[1.0, 2.0, np.nan, 4.0]])
    names = ("expected_reward", "sft_reward", "num_steps", "loss_at_the_end")
    results = xarray.Dataset(dict.fromkeys(names, (("beta", "seed"), values)), coords={"beta": [0.1]})
    summary = script.summarise(results)
    assert summary.loss_at_the_end.item() == pytest.approx(7 / 3)
    assert summary.loss_at_the_end_stderr.item() == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)


@pytest.mark.usefixtures("as_users_have_it")
def test_stopped_from_outside_it_says_how_to_go_on(tmp_path, short, monkeypatch, capsys):
    for stopped, code in ((KeyboardInterrupt(), 130), (SystemExit(143), 143)):
        monkeypatch.setattr(script.sweep, "grid", lambda stopped=stopped, **_: (_ for _ in ()).throw(stopped))
        with pytest.raises(SystemExit) as ended:
            script.main(script.Options(num_seeds=2, out=tmp_path))
        assert ended.value.code == code
        assert "the same command goes on" in capsys.readouterr().out


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
        script.main(script.Options(num_seeds=1, out=tmp_path / "out"))


@pytest.mark.usefixtures("as_users_have_it")
def test_the_same_command_goes_on_and_another_one_is_refused(options, short, monkeypatch):
    script.main(options)
    computed = []
    monkeypatch.setattr(grid_module, "_dispatched", lambda work, blocks: iter(computed.extend(blocks) or ()))
    script.main(options)
    assert computed == []
    with pytest.raises(SystemExit, match="holds another sweep: key was"):
        script.main(replace(options, seed=1))


def test_figures_keep_conditions_apart_and_choose_only_the_learning_rate():
    axes = {"loss": ["dpo"], "beta": [0.1, 0.5], "learning_rate": [1e-3, 3e-3], "label_noise": [0.0, 0.2]}
    values = np.array([[[[0.1, 0.9], [0.2, 0.8]], [[0.4, 0.6], [0.3, 0.7]]]])
    summary = xarray.Dataset({"expected_reward": (tuple(axes), values)}, coords=axes)
    found = {name: here.expected_reward.values.tolist() for name, here in script._conditions(summary)}
    assert found == {"dpo, 0 flipped": values[0, ..., 0].tolist(), "dpo, 0.2 flipped": values[0, ..., 1].tolist()}
    best = {
        name: here.expected_reward.values.tolist()
        for name, here in script._conditions(script._at_best(summary, "learning_rate"))
    }
    assert best == {"dpo, 0 flipped": [0.2, 0.4], "dpo, 0.2 flipped": [0.9, 0.7]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": ("dop",)}, "did you mean 'dpo'"),
        ({"loss": ("dpo", "dpo")}, "--loss names a loss twice"),
        ({"beta": (-1.0,)}, "--beta must be in .0, inf."),
        ({"beta": ()}, "axis beta has no values"),
        ({"label_noise": (2.0,)}, "--label-noise"),
        ({"fixed": {"gama": 1.0}}, "no loss has 'gama'"),
        ({"vary": ("gamma=1,2",)}, "--vary: no loss has 'gamma'; there are: none"),
        ({"loss": ("simpo",), "vary": ("gamma",)}, "--vary must be a name and numbers, as in gamma=0.5,1,2"),
        ({"loss": ("nowhere.py:mine",)}, "there is no file nowhere.py"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"fixed": {"gamma": float("nan")}}, "--fixed gamma must be finite"),
        ({"log_every": 0.0}, "--log-every must be in .0, inf."),
    ],
)
def test_bad_options_end_with_one_line(tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        script.main(script.Options(**{"out": tmp_path / "out", "num_seeds": 2, **change}))


@pytest.mark.usefixtures("as_users_have_it")
def test_a_dry_run_says_how_much_there_is_to_do(tmp_path, short, capsys):
    script.main(script.Options(num_seeds=5, dry_run=True, out=tmp_path / "none"))
    said = capsys.readouterr().out
    assert "20 runs: 4 points, 5 seeds each" in said
    assert "1 programs (traced: beta, learning_rate, label_noise; static: loss)" in said
    assert "0 are done already" in said
    assert not (tmp_path / "none").exists()
    script.main(script.Options(num_seeds=5, out=tmp_path / "some"))
    script.main(script.Options(num_seeds=5, dry_run=True, out=tmp_path / "some"))
    assert "1 are done already" in capsys.readouterr().out


FOCAL = """
import jax
from dpo_jax import losses

def focal_loss(policy, reference, *, beta, focus):
    ratios = losses.log_ratios(policy, reference)
    wrong = jax.nn.sigmoid(-beta * (ratios.chosen - ratios.rejected))
    return -(wrong**focus) * jax.numpy.log1p(-wrong)
"""


@pytest.mark.usefixtures("as_users_have_it")
def test_a_loss_of_ones_own_is_swept_from_its_file(tmp_path, short, capsys):
    file = tmp_path / "my_losses.py"
    file.write_text(FOCAL)
    options = script.Options(loss=("dpo", f"{file}:focal_loss"), beta=(0.1,), num_seeds=2, out=tmp_path / "out")
    with pytest.raises(SystemExit, match="a loss also needs focus: --fixed focus 0.5, or --vary focus=0.5,1"):
        script.main(replace(options, loss=(f"{file}:focal_loss",), fixed={}, vary=(), out=tmp_path / "none"))
    script.main(replace(options, vary=("focus=0,2",)))
    runs = pq.read_table(tmp_path / "out" / "runs.parquet").to_pandas()
    assert sorted(set(runs.loss)) == ["dpo", "focal_loss"]
    pivot = runs.pivot_table(values="expected_reward", index="seed", columns=["loss", "focus"])
    np.testing.assert_allclose(pivot["focal_loss", 0.0], pivot["dpo", 0.0], rtol=1e-4)  # with focus 0 it is DPO
    assert not np.allclose(pivot["focal_loss", 2.0], pivot["dpo", 2.0], rtol=1e-4)
    with pytest.raises(SystemExit, match="has no function 'fokal'; it has: focal_loss"):
        script.main(replace(options, loss=(f"{file}:fokal",)))
