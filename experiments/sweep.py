"""Sweeps of whole experiments: world, SFT, comparisons, training, exact evaluation, over losses, betas and seeds.

Each run is the tutorial's, with another loss, beta, learning rate or share of flipped labels. All points see the same
worlds, data and orders of data, seed by seed. Results are stored as they come; the same command goes on where an
earlier one stopped. Started several times with the environment that `dpo_jax.sweep.join_processes` describes, or under
SLURM, the processes share the work.
"""

import csv
import difflib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from dpo_jax import checks, figures, sweep, toy, train
from dpo_jax.sweep.store import check_place
from dpo_jax.types import Metrics, Numeric, Params
from experiments import harness, notebook
from experiments.methods import METHODS, Feedback, Method, Setup, load_function, method_of
from experiments.notebook import POLICY

if TYPE_CHECKING:
    import xarray

STEPS_PER_EPOCH, NUM_EPOCHS = 29, 50
FIXED = {
    "label_smoothing": 0.1,
    "temperature": 0.05,
    "offset": 0.0,
    "penalty": 1.0,
    "gamma": 0.1,
    "alpha": 0.5,
    "sft_weight": 1.0,
    "odds_weight": 0.1,
    "mix": 0.001,
}
"""Hyperparameters that only some losses have, unless `--fixed` says otherwise."""
OF_PAIRS = {method.name: method for method in METHODS if "rank" not in method.name and "labels" not in method.name}
"""The losses that learn from comparisons of two responses."""


@dataclass(frozen=True)
class Options:
    """Whole experiments over losses, betas, learning rates, label noise and seeds: exact reward, KL and regret."""

    loss: tuple[str, ...] = ("dpo",)
    """Names of the losses (see `experiments/methods.py`), or functions of your own: `my_file.py:focal_loss`."""
    beta: tuple[float, ...] = notebook.BETAS
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
    """Which part to compute, of how many: `3/16`. Parts wait for nobody; tables come from what is there."""
    runs_at_once: int | None = None
    """How many runs a device makes at once; by default what suits the device."""
    memory_limit: int | None = None
    """Bytes that programs may take on each device; by default most of what is free."""
    log_every: float | None = None
    """Seconds between lines that say how far the sweep is, for batch jobs; none by default."""
    repair: bool = False
    """Make blocks of the folder that are damaged again."""
    dry_run: bool = False
    """Only say how many runs, programs and bytes there will be, and roughly how long they will take."""
    out: Path = Path("results/sweep")
    """Folder for results: `runs/` holds every run, and the rest what is made of them."""


class Start(NamedTuple):
    """What all runs of a seed share.

    Attributes:
      preference_key, train_key, method_key: for what comes next.
      world: prompts, responses, true rewards.
      params, log_probs: the SFT policy, and its table.
    """

    preference_key: Key[Array, ""]
    train_key: Key[Array, ""]
    method_key: Key[Array, ""]
    world: toy.World
    params: Params
    log_probs: Float[Array, "prompts responses"]


def prepare(key: Key[Array, ""]) -> Start:
    """A world and its SFT policy."""
    start_key, *keys = jax.random.split(key, 4)
    start = notebook.prepare(start_key)
    return Start(*keys, start.world, start.sft.params, start.sft.log_probs)


