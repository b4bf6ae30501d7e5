"""Your own comparisons: which responses people prefer, and how sure that is.

Strengths are fitted by the Bradley-Terry model, to all votes together and to each category apart: see `dpo_jax.votes`.
A separate fit, of a part of the votes, shows how well strengths predict.
"""

import time
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from dpo_jax import checks, figures, votes
from experiments.fit_comparisons import report
from experiments.fit_comparisons.held_out import evaluate, split
from experiments.fit_comparisons.ranking import (
    MOST_FOR_CURVATURE,
    Contest,
    Model,
    Pairs,
    Ranked,
    with_effective_weights,
)
from experiments.lab import commands, console, devices, files

OVERALL = "overall"
NO_CATEGORIES = "none"
TIES = {"half": votes.half_wins, "davidson": votes.davidson}
FEW_CLUSTERS = 20
RANKINGS_SHOWN, RESPONSES_SHOWN = 6, 30
"""Panels of the figure of strengths, and rows of a panel."""


@dataclass(frozen=True)
class Options:
    """Ranks responses by your own comparisons, with intervals."""

    file: Annotated[Path, tyro.conf.Positional]
    """CSV, JSON Lines (both also .gz) or Parquet with the columns chosen and rejected, or model_a, model_b and winner;
    optionally prompt, judge, tie, first (which was shown first), weight."""
    by: str = ""
    """Column whose values have a ranking each. By default `prompt`, if there is one; `none` for the overall ranking
    alone."""
    compare: tuple[str, str] | None = None
    """Two responses: is the one better than the other, and how sure is that?"""
    prior: float = 1.0
    """Virtual votes of each response against an average one, half of them won; 0 for none."""
    ties: Literal["half", "davidson"] = "half"
    """A tie is half a win for each, or an outcome of its own (Davidson's model)."""
    intervals: Literal["curvature", "bootstrap"] = "curvature"
    """Intervals by the curvature of the likelihood, or by fits of redrawn votes."""
    num_fits: int = 200
    """Fits of redrawn votes."""
    clusters: str = ""
    """Column whose votes are not independent, such as `judge`: they are redrawn together (by the bootstrap)."""
    held_out: float = 0.2
    """Share of the votes for the check of predictions; 0 for no check. The rankings use all votes."""
    seed: int = 0
    """Decides how votes are redrawn, and which are held out."""
    out: Path = Path("results/fit_comparisons")
    """Folder for tables (CSV), figures and summary.json."""


def main(options: Options) -> None:
    """Reads the votes, ranks the responses, checks the predictions, and saves all of it."""
    with commands.clear_errors():
        check(options)
        wanted = [name for name in (options.by, options.clusters) if name not in ("", NO_CATEGORIES)]
        file = votes.read(options.file, columns=wanted)
        categories = categories_of(options, file)
        check_compared(options, file)
        check_ties(options, file)
        num = len(file.votes.responses.chosen)
        parts = split(jax.random.key(options.seed), num, options.held_out) if options.held_out else None
    if file.unused_columns:
        console.say(f"Columns that are not used: {', '.join(map(repr, file.unused_columns))}.")
    out = files.output_folder(options.out)
    devices.enable_compilation_cache()

    start = time.perf_counter()
    clusters = file.columns[options.clusters.strip().lower()].ids if options.clusters else None
    bootstrap = options.intervals == "bootstrap" or clusters is not None
    model = Model(options.prior, TIES[options.ties], bootstrap, options.num_fits, clusters)
    overall_key, category_key = jax.random.split(jax.random.key(options.seed + 1))
    ballots = with_effective_weights(file.votes)
    everything = votes.Column((OVERALL,), np.zeros(num, np.int32))
    contests = [Contest(overall_key, ballots, file.responses, everything, model)]
    if categories and len(categories.names) > 1:
        contests.append(Contest(category_key, ballots, file.responses, categories, model))
    tests = [evaluate(contest.entrants, parts, model) for contest in contests] if parts else []
    if categories and len(categories.names) == 1:
        contests.append(contests[0].named(categories.names))
    results = Results(
        {name: ranking for contest in contests for name, ranking in contest.rankings().items()},
        [(contest, contest.pairs()) for contest in contests],
        [test for test, _ in tests],
        tests[-1][1] if tests else {},
        [
            *dict.fromkeys(sentence for contest in contests for sentence in contest.warnings()),
            *warnings_of_method(options, file, contests),
        ],
        agreement_of_judges(file),
        shown_first(contests[0], file),
    )
    seconds = time.perf_counter() - start
    save(out, options, results, seconds)
    show(options, results)
    console.say(f"Saved {', '.join(sorted(path.name for path in out.iterdir()))} in {out}.")


