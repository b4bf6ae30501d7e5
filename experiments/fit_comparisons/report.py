"""What is printed and written as CSV."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax import votes
from experiments.fit_comparisons.ranking import Contest, Pairs, Ranked
from experiments.lab import console

RANKINGS_SHOWN = 5
RESPONSES_SHOWN = 10


def print_rankings(rankings: Mapping[str, Sequence[Ranked]]) -> None:
    """Prints the best responses of the first rankings."""
    for name, ranking in list(rankings.items())[:RANKINGS_SHOWN]:
        console.print_table(
            shortened(name),
            ["response", "strength", "95 % interval", "rank", "wins", "losses", "ties", "better than the next"],
            [
                [
                    f"{entry.rank}. {shortened(entry.response, 40)}",
                    f"{entry.strength:+.2f}",
                    f"{entry.low:+.2f} to {entry.high:+.2f}",
                    _range(entry.rank_low, entry.rank_high),
                    f"{entry.wins:,}",
                    f"{entry.losses:,}",
                    f"{entry.ties:,}",
                    sureness(entry.better_than_next),
                ]
                for entry in ranking[:RESPONSES_SHOWN]
            ],
        )
        if len(ranking) > RESPONSES_SHOWN:
            console.say(f"and {len(ranking) - RESPONSES_SHOWN:,} more responses: see ranking.csv")
    if len(rankings) > RANKINGS_SHOWN:
        console.say(f"ranking.csv has all {len(rankings):,} rankings.")


def sureness(probability: float) -> str:
    """A probability that one response is better, in words."""
    if np.isnan(probability):
        return ""
    if 0.025 < probability < 0.975:
        return f"{probability:.0%}: not separable"
    return _share(probability)


def comparisons_in_words(contest: Contest, one: str, other: str) -> Iterable[str]:
    """Whether one response is better than another, and how sure that is, in each group that has both."""
    names = [contest.responses[i] for i in contest.entrants.responses]
    for group, (begin, end) in enumerate(contest.bounds()):
        if one in names[begin:end] and other in names[begin:end]:
            ids = (begin + names[begin:end].index(name) for name in (one, other))
            yield _in_words(contest, group, one, other, *ids)


def _in_words(contest: Contest, group: int, one: str, other: str, one_id: int, other_id: int) -> str:
    fitted = votes.compare(contest.fit, contest.draws, one_id, other_id)
    if np.isnan(fitted.win_probability):
        return f"{contest.names[group]}: without a prior, the votes do not say whether {one} is better than {other}."
    sides = np.sort(np.stack(contest.entrants.votes.responses), axis=0)
    met = int(np.sum((sides[0] == min(one_id, other_id)) & (sides[1] == max(one_id, other_id))))
    basis = f"They met in {met:,} of the votes." if met else "They never met: others, whom both met, decide."
    if fitted.separable:
        verdict = f"{one} is {'better' if fitted.better > 0.5 else 'worse'} than {other}"
    else:
        verdict = f"{one} and {other} are not separable"
    return (
        f"{contest.names[group]}: {verdict}. The probability that {one} is better is {_share(float(fitted.better))}; "
        f"its probability of winning against {other} is {float(fitted.win_probability):.0%} "
        f"({float(fitted.low):.0%} to {float(fitted.high):.0%}). {basis}"
    )


def _share(probability: float) -> str:
    return f"{probability:.1%}" if 0.001 < probability < 0.999 else "over 99.9%" if probability > 0.5 else "under 0.1%"


def first_in_words(first: Mapping[str, float]) -> str:
    """How much it matters to be shown first."""
    return (
        f"Of two equal responses, the one shown first wins with probability {first['win_probability']:.1%} "
        f"({first['low']:.1%} to {first['high']:.1%}). Strengths are corrected for that."
    )


def agreement_in_words(judges: Sequence[Mapping[str, Any]]) -> str:
    """How often judges agree."""
    overall = judges[-1]
    if not overall["pairs"]:
        return f"{len(judges) - 1:,} judges, of whom no two voted on the same responses to the same prompt."
    return (
        f"{len(judges) - 1:,} judges. Two of them who voted on the same responses to the same prompt agree in "
        f"{overall['agreement']:.0%} of {overall['pairs']:,} cases: see judges.csv. --by judge ranks by judge."
    )


def print_test(tests: Sequence[Mapping[str, Any]]) -> None:
    """Prints the accuracies on held-out votes: of the overall strengths, and of those by category."""
    names = ["overall strengths", "strengths by category"][: len(tests)]
    rows = [(name, test["accuracy"]) for name, test in zip(names, tests, strict=True)]
    rows.append(("majority of the fitted votes on the same two", tests[-1]["majority_accuracy"]))
    console.print_table(
        f"Predicting {tests[0]['num_held_out']:,} held-out votes, from {tests[0]['num_training']:,}",
        ["rule", "accuracy (a tie is half right)"],
        [*([rule, f"{share['mean']:.1%} ± {share['stderr']:.1%}"] for rule, share in rows), ["coin toss", "50.0%"]],
    )


def write_rankings(path: Path, rankings: Mapping[str, Sequence[Ranked]]) -> None:
    """Writes all rankings."""
    rows = ((name, *entry) for name, ranking in rankings.items() for entry in ranking)
    _write(path, ["category", *Ranked._fields], rows)


def write_pairs(path: Path, tables: Iterable[tuple[Contest, Pairs]]) -> None:
    """Writes pairs of responses: votes, the fitted probability of winning and its interval."""
    columns = [
        *("category", "response", "opponent", "wins", "losses", "ties"),
        *("observed", "win_probability", "low", "high", "better"),
    ]

    def rows() -> Iterable[Sequence[Any]]:
        for contest, pairs in tables:
            names = [contest.responses[i] for i in contest.entrants.responses]
            groups = [contest.names[i] for i in contest.entrants.groups]
            wins, losses, ties = pairs.record
            total = wins + losses + ties
            observed = np.divide(wins + ties / 2, total, out=np.full(len(total), np.nan), where=total > 0)
            fitted = (pairs.fitted.win_probability, pairs.fitted.low, pairs.fitted.high, pairs.fitted.better)
            numbers = np.stack([observed, *fitted], axis=1).round(4).tolist()
            counts = np.stack(pairs.record, axis=1).tolist()
            for one, other, count, number in zip(pairs.ones, pairs.others, counts, numbers, strict=True):
                yield groups[one], names[one], names[other], *count, *("" if x != x else x for x in number)

    _write(path, columns, rows())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes mappings with the same keys as a table."""
    _write(path, list(rows[0]), (list(row.values()) for row in rows))


def shortened(text: str, width: int = 60) -> str:
    """A text on one line, cut off if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
