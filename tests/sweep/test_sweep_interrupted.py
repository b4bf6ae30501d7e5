"""Killed, asked to stop, out of space: a folder keeps what was done and comes to the same end, byte by byte."""

import contextlib
import errno
import gc
import importlib
import itertools
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sweep
from dpo_jax.sweep import stopping, store
from tests import forked
from tests.sweep import sweeps

programs = importlib.import_module("dpo_jax.sweep.programs")


@pytest.mark.slow
def test_killed_at_twenty_moments_it_comes_to_the_same_end(tmp_path, expected):
    assert forked.exit_code(sweeps.make_until_killed, tmp_path / "never" / "out", 0) == 0
    assert sweeps.contents(tmp_path / "never" / "out") == expected
    num_lines = int((tmp_path / "never" / "lines").read_text())
    moments = random.Random(0)
    folder, num_kills = tmp_path / "0" / "out", 0
    while num_kills < 20:
        code = forked.exit_code(sweeps.make_until_killed, folder, moments.randint(1, num_lines // 3))
        assert code in (0, -9)
        num_kills += code == -9
        if code == 0:
            assert sweeps.contents(folder) == expected
            folder = tmp_path / str(num_kills) / "out"
    sweeps.make(folder)
    assert sweeps.contents(folder) == expected


def test_asked_to_terminate_it_stops_after_a_block_and_goes_on_later(tmp_path, expected):
    assert forked.exit_code(sweeps.make_until_terminated, tmp_path / "out", 20) == 128 + 15
    done = len(list((tmp_path / "out" / "blocks").iterdir()))
    assert 0 < done < sweeps.NUM_BLOCKS / 2
    told = []
    sweeps.make(tmp_path / "out", report=told.append)
    assert len(told) == sweeps.NUM_BLOCKS - done
    assert sweeps.contents(tmp_path / "out") == expected


@contextlib.contextmanager
def signal_soon(number):
    """Sends a signal to this process now, in another thread, and sees that it acts within seconds."""
    start, sent = time.perf_counter(), threading.Timer(0.2, os.kill, (os.getpid(), number))
    sent.start()
    yield
    sent.join()
    assert time.perf_counter() - start < 5


@contextlib.contextmanager
def signal_in_the_collector(number):
    """Sends a signal while the garbage collector calls Python, where exceptions are swallowed."""

    def callback(phase, info):
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            gc.callbacks.remove(callback)
            signal.raise_signal(number)

    gc.callbacks.append(callback)
    yield


@contextlib.contextmanager
def signal_to_another_thread(number):
    """Sends a signal soon, which this thread does not receive; as the system may choose under load."""
    with signal_soon(number):
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        try:
            yield
        finally:
            if number in signal.sigpending():
                signal.sigwait({number})
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


@pytest.mark.parametrize(
    ("number", "where"),
    [
        *itertools.product([signal.SIGINT, signal.SIGTERM], ["trace", "compile", "run"]),
        pytest.param(signal.SIGINT, "collector", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "collector", marks=pytest.mark.slow),
    ],
)
def test_a_signal_acts_at_once_whatever_is_done(key, monkeypatch, where, number):
    again, compiled, before = threading.Event(), [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(key, *, name):
        if where == "collector":
            gc.collect()
        if where in ("collector", "trace"):
            again.wait(10)
        waits = lambda: np.float32(again.wait(10))  # noqa: E731
        return jax.pure_callback(waits, jax.ShapeDtypeStruct((), jnp.float32)) if where == "run" else 0.0

    def compile_slowly(lowered):
        compiled.append(lowered)
        again.wait(10)

    if where == "compile":
        monkeypatch.setattr(programs, "compile_fast", compile_slowly)
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    send = signal_in_the_collector if where == "collector" else signal_soon
    with send(number), pytest.raises(expected) as stopped:
        sweep.grid(run, key, num_seeds=1, name=sweep.static(range(20)))
    again.set()
    assert expected is KeyboardInterrupt or stopped.value.code == 143
    assert len(compiled) <= (os.cpu_count() or 1)
    assert {n: signal.getsignal(n) for n in before} == before


@pytest.mark.parametrize("where", ["compile", "run"])
def test_a_signal_that_reaches_another_thread_acts_at_once(key, monkeypatch, where):
    again = threading.Event()
    wait = lambda *_: again.wait(10)  # noqa: E731
    if where == "compile":
        monkeypatch.setattr(programs, "compile_fast", wait)
    else:
        monkeypatch.setattr(jax, "device_get", wait)
    with signal_to_another_thread(signal.SIGINT), pytest.raises(KeyboardInterrupt):
        sweep.grid(lambda key: 0.0, key, num_seeds=1)
    again.set()


def test_what_a_callback_raised_for_a_signal_is_that_of_the_signal():
    """JAX may run a callback on the main thread, and reports what is raised there as an error of its own."""
    with pytest.raises(SystemExit), stopping.stopping() as stop:
        stop.why = lambda: SystemExit(143)
        raise jax.errors.JaxRuntimeError("CpuCallback error")
    with pytest.raises(jax.errors.JaxRuntimeError), stopping.stopping():
        raise jax.errors.JaxRuntimeError("another")


def test_a_handler_of_the_callers_is_left_alone(key, monkeypatch):
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        sweep.grid(lambda key: signal.raise_signal(signal.SIGTERM) or 0.0, key, num_seeds=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [1]


def test_without_space_it_fails_and_goes_on_later(out, expected):
    done = {path.name for path in (out / "blocks").iterdir()}
    assert forked.exit_code(sweeps.make_with_little_space, out, 300) == errno.EFBIG
    assert done <= {path.name for path in (out / "blocks").iterdir()}
    sweeps.make(out)
    assert sweeps.contents(out) == expected


class Full:
    """A file on a disk with room for half of what is written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(patch, files):
    """From now on there is no space for files that match."""
    real = Path.open

    def opened(path, mode="r", *args, **options):
        file = real(path, mode, *args, **options)
        return Full(file) if path.match(files) and mode != "rb" else file

    patch.setattr(Path, "open", opened)


def test_a_full_disk_loses_nothing(out, expected, monkeypatch):
    done = {path.name for path in (out / "blocks").iterdir()}
    with monkeypatch.context() as patch:
        fill_disk(patch, ".*.unfinished")
        with pytest.raises(OSError, match="No space left") as problem:
            sweeps.make(out)
    assert problem.value.errno == errno.ENOSPC
    assert {path.name for path in (out / "blocks").iterdir()} == done
    sweeps.make(out)
    assert sweeps.contents(out) == expected


def test_what_a_killed_process_left_behind_is_removed_some_time_later(out, expected):
    long_ago = time.time() - 2 * store.SECONDS_TO_WRITE
    for path in (out / ".sweep.json.77.unfinished", out / "blocks" / ".3.npz.77.unfinished"):
        path.write_text("12")
        os.utime(path, (long_ago, long_ago))
    of_another = out / "blocks" / ".4.npz.78.unfinished"
    of_another.write_text("12")
    sweeps.make(out)
    assert of_another.read_text() == "12"
    of_another.unlink()
    assert sweeps.contents(out) == expected


def test_a_start_that_ended_before_it_made_a_block_is_no_obstacle(out, expected):
    shutil.rmtree(out / "blocks")
    sweeps.make(out)
    assert sweeps.contents(out) == expected
