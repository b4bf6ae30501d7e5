"""What beta does to a language model: an adapter for each beta and seed, all trained by one program.

All adapters share the model, the reference and the batches. Several losses make one program each. Judged are held-out
pairs, and answers that each adapter writes to held-out prompts: how far it went from the model as it was.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from dpo_jax import figures, lm
from experiments.lab import commands, console, devices, files, page
from experiments.lab.language import (
    FAILURES,
    OF_LANGUAGE,
    answers,
    hyperparameters_of,
    judged,
    kind_of_data,
    kl_along,
    model_and_text,
    objective_of,
    optimizer_of,
    read,
    split,
    takes_means,
)
from experiments.lab.methods import Method, method_named


@dataclass(frozen=True)
class Options:
    """What beta does to a language model: adapters for several betas, losses and seeds, trained together."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model: config.json, model.safetensors, tokenizer.json, chat_template.jinja."""
    data: Annotated[Path, tyro.conf.Positional]
    """File (.jsonl, .csv, .parquet): columns chosen and rejected; or response and label, or responses, as the losses
    need; perhaps prompt and weight."""
    loss: tuple[str, ...] = ("dpo",)
    """Names of the losses (see `experiments/lab/methods.py`), or functions of your own: `my_file.py:focal_loss`."""
    beta: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """The betas to try."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Other hyperparameters of the losses: `--fixed gamma 0.5`."""
    mean: bool | None = None
    """Takes means over tokens in place of sums; by default only for losses whose papers do (SimPO, AlphaPO, ORPO)."""
    learning_rate: tuple[float, ...] = (2e-4,)
    """Highest learning rates to try."""
    num_seeds: int = 1
    """How many new adapters each point gets; all see the same batches."""
    num_epochs: int = 1
    """Passes over the data."""
    batch_size: int = 8
    """Rows per optimizer step."""
    max_length: int = 512
    """Tokens of a prompt and a response; longer prompts lose their beginning."""
    max_rows: int | None = None
    """Use so many rows of the file, chosen at random."""
    held_out: float = 0.2
    """Share of the rows on which adapters are judged, not trained."""
    lora_rank: int = 16
    """Rank of the adapters."""
    top_layers: int | None = 8
    """How many layers have adapters, from the last: those below are computed once for all adapters."""
    num_samples: int = 16
    """How many held-out prompts each adapter answers, to estimate its KL."""
    max_tokens: int = 48
    """Tokens of these answers."""
    seed: int = 0
    """Decides everything random."""
    out: Path = Path("results/lm_beta_ablation")
    """Folder for checkpoints, the cache of the reference, the figure and summary.json."""


def measured(
    key: Any, model: lm.LanguageModel, params: Any, make: Any, held_out: Any, mean: bool, options: Options
) -> dict[str, dict[str, float]]:
    """Held-out metrics of a policy, and its KL along answers of its own: means and standard errors."""
    policy = model._replace(params=params)
    found = judged(make, held_out, lm.logps(policy, held_out, mean=mean))
    prompts = held_out.prompts[: options.num_samples]
    written = answers(key, model, params, prompts, max_tokens=options.max_tokens).tokens
    kl, lengths = kl_along(model, params, prompts, written), np.sum(np.asarray(written) >= 0, axis=1)
    return {**found, "kl": lm.mean_and_stderr(kl), "answer_tokens": lm.mean_and_stderr(lengths)}


