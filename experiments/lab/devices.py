"""The devices that commands use, and their cache of compiled programs."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import jax

from experiments.lab import commands

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment in which glibc asks for huge pages of memory. On a CPU, a program asks for its temporary memory anew each
time it runs, and gets it faster in huge pages: `lm_benchmark` has one side without."""


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
    """Makes each core of a CPU a device of its own, so that sweeps use them all; no effect once JAX is in use."""
    with suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_cores())


def restart_with_huge_pages() -> None:
    """Starts this command again with `HUGE_PAGES`, which a process cannot choose later, if it computes on a CPU.

    No effect outside Linux, in Jupyter, or if `GLIBC_TUNABLES` is set.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or commands.in_jupyter():
        return
    if jax.default_backend() == "cpu":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **HUGE_PAGES})


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
