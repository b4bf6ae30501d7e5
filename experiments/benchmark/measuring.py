"""Measuring programs: compiled apart from running, spread over devices, timed in turn, beside the machine's peaks."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.fast.compiling import compile_fast
from experiments.benchmark.least_work import Work
from experiments.lab.devices import num_cores


@dataclass(frozen=True)
class Program:
    """A compiled function of arrays whose leading axis is split over devices.

    Attributes:
      executable: the compiled function.
      sharding: how its arguments are split.
      compile_seconds: how long tracing and compiling took.
    """

    executable: jax.stages.Compiled
    sharding: NamedSharding
    compile_seconds: float

    def __call__(self, *args: Any) -> Any:
        """Runs to the end."""
        return jax.block_until_ready(self.executable(*args))

    def place(self, args: Any) -> Any:
        """Arguments where the program wants them."""
        return jax.device_put(args, self.sharding)

    @property
    def xla_counts(self) -> dict[str, float]:
        """What XLA thinks the program does; the body of a loop counts once, however often it is run."""
        counts = self.executable.cost_analysis() or {}
        return {name: float(counts[name]) for name in ("flops", "transcendentals", "bytes accessed") if name in counts}


def compile_on(num_devices: int, function: Callable[..., Any], *args: Any) -> Program:
    """Compiles a function to run on some of the devices, on its part of the arguments' leading axis on each.

    Args:
      num_devices: how many of the local devices.
      function: what each of them does with its part.
      *args: all that it is to be called with, or the shapes of that.
    """
    mesh = Mesh(np.array(jax.local_devices()[:num_devices]), ("devices",))
    split = PartitionSpec("devices")
    start = time.perf_counter()
    spread = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    executable = compile_fast(jax.jit(spread).lower(*args))
    return Program(executable, NamedSharding(mesh, split), time.perf_counter() - start)


def seconds(run: Callable[[], Any]) -> float:
    """How long something takes, this once; of a sweep, which says so itself, without tracing and compiling."""
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    return float(getattr(result, "attrs", {}).get("run_seconds", elapsed))


def seconds_in_turn(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each contender took, in rounds: each once, then again. A first round, to warm up, does not count."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            times[name].append(seconds(run))
    return times


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of some runs, after one to warm up."""
    return statistics.median(seconds_in_turn({"": run}, repeats)[""])


Probe = Callable[..., dict[str, float]]
"""Measures what the machine can do: `(repeats) -> rates`, or `(repeats, names) -> rates` of these names."""


def probe_of(*, matrix_size: int, copy_size: int) -> Probe:
    """What measures, whenever it is called, what all local devices together can do.

    Args:
      matrix_size: rows and columns of each device's matrix.
      copy_size: floats in each device's array.

    Returns:
      A function that returns the FLOP/s of big matrix products, `float32`, as precise as the networks here, and
      `float32 by default`, which accelerators round more; and the bytes per second of a big `copy`.
    """
    num = jax.local_device_count()

    def prepared(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> Callable[[], Any]:
        program = compile_on(num, function, jax.ShapeDtypeStruct(shape, jnp.float32))
        return partial(program, program.place(np.ones(shape, np.float32)))

    square, product = (num * matrix_size, matrix_size), 2.0 * num * matrix_size**3
    probes = {
        "float32": (prepared(lambda x: jnp.matmul(x, x, precision="highest"), square), product),
        "float32 by default": (prepared(lambda x: jnp.matmul(x, x), square), product),
        "copy": (prepared(lambda x: x + 1, (num * copy_size,)), 8.0 * num * copy_size),
    }

    def probe(repeats: int, names: Iterable[str] = tuple(probes)) -> dict[str, float]:
        return {name: probes[name][1] / median_seconds(probes[name][0], repeats) for name in names}

    return probe


BESIDE = ("float32", "copy")
"""The peaks that are measured before and after everything else."""


@dataclass(frozen=True)
class Clock:
    """Measures times, and the machine's peaks before and after each.

    Attributes:
      probe: measures what the machine can do (`probe_of`).
      repeats: how often each time is measured.
    """

    probe: "Probe"
    repeats: int

    def timed(self, measure: Callable[[], float], work: Work, **counts: int) -> dict[str, Any]:
        """A time and its rates: how many of each per second, FLOP/s, bytes/s, as shares of the peaks.

        The peaks are measured before and after, since a machine changes its speed: the shares are those of their mean.
        """
        before = self.probe(1, BESIDE)
        seconds = measure()
        peaks = {name: [before[name], peak] for name, peak in self.probe(1, BESIDE).items()}
        flops, traffic = work.flops / seconds, work.bytes / seconds
        return {
            "seconds": seconds,
            **{f"{name}_per_second": count / seconds for name, count in counts.items()},
            "flops_per_second": flops,
            "bytes_per_second": traffic,
            "share_of_peak_flops": flops / np.mean(peaks["float32"]),
            "share_of_peak_copy": traffic / np.mean(peaks["copy"]),
            "flops_per_byte": work.intensity,
            "peaks": peaks,
        }


def machine() -> dict[str, Any]:
    """The processor, its cores and those this process may use, bytes of memory, and how many processes want to run."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "usable_cores": num_cores(),
        "memory": psutil.virtual_memory().total,
        "load": psutil.getloadavg()[0],
    }


def processor() -> str:
    """The model of the processor, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