class Results(NamedTuple):
    """What was found.

    Attributes:
      rankings: by category, `overall` first.
      pairs: of the overall ranking, and of the categories.
      tests: of the overall strengths, and of those by category; none without held-out votes.
      history: of the last test's fit.
      warnings: what the votes cannot say, in sentences.
      judges: how far each agrees with the others, if there are judges.
      first: the probability that the response shown first wins among equals, if the file says which it was.
    """

    rankings: dict[str, list[Ranked]]
    pairs: list[tuple[Contest, Pairs]]
    tests: list[dict[str, Any]]
    history: dict[str, list[float]]
    warnings: list[str]
    judges: list[dict[str, Any]]
    first: dict[str, float] | None


def check(options: Options) -> None:
    """Raises an error on options that make no sense, before anything is read or computed."""
    commands.check_seed(options.seed)
    checks.interval("--prior", options.prior, "[0, inf)")
    checks.interval("--held-out", options.held_out, "[0, 1)")
    checks.size("--num-fits", options.num_fits, at_least=2)


def categories_of(options: Options, file: votes.VoteFile) -> votes.Column | None:
    """The groups of votes that have a ranking each, if there are any."""
    column = options.by.strip().lower() or "prompt"
    if column == NO_CATEGORIES or column not in file.columns:
        return None
    names, ids = file.columns[column]
    return votes.Column(tuple(f"{name} ({column})" if name == OVERALL else name for name in names), ids)


def check_compared(options: Options, file: votes.VoteFile) -> None:
    """Raises an error unless the responses to compare are two, and in the file."""
    if options.compare and options.compare[0] == options.compare[1]:
        raise ValueError(f"--compare: these are the same, {options.compare[0]!r}")
    for name in options.compare or ():
        if name not in file.responses:
            near = get_close_matches(name, file.responses, n=1)
            raise ValueError(f"--compare: no response {name!r}" + (f". Is it {near[0]!r}?" if near else ""))


def check_ties(options: Options, file: votes.VoteFile) -> None:
    """Raises an error if ties alone make a likelihood without a maximum."""
    if options.prior == 0 and options.ties == "davidson" and file.votes.ties is not None and file.votes.ties.all():
        raise ValueError("--ties davidson --prior 0: all votes are ties, and these parameters have no maximum")


def warnings_of_method(options: Options, file: votes.VoteFile, contests: list[Contest]) -> list[str]:
    """What the method cannot do with these votes, in sentences."""
    found = []
    if options.clusters and (num := len(file.columns[options.clusters.strip().lower()].names)) < FEW_CLUSTERS:
        found.append(f"{num} values of {options.clusters} are too few to redraw: the intervals are too narrow.")
    if options.intervals == "curvature" and not options.clusters and any(c.num > MOST_FOR_CURVATURE for c in contests):
        found.append(f"Intervals are made by redrawing votes where rankings have over {MOST_FOR_CURVATURE:,} entries.")
    if file.votes.first is not None and len({*np.unique(file.votes.first).tolist()} - {0}) == 1:
        found.append("Order and outcome always go together: the votes do not tell which of them decides.")
    return found


