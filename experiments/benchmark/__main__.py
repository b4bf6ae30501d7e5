"""How fast it is: whole experiments, stacked training runs and losses, beside what the machine can do.

Times to compile and times to run are kept apart; each time to run is the median of several, after one to warm up. If
PyTorch is installed, and JAX runs on the CPU, the same DPO runs are made in PyTorch in turn (`rival.py`).
"""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import checks, sweep
from experiments.benchmark import compare, losses, measuring, report, string_runs, workloads
from experiments.benchmark.measuring import Clock
from experiments.lab import commands, console, devices, files, page


@dataclass(frozen=True)
class Options:
    """How long experiments, training runs and losses take, beside what the machine can do.

    On two quiet cores that is about 8 minutes and 2 GB of memory, and 10 minutes more where PyTorch is installed; with
    `--max-seconds 600`, a quarter of an hour more. `--quick` takes a minute, and measures nothing worth knowing.
    """

    seed: int = 0
    """Decides everything random."""
    max_experiments: int | None = None
    """At most how many experiments at once; by default as many as `--max-seconds` allows."""
    runs_at_once: int | None = None
    """How many runs a device trains at once; more are trained block after block. By default what suits the device."""
    max_seconds: float = 30.0
    """Numbers of experiments, and of runs, that take longer than this are left out."""
    repeats: int = 3
    """How often each time is measured."""
    torch: bool = True
    """Whether to compare with PyTorch, where it is installed and JAX runs on a CPU."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing: set two summaries side by side, of these files or folders, with ratios of the second to the
    first."""
    quick: bool = False
    """Only check that everything works, with next to nothing to do."""
    out: Path = Path("results/benchmark")
    """Folder for summary.json and the figures."""


class Sizes(NamedTuple):
    """How much to do.

    Attributes:
      runs: numbers of DPO runs at once.
      torch_runs: those that are made in PyTorch, too.
      string_runs: numbers of DPO runs on strings at once, in PyTorch, too.
      num_starts: different worlds, data and SFT policies from which DPO runs start.
      pairs: comparisons in the batch that the losses see.
      losses: which losses.
      matrix: rows and columns of each device's big matrix.
      copy: floats in each device's big array.
    """

    runs: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384, 102400)
    torch_runs: tuple[int, ...] = (1, 4, 64, 256, 1024)
    string_runs: tuple[int, ...] = (64, 256, 1024)
    num_starts: int = 1024
    pairs: int = 2**20
    losses: tuple[str, ...] = tuple(losses.LOSSES)
    matrix: int = 2048
    copy: int = 2**25


QUICK = Sizes((1, 2), (1,), (2,), 2, 2**12, ("dpo", "nca"), 256, 2**16)
ON_ACCELERATORS = Sizes(matrix=8192, copy=2**28)
NUM_SCALED = 64
"""How many experiments each device makes when devices are compared."""


def measure(options: Options) -> dict[str, Any]:
    """Measures everything."""
    sizes = QUICK if options.quick else Sizes() if jax.default_backend() == "cpu" else ON_ACCELERATORS
    with console.waiting("Measuring what the machine can do"):
        probe = measuring.probe_of(matrix_size=sizes.matrix, copy_size=sizes.copy)
        peaks = probe(options.repeats)
    clock = Clock(probe, options.repeats)
    whole = workloads.experiments(options.seed, options.runs_at_once)
    with console.waiting("Experiments"):
        experiments = list(workloads.at_once(whole, numbers(options), clock, options.max_seconds))
    with console.waiting("DPO runs"):
        starts = sweep.prepare(workloads.prepare, jax.random.key(options.seed), num_seeds=sizes.num_starts)
        runs = workloads.dpo_runs(starts, options.runs_at_once)
        dpo = list(workloads.at_once(runs, sizes.runs, clock, options.max_seconds))
    with console.waiting("DPO runs on strings"):
        # same key: the seed of the command
        string_starts = sweep.prepare(string_runs.prepare, jax.random.key(options.seed), num_seeds=sizes.num_starts)
        on_strings = string_runs.workload(string_starts, options.runs_at_once)
        of_strings = list(workloads.at_once(on_strings, sizes.string_runs, clock, options.max_seconds))
    with console.waiting("Losses"):
        of_losses = losses.all_losses(sizes.losses, sizes.pairs, clock)
    with console.waiting("Devices"):
        of_devices = workloads.scaling(whole, 1 if options.quick else NUM_SCALED, clock)
    return {
        "runs_at_once": options.runs_at_once,
        "steps": {
            "experiment": workloads.EXPERIMENT_STEPS,
            "dpo": workloads.DPO.steps,
            "strings": string_runs.TRAINING.steps,
        },
        "pairs": sizes.pairs,
        "peaks": report.highest(peaks, [*experiments, *dpo, *of_strings, *of_losses.values()]),
        "step": workloads.step_counts(workloads.dpo_step, starts.values.start.params, starts.values, workloads.DPO),
        "string_step": workloads.step_counts(
            string_runs.step, string_starts.values.params, string_starts.values, string_runs.TRAINING
        ),
        "experiments": experiments,
        "dpo": dpo,
        "strings": of_strings,
        "losses": of_losses,
        "scaling": of_devices,
        **beside_torch(options, sizes, (starts, runs), (string_starts, on_strings)),
    }


