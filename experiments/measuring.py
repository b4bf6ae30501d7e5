"""Measuring programs: compiled apart from running, spread over devices, timed in turn, beside the machine's peaks."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.sweep.programs import compile_fast


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
    def num_devices(self) -> int:
        """On how many devices it runs."""
        return self.sharding.num_devices

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on each device: what the program needs, and the largest use so far where the device counts that."""
        needed = self.executable.memory_analysis()
        used = jax.local_devices()[0].memory_stats() or {}
        names = ("argument", "output", "temp")
        sizes = {name: int(getattr(needed, f"{name}_size_in_bytes")) for name in names} if needed else {}
        return sizes | ({"peak_so_far": int(used["peak_bytes_in_use"])} if "peak_bytes_in_use" in used else {})

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
    """How long something takes, this once."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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


def peaks(repeats: int, *, matrix_size: int, copy_size: int) -> dict[str, float]:
    """What all local devices together can do: FLOP/s of big matrix products, bytes per second of a big copy.

    Args:
      repeats: how often to measure.
      matrix_size: rows and columns of each device's matrix.
      copy_size: floats in each device's array.

    Returns:
      `float32`, as precise as the networks here; `float32 by default`, which accelerators round more; and `copy`.
    """
    num = jax.local_device_count()

    def rate(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], work: float) -> float:
        program = compile_on(num, function, jax.ShapeDtypeStruct(shape, jnp.float32))
        data = program.place(np.ones(shape, np.float32))
        return num * work / median_seconds(lambda: program(data), repeats)

    product, shape = 2.0 * matrix_size**3, (num * matrix_size, matrix_size)
    return {
        "float32": rate(lambda x: jnp.matmul(x, x, precision="highest"), shape, product),
        "float32 by default": rate(lambda x: jnp.matmul(x, x), shape, product),
        "copy": rate(lambda x: x + 1, (num * copy_size,), 8.0 * copy_size),
    }