def run(
    start: Start,
    *,
    loss: str,
    beta: Numeric,
    learning_rate: Numeric,
    label_noise: Numeric,
    methods: Mapping[str, Method],
    fixed: Mapping[str, float],
    **varied: Numeric,
) -> Metrics:
    """Comparisons, training by one loss, and what became of the policy."""
    world, reference, method = start.world, start.params, methods[loss]
    log_prob, table = toy.log_prob_fn(POLICY, world.embeddings), toy.table_fn(POLICY, world.embeddings)
    pairs = toy.sample_preferences(
        start.preference_key, world, num=notebook.NUM_PREFERENCES, flip_probability=label_noise
    )
    pairs = train.with_reference(log_prob, reference, pairs)
    data = method.data(Feedback(pairs, None, None))  # type: ignore[arg-type]
    known = {"beta": beta, **FIXED, **fixed, **varied}
    objective = method.objective(
        Setup(start.method_key, log_prob, table, reference, start.log_probs),
        {name: known[name] for name in method.ranges},
    )
    params, history = train.fit(
        start.train_key,
        reference,
        data,
        objective=objective,
        optimizer=optax.adam(learning_rate),
        num_epochs=NUM_EPOCHS,
        batch_size=-(-len(data.prompts) // STEPS_PER_EPOCH),
    )
    return {
        **toy.evaluate(table(params), start.log_probs, world.rewards),
        "sft_reward": toy.expected_reward(start.log_probs, world.rewards).mean(),
        "loss_at_the_end": history["loss"][-1],
        "num_steps": history["step"][-1],
    }


def summarise(results: "xarray.Dataset") -> "xarray.Dataset":
    """Means over seeds with standard errors, for every point; `gain` is the reward gained on the SFT policy.

    `num_seeds` is over how many seeds those of the reward are taken.
    """
    runs = results.assign(
        gain=results.expected_reward - results.sft_reward,
        finished=(results.num_steps == STEPS_PER_EPOCH * NUM_EPOCHS).astype(float),
    )
    means, num = runs.mean("seed", dtype=float), runs.count("seed")  # of numbers that are some
    deviations = runs.std("seed", dtype=float)
    stderrs = (deviations / np.sqrt((num - 1).where(num > 1))).where(num > 1)
    named = {f"{name}_stderr": values for name, values in stderrs.items() if name != "finished"}
    return means.assign({**named, "num_seeds": num.expected_reward})


def points(summary: "xarray.Dataset") -> Iterator[tuple[dict[str, Any], "xarray.Dataset"]]:
    """Every point of the grid, by its values, with what was found there."""
    axes = list(summary.coords)
    for index in np.ndindex(*(summary.sizes[axis] for axis in axes)):
        found = summary.isel(dict(zip(axes, index, strict=True)))
        yield {str(axis): found[axis].item() for axis in axes}, found


def save_tables(results: "xarray.Dataset", summary: "xarray.Dataset", out: Path) -> None:
    """Writes `summary.csv`, a row for each point, and `runs.parquet`, a row for each run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = [str(name) for name in summary.data_vars]
            writer.writerow([*summary.coords, *names])
            for point, found in points(summary):
                writer.writerow([*point.values(), *(found[name].item() for name in names)])

    def write_parquet(path: Path) -> None:
        writer = None
        for point, found in points(results.drop_vars("seed")):
            columns = {name: [value] * results.sizes["seed"] for name, value in point.items()}
            values = {str(name): np.asarray(variable) for name, variable in found.data_vars.items()}
            table = pa.table({**columns, "seed": np.arange(results.sizes["seed"]), **values})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()

    harness.save(out / "summary.csv", write_csv)
    harness.save(out / "runs.parquet", write_parquet)


def save_figures(summary: "xarray.Dataset", out: Path) -> None:
    """Draws reward against beta, reward against KL, and heat maps, for each loss and share of flipped labels."""
    sft_reward, betas = float(summary.sft_reward.mean()), summary.beta.values
    curves = {
        name: {str(column): values.values for column, values in curve.data_vars.items()}
        for name, curve in _conditions(_at_best(summary, "learning_rate"))
    }
    of = "" if summary.sizes["learning_rate"] == 1 else "At the best learning rate"
    harness.save_figure(figures.reward_against_beta(betas, curves, sft_reward=sft_reward, of=of), out / "reward.png")
    harness.save_figure(figures.reward_against_kl(betas, curves, sft_reward=sft_reward, of=of), out / "frontier.png")
    if summary.sizes["beta"] > 1 and summary.sizes["learning_rate"] > 1:
        maps = {
            name: found.expected_reward.transpose("learning_rate", "beta").values
            for name, found in _conditions(summary)
        }
        axes = {"β": betas, "Learning rate": summary.learning_rate.values}
        harness.save_figure(figures.heat_maps(maps, axes, title="Expected true reward"), out / "heat_map.png")


def print_results(summary: "xarray.Dataset", limit: int = 40) -> None:
    """Prints the points of the grid, as many as are readable."""
    varied = [str(axis) for axis in summary.coords if summary.sizes[axis] > 1] or ["loss"]
    rows = [
        [
            *(f"{point[axis]:g}" if isinstance(point[axis], float) else str(point[axis]) for axis in varied),
            *(
                harness.interval(
                    {"mean": found[name].item(), "stderr": found[f"{name}_stderr"].item()}, found.num_seeds.item()
                )
                for name in ("expected_reward", "gain", "kl_to_reference")
            ),
            f"{found.finished.item():.0%}",
        ]
        for point, found in points(summary)
    ]
    columns = [*varied, "reward ↑", "gain on SFT ↑", "KL (nats)", "runs finished"]
    harness.print_table("Means over seeds with 95 % confidence intervals", columns, rows[:limit])
    if len(rows) > limit:
        harness.console.print(f"... and {len(rows) - limit} more points in summary.csv")


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
        harness.console.print("Stopped. What is done is stored: the same command goes on from there.")
        raise SystemExit(stopped.code if isinstance(stopped, SystemExit) else 130) from None


def main(options: Options) -> None:
    """Runs the sweep and writes its results."""
    harness.use_all_cores()
    harness.enable_compilation_cache()
    with harness.clear_errors():
        check_place(options.out)
        sweep.join_processes()
        arguments = _arguments(options)
    if options.dry_run:
        with harness.clear_errors(), _saying_how_to_go_on():
            harness.console.print(str(sweep.plan(**arguments, out=options.out / "runs")))
        return
    with harness.clear_errors():
        check_folder(options.out)
    out, start = harness.output_folder(options.out), perf_counter()
    errors = harness.clear_errors(TypeError, ValueError, OSError, sweep.OtherProcessError)
    with errors, _saying_how_to_go_on(), harness.sweep_report("Runs", options.log_every) as report:
        results = sweep.grid(
            **arguments, out=out / "runs", share=_share(options.share), repair=options.repair, report=report
        )
    if jax.process_index() != 0:
        return
    summary = summarise(results)
    save_tables(results, summary, out)
    save_figures(summary, out)
    seconds = {"total": perf_counter() - start}
    harness.save_summary({"options": _as_text(options), **harness.provenance(**seconds)}, out)
    print_results(summary)
    harness.console.print(
        f"Results are in {out}: summary.csv, runs.parquet and figures; every run is in {out / 'runs'}."
    )


def _arguments(options: Options) -> dict[str, Any]:
    """What `sweep.grid` and `sweep.plan` are called with; an error for what cannot be meant."""
    harness.check_seeds(options.seed, options.num_seeds)
    methods = dict(_method(name) for name in options.loss)
    if len(methods) < len(options.loss):
        raise ValueError(f"--loss names a loss twice: {', '.join(options.loss)}")
    varied = dict(_varied(text) for text in options.vary)
    needed = {name for method in methods.values() for name in method.ranges} - {"beta"}
    for option, names, known in (("--fixed", options.fixed, needed | {*FIXED}), ("--vary", varied, needed)):
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: no loss has {name!r}; there are: {', '.join(sorted(known)) or 'none'}")
    if missing := sorted(needed - {*FIXED, *options.fixed, *varied}):
        raise ValueError(f"a loss also needs {missing[0]}: --fixed {missing[0]} 0.5, or --vary {missing[0]}=0.5,1")
    if options.log_every is not None:
        checks.interval("--log-every", np.array(options.log_every), "(0, inf)")
    for name, value in options.fixed.items():
        checks.finite(f"--fixed {name}", np.array(value))
    checks.interval("--beta", np.array(options.beta), "(0, inf)")
    checks.interval("--learning-rate", np.array(options.learning_rate), "(0, inf)")
    checks.interval("--label-noise", np.array(options.label_noise), "[0, 1]")
    return {
        "run": partial(run, methods=methods, fixed=options.fixed),
        "prepare": prepare,
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


def _method(name: str) -> tuple[str, Method]:
    """A loss of the library by its name, or a function in a file: `my_file.py:focal_loss`."""
    if name in OF_PAIRS:
        return name, OF_PAIRS[name]
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        return function, method_of(function, load_function(Path(path), function))
    close = difflib.get_close_matches(name, OF_PAIRS, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(OF_PAIRS)}; or my_file.py:my_loss"
    raise ValueError(f"--loss: there is no {name!r}{meant}")


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


def _conditions(summary: "xarray.Dataset") -> Iterator[tuple[str, "xarray.Dataset"]]:
    """Every combination of the other axes than beta and the learning rate, with a name for it."""
    axes = [str(axis) for axis in summary.coords if axis not in ("beta", "learning_rate")]
    shown = {"label_noise": "{:.3g} flipped"}
    for values in itertools.product(*(summary[axis].values for axis in axes)):
        chosen = dict(zip(axes, values, strict=True))
        varied = [axis for axis in axes if axis != "loss" and summary.sizes[axis] > 1]
        names = [shown.get(axis, f"{axis} {{:.3g}}").format(chosen[axis]) for axis in varied]
        yield ", ".join([str(chosen["loss"]), *names]), summary.sel(chosen)


def _at_best(summary: "xarray.Dataset", axis: str) -> "xarray.Dataset":
    """At each point of the other axes, what was found at the value of this axis with the highest mean reward."""
    return summary.isel({axis: summary.expected_reward.argmax(axis)}).drop_vars(axis)


def _as_text(options: Options) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


if __name__ == "__main__":
    asked = harness.parse(Options)
    try:
        main(asked)
    except SystemExit as ended:  # XLA cannot be stopped, so nobody waits for it
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(ended.code, str) else ended.code or 0)
