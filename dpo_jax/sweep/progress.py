"""How far a sweep is, and the line on a terminal that shows it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO


class Progress(NamedTuple):
    """How far a sweep is.

    Attributes:
      done: runs that are complete, those of an earlier start among them.
      total: runs of the whole share of this process.
      resumed: runs that were complete at the start.
      compile_seconds: how long it took to trace and compile.
      run_seconds: time spent running programs and storing results.
    """

    done: int
    total: int
    resumed: int
    compile_seconds: float
    run_seconds: float

    def __str__(self) -> str:
        """One line for people to read."""
        rate = (self.done - self.resumed) / max(self.run_seconds, 1e-9)
        return (
            f"{self.done:,} of {self.total:,} runs, {rate:,.1f} per second, about "
            f"{(self.total - self.done) / max(rate, 1e-9):,.0f} s left (compiled in {self.compile_seconds:.1f} s)"
        )


@contextmanager
def on_terminal(
    what: str = "", file: TextIO | None = None, *, seconds_between: float = 0.1
) -> Iterator[Callable[[Progress], None]]:
    """Yields a `report` that keeps one line up to date if the output is a terminal, and removes it in the end.

    Args:
      what: what the line begins with.
      file: the output; by default standard error.
      seconds_between: the least time between two updates.
    """
    file = file or sys.stderr
    width, last = 0, -seconds_between
    if not file.isatty():
        yield lambda _: None
        return

    def report(progress: Progress) -> None:
        nonlocal width, last
        now = time.perf_counter()
        if now - last < seconds_between and progress.done < progress.total:
            return
        line, last = f"{what}: {progress}" if what else str(progress), now
        file.write("\r" + line.ljust(width))
        file.flush()
        width = len(line)

    try:
        yield report
    finally:
        file.write("\r" + " " * width + "\r")
        file.flush()
