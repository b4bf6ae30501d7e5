"""How fast language models are tuned: seconds of a step, tokens per second, share of the machine's peak, memory.

The model has the sizes of SmolLM2-135M and random weights, unless a folder is given: speed does not depend on weights.
Each side runs in a process of its own, one after the other, in several rounds, so that a machine that other work slows
down slows all of them. Where PyTorch, Transformers and TRL are installed, and a folder is given, they do the same step.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab import commands, console, devices, files, page
from experiments.lm_benchmark import workload

OURS = {
    "all parameters": {},
    "LoRA 16, all layers": {"rank": 16},
    "LoRA 16, top 8 layers": {"rank": 16, "top_layers": 8},
}
RIVALS = {
    "PyTorch by hand": "torch",
    "PyTorch by hand, bfloat16": "torch_bf16",
    "TRL, reference before": "trl_before",
    "TRL": "trl",
}
SMALL_PAGES = "all parameters, memory in small pages"
EPOCH = "an epoch of random batches"
COLUMNS = ("side", "seconds", "beside ours", "per adapter", "GB")


@dataclass(frozen=True)
class Options:
    """How fast language models are tuned, beside the machine's peak, and beside PyTorch and TRL if installed."""

    model: Path | None = None
    """Folder of a model; by default random weights of SmolLM2's sizes. PyTorch and TRL need one."""
    num_pairs: int = 4
    """Pairs per step; accelerators want more. PyTorch and TRL take four."""
    num_steps: int = 3
    """Steps to time in each round, after one that warms up."""
    num_rounds: int = 2
    """How often each side is asked, in turn."""
    num_adapters: tuple[int, ...] = (1, 4, 8)
    """How many adapters to train at once, on the top 8 layers; on accelerators also 16 and 64."""
    rivals: Path | None = None
    """The Python of an environment with PyTorch, Transformers and TRL; by default this one, if it has them."""
    bfloat16: bool = False
    """Computes in bfloat16: for accelerators."""
    out: Path = Path("results/lm_benchmark")
    """Folder for summary.json."""


def sides(options: Options, folder: Path) -> dict[str, list[str]]:
    """The commands that time each side; the folder is for what they share."""
    ours = [sys.executable, "-m", "experiments.lm_benchmark.side", "--steps", str(options.num_steps)]
    ours += ["--pairs", str(options.num_pairs)]
    ours += ["--model", str(options.model)] if options.model else []
    ours += ["--bfloat16"] if options.bfloat16 else []
    found = {name: [*ours, *_flags(flags)] for name, flags in OURS.items()}
    for num in options.num_adapters:
        flags = {"rank": 16, "top_layers": 8, "adapters": num}
        found[f"{num} adapters at once, top 8 layers"] = [*ours, *_flags(flags)]
    found[SMALL_PAGES] = ours
    found[EPOCH] = [*ours, "--epoch"]
    found["answers to 16 prompts"] = [*ours, "--generate", "16"]
    rivals = [
        sys.executable if options.rivals is None else str(options.rivals),
        str(Path(__file__).with_name("rivals.py")),
    ]
    if options.num_pairs != 4 or not options.model or not (options.rivals or find_spec("trl")):
        return found
    num = len(workload.LENGTHS)
    vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
    few, many = folder / "pairs.json", folder / "epoch.json"
    few.write_text(workload.as_json(workload.pairs(vocab_size, 4)))
    many.write_text(workload.as_json(workload.pairs(vocab_size, num)))
    for name, what in RIVALS.items():
        found[name] = [*rivals, what, str(options.model), str(few), str(options.num_steps)]
    found[f"TRL, {EPOCH}"] = [*rivals, "trl", str(options.model), str(many), str(num // 4)]
    return found


def pages_of(name: str) -> dict[str, str]:
    """The environment of a side: ours have their memory in huge pages, as commands that tune do, except for one."""
    others = (SMALL_PAGES, *RIVALS, f"TRL, {EPOCH}")
    return dict.fromkeys(devices.HUGE_PAGES, "") if name in others else devices.HUGE_PAGES


def timed(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a side says of itself.

    Raises:
      RuntimeError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarise(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians over all steps of a side, means for epochs, and shares of the peak that was measured beside it."""
    summary = {}
    for name, own in rounds.items():
        seconds = np.concatenate([entry["seconds"] for entry in own])
        entry = {k: v for k, v in own[0].items() if k != "seconds"}
        peak = max((e.get("peak_flops", 0.0) for e in own), default=0.0)
        per_step = np.mean(seconds) if EPOCH in name else np.median(seconds)
        entry |= {"seconds": seconds.tolist(), "per_step": float(per_step), "peak_flops": peak}
        if peak and "least_flop" in entry and name == "all parameters":
            entry["share_of_peak"] = entry["least_flop"] / entry["per_step"] / peak
        summary[name] = entry
    return summary


def rows_of(sides: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Seconds of each side, also beside those of our full step (or epoch), and memory."""
    rows = []
    for name, entry in sides.items():
        base = sides[EPOCH if EPOCH in name else "all parameters"]["per_step"]
        adapters, rate = entry.get("adapters"), entry.get("tokens_per_second")
        rows.append(
            [
                name,
                f"{entry['per_step']:.2f}",
                f"{rate:.0f} tokens per second" if rate else f"{entry['per_step'] / base:.2f}",
                f"{entry['per_step'] / adapters:.2f}" if adapters else "",
                f"{entry['peak_bytes'] / 1e9:.1f}",
            ]
        )
    return rows


def page_table(summary: dict[str, Any]) -> str:
    """The table of the page."""
    return page.table(COLUMNS, rows_of(summary["sides"]))


def _flags(values: dict[str, int]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def main(options: Options) -> None:
    """Runs the command."""
    commands.check_sizes(num_pairs=options.num_pairs, num_steps=options.num_steps, num_rounds=options.num_rounds)
    clock, out = time.perf_counter(), files.output_folder(options.out)
    commands_of_sides = sides(options, out)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in commands_of_sides}
    for i in range(options.num_rounds):
        for name, command in commands_of_sides.items():
            with console.waiting(f"Round {i + 1} of {options.num_rounds}, {name}"), commands.clear_errors(RuntimeError):
                rounds[name].append(timed(command, pages_of(name)))
    summary = summarise(rounds)
    console.print_table(f"Seconds per step of {options.num_pairs} pairs", COLUMNS, rows_of(summary))
    if "share_of_peak" in summary["all parameters"]:
        console.say(f"Share of the measured peak of matrix products: {summary['all parameters']['share_of_peak']:.0%}")
    found = {"sides": summary, "num_pairs": options.num_pairs, **files.provenance(total=time.perf_counter() - clock)}
    files.save_summary(found, out)
    page.update({"lm_benchmark": page_table(found)}, out, path=page.LANGUAGE_MODELS)
    console.say(f"{time.perf_counter() - clock:.0f} s in all. summary.json is in {out}.")


if __name__ == "__main__":
    main(commands.parse(Options))
