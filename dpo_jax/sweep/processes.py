"""Processes: several of them, on one machine or many, that share a sweep."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np


def join_processes() -> None:
    """Joins the processes that share a sweep, if there are several; to be called before anything else of JAX.

    The same script is started once for each process. Under SLURM (`srun`) nothing else is needed. Elsewhere, each
    process finds in its environment `JAX_COORDINATOR_ADDRESS` (host:port of the process of number 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (0, 1, ...).

    Raises:
      ValueError: some of these are missing, or not numbers.
    """
    if jax.distributed.is_initialized():
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


def least(number: int) -> int:
    """The least of the numbers that all processes give, about: small enough for each of them, the same for all."""
    return int(gather(number * (1 - 2**-23)).min()) if jax.process_count() > 1 else number


@contextmanager
def together(what: str) -> Iterator[None]:
    """Work that all processes do, which ends when all have ended it, and fails in all if it fails in one.

    Raises:
      RuntimeError: another process has failed.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        failures = gather(float(failed)) if jax.process_count() > 1 else np.zeros(1)
    if failures.any():
        raise RuntimeError(f"process {failures.argmax()} could not {what}; it says itself why not")


def gather(number: float) -> np.ndarray:
    """The numbers that all processes give, by process."""
    from jax.experimental import multihost_utils

    return np.ravel(multihost_utils.process_allgather(np.float32(number)))
