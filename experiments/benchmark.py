"""How fast it is: whole notebooks, stacked training runs and losses, beside what the machine can do.

A notebook is everything in the tutorial: a world, supervised fine-tuning, comparisons, DPO, DPO for four values of
beta, and their exact evaluation: 8,850 optimizer steps. Times to compile and times to run are kept apart; each time to
run is the median of several, after one to warm up. Where PyTorch is installed, and JAX runs on the CPU, the same DPO
runs are made in PyTorch in turn (`benchmark_torch`).
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, UInt32

from dpo_jax import checks, figures, losses, toy, train
from dpo_jax.sweep.programs import bytes_needed
from dpo_jax.types import Metrics, Pair, Params
from experiments import benchmark_compare, harness, measuring
from experiments.least_work import DEMONSTRATION, DPO_GRADIENT, DPO_PAIR, DPO_VALUE, Training, Work
from experiments.measuring import Program
from experiments.notebook import BETA, BETAS, NUM_DEMONSTRATIONS, NUM_PREFERENCES, POLICY, Start, prepare, train_dpo

SFT = Training(num_epochs=100, num_rows=NUM_DEMONSTRATIONS, batch_size=32, row=DEMONSTRATION)
DPO = Training(num_epochs=50, num_rows=NUM_PREFERENCES, batch_size=64, row=DPO_PAIR)
NOTEBOOK_STEPS = SFT.steps + (1 + len(BETAS)) * DPO.steps
NOTEBOOK_WORK = SFT.work + DPO.work * (1 + len(BETAS))

RUNS_PER_CPU_DEVICE = 256
SHARE_OF_MEMORY = 0.8
BESIDE = ("float32", "copy")
"""The peaks that are measured before and after everything else."""
STEADY = 1.5
"""How far peaks may differ on a machine that does nothing else."""
LONG = 10.0
"""Seconds after which something is measured once, with no run to warm up: its many calls of one program do that."""


def with_lengths(loss: Callable[..., Array]) -> Callable[..., Array]:
    """A loss whose chosen responses have 7 tokens and whose rejected ones have 5."""
    return lambda policy, reference, **rest: loss(
        policy, reference, lengths=Pair(jnp.full_like(policy[0], 7), jnp.full_like(policy[1], 5)), **rest
    )


TORCH = ("tutorial's loop", "stacked", "by hand", "by hand, compiled")
"""The versions of `benchmark_torch`."""

LOSSES: dict[str, Callable[..., Array]] = {
    "dpo": losses.dpo_loss,
    "conservative dpo": partial(losses.dpo_loss, label_smoothing=0.1),
    "robust dpo": partial(losses.robust_dpo_loss, label_smoothing=0.1),
    "ipo": losses.ipo_loss,
    "hinge": losses.hinge_loss,
    "squared": losses.squared_loss,
    "truncated quadratic": losses.truncated_quadratic_loss,
    "exponential": losses.exponential_loss,
    "savage": losses.savage_loss,
    "exo": partial(losses.exo_loss, label_smoothing=0.1),
    "discopop": losses.discopop_loss,
    "offset dpo": partial(losses.offset_dpo_loss, offset=0.5),
    "length-regularized dpo": with_lengths(partial(losses.length_regularized_dpo_loss, alpha=0.1)),
    "nca": losses.nca_loss,
    "bco, pairs": partial(losses.bco_pair_loss, shift=0.1),
    "sppo": losses.sppo_loss,
    "apo-zero": losses.apo_zero_loss,
    "apo-down": losses.apo_down_loss,
    "dpo-positive": partial(losses.dpo_positive_loss, penalty=1.0),
    "chi-po": losses.chi_po_loss,
    "length-normalized dpo": with_lengths(losses.length_normalized_dpo_loss),
    "dpo, forward KL": losses.with_divergence(losses.dpo_loss, losses.forward_kl),
    "dpo, Jensen-Shannon": losses.with_divergence(losses.dpo_loss, losses.jensen_shannon),
    "dpo, alpha 0.5": losses.with_divergence(losses.dpo_loss, losses.alpha_divergence(0.5)),
}


@dataclass(frozen=True)
class Options:
    """How long notebooks, training runs and losses take, beside what the machine can do.

    On two quiet cores that is about 8 minutes and 2 GB of memory, and 10 minutes more where PyTorch is installed; with
    `--max-seconds 600`, a quarter of an hour more. `--quick` takes a minute, and measures nothing worth knowing.
    """

    seed: int = 0
    """The first seed; the others follow it."""
    max_notebooks: int | None = None
    """At most how many notebooks at once; by default what the memory of an accelerator holds, any number on a CPU."""
    chunk: int | None = None
    """How many runs a device trains at once, of which a notebook has four; more are made one after another. By default
    what memory holds, and 256 on a CPU."""
    max_seconds: float = 30.0
    """Numbers of notebooks, and of runs, that take longer than this are left out."""
    repeats: int = 3
    """How often each time is measured."""
    torch: bool = True
    """Whether to compare with PyTorch, where it is installed and JAX runs on a CPU."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing: set two summaries side by side, of these files or folders, with ratios of the second to the
    first."""
    quick: bool = False
    """Only try out whether everything works, with next to nothing to do."""
    out: Path = Path("results/benchmark")
    """Folder for summary.json and the figures."""


class Sizes(NamedTuple):
    """How much to do.

    Attributes:
      runs: numbers of DPO runs at once.
      torch_runs: those that are made in PyTorch, too.
      num_starts: different worlds, data and SFT policies from which DPO runs start.
      pairs: comparisons in the batch that the losses see.
      losses: which losses.
      matrix: rows and columns of each device's big matrix.
      copy: floats in each device's big array.
    """

    runs: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384, 102400)
    torch_runs: tuple[int, ...] = (1, 4, 64, 256, 1024)
    num_starts: int = 1024
    pairs: int = 2**20
    losses: tuple[str, ...] = tuple(LOSSES)
    matrix: int = 2048
    copy: int = 2**25


QUICK = Sizes((1, 2), (1,), 2, 2**12, ("dpo", "nca"), 256, 2**16)
ON_ACCELERATORS = Sizes(matrix=8192, copy=2**28)


@dataclass(frozen=True)
class Measurements:
    """What measures workloads: how large they are, how often, and what they are compared with.

    Attributes:
      options: of the script.
      sizes: how much to do.
      chunk: how many runs a device trains at once.
      probe: measures what the machine can do (`measuring.probe_of`).
    """

    options: Options
    sizes: Sizes
    chunk: int
    probe: measuring.Probe

    @property
    def notebooks(self) -> int:
        """How many notebooks a device makes at once."""
        return max(1, self.chunk // len(BETAS))

    def split(self, num: int, chunk: int) -> tuple[int, int, int]:
        """On how many devices, how many at once on each, and how often, to make `num` of something."""
        num_devices = min(num, jax.local_device_count())
        calls = -(-num // (num_devices * chunk))
        return num_devices, -(-num // (num_devices * calls)), calls

    def seeds(self, num_chunks: int, size: int) -> np.ndarray:
        """Seeds for some chunks, `[chunks, size]`."""
        return seeds(self.options.seed, num_chunks * size).reshape(num_chunks, size)

    def timed(self, measure: Callable[[], float], work: Work, **counts: int) -> dict[str, Any]:
        """A time and what it comes to: how many of each per second, FLOP/s, bytes/s, as shares of the peaks.

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

    def at_once(
        self, numbers: Iterable[int], make_job: Callable[["Measurements", int], "Job"], steps: int, work: Work
    ) -> Iterator[dict[str, Any]]:
        """Entries of the summary, one for each number of runs, each of so many optimizer steps, with that least work.

        There is one at least, and they end where one more would take longer than the user wants.
        """
        for i, num in enumerate(numbers):
            job = make_job(self, num)
            job.call(0)  # warms up
            seconds = job.num_calls * measuring.seconds(partial(job.call, 0))
            if seconds > self.options.max_seconds and i > 0:
                return
            repeats = partial(measuring.median_seconds, job, self.options.repeats)
            measure = partial(measuring.seconds, job) if seconds > LONG else repeats
            times = self.timed(measure, work * num, runs=num, steps=num * steps)
            yield {
                "num": num,
                "num_devices": job.program.num_devices,
                "per_device": job.seeds.shape[1] // job.program.num_devices,
                "calls": job.num_calls,
                "compile_seconds": job.program.compile_seconds,
                "microseconds_per_step_and_run": 1e6 * times["seconds"] / (num * steps),
                **times,
                "memory": job.program.memory,
            }


