"""Claims as they stand in a summary, on a page and in figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lab import console, files, page
from experiments.lab.claim_figure import draw
from experiments.lab.judging import Claim
from experiments.lab.studies import Study


def publish(title: str, claims: Mapping[str, Claim], study: Study, folder: str, path: Path) -> None:
    """Writes the summary, the figures and the page; prints the verdicts.

    Args:
      title: what all claims are about.
      claims: by name, which is that of the figure, too.
      study: of which they are the result.
      folder: of the reported results, to which the page links.
      path: of the page.
    """
    summary = study.save({"claims": [as_entry(name, claim) for name, claim in claims.items()]})
    save_figures(claims, study.out)
    page.update(page_texts(summary, folder), study.out, path=path)
    console.print_table(
        f"{title}, measured: effects with 95% intervals",
        ["claim", "effect", "verdict"],
        [[name, f"{c.effect.mean:+.4f} ± {c.effect.half:.4f}", c.verdict] for name, c in claims.items()],
    )


def as_entry(name: str, claim: Claim) -> dict[str, Any]:
    """A claim as it stands in the summary."""
    details = {
        what: value if isinstance(value, float) else {"effect": value.mean, "interval": value.interval}
        for what, value in claim.details.items()
    }
    return {
        "id": name,
        "claim": claim.claim,
        **({"papers": list(claim.papers)} if claim.papers else {}),
        "quantity": claim.quantity,
        "effect": claim.effect.mean,
        "interval": claim.effect.interval,
        "verdict": claim.verdict,
        "details": details,
        "figure": {
            "xlabel": claim.xlabel,
            "log": claim.log,
            "panels": {
                quantity: {label: measured._asdict() for label, measured in lines.items()}
                for quantity, lines in claim.panels.items()
            },
        },
    }


def page_texts(summary: dict[str, Any], folder: str) -> dict[str, str]:
    """What stands between the markers of the page: all verdicts, and each claim's verdict, numbers and figure."""
    rows = [[str(i), f"[{c['claim']}](#{c['id']})", c["verdict"]] for i, c in enumerate(summary["claims"], 1)]
    texts = {"verdicts": page.table(["", "claim", "verdict"], rows)}
    for claim in summary["claims"]:
        numbers = [[claim["quantity"], _number(claim)], *([n, _number(d)] for n, d in claim["details"].items())]
        texts[claim["id"]] = (
            f"**{_sentence(claim['verdict'])}**\n\n{page.table(['measured', 'mean ± 95 %'], numbers)}\n\n"
            f"![{claim['claim']}](../reported/{folder}/{claim['id']}.png)"
        )
    return texts


def _sentence(verdict: str) -> str:
    return f"{verdict[0].upper()}{verdict[1:]}."


def _number(measured: dict[str, Any] | float) -> str:
    if isinstance(measured, float):
        return f"{measured:g}"
    if measured["effect"] is None or np.isnan(measured["effect"]):  # not known in some world
        return "–"
    mean, half = measured["effect"], measured["interval"][1] - measured["effect"]
    digits = min(6, max(1, 1 - int(np.floor(np.log10(half))))) if half > 0 else 3
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def save_figures(claims: Mapping[str, Claim], out: Path) -> None:
    """Draws each claim, under its name."""
    for name, claim in claims.items():
        title = f"“{claim.claim}” {_sentence(claim.verdict)}"
        files.save_figure(draw(claim.panels, xlabel=claim.xlabel, title=title, log=claim.log), out / f"{name}.png")
