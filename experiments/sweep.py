"""Sweeps of whole experiments: world, SFT, comparisons, training, exact evaluation, over losses, betas and seeds.

Each run is the tutorial's, with another loss, beta, learning rate or share of flipped labels. All points see the same
worlds, data and orders of data, seed by seed. Results are stored as they are computed; the same command resumes an
earlier one. Several processes share the work if they are started with the environment that
`dpo_jax.sweep.join_processes` describes, or under SLURM; `--share` shares it without any connection.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dpo_jax import checks, figures, sweep, toy
from dpo_jax.sweep.store import check_place
from dpo_jax.types import Metrics, Numeric
from experiments.lab import commands, console, devices, files
from experiments.lab.feedback import Setting
from experiments.lab.methods import OF_PAIRS, Method, method_named
from experiments.lab.pipeline import BETAS, TUTORIAL, Pipeline, Start
from experiments.lab.runs import standard_run

if TYPE_CHECKING:
    import xarray

SHOWN = {
    "expected_reward": "reward ↑",
    "gain": "gain over SFT ↑",
    "expected_reward_difference": "gain over the first loss ↑",
    "kl_to_reference": "KL (nats)",
}


@dataclass(frozen=True)
class Options:
    """Whole experiments over losses, betas, learning rates, label noise and seeds: exact reward, KL and regret."""

    loss: tuple[str, ...] = ("dpo",)
    """Names of the losses (see `experiments/lab/methods.py`), or functions of your own: `my_file.py:focal_loss`."""
    beta: tuple[float, ...] = BETAS
    """Strengths of the pull towards the reference."""
    learning_rate: tuple[float, ...] = (1e-3,)
    """Learning rates of Adam."""
    label_noise: tuple[float, ...] = (0.0,)
    """Shares of the labels that are flipped."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Other hyperparameters of the losses, one value each: `--fixed gamma 0.5`."""
    vary: tuple[str, ...] = ()
    """Other hyperparameters of the losses, several values each: `--vary gamma=0.5,1,2`."""
    seed: int = 0
    """Decides everything random."""
    num_seeds: int = 64
    """How many worlds, each with its own data, network and training."""
    share: str = "1/1"
    """Which part to compute, of how many: `3/16`. Parts do not wait for each other; tables show what is there."""
    runs_at_once: int | None = None
    """How many runs a device makes at once; by default what suits the device."""
    memory_limit: int | None = None
    """Bytes that programs may take on each device; by default most of what is free."""
    log_every: float | None = None
    """Seconds between lines that say how far the sweep is, for batch jobs; none by default."""
    repair: bool = False
    """Make blocks of the folder that are damaged again."""
    dry_run: bool = False
    """Only say how many runs, programs and bytes there will be."""
    out: Path = Path("results/sweep")
    """Folder for results: `runs/` holds every run, and the rest what is made of them."""


def runner(methods: Mapping[str, Method], fixed: Mapping[str, float], pipeline: Pipeline) -> Callable[..., Metrics]:
    """`run(start, loss=..., beta=..., ...)`: the standard run of a loss, and the exact optimum for this beta."""

    def run(
        start: Start, *, loss: str, beta: Numeric, learning_rate: Numeric, label_noise: Numeric, **varied: Numeric
    ) -> Metrics:
        method, setting = methods[loss], Setting(flip_probability=label_noise)
        chosen = hyperparameters(method, {**fixed, **varied, "beta": beta})
        reference, rewards = start.log_probs, start.world.rewards
        best = toy.evaluate(toy.optimal_policy(reference, rewards, beta=beta), reference, rewards)
        return {
            **standard_run(pipeline, method, start, setting, {"learning_rate": learning_rate, **chosen}),
            "optimal_reward": best["expected_reward"],
            "optimal_kl": best["kl_to_reference"],
        }

    return run


def hyperparameters(method: Method, chosen: Mapping[str, Numeric]) -> dict[str, Numeric]:
    """Those of a method: what was chosen, and the standard values of what the method needs besides."""
    known = {**method.usual, **chosen}
    return {name: known[name] for name in (*method.ranges, *method.optional) if name in known}