@dataclass(frozen=True)
class Job:
    """Calls of a program for one chunk of runs after another.

    Attributes:
      program: makes a chunk.
      seeds: of each chunk.
      data: what else a chunk needs, on the devices; from the first one again if there are more chunks.
    """

    program: Program
    seeds: np.ndarray
    data: list[tuple[Any, ...]]

    @property
    def num_calls(self) -> int:
        """How often the program is called."""
        return len(self.seeds)

    def call(self, number: int) -> Any:
        """Makes one chunk."""
        return self.program(self.program.place(self.seeds[number]), *self.data[number % len(self.data)])

    def __call__(self) -> list[Any]:
        """Makes all chunks."""
        return [self.call(number) for number in range(self.num_calls)]


def notebook(seed: UInt32[Array, ""]) -> Metrics:
    """The whole notebook: the reward of its SFT policy, and the last metrics of its DPO runs, the ablation's last."""
    start_key, dpo_key, ablation_key = jax.random.split(jax.random.key(seed), 3)
    start = prepare(start_key)
    dpo = train_dpo(dpo_key, start, BETA)
    ablation = jax.vmap(train_dpo, in_axes=(None, None, 0))(ablation_key, start, jnp.array(BETAS))
    last = {name: jnp.append(metric[-1], ablation.history[name][:, -1]) for name, metric in dpo.history.items()}
    return {"sft_reward": jnp.mean(start.sft.expected_reward), **last}