def ablate(
    keys: Any,
    model: lm.LanguageModel,
    data: tuple[Any, Any],
    name: str,
    method: Method,
    hyperparameters: Mapping[str, float],
    options: Options,
) -> list[dict[str, Any]]:
    """Trains the adapters of a loss on the first data, and measures each of them on the second."""
    make, mean = objective_of(method, hyperparameters), takes_means(method, options.mean)
    lora = lm.LoRA(rank=options.lora_rank, alpha=2.0 * options.lora_rank, top_layers=options.top_layers)
    train_data, held_out = (lm.with_reference(model, x, mean=mean, cache=options.out / "reference") for x in data)
    num_steps = options.num_epochs * -(-len(train_data.prompts) // options.batch_size)
    with console.training(name) as show:
        grid = lm.tune_grid(
            keys[0],
            model,
            train_data,
            lora=lora,
            axes={"beta": options.beta, "learning_rate": options.learning_rate},
            num_seeds=options.num_seeds,
            objective=make,
            optimizer=lambda learning_rate: optimizer_of(learning_rate, num_steps),
            num_epochs=options.num_epochs,
            batch_size=options.batch_size,
            mean=mean,
            folder=options.out / "checkpoints" / name,
            about={"loss": name, **hyperparameters},
            report=show,
        )
    entries = []
    for i in range(len(grid.points["seed"])):
        point = {axis: float(values[i]) for axis, values in grid.points.items()}
        params = lm.merge(model.params, jax.tree.map(lambda leaf, i=i: leaf[i], grid.adapters), lora)
        judge = partial(make, beta=point["beta"])
        # same key: differences between adapters are not those of the draws
        found = measured(keys[1], model, params, judge, held_out, mean, options)
        entries.append({"loss_name": name, **point, **found})
        console.say(f"{name}, β {point['beta']:.3g}: KL {console.interval(found['kl'], options.num_samples)} nats")
    return entries


COLUMNS = ("loss", "β", "learning rate", "held-out loss", "accuracy", "margin", "KL of answers", "their tokens")


def rows_of(entries: Sequence[Mapping[str, Any]], num: int, num_samples: int) -> list[list[str]]:
    """A row for each adapter, with 95 % intervals."""
    shown = {"loss": num, "accuracy": num, "reward_margin": num, "kl": num_samples, "answer_tokens": num_samples}
    return [
        [
            entry["loss_name"],
            f"{entry['beta']:.3g}",
            f"{entry['learning_rate']:.2g}",
            *(console.interval(entry[name], n) if name in entry else "" for name, n in shown.items()),
        ]
        for entry in entries
    ]


def page_table(summary: Mapping[str, Any]) -> str:
    """The table of the page."""
    rows = rows_of(summary["adapters"], summary["held_out"], summary["answers"])
    return page.table(COLUMNS, rows)


def main(options: Options) -> None:
    """Runs the command."""
    commands.check_seed(options.seed)
    names = ("num_seeds", "num_epochs", "batch_size", "max_length", "lora_rank", "num_samples", "max_tokens")
    commands.check_sizes(**{name: getattr(options, name) for name in names})
    clock, out = time.perf_counter(), files.output_folder(options.out)
    devices.enable_compilation_cache()
    keys = jax.random.split(jax.random.key(options.seed), 4)
    entries: list[dict[str, Any]] = []
    with commands.clear_errors(*FAILURES):
        methods = dict(method_named(name, OF_LANGUAGE) for name in options.loss)
        if len({kind_of_data(method) for method in methods.values()}) > 1:
            raise ValueError(f"--loss: {', '.join(methods)} learn from different data: try them one at a time")
        model, text = model_and_text(options.model)
        method = next(iter(methods.values()))
        rows, report = read(method, options.data, text, max_length=options.max_length, key=keys[3])
        console.say(str(report))
        data = split(keys[0], rows, held_out=options.held_out, at_most=options.max_rows)
        for name, method in methods.items():
            hyperparameters = hyperparameters_of(method, options.fixed, methods.values())
            entries += ablate(keys[1:3], model, data, name, method, hyperparameters, options)
    num = len(data[1].prompts)
    num_answers = min(options.num_samples, num)
    console.print_table(f"{num} held-out rows, {num_answers} answers", COLUMNS, rows_of(entries, num, num_answers))
    files.save_figure(figures.language_betas(entries), out / "beta.png")
    shown = {**asdict(options), "model": options.model.name, "data": options.data.name}
    summary = {"options": shown, "held_out": num, "answers": num_answers, "adapters": entries}
    summary |= files.provenance(total=time.perf_counter() - clock)
    files.save_summary(summary, out)
    page.update({"lm_beta_ablation": page_table(summary)}, out, path=page.LANGUAGE_MODELS)
    console.say(f"{time.perf_counter() - clock:.0f} s in all. The figure and summary.json are in {out}.")


if __name__ == "__main__":
    chosen = commands.parse(Options)
    devices.restart_with_huge_pages()
    main(chosen)