def summarise(results: "xarray.Dataset") -> "xarray.Dataset":
    """Means over seeds with intervals; also of the reward gained over the SFT policy, and over the first loss."""
    gained = results.assign(
        gain=results.expected_reward - results.sft_reward, optimal_gain=results.optimal_reward - results.sft_reward
    )
    first = results.loss.values[0]
    return sweep.summarise(gained, baseline={"loss": first} if results.sizes["loss"] > 1 else None)


def save_tables(results: "xarray.Dataset", summary: "xarray.Dataset", out: Path) -> None:
    """Writes `summary.csv`, a row for each point, and `runs.parquet`, a row for each run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write_csv(path: Path) -> None:
        rows = sweep.rows(summary)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def write_parquet(path: Path) -> None:
        writer = None
        for point, found in sweep.points(results.drop_vars("seed")):
            columns = {name: [value] * results.sizes["seed"] for name, value in point.items()}
            values = {str(name): np.asarray(variable) for name, variable in found.data_vars.items()}
            table = pa.table({**columns, "seed": np.arange(results.sizes["seed"]), **values})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()

    files.save(out / "summary.csv", write_csv)
    files.save(out / "runs.parquet", write_parquet)


def save_figures(summary: "xarray.Dataset", num_seeds: int, out: Path) -> None:
    """Draws gain against beta, gain against KL, and heat maps: a colour for each loss, a panel for each condition."""
    at_best, which = summary, ""
    if summary.sizes["learning_rate"] > 1:
        best = summary.gain.sel(statistic="mean", drop=True).argmax("learning_rate")
        at_best, which = summary.isel(learning_rate=best).drop_vars("learning_rate"), ", at the best learning rate"
    means = f"Means over {num_seeds} worlds, 95 % intervals{which}"
    gained = "Reward gained over SFT"
    if summary.sizes["beta"] > 1:
        figure = figures.lines(at_best, "gain", x="beta", colour="loss", label=gained, title=means)
        files.save_figure(figure, out / "reward.png")
    labels = "KL to the SFT policy (nats)", gained
    title = f"{means}; numbers beside the optimum are beta"
    figure = figures.frontiers(at_best, along="beta", colour="loss", labels=labels, title=title)
    files.save_figure(figure, out / "frontier.png")
    if summary.sizes["beta"] > 1 and summary.sizes["learning_rate"] > 1:
        figure = figures.heat_maps(summary, "gain", x="beta", y="learning_rate", label=gained, title=means)
        files.save_figure(figure, out / "heat_map.png")


def print_results(summary: "xarray.Dataset", limit: int = 40) -> None:
    """Prints the points of the grid, as many as are readable."""
    points, shown = list(sweep.points(summary)), [name for name in SHOWN if name in summary]
    varied = [name for name in points[0][0] if summary.sizes[name] > 1] or ["loss"]
    rows = [
        [
            *(f"{point[axis]:g}" if isinstance(point[axis], float) else str(point[axis]) for axis in varied),
            *(sweep.interval(found[name]) for name in shown),
            f"{found.finished.item():.0%}",
        ]
        for point, found in points[:limit]
    ]
    columns = [*varied, *(SHOWN[name] for name in shown), "runs finished"]
    console.print_table("Means over seeds with 95 % confidence intervals", columns, rows)
    if len(points) > limit:
        console.say(f"... and {len(points) - limit} more points in summary.csv")


def check_folder(out: Path) -> None:
    """Raises FileExistsError if a folder holds files, and they are not of a sweep."""
    if out.is_dir() and not (out / "runs" / "sweep.json").exists():
        others = sorted(path.name for path in out.iterdir() if path.name != "runs" and not path.name.startswith("."))
        if others:
            raise FileExistsError(f"{out} holds other files ({others[0]}) and no sweep: choose a new folder")


@contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    """Says, if the sweep is stopped from outside, that nothing is lost."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        console.say("Stopped. What is done is stored: the same command goes on from there.")
        raise SystemExit(stopped.code if isinstance(stopped, SystemExit) else 130) from None