def agreement_of_judges(file: votes.VoteFile) -> list[dict[str, Any]]:
    """How often each judge voted as the other judges did on the same two responses to the same prompt."""
    if "judge" not in file.columns:
        return []
    names, ids = file.columns["judge"]
    prompts = file.columns["prompt"].ids if "prompt" in file.columns else None
    pairs, agreement, overall = votes.agreement(file.votes, ids, prompts)
    num_votes = np.bincount(ids, minlength=len(names))
    rows = zip(names, num_votes.tolist(), pairs.tolist(), agreement.tolist(), strict=True)
    found = [dict(zip(("judge", "votes", "pairs", "agreement"), row, strict=True)) for row in rows]
    return [*found, {"judge": OVERALL, "votes": len(ids), "pairs": int(pairs.sum()) // 2, "agreement": float(overall)}]


def shown_first(contest: Contest, file: votes.VoteFile) -> dict[str, float] | None:
    """How much the response that is shown first gains: the probability that it wins among equals, with its interval."""
    if file.votes.first is None:
        return None
    low, high = np.quantile(contest.draws.first, [0.025, 0.975])
    odds = {"win_probability": contest.fit.first, "low": low, "high": high}
    return {name: float(1 / (1 + np.exp(-value))) for name, value in odds.items()}


def save(out: Path, options: Options, results: Results, seconds: float) -> None:
    """Writes the tables, the figures and summary.json."""
    files.save(out / "ranking.csv", lambda path: report.write_rankings(path, results.rankings))
    files.save(out / "pairs.csv", lambda path: report.write_pairs(path, results.pairs))
    if results.judges:
        files.save(out / "judges.csv", lambda path: report.write_rows(path, results.judges))
    rankings = {name: [entry._asdict() for entry in ranking] for name, ranking in results.rankings.items()}
    shown = {name: ranking[:RESPONSES_SHOWN] for name, ranking in list(rankings.items())[:RANKINGS_SHOWN]}
    files.save_figure(figures.strengths(shown), out / "strengths.png")
    contest, pairs = results.pairs[0]
    names, *tables = contest.matrices(0, pairs)
    files.save_figure(figures.win_probabilities(OVERALL, names, *tables), out / "win_probabilities.png")
    if results.tests:
        bins = results.tests[-1]["calibration"]
        files.save(out / "calibration.csv", lambda path: report.write_rows(path, bins))
        files.save_figure(figures.calibration(bins), out / "calibration.png")
    summary = {
        "file": options.file.name,
        "beta": 1.0,  # at which DPO on a table has this likelihood
        **{name: value for name, value in vars(options).items() if name not in ("file", "out")},
        "test": results.tests[-1] if results.tests else None,
        "test_overall": results.tests[0] if results.tests else None,
        "history": results.history,
        "warnings": results.warnings,
        "shown_first": results.first,
        "judges": results.judges,
        "rankings": rankings,
        "win_probabilities": win_probabilities(results.pairs),
    }
    files.save_summary({**summary, **files.provenance(compile_and_run=seconds)}, out)


def win_probabilities(tables: list[tuple[Contest, Pairs]]) -> dict[str, dict[str, Any]]:
    """By category: the strongest responses, the fitted probability that each wins against each, the observed share."""
    return {
        name: dict(zip(("responses", "fitted", "observed"), contest.matrices(group, pairs), strict=True))
        for contest, pairs in tables
        for group, name in enumerate(contest.names)
    }


def show(options: Options, results: Results) -> None:
    """Prints the rankings, what they cannot say, and how well they predict."""
    report.print_rankings(results.rankings)
    for sentence in results.warnings:
        console.say(f"Warning: {sentence}")
    if results.first is not None:
        console.say(report.first_in_words(results.first))
    if results.judges:
        console.say(report.agreement_in_words(results.judges))
    if results.tests:
        report.print_test(results.tests)
    if options.compare:
        for contest, _ in results.pairs:
            for sentence in islice(report.comparisons_in_words(contest, *options.compare), report.RANKINGS_SHOWN):
                console.say(sentence)


if __name__ == "__main__":
    main(commands.parse(Options))
