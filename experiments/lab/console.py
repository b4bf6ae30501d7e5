"""What commands print: tables, and how far they are."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from dpo_jax import lm, sweep
from dpo_jax.intervals import half_width
from experiments.lab.commands import in_jupyter

console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)

SECONDS_BETWEEN_LINES = 30.0
"""How often a long run reports on itself in a log file or a pipe, where no line can be rewritten."""


def say(text: str) -> None:
    """Prints a line."""
    console.print(text)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, numbers to the right."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def interval(statistics: Mapping[str, Any], num: int, digits: int = 3, *, sign: bool = False) -> str:
    """A mean of `num` values and half the width of its 95 % confidence interval, if there is one."""
    half = half_width(np.float64(statistics["stderr"]), num)
    return f"{statistics['mean']:{'+' if sign else ''}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def on_terminal() -> bool:
    """Whether the output is an interactive terminal."""
    return console.is_terminal and not in_jupyter()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Prints what the user is waiting for: a spinner on a terminal, otherwise a line now and then."""
    if on_terminal():
        with console.status(what):
            yield
        return
    start, over = time.perf_counter(), Event()

    def print_lines() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            say(f"{what}: {time.perf_counter() - start:.0f} s so far")

    if not in_jupyter():
        say(f"{what} ...")
        Thread(target=print_lines, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def progress(what: str, seconds_between: float | None = SECONDS_BETWEEN_LINES) -> Iterator[Callable[[Any], None]]:
    """Yields the `report` of a sweep: one line kept up to date on a terminal, otherwise a line now and then.

    Args:
      what: what is counted.
      seconds_between: the least time between two lines in a log; `None` for no lines.
    """
    with sweep.on_terminal(what=what) as show:
        last = time.perf_counter()

        def report(state: sweep.Progress) -> None:
            nonlocal last
            show(state)
            now = time.perf_counter()
            if on_terminal() or in_jupyter() or seconds_between is None or now - last < seconds_between:
                return
            last = now
            say(f"{what}: {state}")

        yield report


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields what sets how many are done."""
    with Progress(console=console, transient=True, disable=not on_terminal()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def training(what: str) -> Iterator[Callable[[lm.Step], None]]:
    """Yields the `report` of `lm.tune`: a bar with rate and time left on a terminal, otherwise a line now and then."""
    spent, computed, compiling, last = 0.0, 0, 0.0, time.perf_counter()
    with Progress(console=console, transient=True, disable=not on_terminal()) as bar:
        task = bar.add_task(what, total=None)

        def report(step: lm.Step) -> None:
            nonlocal spent, computed, compiling, last
            spent, computed, compiling = spent + step.seconds, computed + step.tokens, compiling + step.compiling
            left = spent / step.done * (step.planned - step.done)
            state = (
                f"step {step.done:,} of {step.planned:,}, loss {np.mean(step.metrics['loss']):.3f}, "
                f"{computed / spent:,.0f} tokens per second, about {left:.0f} s left (compiled in {compiling:.0f} s)"
            )
            bar.update(task, total=step.planned, completed=step.done, description=f"{what}: {state}")
            now = time.perf_counter()
            if not on_terminal() and not in_jupyter() and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                say(f"{what}: {state}")

        yield report