def main(options: Options, pipeline: Pipeline = TUTORIAL) -> None:
    """Runs the sweep and writes its results."""
    devices.use_all_cores()
    devices.enable_compilation_cache()
    with commands.clear_errors():
        check_place(options.out)
        sweep.join_processes()
        arguments = _arguments(options, pipeline)
    if options.dry_run:
        with commands.clear_errors(), _saying_how_to_go_on():
            console.say(str(sweep.plan(**arguments, out=options.out / "runs")))
        return
    with commands.clear_errors():
        check_folder(options.out)
    out, start = files.output_folder(options.out), perf_counter()
    errors = commands.clear_errors(TypeError, ValueError, OSError, sweep.OtherProcessError)
    with errors, _saying_how_to_go_on(), console.progress("Runs", options.log_every) as report:
        results = sweep.grid(
            **arguments, out=out / "runs", share=_share(options.share), repair=options.repair, report=report
        )
    if jax.process_index() != 0:
        return
    summary = summarise(results)
    save_tables(results, summary, out)
    save_figures(summary, results.sizes["seed"], out)
    seconds = {"total": perf_counter() - start}
    files.save_summary({"options": vars(options), **files.provenance(**seconds)}, out)
    print_results(summary)
    console.say(f"Results are in {out}: summary.csv, runs.parquet and figures; every run is in {out / 'runs'}.")


def _arguments(options: Options, pipeline: Pipeline) -> dict[str, Any]:
    """What `sweep.grid` and `sweep.plan` are called with; an error for what cannot be meant."""
    commands.check_seed(options.seed)
    commands.check_sizes(num_seeds=options.num_seeds)
    methods = dict(method_named(name, OF_PAIRS) for name in options.loss)
    if len(methods) < len(options.loss):
        raise ValueError(f"--loss names a loss twice: {', '.join(options.loss)}")
    varied = dict(_varied(text) for text in options.vary)
    known = {name for method in methods.values() for name in (*method.ranges, *method.optional)} - {"beta"}
    for option, names in (("--fixed", options.fixed), ("--vary", varied)):
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: no loss has {name!r}; there are: {', '.join(sorted(known)) or 'none'}")
    for method in methods.values():
        if missing := sorted({*method.ranges} - {"beta", *method.usual, *options.fixed, *varied}):
            name = missing[0]
            raise ValueError(f"{method.name} also needs {name}: --fixed {name} 0.5, or --vary {name}=0.5,1")
    if options.log_every is not None:
        checks.interval("--log-every", np.array(options.log_every), "(0, inf)")
    for name, value in options.fixed.items():
        checks.finite(f"--fixed {name}", np.array(value))
    checks.interval("--beta", np.array(options.beta), "(0, inf)")
    checks.interval("--learning-rate", np.array(options.learning_rate), "(0, inf)")
    checks.interval("--label-noise", np.array(options.label_noise), "[0, 1]")
    return {
        "run": runner(methods, options.fixed, pipeline),
        "prepare": pipeline.start,
        "key": jax.random.key(options.seed),
        "num_seeds": options.num_seeds,
        "runs_at_once": options.runs_at_once,
        "memory_limit": options.memory_limit,
        "loss": list(methods),
        "beta": _floats(options.beta),
        "learning_rate": _floats(options.learning_rate),
        "label_noise": _floats(options.label_noise),
        **varied,
    }


def _share(text: str) -> tuple[int, int] | None:
    """Which part of how many: `3/16`; `None` for the whole."""
    which, _, num = text.partition("/")
    if not (which.isdecimal() and num.isdecimal()):
        raise ValueError(f"--share must be a part of how many, as in 3/16; got {text!r}")
    return None if text == "1/1" else (int(which), int(num))


def _varied(text: str) -> tuple[str, np.ndarray]:
    """A hyperparameter and its values: `gamma=0.5,1,2`."""
    name, _, values = text.partition("=")
    try:
        return name, np.array([float(value) for value in values.split(",")])
    except ValueError:
        raise ValueError(f"--vary must be a name and numbers, as in gamma=0.5,1,2; got {text!r}") from None


def _floats(values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, float)


if __name__ == "__main__":
    asked = commands.parse(Options)
    commands.end_at_once(partial(main, asked))
