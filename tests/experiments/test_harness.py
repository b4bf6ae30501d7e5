import importlib
import io
import threading

import pytest
from rich.console import Console

from dpo_jax import sweep
from experiments import harness


def test_knowing_jupyter_is_not_being_it():
    importlib.import_module("ipykernel.kernelapp")  # as whoever starts a notebook does
    assert not harness.in_jupyter()


@pytest.fixture
def screen(monkeypatch):
    """What the console shows; a terminal, if asked to be one."""

    def shown(terminal):
        monkeypatch.setenv("TERM", "xterm")  # a terminal that calls itself dumb is shown no bar
        console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
        monkeypatch.setattr(harness, "console", console)
        return console.file

    return shown


def report_all(report):
    for done in (10, 20, 40):
        report(sweep.Progress(done, 40, resumed=5, compile_seconds=1.25, run_seconds=done / 10))


def test_a_sweep_is_silent_where_nobody_watches(screen):
    said = screen(terminal=False)
    with harness.sweep_report("Runs") as report:
        report_all(report)
    assert said.getvalue() == ""


def test_a_sweep_shows_a_bar_to_those_who_watch(screen):
    said = screen(terminal=True)
    with harness.sweep_report("Runs") as report:
        report_all(report)
    assert "40/40" in said.getvalue()
    assert "compiled for 1.2 s" in said.getvalue()
    assert "8.8/s" in said.getvalue()  # 35 of its own in 4 seconds


def test_lines_come_when_it_is_time_and_in_the_end(screen):
    said = screen(terminal=False)
    with harness.sweep_report("Runs", seconds_per_line=1000.0) as report:
        report_all(report)
    assert said.getvalue() == "Runs: 40 of 40, 8.8 per second, compiled for 1.2 s, about 0 s left\n"
    said = screen(terminal=True)
    with harness.sweep_report("Runs", seconds_per_line=1e-9) as report:
        report_all(report)
    lines = [line for line in said.getvalue().splitlines() if "Runs: " in line]
    assert len(lines) == 3
    assert "10 of 40, 5.0 per second" in harness.Text.from_ansi(lines[0]).plain
    assert "about 6 s left" in harness.Text.from_ansi(lines[0]).plain


def test_a_long_run_says_how_far_it_is_where_no_bar_can_move(screen, monkeypatch):
    said, compiled = screen(terminal=False), threading.Event()
    monkeypatch.setattr(harness, "SECONDS_PER_LINE", 0.001)
    monkeypatch.setattr(sweep, "compile_fast", lambda *_, **__: compiled.wait())
    watch = harness.Stopwatch()
    watch.compiled(lambda x: x, 1.0)
    with harness.progress("runs", 1000, watch) as show_done:
        show_done(10)
        while "runs: 10 of 1,000, 0 of 1 programs compiled\n" not in said.getvalue():
            pass
        compiled.set()
        while "runs: 10 of 1,000\n" not in said.getvalue():
            pass
