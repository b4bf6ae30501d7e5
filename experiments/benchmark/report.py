"""What a benchmark says: tables, figures, and doubts about its numbers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import figures
from experiments.benchmark.measuring import BESIDE
from experiments.benchmark.string_runs import TRAINING
from experiments.benchmark.workloads import DPO, EXPERIMENT_STEPS
from experiments.lab import console, files, page

TORCH = ("tutorial's loop", "stacked", "by hand", "by hand, compiled")
"""The versions of `rival.py`."""
STRING_TORCH = ("stacked", "by hand", "by hand, in blocks", "by hand, compiled")
"""The versions of `string_rival.py`."""
STEADY = 1.5
"""How far peaks may differ on a machine that does nothing else."""


def highest(peaks: dict[str, float], entries: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The best that the machine did, at first or beside any entry."""
    for entry in entries:
        peaks = {name: max([peak, *entry["peaks"].get(name, [])]) for name, peak in peaks.items()}
    return peaks


def shares(summary: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Every share of a peak: of which entry, of which peak, and how large."""
    for what in ("experiments", "dpo", "strings", "losses"):
        entries = summary.get(what, [])
        named = entries.items() if isinstance(entries, dict) else ((f"{e['num']:,} {what}", e) for e in entries)
        for name, entry in named:
            for peak in BESIDE:
                yield name, peak, entry[f"share_of_peak_{'flops' if peak == 'float32' else peak}"]


def doubts(summary: dict[str, Any]) -> list[str]:
    """What speaks against a summary: a machine that changed its speed, and shares of its peaks above 100 %."""
    found = []
    runs = (summary.get(what, []) for what in ("experiments", "dpo", "strings"))
    entries = [*chain(*runs), *summary["losses"].values()]
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


def print_results(summary: dict[str, Any]) -> None:
    """Prints the tables of a summary."""
    peaks = summary["peaks"]
    console.print_table(
        "What the machine can do",
        ["", "rate"],
        [
            [name, f"{figures.benchmark_figures.short(peak)}{'B/s' if name == 'copy' else 'FLOP/s'}"]
            for name, peak in peaks.items()
        ],
    )
    for what, title in (
        ("experiments", f"Experiments at once, each {EXPERIMENT_STEPS:,} optimizer steps"),
        ("dpo", f"DPO runs at once, each {DPO.steps:,} optimizer steps"),
        ("strings", f"DPO runs on strings at once, each {TRAINING.steps:,} optimizer steps"),
    ):
        columns = ("", "compile", "run", "per second", "steps/s", "µs per step and run", "of peak FLOP/s", "of copy")
        console.print_table(title, columns, [_row(entry) for entry in summary[what]])
    console.print_table("One optimizer step of one run", ["", *STEP_COLUMNS], _steps(summary))
    console.print_table(
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
    console.print_table(
        "Experiments on some of the devices",
        ["devices", "experiments", "per second", "efficiency"],
        [
            [f"{e['num_devices']}", f"{e['num']:,}", f"{e['runs_per_second']:,.1f}", f"{e['efficiency']:.0%}"]
            for e in summary["scaling"]
        ],
    )
    for what, runs, versions in (("torch", "DPO run", TORCH), ("string_torch", "DPO run on strings", STRING_TORCH)):
        if summary[what]:
            console.print_table(
                f"µs per optimizer step and {runs}, beside PyTorch {summary[what]['version']}; in turn",
                ["at once", "JAX", *(f"PyTorch, {name}" for name in versions)],
                [_beside(entry, versions) for entry in summary[what]["runs"]],
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


def _beside(
    entry: dict[str, Any], versions: Sequence[str], shown: Callable[[float], str] = "{:.2f}".format
) -> list[str]:
    """A row of the comparison: how many runs, microseconds, and how many times those of JAX."""
    cost, ratio = entry["microseconds_per_step_and_run"], entry["times_jax"]
    rivals = [f"{shown(cost[name])} ({shown(ratio[name])}×)" if name in cost else "" for name in versions]
    return [f"{entry['num']:,}", shown(cost["jax"]), *rivals]


def page_tables(summary: dict[str, Any]) -> dict[str, str]:
    """The tables on the page of results, by the names of their markers."""
    experiments = [
        [
            f"{entry['num']:,}",
            f"{entry['compile_seconds']:.1f} s",
            f"{entry['seconds']:.2f} s",
            f"{entry['runs_per_second']:.0f}",
            _cost(entry["microseconds_per_step_and_run"]),
        ]
        for entry in summary["experiments"]
    ]
    columns = ["experiments at once", "compile", "run", "per second", "µs per step and run"]
    tables = {"benchmark experiments": page.table(columns, experiments, numbers=True)}
    if summary["torch"]:
        tables["benchmark torch"] = _table_beside_torch("DPO runs at once", summary["torch"], TORCH)
    if "strings" in summary:
        tables["benchmark strings"] = page.table(STRING_COLUMNS, _strings(summary), numbers=True)
        tables["benchmark steps"] = page.table(["one optimizer step", *STEP_COLUMNS], _steps(summary), numbers=True)
    if summary.get("string_torch"):
        table = _table_beside_torch("DPO runs on strings at once", summary["string_torch"], STRING_TORCH)
        tables["benchmark strings torch"] = table
    return tables


STRING_COLUMNS = [
    "DPO runs on strings at once",
    "compile",
    "run",
    "µs per step and run",
    "of one token",
    "of peak FLOP/s",
]


def _strings(summary: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of runs on strings: times that of as many runs in the world of one token, where measured."""
    one_token = {entry["num"]: entry["microseconds_per_step_and_run"] for entry in summary["dpo"]}
    return [
        [
            f"{entry['num']:,}",
            f"{entry['compile_seconds']:.1f} s",
            f"{entry['seconds']:.2f} s",
            _cost(cost := entry["microseconds_per_step_and_run"]),
            f"{_cost(cost / one_token[entry['num']])}×" if entry["num"] in one_token else "",
            f"{entry['share_of_peak_flops']:.1%}",
        ]
        for entry in summary["strings"]
    ]


STEP_COLUMNS = ["FLOP, at least", "bytes, at least", "FLOP in XLA's program", "bytes in XLA's program"]


def _steps(summary: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of work in one step of one run."""
    steps = {"one token": summary["step"], "strings": summary["string_step"]}
    return [
        [
            name,
            f"{step['least_flops']:,.0f}",
            f"{step['least_bytes']:,.0f}",
            f"{step['xla'].get('flops', np.nan) + step['xla'].get('transcendentals', np.nan):,.0f}",
            f"{step['xla'].get('bytes accessed', np.nan):,.0f}",
        ]
        for name, step in steps.items()
    ]


def _table_beside_torch(runs: str, compared: dict[str, Any], versions: Sequence[str]) -> str:
    columns = [runs, "this library, µs per step and run", *(f"PyTorch, {name}" for name in versions)]
    return page.table(columns, [_beside(entry, versions, _cost) for entry in compared["runs"]], numbers=True)


def _cost(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def save_figures(summary: dict[str, Any], out: Path) -> None:
    """Draws the roofline, and the cost of a step against the number of runs."""
    peaks, device = dict(summary["peaks"]), summary["device"]
    bandwidth = peaks.pop("copy")
    if peaks["float32 by default"] < 1.5 * peaks["float32"]:
        del peaks["float32 by default"]  # it is the same on this machine
    shown = {"DPO loss and gradient": summary["losses"]["dpo"]}
    for what, one in (("experiments", "one experiment"), ("dpo", "one DPO run")):
        first, last = summary[what][0], summary[what][-1]
        several = f"{last['num']:,} {'DPO runs' if what == 'dpo' else what}"
        shown |= {one: first} | ({several: last} if last is not first else {})
    points = {name: (entry["flops_per_byte"], entry["flops_per_second"]) for name, entry in shown.items()}
    peaks = {f"matrix product, {name}": peak for name, peak in peaks.items()}
    above = any(max(entry["share_of_peak_flops"], entry["share_of_peak_copy"]) > 1 for entry in shown.values())
    title = f"{device}. Above the roof: data in caches, or a changed speed" if above else device
    files.save_figure(figures.roofline(peaks, bandwidth, points, title=title), out / "roofline.png")

    def curve(entries: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
        return [entry["num"] for entry in entries], [entry["microseconds_per_step_and_run"] for entry in entries]

    curves = {"experiments": curve(summary["experiments"]), "DPO runs": curve(summary["dpo"])}
    curves["DPO runs on strings"] = curve(summary["strings"])
    for name in TORCH if summary["torch"] else ():
        costs = {entry["num"]: entry["microseconds_per_step_and_run"] for entry in summary["torch"]["runs"]}
        costs = {num: cost[name] for num, cost in costs.items() if name in cost}
        if costs:
            curves[f"PyTorch, {name}"] = list(costs), list(costs.values())
    files.save_figure(figures.cost_per_step(curves, title=device), out / "cost_per_step.png")
