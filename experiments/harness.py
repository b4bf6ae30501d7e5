"""What every experiment needs around it: options, compiled programs and their times, files, tables."""

import io
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event, Lock, Thread, Timer
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dpo_jax import checks, sweep
from dpo_jax.intervals import half_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)

OptionsType = TypeVar("OptionsType")


def parse(options: type[OptionsType]) -> OptionsType:
    """Options from the command line; in a Jupyter notebook, their defaults."""
    if in_jupyter():
        return options()
    behave_as_a_command()
    import tyro

    module = sys.modules["__main__"].__spec__
    return tyro.cli(options, prog=f"python -m {module.name}" if module else None)


def behave_as_a_command() -> None:
    r"""Makes this process print, and end, as users of a command line expect.

    - Characters that the terminal's encoding lacks are printed as escapes (`\u03b2`), and are no error.
    - Where nobody reads the output any more (`... | head -1`), the process ends quietly by SIGPIPE: status 141 in a
      shell.
    - Ctrl-C ends it with one line, by SIGINT: status 130 in a shell. It waits for no thread, and an interrupt that
      Python swallows, because it came inside a callback of the garbage collector, is sent again.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.excepthook, sys.unraisablehook = _end_on_interrupt, _interrupt_again


def _end_on_interrupt(kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, problem, trace)
        return
    print("Interrupted.", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def _interrupt_again(problem: "sys.UnraisableHookArgs") -> None:
    if problem.exc_type is KeyboardInterrupt:
        Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(problem)


def in_jupyter() -> bool:
    """Whether this process is a Jupyter kernel, and not merely one that knows how to start some."""
    kernels = sys.modules.get("ipykernel.kernelapp")
    return kernels is not None and bool(kernels.IPKernelApp.initialized())


@contextmanager
def clear_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the script with one line, and no traceback, on an error that the user can mend: by default, bad input."""
    try:
        yield
    except Exception as problem:
        if isinstance(problem, kinds or (TypeError, ValueError, OSError)):
            notes = [note for note in getattr(problem, "__notes__", []) if not note.startswith("---")]  # JAX's own
            sys.exit(" ".join([f"error: {problem}", *(f"({note})" for note in notes)]))
        raise


def check_seeds(seed: int, num_seeds: int = 1) -> None:
    """Ends the script unless `seed .. seed + num_seeds - 1` can be seeds."""
    with clear_errors():
        checks.size("--seed", seed, at_least=0)
        checks.size("--num-seeds", num_seeds)
        if seed + num_seeds > 2**32:
            raise ValueError(f"--seed + --num-seeds must be at most 2**32, got {seed} + {num_seeds}")


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the second start is fast.

    They are kept in `~/.cache/dpo_jax` (`$XDG_CACHE_HOME/dpo_jax`), or where `JAX_COMPILATION_CACHE_DIR` says. Set
    `JAX_ENABLE_COMPILATION_CACHE=false` to keep nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def use_all_cores() -> None:
    """Lets each core of a CPU be a device of its own, so that sweeps use them all; nothing happens if JAX is in use."""
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_cores())


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Stopwatch:
    """Compiles and runs programs, and counts the seconds of each apart.

    Attributes:
      compile: seconds spent tracing, and waiting for the compiler, which works in the background.
      run: seconds spent running compiled programs.
      num_programs, num_compiled: how many programs were asked for, and are ready.
    """

    def __init__(self) -> None:
        self.compile, self.run = 0.0, 0.0
        self.num_programs, self.num_compiled = 0, 0
        self.compiler, self.lock = ThreadPoolExecutor(), Lock()

    def compiled(self, function: Callable[..., Any], *args: Any, optimise: bool = True) -> "Program":
        """Compiles a function for arguments of these shapes (`jax.ShapeDtypeStruct` will do), in the background.

        Args:
          function: a pure function.
          *args: arguments like those to come.
          optimise: whether XLA shall spend time on fast code. A program that runs for milliseconds is not worth it.
        """
        with self.counting("compile"):
            lowered = jax.jit(function).lower(*args)
        executable = self.compiler.submit(sweep.compile_fast, lowered, optimise=optimise)
        self._count("num_programs")
        executable.add_done_callback(lambda _: self._count("num_compiled"))
        return Program(lowered.out_info, executable, self)

    @property
    def state(self) -> str:
        """How many programs are compiled, until all are."""
        if self.num_compiled == self.num_programs:
            return ""
        return f"{self.num_compiled} of {self.num_programs} programs compiled"

    @contextmanager
    def counting(self, what: str) -> Iterator[None]:
        """Adds the seconds spent inside to the attribute `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._count(what, time.perf_counter() - start)

    def _count(self, what: str, more: float = 1) -> None:
        with self.lock:
            setattr(self, what, getattr(self, what) + more)


@dataclass(frozen=True)
class Program:
    """A compiled program, or one that soon will be.

    Attributes:
      output: shapes and dtypes of the result, known before the program is compiled.
      executable: the compiled program, a promise.
      watch: counts the seconds.
    """

    output: Any
    executable: Future[jax.stages.Compiled]
    watch: Stopwatch

    def __call__(self, *args: Any) -> Any:
        """Runs the program, once it is compiled; returns the result as NumPy arrays."""
        self.wait()
        with self.watch.counting("run"):
            return jax.device_get(self.executable.result()(*args))

    def wait(self) -> None:
        """Waits until the program is compiled."""
        with self.watch.counting("compile"):
            self.executable.result()


def provenance(**seconds: float) -> dict[str, Any]:
    """What belongs to every result: how long each part took, where, and with which versions."""
    packages = ("dpo_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "seconds": seconds,
        "device": f"{jax.device_count()} x {device.platform} ({device.device_kind})",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }


def output_folder(path: Path) -> Path:
    """Makes the folder for results, before any work is done whose results it could not take."""
    with clear_errors():
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return path


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: `write` fills a neighbour, which then takes the file's place."""
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_summary(summary: dict[str, Any], folder: Path) -> None:
    """Writes `summary.json`: arrays as lists, and numbers that JSON lacks (NaN, infinity) as null.

    Half a character, as a file's name may hold, becomes its JSON escape, which is Python's.
    """
    text = json.dumps(_as_json(summary), indent=2, ensure_ascii=False, allow_nan=False)
    save(folder / "summary.json", lambda path: path.write_text(text + "\n", "utf-8", "backslashreplace"))


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, and shows it if this is a Jupyter notebook."""
    save(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=110))
    if in_jupyter():
        from IPython.display import Image, display

        display(Image(filename=str(path)))


def mean_and_stderr(values: Any) -> dict[str, np.ndarray]:
    """Mean over the first axis (seeds) and its standard error, NaN for a single seed."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return {"mean": values.mean(axis=0), "stderr": spread / np.sqrt(len(values))}


