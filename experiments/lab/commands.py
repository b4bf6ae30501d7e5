"""What every command needs: options, one-line errors, a quiet end."""

import difflib
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Timer
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from dpo_jax import checks

if TYPE_CHECKING:
    from collections.abc import Callable

OptionsType = TypeVar("OptionsType")


def parse(options: type[OptionsType]) -> OptionsType:
    """Options from the command line; in a Jupyter notebook, their defaults."""
    if in_jupyter():
        return options()
    behave_as_a_command()
    import tyro

    module = sys.modules["__main__"].__spec__
    name = module.name.removesuffix(".__main__") if module else None
    return tyro.cli(options, prog=f"python -m {name}" if name else None)


def in_jupyter() -> bool:
    """Whether this process is a Jupyter kernel; one that only imported `ipykernel` is not."""
    kernels = sys.modules.get("ipykernel.kernelapp")
    return kernels is not None and bool(kernels.IPKernelApp.initialized())


@contextmanager
def clear_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with one line and no traceback on an error that the user can fix: by default, bad input."""
    try:
        yield
    except Exception as problem:
        if isinstance(problem, kinds or (TypeError, ValueError, OSError)):
            notes = [note for note in getattr(problem, "__notes__", []) if not note.startswith("---")]  # JAX's own
            sys.exit(" ".join([f"error: {problem}", *(f"({note})" for note in notes)]))
        raise


def check_sizes(**sizes: int | None) -> None:
    """Ends the command unless all sizes that are given are 1 or more; `num_seeds=3` is the option `--num-seeds`."""
    with clear_errors():
        for name, size in sizes.items():
            if size is not None:
                checks.size(_option(name), size)


def check_seed(seed: int) -> None:
    """Ends the command unless a number can seed a key."""
    with clear_errors():
        checks.size("--seed", seed, at_least=0)
        if seed >= 2**32:
            raise ValueError(f"--seed must be below 2**32, got {seed}")


def check_names(option: str, names: Iterable[str], known: Mapping[str, object]) -> None:
    """Ends the command unless all names are known; says which are like an unknown one."""
    with clear_errors():
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
                raise ValueError(f"{option}: there is no {name!r}; perhaps {', '.join(map(repr, close))}")


def behave_as_a_command() -> None:
    r"""Makes this process print and end as users of a command line expect.

    - Characters that the terminal's encoding lacks are printed as escapes (`\u03b2`).
    - If the reader of a pipe is gone (`... | head -1`), the process ends quietly by SIGPIPE: status 141 in a shell.
    - Ctrl-C ends it with one line, by SIGINT: status 130 in a shell. It waits for no thread. Python swallows an
      interrupt that arrives inside a callback of the garbage collector; such an interrupt is sent again.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.excepthook, sys.unraisablehook = _end_on_interrupt, _interrupt_again


def end_at_once(main: "Callable[[], None]") -> None:
    """Runs a command that compiles, and ends the process without waiting for the compiler, which cannot be stopped."""
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(ended.code, str) else ended.code or 0)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _end_on_interrupt(kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, problem, trace)
        return
    print("Interrupted.", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def _interrupt_again(problem: "sys.UnraisableHookArgs") -> None:
    if problem.exc_type is KeyboardInterrupt:
        Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()  # not before this has returned: it would be lost, too
    else:
        sys.__unraisablehook__(problem)