def numbers(options: Options) -> Iterator[int]:
    """Numbers of experiments: 1, 4, 16, 64, ..., as far as the user wants."""
    limit = 1 if options.quick else options.max_experiments
    return itertools.takewhile(lambda num: limit is None or num <= limit, (4**i for i in itertools.count()))


def can_compare(options: Options) -> bool:
    """Whether JAX can be compared with PyTorch here."""
    return options.torch and jax.default_backend() == "cpu" and importlib.util.find_spec("torch") is not None


def beside_torch(
    options: Options,
    sizes: Sizes,
    dpo: tuple[sweep.Starts, workloads.Workload],
    strings: tuple[sweep.Starts, workloads.Workload],
) -> dict[str, Any]:
    """The same runs in PyTorch; `None` if that cannot be compared."""
    if not can_compare(options):
        return {"torch": None, "string_torch": None}
    from experiments.benchmark import rival, string_rival

    def compared(compare: Any, starts: sweep.Starts, runs: workloads.Workload, numbers: tuple[int, ...]) -> Any:
        return compare(
            without_keys(starts.values),
            {num: partial(runs.run, num) for num in numbers},
            repeats=options.repeats,
            compile_seconds=0.0 if options.quick else 60.0,
        )

    with console.waiting("PyTorch"):
        torch = compared(rival.compare, *dpo, sizes.torch_runs)
    with console.waiting("PyTorch on strings"):
        return {"torch": torch, "string_torch": compared(string_rival.compare, *strings, sizes.string_runs)}


def without_keys(starts: Any) -> Any:
    """Starts as NumPy arrays."""
    return jax.device_get(starts._replace(key=jax.random.key_data(starts.key)))


def main(options: Options) -> None:
    """Measures everything and writes the results."""
    commands.check_seed(options.seed)
    if options.compare:
        with commands.clear_errors():
            compare.print_comparison(*options.compare)
        return
    with commands.clear_errors():
        checks.size("--repeats", options.repeats)
        checks.interval("--max-seconds", np.array(options.max_seconds), "(0, inf)")
        for name, value in (("--max-experiments", options.max_experiments), ("--runs-at-once", options.runs_at_once)):
            if value is not None:
                checks.size(name, value)
    out = files.output_folder(options.out)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured, too
    devices.use_all_cores()
    start, machine = perf_counter(), measuring.machine()
    summary = measure(options)
    machine |= {"load": [machine["load"], measuring.machine()["load"]]}
    summary |= {
        "machine": machine,
        "doubts": report.doubts(summary),
        **files.provenance(total=perf_counter() - start),
    }
    files.save_summary({"seed": options.seed, "repeats": options.repeats, **summary}, out)
    report.save_figures(summary, out)
    page.update(report.page_tables(summary), out)
    report.print_results(summary)
    for doubt in summary["doubts"]:
        console.say(f"Beware: {doubt}")
    console.say(f"Measured in {summary['seconds']['total']:.0f} s. Figures and summary.json are in {out}.")


if __name__ == "__main__":
    main(commands.parse(Options))
