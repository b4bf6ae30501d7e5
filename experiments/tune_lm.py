"""Tunes a language model on a file of preferences: a folder in, a folder out, and what happened on the way.

The folder is that of Hugging Face Transformers (Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3). The file holds pairs, labels
(for `--loss kto` and others) or rankings, as text or as chats: JSON Lines, CSV or Parquet. Some rows are held out. The
same command goes on where it was stopped.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dpo_jax import figures, lm
from dpo_jax.types import Preferences
from experiments.lab import commands, console, devices, files
from experiments.lab.language import (
    FAILURES,
    OF_LANGUAGE,
    answers,
    hyperparameters_of,
    judged,
    model_and_text,
    objective_of,
    optimizer_of,
    read,
    split,
    takes_means,
)
from experiments.lab.methods import method_named


@dataclass(frozen=True)
class Options:
    """Tunes a language model on a file of preferences."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model: config.json, model.safetensors, tokenizer.json, chat_template.jinja."""
    data: Annotated[Path, tyro.conf.Positional]
    """File (.jsonl, .csv, .parquet): columns chosen and rejected; or response and label, or responses, as the loss
    needs; perhaps prompt and weight."""
    loss: str = "dpo"
    """Name of the loss (see `experiments/lab/methods.py`), or a function of your own: `my_file.py:focal_loss`."""
    beta: float = 0.1
    """Strength of the pull towards the model as it is; losses without a beta ignore it."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Other hyperparameters of the loss: `--fixed gamma 0.5`."""
    mean: bool | None = None
    """Takes means over tokens in place of sums; by default only for losses whose papers do (SimPO, AlphaPO, ORPO)."""
    learning_rate: float | None = None
    """Highest learning rate; by default 1e-6, or 2e-4 for an adapter."""
    num_epochs: int = 1
    """Passes over the data."""
    batch_size: int = 8
    """Rows per optimizer step."""
    rows_at_once: int | None = None
    """Computes a step in parts of so many rows, for less memory."""
    max_length: int = 512
    """Tokens of a prompt and a response; longer prompts lose their beginning."""
    max_rows: int | None = None
    """Use so many rows of the file, chosen at random."""
    held_out: float = 0.1
    """Share of the rows on which the model is judged, not trained."""
    lora_rank: int = 0
    """Trains an adapter of this rank; 0 trains all parameters."""
    top_layers: int | None = None
    """How many layers have adapters, from the last; by default all."""
    bfloat16: bool = False
    """Computes in bfloat16: for accelerators."""
    num_samples: int = 16
    """How many held-out prompts are answered before and after, to estimate the KL."""
    max_tokens: int = 64
    """Tokens of these answers."""
    steps_per_checkpoint: int = 50
    """How often the state of training is kept."""
    steps_per_evaluation: int | None = None
    """How often the held-out rows are judged; by default only before and after training."""
    seed: int = 0
    """Decides everything random: which rows are held out, their order, the adapter, the answers."""
    out: Path = Path("results/tune_lm")
    """Folder for the model, checkpoints, the cache of the reference, metrics.jsonl, figures and summary.json."""


@dataclass(frozen=True)
class Job:
    """A model, the rows that it learns from, those on which it is judged, and how it learns."""

    model: lm.LanguageModel
    report: lm.Report
    train_data: Any
    held_out: Any
    objective: Any
    mean: bool
    """Whether the loss takes means over tokens."""
    hyperparameters: dict[str, float]
    learning_rate: float
    lora: lm.LoRA | None

    def policy(self, params: Any) -> lm.LanguageModel:
        """The model with parameters that were tuned, or with an adapter."""
        return self.model._replace(params=lm.merge(self.model.params, params, self.lora) if self.lora else params)

    def judge(self, params: Any) -> dict[str, dict[str, float]]:
        """What held-out rows show of tuned parameters."""
        logps = lm.logps(self.policy(params), self.held_out, mean=self.mean)
        return judged(self.objective, self.held_out, logps)


