"""Summaries against SciPy's t intervals, and the tables made of them."""

import io

import numpy as np
import pytest
import xarray
from scipy import stats

from dpo_jax import sweep
from dpo_jax.sweep.summary import interval, latex, points, rows, summarise

VALUES = np.random.default_rng(0).normal(size=(2, 3, 9))  # losses, betas, seeds
AXES = {"loss": ["dpo", "i_po"], "beta": [0.1, 0.5, 2.0], "seed": np.arange(9)}


@pytest.fixture
def results():
    return xarray.Dataset({"reward": (tuple(AXES), VALUES.copy())}, AXES).assign_attrs(run_seconds=1.0)


def test_intervals_are_students(results):
    summary = summarise(results)
    low, high = stats.t.interval(0.95, 8, VALUES.mean(-1), stats.sem(VALUES, axis=-1))
    np.testing.assert_allclose(summary.reward.sel(statistic="mean"), VALUES.mean(-1))
    np.testing.assert_allclose(summary.reward.sel(statistic="stderr"), stats.sem(VALUES, axis=-1))
    np.testing.assert_allclose(summary.reward.sel(statistic="low"), low)
    np.testing.assert_allclose(summary.reward.sel(statistic="high"), high)


def test_differences_to_a_baseline_are_paired(results):
    found = summarise(results, baseline={"loss": "dpo"}).reward_difference
    np.testing.assert_array_equal(found.sel(loss="dpo", statistic=["mean", "stderr"]), 0)
    paired = stats.ttest_rel(VALUES[1, 2], VALUES[0, 2]).confidence_interval(0.95)
    at = {"loss": "i_po", "beta": 2.0}
    np.testing.assert_allclose(found.sel(statistic="low", **at), paired.low)
    np.testing.assert_allclose(found.sel(statistic="high", **at), paired.high)
    with pytest.raises(ValueError, match="baseline .*is no point of the grid"):
        summarise(results, baseline={"loss": "kto"})
    with pytest.raises(ValueError, match="no dimension 'world'; they have loss, beta, seed"):
        summarise(results, over="world")


def test_runs_without_a_number_do_not_count(results):
    results.reward[0, 1, :4] = np.nan
    summary = summarise(results)
    at = {"loss": "dpo", "beta": 0.5}
    np.testing.assert_allclose(summary.reward.sel(statistic="mean", **at), VALUES[0, 1, 4:].mean())
    np.testing.assert_allclose(summary.reward.sel(statistic="stderr", **at), stats.sem(VALUES[0, 1, 4:]))
    np.testing.assert_allclose(summary.finished.sel(**at), 5 / 9)
    assert summary.finished.sel(loss="i_po").min() == 1


def test_a_run_with_a_nan_anywhere_is_not_finished(results):
    history = xarray.DataArray(np.ones((2, 3, 9, 4)), AXES, dims=(*AXES, "epoch"))
    history[0, 0, 0, 2] = np.nan
    finished = summarise(results.assign(history=history)).finished
    assert finished.sel(loss="dpo", beta=0.1) == 8 / 9 and finished.sel(loss="i_po").min() == 1


def test_one_run_has_no_interval(results):
    summary = summarise(results.isel(seed=[0]))
    assert np.isnan(summary.reward.sel(statistic="high")).all()
    assert interval(summary.reward.isel(loss=0, beta=0)) == f"{VALUES[0, 0, 0]:.3f}"


def test_tables_have_a_row_for_each_point(results):
    summary = summarise(results)
    table = rows(summary)
    assert [(row["loss"], row["beta"]) for row in table] == [(a, b) for a in AXES["loss"] for b in AXES["beta"]]
    np.testing.assert_allclose([row["reward_mean"] for row in table], VALUES.mean(-1).ravel())
    assert [point["beta"] for point, _ in points(summary)] == 2 * AXES["beta"]
    text = latex(summary, ["reward"], digits=2)
    assert text.startswith("\\begin{tabular}{llr}\n\\hline\nloss & beta & reward \\\\\n")
    low, high = stats.t.interval(0.95, 8, VALUES[1, 0].mean(), stats.sem(VALUES[1, 0]))
    assert f"i\\_po & 0.1 & ${VALUES[1, 0].mean():.2f} \\pm {(high - low) / 2:.2f}$ \\\\" in text


def test_what_was_done_before_is_not_counted_in_the_rate():
    progress = sweep.Progress(30, 40, resumed=20, compile_seconds=1.0, run_seconds=2.0)
    assert str(progress) == "30 of 40 runs, 5.0 per second, about 2 s left (compiled in 1.0 s)"


def test_the_line_on_a_terminal_is_rewritten_and_removed(as_users_have_it):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def progress(done):
        return sweep.Progress(done, 40, resumed=0, compile_seconds=1.25, run_seconds=done / 10)

    with sweep.on_terminal("Runs", terminal := Terminal(), seconds_between=0.0) as report:
        report(progress(10))
        report(progress(40))
    lines = terminal.getvalue().split("\r")
    assert lines[1] == "Runs: 10 of 40 runs, 10.0 per second, about 3 s left (compiled in 1.2 s)"
    assert lines[2].startswith("Runs: 40 of 40 runs")
    assert lines[-2].isspace()
