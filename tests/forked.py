"""Functions of tests in processes of their own, which start with JAX and the library imported, and nothing computed."""

import multiprocessing

import optax  # noqa: F401
import xarray  # noqa: F401

from dpo_jax import lm, losses, sweep, toy, train  # noqa: F401
from dpo_jax.fast import compiling

compiling.CPU_OPTIONS.clear()  # they compile as the tests do


def start(target, *args):
    """Starts a function of a module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked"])
    process = context.Process(target=run, args=(target, *args))
    process.start()
    return process


def run(target, *args):
    """What the process does: it has imported this module, whether or not that was done in advance."""
    target(*args)


def exit_code(target, *args):
    """Runs a function to its end, two minutes at most."""
    process = start(target, *args)
    process.join(120)
    return process.exitcode
