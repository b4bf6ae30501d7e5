import importlib
import io

import pytest
from rich.console import Console
from rich.text import Text

from dpo_jax import sweep
from experiments.lab import commands, console


def test_knowing_jupyter_is_not_being_it():
    importlib.import_module("ipykernel.kernelapp")  # as a process that starts a notebook does
    assert not commands.in_jupyter()


@pytest.fixture
def said(monkeypatch):
    """What is printed where nobody watches."""
    console_of_a_log = Console(file=io.StringIO(), force_terminal=False, width=150)
    monkeypatch.setattr(console, "console", console_of_a_log)
    return console_of_a_log.file


@pytest.mark.parametrize(("seconds_between", "num_lines"), [(None, 0), (1000.0, 0), (0.0, 3)])
def test_a_log_has_lines_at_the_asked_intervals(said, seconds_between, num_lines):
    with console.progress("Runs", seconds_between) as report:
        for done in (10, 20, 40):
            report(sweep.Progress(done, 40, resumed=5, compile_seconds=1.25, run_seconds=done / 10))
    lines = said.getvalue().splitlines()
    assert len(lines) == num_lines
    if lines:
        first = Text.from_ansi(lines[0]).plain
        assert first == "Runs: 10 of 40 runs, 5.0 per second, about 6 s left (compiled in 1.2 s)"


def test_a_long_wait_is_reported_where_nothing_can_spin(said, monkeypatch):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.001)
    with console.waiting("Timing"):
        while "Timing: 0 s so far\n" not in said.getvalue():
            pass
    assert said.getvalue().startswith("Timing ...\n")
