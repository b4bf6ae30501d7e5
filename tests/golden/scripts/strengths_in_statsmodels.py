"""Strengths and their covariance by statsmodels, and strengths by choix.

Needs statsmodels and choix; the tests do not: they read the JSON file, made by

    python tests/golden/scripts/strengths_in_statsmodels.py

Bradley and Terry's model is a logistic regression on differences of indicators, and the prior is further rows of it: a
response against nobody, half won. Davidson's model is a Poisson regression of the numbers of wins, losses and ties of
each pair, with an intercept for each pair.
"""

import json
from importlib.metadata import version
from pathlib import Path

import choix
import numpy as np
import statsmodels.api as sm

VERSIONS = {"statsmodels": "0.15.0", "choix": "0.4.1"}
TRUTH = np.array([1.2, 0.4, 0.0, -0.5, -1.1])


def main() -> None:
    assert {name: version(name) for name in VERSIONS} == VERSIONS, f"this script is for {VERSIONS}"
    rng = np.random.default_rng(0)
    plain = draw(rng, 300, tie=0.0)
    tied = draw(rng, 300, tie=0.3)
    never_lost = [row for row in draw(rng, 60, tie=0.0) if row["rejected"] != 0]
    apart = [row for row in draw(rng, 200, tie=0.0) if (row["chosen"] < 2) == (row["rejected"] < 2)]
    cases = [
        {**logistic("plain", plain, prior=0), "choix": by_choix(plain)},
        logistic("weak prior", plain, prior=1),
        logistic("weights", [{**row, "weight": rng.uniform(0.2, 3)} for row in plain], prior=0),
        logistic("ties are half", tied, prior=1),
        logistic("shown first", draw(rng, 400, tie=0.0, first=0.7), prior=0, order=True),
        logistic("never lost", never_lost, prior=1),
        logistic("never compared", apart, prior=1),
        davidson("davidson", tied),
    ]
    text = json.dumps({"versions": VERSIONS, "cases": cases}, separators=(",", ":")).replace('{"name"', '\n{"name"')
    (Path(__file__).parents[1] / "strengths_in_statsmodels.json").write_text(text + "\n")


def draw(rng: np.random.Generator, num: int, *, tie: float, first: float = 0.0) -> list[dict]:
    rows = []
    for _ in range(num):
        a, b = rng.choice(len(TRUTH), 2, replace=False)
        won = rng.random() < 1 / (1 + np.exp(-(TRUTH[a] - TRUTH[b] + first)))  # a is shown first
        chosen, rejected = (a, b) if won else (b, a)
        row = {"chosen": int(chosen), "rejected": int(rejected), "tie": bool(rng.random() < tie), "weight": 1.0}
        rows.append({**row, "first": (1 if won else -1) if first else 0})
    return rows


def logistic(name: str, rows: list[dict], *, prior: float, order: bool = False) -> dict:
    """Strengths that average 0, their covariance, and the advantage of the response shown first."""
    size = len(TRUTH)
    design = np.zeros((len(rows), size + order))
    for line, row in zip(design, rows, strict=True):
        line[row["chosen"]], line[row["rejected"]] = 1, -1
        if order:
            line[size] = row["first"]
    share = np.array([0.5 if row["tie"] else 1.0 for row in rows])
    weights = np.array([row["weight"] for row in rows])
    kept = slice(0, None)
    if prior:
        design = np.concatenate([design, np.eye(size + order)])
        share, weights = np.append(share, np.full(size, 0.5)), np.append(weights, np.full(size, prior))
    else:
        kept = slice(1, None)  # the first strength is 0
    fitted = sm.GLM(share, design[:, kept], sm.families.Binomial(), var_weights=weights).fit(tol=1e-14, maxiter=200)
    strengths, covariance = np.zeros(size + order), np.zeros((size + order, size + order))
    strengths[kept], covariance[kept, kept] = fitted.params, fitted.cov_params()
    return {"name": name, "prior": prior, "model": "half_wins", **centred(rows, strengths, covariance, order)}


def davidson(name: str, rows: list[dict]) -> dict:
    """The same for Davidson's model, without a prior, and log nu."""
    size = len(TRUTH)
    pairs = sorted({tuple(sorted((row["chosen"], row["rejected"]))) for row in rows})
    design, counts = [], []
    for pair, (a, b) in enumerate(pairs):
        of_pair = [row for row in rows if {row["chosen"], row["rejected"]} == {a, b}]
        intercept = np.eye(len(pairs))[pair]
        ahead = (np.eye(size)[a] - np.eye(size)[b]) / 2
        for outcome, found in (
            ((*ahead, 0), [row for row in of_pair if not row["tie"] and row["chosen"] == a]),
            ((*-ahead, 0), [row for row in of_pair if not row["tie"] and row["chosen"] == b]),
            ((*np.zeros(size), 1), [row for row in of_pair if row["tie"]]),
        ):
            design.append([*outcome[1:], *intercept])
            counts.append(len(found))
    fitted = sm.GLM(counts, np.array(design), sm.families.Poisson()).fit(tol=1e-14, maxiter=200)
    strengths, covariance = np.zeros(size), np.zeros((size, size))
    strengths[1:], covariance[1:, 1:] = fitted.params[: size - 1], fitted.cov_params()[: size - 1, : size - 1]
    case = {"name": name, "prior": 0, "model": "davidson", **centred(rows, strengths, covariance, False)}
    return {**case, "ties": fitted.params[size - 1]}


def centred(rows: list[dict], params: np.ndarray, covariance: np.ndarray, order: bool) -> dict:
    size = len(TRUTH)
    centre = np.eye(size) - 1 / size
    columns = {name: [row[name] for row in rows] for name in ("chosen", "rejected", "tie", "weight", "first")}
    return {
        "strengths": (centre @ params[:size]).tolist(),
        "covariance": (centre @ covariance[:size, :size] @ centre).tolist(),
        "first": float(params[size]) if order else 0.0,
        "ties": 0.0,
        "votes": columns,
    }


def by_choix(rows: list[dict]) -> list[float]:
    strengths = choix.opt_pairwise(len(TRUTH), [(row["chosen"], row["rejected"]) for row in rows], tol=1e-12)
    return (strengths - strengths.mean()).tolist()


if __name__ == "__main__":
    main()