def make_start(seed: UInt32[Array, ""]) -> Start:
    """What a DPO run starts from."""
    return prepare(jax.random.key(seed))


def dpo_run(seed: UInt32[Array, ""], start: Start) -> Metrics:
    """One DPO run, from start to expected reward, without the tutorial's evaluations on the way.

    Its seed made its start, so it takes another: its shuffles would go by the keys of world and data.
    """
    embeddings, rewards = start.world.embeddings, start.world.rewards
    params, history = train.fit(
        jax.random.key(~seed), start.sft.params, start.preferences, objective=dpo_objective(embeddings), **DPO_SETTINGS
    )
    reward = toy.expected_reward(toy.table_fn(POLICY, embeddings)(params), rewards)
    return {name: metric[-1] for name, metric in history.items()} | {"expected_reward": jnp.mean(reward)}


DPO_SETTINGS: dict[str, Any] = {
    "optimizer": optax.adam(1e-3),
    "num_epochs": DPO.num_epochs,
    "batch_size": DPO.batch_size,
}


def dpo_objective(embeddings: Array) -> Any:
    """The tutorial's DPO."""
    return train.preference_objective(toy.log_prob_fn(POLICY, embeddings), losses.dpo_loss, beta=BETA)


def dpo_step(params: Params, start: Start) -> Metrics:
    """One optimizer step of DPO from a fresh state."""
    objective, adam = dpo_objective(start.world.embeddings), DPO_SETTINGS["optimizer"]
    state = train.init_state(params, objective=objective, optimizer=adam)
    batch = jax.tree.map(lambda leaf: leaf[: DPO.batch_size], start.preferences)
    state, metrics = train.update(state, batch, objective=objective, optimizer=adam)
    return {**metrics, "state": state}


@cache
def notebook_program(num_devices: int, per_device: int) -> Program:
    """Makes notebooks."""
    return measuring.compile_on(num_devices, jax.vmap(notebook), seeds(0, num_devices * per_device))


@cache
def start_program(num_devices: int, per_device: int) -> Program:
    """Makes what DPO runs start from."""
    return measuring.compile_on(num_devices, jax.vmap(make_start), seeds(0, num_devices * per_device))


