"""Two summaries of `experiments.benchmark` side by side: what took how long, and the ratios."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax import figures
from experiments.lab import console

Summary = dict[str, Any]
NEEDED = ("steps", "pairs", "peaks", "experiments", "dpo", "losses", "device", "versions")
WORKLOADS = {"experiments": "experiments", "dpo": "DPO runs", "strings": "DPO runs on strings"}
SAME = ("steps", "pairs")
"""What must be the same, or times are those of different work; numbers of steps, where both tell them."""
NOTED = ("device", "machine", "runs_at_once", "repeats", "versions")
"""What may differ, but has a share in the ratios."""


def read(path: Path) -> Summary:
    """A summary from a file, or from `summary.json` in a folder."""
    file = path / "summary.json" if path.is_dir() else path
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:  # no text, or no JSON
        raise ValueError(f"{file} is no summary of a benchmark: {problem}") from None
    missing = [name for name in NEEDED if not isinstance(summary, dict) or name not in summary]
    if missing:
        raise ValueError(f"{file} is no summary of a benchmark: it has no {missing[0]!r}")
    return summary


def times(summary: Summary) -> Iterator[tuple[str, float]]:
    """Everything that took time, by name: microseconds."""
    for what, title in WORKLOADS.items():
        for entry in summary.get(what, []):
            yield f"{entry['num']:,} {title}, per step and run", entry["microseconds_per_step_and_run"]
    for what, of in (("torch", "dpo"), ("string_torch", "strings")):
        for entry in (summary.get(what) or {"runs": []})["runs"]:
            for name, cost in entry["microseconds_per_step_and_run"].items():
                if name != "jax":
                    yield f"{entry['num']:,} {WORKLOADS[of]}, PyTorch, {name}", cost
    for name, entry in summary["losses"].items():
        yield f"loss: {name}", 1e6 * entry["seconds"]


def compare(first: Summary, second: Summary) -> list[list[str]]:
    """Rows of a table: what both measured, each time, and the ratio of the second to the first.

    Raises:
      ValueError: if they did different work, or measured nothing in common.
    """
    for name in SAME:
        if not _agree(first[name], second[name]):
            raise ValueError(f"--compare: they did different work: {name} is {first[name]} and {second[name]}")
    old, new = dict(times(first)), dict(times(second))
    common = [name for name in old if name in new]
    if not common:
        raise ValueError("--compare: they measured nothing in common")
    return [[name, f"{old[name]:,.2f}", f"{new[name]:,.2f}", f"{new[name] / old[name]:.2f}"] for name in common]


def _agree(first: Any, second: Any) -> bool:
    """Whether two values are the same; of tables, where both have an entry."""
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return bool(first == second)
    return all(first[name] == second[name] for name in first.keys() & second.keys())


def differences(first: Summary, second: Summary) -> Iterator[str]:
    """What else differs, in words: machines, settings, versions, and peaks."""
    for name in NOTED:
        old, new = (
            {"": value} if not isinstance(value, dict) else value for value in (first.get(name), second.get(name))
        )
        for part in dict.fromkeys([*old, *new]):
            if part != "load" and old.get(part) != new.get(part):
                known = ("not known" if value.get(part) is None else value[part] for value in (old, new))
                yield f"{f'{name} {part}'.strip()}: {next(known)} and {next(known)}"
    for name, peak in first["peaks"].items():
        if name in second["peaks"] and not 1 / 1.1 < second["peaks"][name] / peak < 1.1:
            rates = (figures.benchmark_figures.short(value) for value in (peak, second["peaks"][name]))
            yield f"peak of {name}: {next(rates)} and {next(rates)}per second"


def print_comparison(*paths: Path) -> None:
    """Prints the table, and what else differs.

    Raises:
      ValueError: see `compare`, or if a file holds no summary.
      OSError: if a file cannot be read.
    """
    first, second = map(read, paths)
    rows = compare(first, second)
    console.print_table("Microseconds, and the ratio of the second to the first", ["", *map(str, paths), "ratio"], rows)
    for difference in differences(first, second):
        console.say(f"Beware: they differ in {difference}.")
