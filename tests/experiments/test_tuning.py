import numpy as np
import pytest
from scipy import stats

from experiments import harness, tuning
from experiments.tuning import Plan, Range, Runner, Task, at_edge, candidates, tune

RANGES = {"learning_rate": Range(1e-5, 1e-2), "beta": Range(0.01, 10.0), "offset": Range(-1.0, 1.0, linear=True)}


def test_candidates_fill_their_ranges():
    tried = candidates(RANGES, 24)
    assert stats.kstest([np.log(h["beta"]) for h in tried], stats.uniform(np.log(0.01), np.log(1000)).cdf).pvalue > 0.5
    assert stats.kstest([h["offset"] for h in tried], stats.uniform(-1, 2).cdf).pvalue > 0.5
    assert len({h["learning_rate"] for h in tried}) == 24


def test_what_comes_first_does_not_depend_on_what_follows():
    few = {name: RANGES[name] for name in ("learning_rate", "beta")}
    for one, other in zip(candidates(RANGES, 24), candidates(few, 24), strict=True):
        assert {name: one[name] for name in few} == other


def test_values_at_the_end_of_a_range_are_told():
    assert at_edge(RANGES, {"learning_rate": 1e-3, "beta": 0.011, "offset": 0.0}) == ["beta"]
    assert at_edge(RANGES, {"learning_rate": 9.9e-3, "beta": 0.1, "offset": -0.95}) == ["learning_rate", "offset"]


def test_runs_come_back_in_their_order_whatever_the_chunks(monkeypatch):
    monkeypatch.setattr(tuning, "RUNS_PER_CHUNK", 4)
    done = []
    runner = Runner({"here": {"x": np.arange(5.0)}, "there": {"x": -np.arange(5.0)}}, harness.Stopwatch(), done.append)
    program = runner.compiled(lambda start, h: {"y": start["x"] + h["beta"]}, {"beta": np.float32(0)})
    rows, betas = np.array([4, 0, 2, 2, 1, 3]), np.arange(0.0, 60.0, 10.0, dtype=np.float32)
    task = Task("there", rows, [{"beta": beta} for beta in betas])
    np.testing.assert_allclose(runner(program, task)["y"], betas - rows)
    assert done == [4, 2]


@pytest.mark.parametrize("num", [1, 3, 6])
def test_tuning_finds_the_best_where_it_may_look(num):
    """With scores that are known: the second candidate is best, the first diverges."""
    runs = []

    def rigged(_, task):
        runs.append(task)
        beta = np.array([float(h["beta"]) for h in task.hyperparameters])
        return {"reward": np.where(beta == betas[0], np.nan, -np.abs(beta - betas[-1 if num == 1 else 1]))}

    tried = candidates({"beta": Range(0.01, 10.0)}, num)
    betas = [float(h["beta"]) for h in tried]
    plan = Plan(reported=np.arange(3), tuning=np.arange(3, 11), num_candidates=num)
    chosen = tune(rigged, None, "here", tried, plan, score="reward")
    assert float(chosen["beta"]) == betas[0 if num == 1 else 1]
    assert [set(task.rows) for task in runs] == [{3, 4}, set(range(3, 11))]
    assert sum(len(task.rows) for task in runs) == plan.num_tuning_runs


def test_threads_are_counted_together():
    shown = []
    counter = tuning.Counter(shown.append)
    counter(3)
    counter(4)
    assert shown == [3, 7]
