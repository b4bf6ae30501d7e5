"""Several processes share a sweep."""

import contextlib
import errno
import importlib
import socket

import jax
import numpy as np
import pytest

from dpo_jax import sweep
from dpo_jax.sweep import processes
from tests import forked
from tests.sweep import sweeps

grid_module = importlib.import_module("dpo_jax.sweep.grid")
NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def make_together(out, name, folder, **ends):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        forked.start(
            sweeps.make_together,
            out,
            name,
            folder / str(number),
            dict(zip(NAMES, (address, "2", str(number)), strict=True)),
            ends,
        )
        for number in range(2)
    ]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many blocks", "noisy"])
def test_two_processes_make_the_same_folder_as_one_and_both_return_the_whole(tmp_path, name):
    assert make_together(tmp_path / "two", name, tmp_path) == [0, 0]
    alone = sweeps.make(tmp_path / "one", name)
    assert sweeps.contents(tmp_path / "two") == sweeps.contents(tmp_path / "one")
    for number in range(2):
        returned = dict(np.load(tmp_path / f"{number}.npz"))
        assert all((returned[result] == array.values).all() for result, array in alone.items())


@pytest.mark.slow
def test_two_processes_finish_what_one_began(tmp_path):
    assert forked.exit_code(sweeps.make_until_terminated, tmp_path / "two", 20) == 143
    assert make_together(tmp_path / "two", "many blocks", tmp_path) == [0, 0]
    sweeps.make(tmp_path / "one")
    assert sweeps.contents(tmp_path / "two") == sweeps.contents(tmp_path / "one")


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_each_run_is_in_one_share(tmp_path, monkeypatch, key, num_processes):
    options = {"num_seeds": 11, "runs_at_once": 3, "scale": [1.0, 2.0]}
    monkeypatch.setattr(jax, "process_count", lambda: num_processes)
    monkeypatch.setattr(grid_module, "watching_peers", lambda *_: contextlib.nullcontext())
    shares = []
    for index in range(num_processes):
        told = []
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        sweep.grid(sweeps.noisy, key, out=tmp_path, report=told.append, **options)
        shares.append(told[-1].total)
        assert len(list((tmp_path / "blocks").iterdir())) == sum(shares) / 2
    assert sum(shares) == 22
    monkeypatch.undo()
    told = []
    again = sweep.grid(sweeps.noisy, key, out=tmp_path, report=told.append, **options)
    assert told == []
    sweeps.assert_same(again, sweep.grid(sweeps.noisy, key, **options))


@pytest.mark.parametrize(
    ("how", "number"),
    [
        pytest.param("fails", 0, marks=pytest.mark.slow),
        ("fails", 1),
        pytest.param("dies", 0, marks=pytest.mark.slow),
        pytest.param("dies", 1, marks=pytest.mark.slow),
    ],
)
def test_what_ends_one_process_ends_them_all_at_once(tmp_path, how, number):
    codes = make_together(tmp_path / "out", "many blocks", tmp_path, **{how: number})
    assert codes[number] == (errno.ENOSPC if how == "fails" else -9)
    assert codes[1 - number] == 99
    said = (tmp_path / f"{1 - number}.txt").read_text()
    assert said.startswith(
        f"process {number} of 2 "
        + ("failed: [Errno 28] No space left" if how == "fails" else "has given no sign of life for")
    )
    assert len(list((tmp_path / "out" / "blocks").iterdir())) < sweeps.NUM_BLOCKS * 0.5
    sweeps.make(tmp_path / "out")
    sweeps.make(tmp_path / "one")
    assert sweeps.contents(tmp_path / "out") == sweeps.contents(tmp_path / "one")


def test_processes_hear_of_each_other(tmp_path, monkeypatch):
    first, second = (processes.Peers(tmp_path, "start", number, 2) for number in range(2))
    assert first.check() == {1: "begun"}
    assert second.check() == {0: "begun"}
    (tmp_path / ".processes" / "before").mkdir()
    processes.remove_earlier_starts(tmp_path, first)
    second.say("failed: no space")
    with pytest.raises(sweep.OtherProcessError, match="process 1 of 2 failed: no space"):
        first.check()
    monkeypatch.setattr(processes, "SECONDS_OF_SILENCE", 0.0)
    with pytest.raises(sweep.OtherProcessError, match="process 0 of 2 has given no sign of life for 0 s"):
        second.check()
    first.leave()
    monkeypatch.setattr(processes, "SECONDS_TO_BEGIN", 0.0)
    with pytest.raises(sweep.OtherProcessError, match="process 1 of 3 has not begun"):
        processes.Peers(tmp_path, "later", 0, 3).check()
    with pytest.raises(sweep.OtherProcessError, match="started again meanwhile"):
        first.check()


def test_a_folder_that_holds_something_else_is_refused_by_all(tmp_path):
    sweeps.make(tmp_path / "out", "noisy")
    before = sweeps.contents(tmp_path / "out")
    assert make_together(tmp_path / "out", "many blocks", tmp_path) == [98, 98]
    assert sweeps.contents(tmp_path / "out") == before


def test_several_processes_need_a_folder(monkeypatch, key):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="give out"):
        sweep.grid(sweeps.noisy, key, num_seeds=2, scale=[1.0])


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    sweep.join_processes()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_that_is_missing_is_named(monkeypatch, name):
    for other, value in zip(NAMES, ("localhost:1", "2", "0"), strict=True):
        monkeypatch.setenv(other, value)
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=f"{name} must be set"):
        sweep.join_processes()


def test_a_number_that_is_none_is_told(monkeypatch):
    for other, value in zip(NAMES, ("localhost:1", "two", "0"), strict=True):
        monkeypatch.setenv(other, value)
    with pytest.raises(ValueError, match="cannot join the other processes: .*'two'"):
        sweep.join_processes()