@cache
def dpo_program(num_devices: int, per_device: int) -> Program:
    """Makes DPO runs."""
    first = seeds(0, num_devices * per_device)
    return measuring.compile_on(num_devices, jax.vmap(dpo_run), first, jax.eval_shape(jax.vmap(make_start), first))


def seeds(first: int, num: int) -> np.ndarray:
    """Seeds, one after another."""
    return np.arange(first, first + num).astype(np.uint32)


def make_starts(measurements: Measurements) -> Start:
    """What DPO runs start from, as NumPy arrays: `num_starts` or some more, to fill chunks."""
    num_devices, per_device, calls = measurements.split(measurements.sizes.num_starts, measurements.chunk)
    size = num_devices * per_device
    job = Job(start_program(num_devices, per_device), measurements.seeds(calls, size), [()])
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *jax.device_get(job()))


def notebook_job(measurements: Measurements, num: int) -> Job:
    """What makes `num` notebooks."""
    num_devices, per_device, calls = measurements.split(num, measurements.notebooks)
    return Job(notebook_program(num_devices, per_device), measurements.seeds(calls, num_devices * per_device), [()])


def dpo_job(measurements: Measurements, num: int, *, starts: Start) -> Job:
    """What makes `num` DPO runs; if there are more runs than starts, some start alike, and differ in their shuffles."""
    num_devices, per_device, calls = measurements.split(num, measurements.chunk)
    size, program = num_devices * per_device, dpo_program(num_devices, per_device)
    num_chunks = max(1, min(calls, len(starts.world.rewards) // size))
    rows = np.arange(num_chunks * size).reshape(num_chunks, size) % len(starts.world.rewards)
    chunks = [(program.place(jax.tree.map(lambda leaf, i=i: leaf[i], starts)),) for i in rows]
    return Job(program, measurements.seeds(calls, size), chunks)


def numbers_of_notebooks(measurements: Measurements) -> Iterator[int]:
    """1, 4, 16, 64, ..., as far as the user wants; on accelerators, as far as memory holds them all at once."""
    limit = 1 if measurements.options.quick else measurements.options.max_notebooks
    if limit is None and jax.default_backend() != "cpu":
        limit = measurements.notebooks * jax.local_device_count()
    numbers = (4**i for i in itertools.count())
    return itertools.takewhile(lambda num: limit is None or num <= limit, numbers)


def all_losses(measurements: Measurements) -> dict[str, dict[str, Any]]:
    """Every loss of pairs with its gradient, on a big batch that is spread over all devices."""
    shape = (measurements.sizes.pairs,)
    logps = [-np.random.default_rng(i).exponential(3.0, shape).astype(np.float32) for i in range(4)]
    policy, reference = Pair(*logps[:2]), Pair(*logps[2:])
    entries = {}
    for name in measurements.sizes.losses:
        program = measuring.compile_on(
            jax.local_device_count(), partial(values_and_gradients, LOSSES[name]), policy, reference
        )
        data = program.place((policy, reference))
        measure = partial(measuring.median_seconds, partial(program, *data), measurements.options.repeats)
        counts = program.xla_counts  # of one device's part
        flops = (counts.get("flops", 0) + counts.get("transcendentals", 0)) * jax.local_device_count()
        least = (DPO_VALUE + DPO_GRADIENT) * shape[0]
        work = least if name == "dpo" else Work(flops, least.bytes)
        entries[name] = {
            "compile_seconds": program.compile_seconds,
            **measurements.timed(measure, work, values=shape[0]),
            "xla_flops_per_value": flops / shape[0],
        }
    return entries


def values_and_gradients(loss: Callable[..., Array], policy: Pair, reference: Pair) -> tuple[Array, Pair]:
    """A loss of each pair, and its gradient with respect to the policy's log-probabilities."""
    values, pull_back = jax.vjp(lambda policy: loss(policy, reference, beta=BETA), policy)
    (gradient,) = pull_back(jnp.ones_like(values))
    return values, gradient


def scaling(measurements: Measurements) -> list[dict[str, Any]]:
    """A full chunk of notebooks on each of 1, 2, 4, ... devices, and on all."""
    num_all = jax.local_device_count()
    entries: list[dict[str, Any]] = []
    for num_devices in sorted({num_all, *(2**i for i in range(num_all.bit_length()) if 2**i <= num_all)}):
        program = notebook_program(num_devices, measurements.notebooks)
        num = num_devices * measurements.notebooks
        (chunk,) = program.place((seeds(measurements.options.seed, num),))
        seconds = measuring.median_seconds(partial(program, chunk), measurements.options.repeats)
        rates = {
            "seconds": seconds,
            "runs_per_second": num / seconds,
            "steps_per_second": num * NOTEBOOK_STEPS / seconds,
        }
        alone = entries[0]["runs_per_second"] if entries else num / seconds
        entries.append(
            {"num_devices": num_devices, "num": num, **rates, "efficiency": num / seconds / (num_devices * alone)}
        )
    return entries


def step_counts(starts: Start) -> dict[str, Any]:
    """One step of one DPO run: the least work, and what XLA says the compiled step does when 64 are stacked."""
    num = 64
    rows = np.arange(num) % len(starts.world.rewards)
    stacked = jax.tree.map(lambda leaf: leaf[rows], starts)
    program = measuring.compile_on(1, jax.vmap(dpo_step), stacked.sft.params, stacked)
    least = DPO.work * (1 / DPO.steps)
    xla = {name: count / num for name, count in program.xla_counts.items()}
    return {"least_flops": least.flops, "least_bytes": least.bytes, "xla": xla}


def chunk_for(options: Options) -> int:
    """How many runs a device trains at once, unless the user says: what memory holds, and few on a CPU."""
    if options.chunk is not None:
        return options.chunk
    if options.quick:
        return 1
    stats = jax.local_devices()[0].memory_stats()
    if jax.default_backend() == "cpu" or not stats or "bytes_limit" not in stats:
        return RUNS_PER_CPU_DEVICE
    sample = 64
    needed = bytes_needed(notebook_program(1, sample).executable) / sample
    return max(1, int(SHARE_OF_MEMORY * stats["bytes_limit"] / needed)) * len(BETAS)


def measure(options: Options) -> dict[str, Any]:
    """Everything that there is to measure."""
    sizes = QUICK if options.quick else Sizes() if jax.default_backend() == "cpu" else ON_ACCELERATORS
    with harness.waiting("Measuring what the machine can do"):
        probe = measuring.probe_of(matrix_size=sizes.matrix, copy_size=sizes.copy)
        peaks = probe(options.repeats)
    measurements = Measurements(options, sizes, chunk_for(options), probe)
    with harness.waiting("Notebooks"):
        numbers = numbers_of_notebooks(measurements)
        notebooks = list(measurements.at_once(numbers, notebook_job, NOTEBOOK_STEPS, NOTEBOOK_WORK))
    with harness.waiting("DPO runs"):
        starts = make_starts(measurements)
        make_job = partial(dpo_job, starts=starts)
        dpo = list(measurements.at_once(sizes.runs, make_job, DPO.steps, DPO.work))
    with harness.waiting("Losses"):
        of_losses = all_losses(measurements)
    with harness.waiting("Devices"):
        of_devices = scaling(measurements)
    return {
        "chunk": measurements.chunk,
        "steps": {"notebook": NOTEBOOK_STEPS, "dpo": DPO.steps},
        "pairs": sizes.pairs,
        "peaks": highest(peaks, [*notebooks, *dpo, *of_losses.values()]),
        "step": step_counts(starts),
        "notebooks": notebooks,
        "dpo": dpo,
        "losses": of_losses,
        "scaling": of_devices,
        "torch": beside_torch(measurements, starts),
    }


def highest(peaks: dict[str, float], entries: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The best that the machine did, at first or beside any entry."""
    for entry in entries:
        peaks = {name: max([peak, *entry["peaks"].get(name, [])]) for name, peak in peaks.items()}
    return peaks


def shares(summary: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Every share of a peak: of which entry, of which peak, and how large."""
    for what in ("notebooks", "dpo", "losses"):
        entries = summary[what]
        named = entries.items() if isinstance(entries, dict) else ((f"{e['num']:,} {what}", e) for e in entries)
        for name, entry in named:
            for peak in BESIDE:
                yield name, peak, entry[f"share_of_peak_{'flops' if peak == 'float32' else peak}"]


def doubts(summary: dict[str, Any]) -> list[str]:
    """What speaks against a summary: a machine that changed its speed, and shares of its peaks above 100 %."""
    found = []
    entries = [*summary["notebooks"], *summary["dpo"], *summary["losses"].values()]
    for peak, unit in zip(BESIDE, ("FLOP/s in a matrix product", "B/s in a copy"), strict=True):
        measured = np.ravel([entry["peaks"][peak] for entry in entries])
        if measured.max() > STEADY * measured.min():
            low, high = (figures.benchmark_figures.short(rate) for rate in (measured.min(), measured.max()))
            found.append(f"The machine changed its speed meanwhile: {low} to {high}{unit}. Other work was done on it.")
        over = {name: share for name, of, share in shares(summary) if of == peak and share > 1}
        if over:
            worst = max(over, key=lambda name: over[name])
            found.append(
                f"{len(over)} of {len(entries)} exceed the machine's {unit}, {worst} most ({over[worst]:.0%}): "
                "their data stay in caches, or the machine changed its speed."
            )
    return found


def beside_torch(measurements: Measurements, starts: Start) -> dict[str, Any] | None:
    """The same DPO runs in PyTorch; `None` where that cannot be compared."""
    options, sizes = measurements.options, measurements.sizes
    if not options.torch or jax.default_backend() != "cpu" or importlib.util.find_spec("torch") is None:
        return None
    from experiments import benchmark_torch

    with harness.waiting("PyTorch"):
        return benchmark_torch.compare(
            starts,
            {num: dpo_job(measurements, num, starts=starts) for num in sizes.torch_runs},
            repeats=options.repeats,
            compile_seconds=0.0 if options.quick else 60.0,
        )


def print_results(summary: dict[str, Any]) -> None:
    """Prints the tables of a summary."""
    peaks = summary["peaks"]
    harness.print_table(
        "What the machine can do",
        ["", "rate"],
        [
            [name, f"{figures.benchmark_figures.short(peak)}{'B/s' if name == 'copy' else 'FLOP/s'}"]
            for name, peak in peaks.items()
        ],
    )
    for what, title in (
        ("notebooks", f"Notebooks at once, each {NOTEBOOK_STEPS:,} optimizer steps"),
        ("dpo", f"DPO runs at once, each {DPO.steps:,} optimizer steps"),
    ):
        columns = ("", "compile", "run", "per second", "steps/s", "µs per step and run", "of peak FLOP/s", "of copy")
        harness.print_table(title, columns, [_row(entry) for entry in summary[what]])
    harness.print_table(
        f"Losses with their gradients, {summary['pairs']:,} pairs",
        ["", "compile", "run", "values/s", "of copy"],
        [
            [
                name,
                f"{entry['compile_seconds']:.2f} s",
                f"{1e3 * entry['seconds']:.2f} ms",
                f"{figures.benchmark_figures.short(entry['values_per_second'])}",
                f"{entry['share_of_peak_copy']:.0%}",
            ]
            for name, entry in summary["losses"].items()
        ],
    )
    harness.print_table(
        "Notebooks on some of the devices",
        ["devices", "notebooks", "per second", "efficiency"],
        [
            [f"{e['num_devices']}", f"{e['num']:,}", f"{e['runs_per_second']:,.1f}", f"{e['efficiency']:.0%}"]
            for e in summary["scaling"]
        ],
    )
    if summary["torch"]:
        harness.print_table(
            f"µs per optimizer step and DPO run, beside PyTorch {summary['torch']['version']}; in turn",
            ["at once", "JAX", *(f"PyTorch, {name}" for name in TORCH)],
            [[f"{entry['num']:,}", *_beside(entry)] for entry in summary["torch"]["runs"]],
        )


def _row(entry: dict[str, Any]) -> list[str]:
    return [
        f"{entry['num']:,}",
        f"{entry['compile_seconds']:.1f} s",
        f"{entry['seconds']:.3f} s",
        f"{entry['runs_per_second']:,.1f}",
        f"{entry['steps_per_second']:,.0f}",
        f"{entry['microseconds_per_step_and_run']:.2f}",
        f"{entry['share_of_peak_flops']:.1%}",
        f"{entry['share_of_peak_copy']:.1%}",
    ]


def _beside(entry: dict[str, Any]) -> list[str]:
    """The cells of a row of the comparison: microseconds, and how many times those of JAX."""
    cost, ratio = entry["microseconds_per_step_and_run"], entry["times_jax"]
    rivals = [f"{cost[name]:.2f} ({ratio[name]:.2f} ×)" if name in cost else "" for name in TORCH]
    return [f"{cost['jax']:.2f}", *rivals]


def save_figures(summary: dict[str, Any], out: Path) -> None:
    """Draws the roofline, and the cost of a step against the number of runs."""
    peaks, device = dict(summary["peaks"]), summary["device"]
    bandwidth = peaks.pop("copy")
    if peaks["float32 by default"] < 1.5 * peaks["float32"]:
        del peaks["float32 by default"]  # it is the same on this machine
    shown = {"DPO loss and gradient": summary["losses"]["dpo"]}
    for what, one in (("notebooks", "one notebook"), ("dpo", "one DPO run")):
        first, last = summary[what][0], summary[what][-1]
        several = f"{last['num']:,} {'DPO runs' if what == 'dpo' else what}"
        shown |= {one: first} | ({several: last} if last is not first else {})
    points = {name: (entry["flops_per_byte"], entry["flops_per_second"]) for name, entry in shown.items()}
    peaks = {f"matrix product, {name}": peak for name, peak in peaks.items()}
    above = any(max(entry["share_of_peak_flops"], entry["share_of_peak_copy"]) > 1 for entry in shown.values())
    title = f"{device}. Above the roof: data in caches, or a changed speed" if above else device
    harness.save_figure(figures.roofline(peaks, bandwidth, points, title=title), out / "roofline.png")

    def curve(entries: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
        return [entry["num"] for entry in entries], [entry["microseconds_per_step_and_run"] for entry in entries]

    curves = {"notebooks": curve(summary["notebooks"]), "DPO runs": curve(summary["dpo"])}
    for name in TORCH if summary["torch"] else ():
        costs = {entry["num"]: entry["microseconds_per_step_and_run"] for entry in summary["torch"]["runs"]}
        costs = {num: cost[name] for num, cost in costs.items() if name in cost}
        if costs:
            curves[f"PyTorch, {name}"] = list(costs), list(costs.values())
    harness.save_figure(figures.cost_per_step(curves, title=device), out / "cost_per_step.png")


def main(options: Options) -> None:
    """Measures everything and writes the results."""
    harness.check_seeds(options.seed)
    if options.compare:
        with harness.clear_errors():
            benchmark_compare.print_comparison(*options.compare)
        return
    with harness.clear_errors():
        checks.size("--repeats", options.repeats)
        checks.interval("--max-seconds", options.max_seconds, "(0, inf)")
        for name, value in (("--max-notebooks", options.max_notebooks), ("--chunk", options.chunk)):
            if value is not None:
                checks.size(name, value)
    out = harness.output_folder(options.out)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured, too
    harness.use_all_cores()
    start, machine = perf_counter(), measuring.machine()
    summary = measure(options)
    machine |= {"load": [machine["load"], measuring.machine()["load"]]}
    summary |= {"machine": machine, "doubts": doubts(summary), **harness.provenance(total=perf_counter() - start)}
    harness.save_summary({"seed": options.seed, "repeats": options.repeats, **summary}, out)
    save_figures(summary, out)
    print_results(summary)
    for doubt in summary["doubts"]:
        harness.console.print(f"Beware: {doubt}")
    harness.console.print(f"Measured in {summary['seconds']['total']:.0f} s. Figures and summary.json are in {out}.")


if __name__ == "__main__":
    main(harness.parse(Options))