def prepare(keys: Any, options: Options) -> Job:
    """Reads model and file, and computes the reference."""
    _, method = method_named(options.loss, OF_LANGUAGE)
    beta = {"beta": options.beta} if "beta" in method.ranges else {}
    hyperparameters = hyperparameters_of(method, {**beta, **options.fixed})
    model, text = model_and_text(options.model, dtype=jnp.bfloat16 if options.bfloat16 else None)
    data, report = read(method, options.data, text, max_length=options.max_length, key=keys[0])
    console.say(str(report))
    both = split(keys[1], data, held_out=options.held_out, at_most=options.max_rows)
    rank, mean = options.lora_rank, takes_means(method, options.mean)
    lora = lm.LoRA(rank=rank, alpha=2.0 * rank, top_layers=options.top_layers) if rank else None
    rate = 2e-4 if lora else 1e-6
    train_data, held_out = (_with_reference(model, rows, mean, options.out) for rows in both)
    return Job(
        model=model,
        report=report,
        train_data=train_data,
        held_out=held_out,
        objective=objective_of(method, hyperparameters),
        mean=mean,
        hyperparameters=hyperparameters,
        learning_rate=rate if options.learning_rate is None else options.learning_rate,
        lora=lora,
    )


def tune(key: Any, job: Job, options: Options) -> tuple[lm.Tuned, dict[int, Any]]:
    """Trains; what comes out, and what held-out rows showed on the way, by the number of steps done."""
    folder = options.out / "checkpoints"
    midway = HeldOut(folder / "held_out.json", job.judge, options.steps_per_evaluation)
    num_steps = options.num_epochs * -(-len(job.train_data.prompts) // options.batch_size)
    with console.training("Training") as show:

        def report(step: lm.Step) -> None:
            show(step)
            midway.report(step)

        tuned = lm.tune(
            key,
            job.model,
            job.train_data,
            objective=job.objective,
            optimizer=lambda: optimizer_of(job.learning_rate, num_steps),
            num_epochs=options.num_epochs,
            batch_size=options.batch_size,
            rows_at_once=options.rows_at_once,
            lora=job.lora,
            mean=job.mean,
            folder=folder,
            steps_per_checkpoint=options.steps_per_checkpoint,
            about={"loss": options.loss, **job.hyperparameters, "learning_rate": job.learning_rate},
            report=report,
        )
    return tuned, {**midway.found, num_steps: job.judge(tuned.params)}


class HeldOut:
    """What held-out rows show, by the number of steps done: kept in a file, for runs that are stopped and go on."""

    def __init__(self, path: Path, judge: Callable[[Any], dict[str, dict[str, float]]], every: int | None):
        self.path, self.judge, self.every = path, judge, every
        known = json.loads(path.read_text()) if path.exists() else {}
        self.found = {int(done): found for done, found in known.items()}

    def report(self, step: lm.Step) -> None:
        """Judges the parameters, if it is time; forgets later steps, which a run without a checkpoint has left."""
        self.found = {done: found for done, found in self.found.items() if done < step.done}
        if self.every and step.done % self.every == 0 and step.done < step.planned:
            self.found[step.done] = self.judge(step.params)
            files.save(self.path, lambda path: path.write_text(json.dumps(self.found)))


def sampled_kl(model: lm.LanguageModel, prompts: Any, written: lm.Generated) -> dict[str, float]:
    """KL to a model (nats per answer), from the answers of another: the mean log-ratio, and its standard error."""
    data: Any = Preferences(prompts, np.asarray(written.tokens))
    return lm.mean_and_stderr(np.asarray(written.logps).sum(axis=1) - lm.logps(model, data))


def print_answers(text: lm.Text, prompts: Any, written: Mapping[str, lm.Generated], num: int = 2) -> None:
    """Prompts, and what was written to them by each model, with its log-probability."""
    for i in range(min(num, len(prompts))):
        console.say(f"prompt: {_text(text, prompts[i])[-200:]!r}")
        for name, answer in written.items():
            logp = float(np.asarray(answer.logps[i]).sum())
            console.say(f"  {name} ({logp:.1f} nats): {_text(text, answer.tokens[i])!r}")


def _text(text: lm.Text, row: Any) -> str:
    return text.decode([int(token) for token in np.asarray(row) if token >= 0])


def print_results(results: Mapping[str, Mapping[str, Mapping[str, float]]], num: int) -> None:
    """A table of means over held-out rows, with 95 % intervals."""
    names = list(next(iter(results.values())))
    console.print_table(
        f"{num} held-out rows",
        ["", *results],
        [[name, *(console.interval(found[name], num) for found in results.values())] for name in names],
    )


def main(options: Options) -> None:
    """Runs the command."""
    commands.check_seed(options.seed)
    commands.check_sizes(
        num_epochs=options.num_epochs,
        batch_size=options.batch_size,
        num_samples=options.num_samples,
        max_tokens=options.max_tokens,
        max_length=options.max_length,
        rows_at_once=options.rows_at_once,
        steps_per_checkpoint=options.steps_per_checkpoint,
        steps_per_evaluation=options.steps_per_evaluation,
    )
    clock, out = time.perf_counter(), files.output_folder(options.out)
    devices.enable_compilation_cache()
    read_key, split_key, tune_key, answer_key = jax.random.split(jax.random.key(options.seed), 4)
    with commands.clear_errors(*FAILURES):
        job = prepare((read_key, split_key), options)
        before = judged(job.objective, job.held_out, job.held_out.reference_logps)
        tuned, later = tune(tune_key, job, options)
    judgements = {0: before, **later}
    results = {"before": before, "after": later[max(later)]}
    num_held_out = len(job.held_out.prompts)
    print_results(results, num_held_out)
    model, after, prompts = job.model, job.policy(tuned.params), job.held_out.prompts[: options.num_samples]
    _save(out, options, after, tuned, job.lora)
    written = {
        # same key: differences between the models are not those of the draws
        name: answers(answer_key, model, policy.params, prompts, max_tokens=options.max_tokens)
        for name, policy in {"before": model, "after": after}.items()
    }
    kl = sampled_kl(model, prompts, written["after"])
    print_answers(model.text, prompts, written)  # type: ignore[arg-type]
    console.say(
        f"KL to the model as it was, from {len(prompts)} answers: {console.interval(kl, len(prompts))} nats each"
    )
    files.save_figure(figures.tuning(tuned.history, judgements), out / "training.png")
    summary = {
        "options": {**asdict(options), "model": options.model.name, "data": options.data.name},
        "rows": job.report.rows,
        "used": job.report.used,
        "held_out": num_held_out,
        **results,
        "held_out_by_step": judgements,
        "sampled_kl": kl,
        **files.provenance(total=time.perf_counter() - clock),
    }
    files.save_summary(summary, out)
    console.say(f"{time.perf_counter() - clock:.0f} s in all. The model is in {out / 'model'}, all else in {out}.")


def _with_reference(model: lm.LanguageModel, rows: Any, mean: bool, out: Path) -> Any:
    with console.counting("Reference", 1) as show:
        cache = out / "reference"
        return lm.with_reference(model, rows, mean=mean, cache=cache, report=lambda done, num: show(done / num))


def _save(out: Path, options: Options, model: lm.LanguageModel, tuned: lm.Tuned, lora: lm.LoRA | None) -> None:
    """Writes the model, and the adapter if there is one, in place of those of an earlier run."""
    for folder in (out / "model", out / "adapter"):
        shutil.rmtree(folder, ignore_errors=True)
    lm.save(out / "model", model)
    if lora:
        lm.save_adapter(out / "adapter", tuned.params, lora, base_name=str(options.model))


if __name__ == "__main__":
    chosen = commands.parse(Options)
    devices.restart_with_huge_pages()
    main(chosen)