def interval(statistics: dict[str, Any], num: int, digits: int = 3) -> str:
    """A mean of `num` values and half the width of its 95 % confidence interval, if there is one."""
    half = half_width(statistics["stderr"], num)
    return f"{statistics['mean']:.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def on_terminal() -> bool:
    """Whether somebody watches who would like to see things move."""
    return console.is_terminal and not in_jupyter()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says at once what is being waited for, in notebooks excepted, and every now and then that it still is."""
    if on_terminal():
        with console.status(what):
            yield
        return
    start = time.perf_counter()
    if not in_jupyter():
        console.print(f"{what} ...")
    with _lines(lambda: f"{what}: {time.perf_counter() - start:.0f} s so far"):
        yield


FIRST_START = "The first start also compiles, for some minutes."
SECONDS_PER_LINE = 30.0
"""How often a long run says how far it is where no bar can move: in a log file, in a pipe."""


@contextmanager
def progress(what: str, total: int, watch: Stopwatch | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and remaining time on terminals; elsewhere a line now and then, in notebooks nothing.

    Args:
      what: what is counted.
      total: how many there are.
      watch: whose programs are compiled meanwhile.

    Yields:
      What sets how many are done.
    """

    def state() -> str:
        return watch.state if watch else ""

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns, _Words(state), console=console, transient=True, disable=not on_terminal()) as bar:
        task = bar.add_task(what, total=total)

        def line() -> str:
            return ", ".join(filter(None, [f"{what}: {bar.tasks[0].completed:,.0f} of {total:,}", state()]))

        with _lines(line):
            yield lambda done: bar.update(task, completed=done)


@contextmanager
def _lines(text: Callable[[], str]) -> Iterator[None]:
    """Prints a line now and then, from a thread of its own, where nothing can move."""

    def print_lines() -> None:
        while not over.wait(SECONDS_PER_LINE):
            console.print(text())

    over, printer = Event(), Thread(target=print_lines, daemon=True)
    if not on_terminal() and not in_jupyter():
        printer.start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def threads(num: int) -> Iterator[ThreadPoolExecutor]:
    """Threads to work with; an error, or an interrupt, does not wait until they have finished what they do."""
    pool = ThreadPoolExecutor(num)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def sweep_report(what: str, seconds_per_line: float | None = None) -> Iterator[Callable[[Any], None]]:
    """Shows how far a sweep is: a bar on terminals; elsewhere nothing, or a line now and then.

    Args:
      what: what is counted.
      seconds_per_line: the least time between two lines; no lines if `None`, no bar otherwise.

    Yields:
      The `report` that `dpo_jax.sweep.grid` takes.
    """
    last = time.perf_counter()

    def log(progress: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        if seconds_per_line is None or (now - last < seconds_per_line and progress.done < progress.total):
            return
        last, rate = now, (progress.done - progress.resumed) / progress.run_seconds
        console.print(
            f"{what}: {progress.done:,} of {progress.total:,}, {rate:,.1f} per second, compiled for "
            f"{progress.compile_seconds:.1f} s, about {(progress.total - progress.done) / rate:,.0f} s left"
        )

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[compiled]}"),
    )
    shown = on_terminal() and seconds_per_line is None
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=None, rate="", compiled="compiling")

        def report(progress: Any) -> None:
            rate = (progress.done - progress.resumed) / progress.run_seconds
            compiled = f"compiled for {progress.compile_seconds:.1f} s"
            bar.update(task, completed=progress.done, total=progress.total, rate=f"{rate:,.1f}/s", compiled=compiled)
            log(progress)

        yield report


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, numbers to the right."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class _Words(ProgressColumn):
    def __init__(self, words: Callable[[], str]):
        super().__init__()
        self.words = words

    def render(self, _: Task) -> Text:
        return Text(self.words())


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _as_json(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
