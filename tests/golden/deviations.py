"""How far each loss is from independent implementations and from its equation: the numbers of the page of the losses.

From the root of the repository:

    python -m tests.golden.deviations

writes `experiments/reported/losses/summary.json` and the table on the page of the losses, `dpo_jax/losses/README.md`.

Deviations are relative (`tests.losses.oracles.deviation`). Those from implementations cover values and gradients; those
from the equation, in extended precision, cover values for random log-probabilities of several seeds. In float32 they
include the rounding of the inputs.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from experiments.lab import files, page
from tests.losses.menu import CASES, Case, evaluate, expected, make_inputs, policy_arrays
from tests.losses.oracles import ENTRIES, compare, deviation

OUT = page.REPORTED / "losses"
PAGE = Path(losses.__file__).parent / "README.md"
NUM_SEEDS = 20
DTYPES = {"float64": jnp.float64, "float32": jnp.float32}
WITHOUT_CASE = {
    "wpo_weights": "Zhou 2024 (WPO), 2406.11827, Eq. 2",
    "length_desensitized_logps": "Liu 2024 (LD-DPO), 2409.06411",
}
ROWS = {
    "mpo": "weighted_sum (MPO)",
    "wpo": "wpo_weights",
    "ld_dpo": "length_desensitized_logps",
    "orpo_odds_ratio": "orpo_loss",
}
STATISTICS = ("bco_shift", "kto_reference_point")  # no losses; tests/losses/test_oracles.py has them
COLUMNS = ("loss", "paper", "independent implementations", *DTYPES, *(f"equation, {dtype}" for dtype in DTYPES))


def row_of(entry: dict[str, Any]) -> str:
    """The row of the table to which an oracle's entry belongs."""
    if entry["divergence"]:
        name = entry["divergence"]["name"]
        return f"dpo_loss, {'alpha_divergence' if name == 'alpha' else name}"
    if entry["loss"] == "dpo_loss" and entry["hyperparameters"].get("label_smoothing"):
        return "dpo_loss, label_smoothing"
    return ROWS.get(entry["loss"], entry["loss"])


def summarise(names: Iterable[str] | None = None) -> dict[str, Any]:
    """The deviations of all losses, or of some."""
    papers = {case.name: case.paper for case in CASES} | WITHOUT_CASE
    equations = {case.name: case for case in CASES}
    rows = []
    for name in papers if names is None else names:
        entries = [entry for entry in ENTRIES if entry["loss"] not in STATISTICS and row_of(entry) == name]
        rows.append(
            {
                "loss": name,
                "paper": papers[name],
                "oracles": list(dict.fromkeys(entry["oracle"] for entry in entries)),
                "num_comparisons": len(entries),
                "oracle": {dtype: from_oracles(entries, dtype) for dtype in DTYPES},
                "equation": {dtype: from_equation(equations.get(name), dtype) for dtype in DTYPES},
            }
        )
    return {"num_seeds": NUM_SEEDS, "losses": rows}


def from_oracles(entries: list[dict[str, Any]], dtype: str) -> float | None:
    """The largest deviation of values and gradients; in float64, from oracles that computed in float64."""
    known = [entry for entry in entries if dtype == "float32" or entry["dtype"] == "float64"]
    with jax.enable_x64(dtype == "float64"):
        deviations = [deviation(*numbers) for entry in known for numbers in compare(entry, DTYPES[dtype])]
    return max(deviations, default=None)


def from_equation(case: Case | None, dtype: str) -> float | None:
    """The largest deviation of the values."""
    if case is None:
        return None
    deviations = []
    with jax.enable_x64(dtype == "float64"):
        for seed in range(NUM_SEEDS):
            inputs = make_inputs(seed)
            values = evaluate(case, policy_arrays(inputs, DTYPES[dtype]), inputs, DTYPES[dtype])
            deviations.append(deviation(np.asarray(values, np.longdouble), expected(case, inputs)))
    return max(deviations)


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    rows = []
    for row in summary["losses"]:
        numbers = [rounded_up(row[source][dtype]) for source in ("oracle", "equation") for dtype in DTYPES]
        rows.append((f"`{row['loss']}`", row["paper"], ", ".join(row["oracles"]) or "none", *numbers))
    return page.table(COLUMNS, rows)


def rounded_up(number: float | None) -> str:
    """One digit and the power of ten, rounded up."""
    if number is None:
        return "–"
    if number == 0:
        return "0"
    power = int(np.floor(np.log10(number)))
    digit = int(np.ceil(number / 10.0**power))
    return f"{digit}e{power}" if digit < 10 else f"1e{power + 1}"


def main() -> None:
    """Computes and writes."""
    start = time.perf_counter()
    summary = summarise()
    seconds = time.perf_counter() - start
    files.save_summary({**summary, **files.provenance(run=seconds)}, files.output_folder(OUT))
    page.update({"deviations": table(summary)}, OUT, path=PAGE)
    print(f"{OUT / 'summary.json'} and the table of {PAGE} are written, in {seconds:.0f} s.")


if __name__ == "__main__":
    main()
