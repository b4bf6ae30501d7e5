"""Stopping: Ctrl-C and SIGTERM act at any time, while JAX traces and compiles too."""

import _thread
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import jax

USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Signals that stop a sweep, with the handlers that are there unless the caller has chosen others."""

SECONDS_BETWEEN = 0.5
"""How long to wait before a request that was swallowed is made again."""

SECONDS_BETWEEN_LOOKS = 0.5
"""How long the main thread may wait for another one before it looks whether a signal has come."""

ResultType = TypeVar("ResultType")


def result_of(future: Future[ResultType]) -> ResultType:
    """The result of a future.

    It waits in short steps, so that a signal acts soon even if the system delivers it to another thread: Python handles
    signals in the main thread, and only when that runs.
    """
    while not future.done():
        with suppress(TimeoutError):
            future.result(SECONDS_BETWEEN_LOOKS)
    return future.result()


class Stop:
    """A request to stop, repeated until it takes effect.

    Attributes:
      why: makes the exception to be raised; `None` without a request.
      signals: signals by which the main thread can be interrupted; none if the sweep runs in another thread.
    """

    def __init__(self, signals: list[signal.Signals]) -> None:
        self.why: Callable[[], BaseException] | None = None
        self.signals, self._is_over, self._over = signals, False, threading.Event()
        self._collecting = False
        self._insisting = threading.Thread(target=self._insist, daemon=True)

    def ask(self, why: Callable[[], BaseException]) -> None:
        """Asks to stop, from any thread; the first reason counts."""
        if self.why is None:
            self.why = why
            if self.signals:
                self._insisting.start()

    def check(self) -> None:
        """Raises the exception of a request to stop, if there is one."""
        if self.why is not None:
            raise self.why()

    def end(self) -> None:
        """Nothing is raised from here on."""
        self._is_over = True
        self._over.set()
        if self._insisting.is_alive():
            self._insisting.join()

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Raises wherever the main thread is, but within the garbage collector, where exceptions are lost."""
        if self._is_over:
            return
        self.ask(KeyboardInterrupt if number == signal.SIGINT else partial(SystemExit, 128 + number))
        if not self._collecting:
            self.check()

    def _collector_begins(self, phase: str, _: object) -> None:
        if phase == "start":
            self._collecting = True

    def _collector_has_ended(self, phase: str, _: object) -> None:
        if phase == "stop":
            self._collecting = False

    def _insist(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN):
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, self.signals[0])
            else:  # Windows; there a thread that waits is not woken
                _thread.interrupt_main(self.signals[0])


@contextmanager
def stopping() -> Iterator[Stop]:
    """Lets Ctrl-C (KeyboardInterrupt) and SIGTERM (SystemExit) stop what is done inside.

    The garbage collector calls functions of JAX's, and exceptions in these are printed and lost, a Ctrl-C too. Here
    none is raised there, and each is raised again until it has reached the end of this block. Python allows only the
    main thread to do so; in another one, nothing changes. Nor does it where the caller has a handler of its own.
    """
    is_main = threading.current_thread() is threading.main_thread()
    stop = Stop([number for number, handler in USUAL.items() if is_main and signal.getsignal(number) == handler])
    gc.callbacks.insert(0, stop._collector_begins)
    gc.callbacks.append(stop._collector_has_ended)
    for number in stop.signals:
        signal.signal(number, stop._handle)
    try:
        yield stop
    except jax.errors.JaxRuntimeError:  # as JAX reports what was raised inside a callback
        stop.check()
        raise
    finally:
        stop.end()
        gc.callbacks.remove(stop._collector_begins)
        gc.callbacks.remove(stop._collector_has_ended)
        for number in stop.signals:
            signal.signal(number, USUAL[number])
