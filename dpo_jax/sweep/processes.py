"""Processes: several of them, on one machine or many, that share a sweep and the folder of its results.

They meet once, when they join. From then on they know of each other by small files in the folder alone: none depends on
another that dies, and a failure in one is read by the others within seconds.
"""

import itertools
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np

from dpo_jax.sweep.stopping import Stop

SECONDS_BETWEEN_SIGNS = 1.0
"""How often a process gives a sign of life."""

SECONDS_OF_SILENCE = 20.0
"""After how long without one it is taken for dead."""

SECONDS_TO_BEGIN = 300.0
"""How long the others wait for one that has not begun."""

_calls = itertools.count()


class OtherProcessError(RuntimeError):
    """Another one of the processes that share a sweep has failed, or died."""


def join_processes() -> None:
    """Joins the processes that share a sweep, if there are several; to be called before anything else of JAX.

    The same script is started once for each process. Under SLURM (`srun`) nothing else is needed. Elsewhere, each
    process finds in its environment `JAX_COORDINATOR_ADDRESS` (host:port of the process of number 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (0, 1, ...).

    JAX's coordinator is needed for a moment only: afterwards a process may die without taking the others with it, and
    collective operations are not available. A script that needs them calls `jax.distributed.initialize` instead, and
    then JAX ends all processes, in its own words, if one of them dies.

    Raises:
      ValueError: some of these are missing, or not numbers.
    """
    if jax.distributed.is_initialized() or start.cache_info().currsize:
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    variables = {name: os.environ.get(name, "") for name in names}
    if any(variables.values()):
        missing = [name for name, value in variables.items() if not value]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be set, too, for several processes to share a sweep")
        address, num_processes, process_id = (variables[name] for name in names)
        try:
            jax.distributed.initialize(address, int(num_processes), int(process_id))
        except ValueError as problem:
            raise ValueError(f"cannot join the other processes: {problem}") from problem
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()
    else:
        return
    start()
    jax.distributed.shutdown()


@cache
def start() -> str:
    """A name of this start, the same in all processes."""
    from jax.experimental import multihost_utils

    return f"{int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))):08x}"


class Peers:
    """What a process says of itself to the others of this start, and hears of them: each writes one small file.

    Args:
      folder: that they share.
      name: of what they do together, the same in all of them.
      number: of this process.
      total: how many processes there are.
    """

    def __init__(self, folder: Path, name: str, number: int, total: int) -> None:
        self.place, self.number, self.total = folder / ".processes" / name, number, total
        self.state, self.signs, self.lock = "begun", 0, threading.Lock()
        now = time.monotonic()
        self.heard = {other: (b"", now) for other in range(total) if other != number}
        self.place.mkdir(parents=True, exist_ok=True)
        self._file(number).touch()
        self.say(self.state)

    def say(self, state: str) -> None:
        """Tells the other processes the state: `begun`, or `failed: ` and the reason."""
        with self.lock:
            self.state = state
        self.heartbeat()

    def heartbeat(self) -> None:
        """Writes a heartbeat. The file keeps its size, so that it can be written even if the disk is full."""
        with self.lock, self._file(self.number).open("r+b") as file:
            self.signs += 1
            file.write(f"{self.signs} {self.state}".encode()[:1024].ljust(1024))

    def check(self) -> dict[int, str]:
        """What each of the others says.

        Raises:
          OtherProcessError: one of them has failed, or is silent; or processes of a later start do the work now.
        """
        if not self._file(self.number).exists():
            raise OtherProcessError("the sweep was started again meanwhile, and this start has no part in it any more")
        states = {}
        for other, (before, when) in self.heard.items():
            said, now = self._said(other), time.monotonic()
            if said not in (before, b""):
                before, when = self.heard[other] = said, now
            states[other] = before.decode(errors="replace").strip().partition(" ")[2]
            if states[other].startswith("failed: "):
                raise OtherProcessError(f"process {other} of {self.total} {states[other]}")
            if now - when > (SECONDS_OF_SILENCE if before else SECONDS_TO_BEGIN):
                what = "has given no sign of life" if before else "has not begun"
                raise OtherProcessError(
                    f"process {other} of {self.total} {what} for {now - when:.0f} s: it was killed, perhaps"
                )
        return states

    def fail(self, why: str) -> None:
        """Tells the others that this process ends; the last one to do so removes the files."""
        with suppress(OSError):
            self.say("failed: " + " ".join(why.split()))
        if all(self._has_ended(other) for other in self.heard):
            shutil.rmtree(self.place, ignore_errors=True)
        self._remove_empty()

    def leave(self) -> None:
        """Removes this process's file, and the folder of these files after the last one."""
        self._file(self.number).unlink(missing_ok=True)
        self._remove_empty()

    def _has_ended(self, other: int) -> bool:
        before, when = self.heard[other]
        is_silent = before != b"" and time.monotonic() - when > SECONDS_OF_SILENCE
        return is_silent or b" failed: " in self._said(other)

    def _remove_empty(self) -> None:
        with suppress(OSError):
            self.place.rmdir()
        with suppress(OSError):
            self.place.parent.rmdir()

    def _file(self, number: int) -> Path:
        return self.place / str(number)

    def _said(self, other: int) -> bytes:
        try:
            return self._file(other).read_bytes()
        except OSError:
            return b""


def remove_earlier_starts(folder: Path, peers: Peers | None) -> None:
    """Removes what processes of earlier starts have left in a folder."""
    for place in (folder / ".processes").glob("*"):
        if peers is None or place != peers.place:
            shutil.rmtree(place, ignore_errors=True)
    if peers is None:
        with suppress(OSError):
            (folder / ".processes").rmdir()


@contextmanager
def watching_peers(folder: Path, stop: Stop) -> Iterator[Peers | None]:
    """Tells the other processes how this one is, and stops it if one of them fails; `None` if there are no others.

    Raises:
      OtherProcessError: another process has failed.
    """
    number, total = jax.process_index(), jax.process_count()
    if total == 1:
        yield None
        return
    peers, over = Peers(folder, f"{start()}-{next(_calls)}", number, total), threading.Event()

    def live() -> None:
        while not over.wait(SECONDS_BETWEEN_SIGNS):
            with suppress(OSError):
                peers.heartbeat()
            try:
                peers.check()
            except OtherProcessError as problem:
                stop.ask(partial(OtherProcessError, str(problem)))

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield peers
    except BaseException as problem:
        over.set()
        what = "it was interrupted" if isinstance(problem, KeyboardInterrupt | SystemExit) else str(problem)
        peers.fail(what)
        if isinstance(problem, Exception):
            problem.add_note(
                f"This was process {number} of {total}; the others end, too. What is done is stored: start all of them "
                "again, with the same command, to go on."
            )
        raise
    over.set()
    thread.join()
    peers.leave()
