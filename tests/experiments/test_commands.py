"""What holds for every command: help, output of any encoding, pipes that nobody reads, interrupts."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest

from experiments import example_comparisons
from experiments.lab import commands, console
from tests.experiments.walks import ROOT

FILES = sorted((ROOT / "experiments").glob("*.py")) + sorted((ROOT / "experiments").glob("*/__main__.py"))
COMMANDS = [
    path.parent.name if path.stem == "__main__" else path.stem
    for path in FILES
    if "commands.parse(" in path.read_text(encoding="utf-8")
]
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
HELP = f"""
import runpy, sys
for name in {COMMANDS}:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"experiments.{{name}}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        print("ended", name, ended.code)
"""


def test_every_command_has_help_in_any_encoding_and_changes_nothing():
    before = example_comparisons.PATH.stat().st_mtime_ns
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, env=ASCII, capture_output=True, check=False)
    said = done.stdout.decode("ascii")
    assert re.findall(r"ended (\w+) (\w+)", said) == [(name, "0") for name in COMMANDS], done.stderr
    assert re.findall(r"usage: python -m experiments\.(\w+)", said) == COMMANDS
    assert example_comparisons.PATH.stat().st_mtime_ns == before


@pytest.fixture
def output(monkeypatch):
    """Standard output of an encoding, as a command has it; what is written there, as bytes."""
    before = signal.getsignal(signal.SIGPIPE)

    def encoded(encoding):
        for name in ("excepthook", "unraisablehook"):
            monkeypatch.setattr(sys, name, getattr(sys, name))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding, write_through=True))
        commands.behave_as_a_command()
        return sys.stdout.buffer

    yield encoded
    signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_printed_as_escapes(encoding, output):
    said = output(encoding)
    names = ["β ± 1", "ß", "日本", "half a letter \udcce"]
    console.print_table(names[0], names[1:], [])
    assert all(name.encode(encoding, "backslashreplace") in said.getvalue() for name in names)


UNREAD = """
import os
from experiments.lab import commands, console
commands.behave_as_a_command()
print("one line")
console.say("another")
"""


def test_a_pipe_that_nobody_reads_ends_a_command_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", UNREAD]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


INTERRUPTED = """
import gc, os, signal, threading
from experiments.lab import commands
commands.behave_as_a_command()
gc.callbacks.append(lambda *_: gc.callbacks.pop() and os.kill(os.getpid(), signal.SIGINT))
threading.Thread(target=threading.Event().wait).start()
gc.collect()
threading.Event().wait()
"""


def test_an_interrupt_ends_a_command_at_once_even_if_it_comes_inside_the_garbage_collector():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "Interrupted.\n")
