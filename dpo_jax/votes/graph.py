"""Who was compared with whom, and who won."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dpo_jax.types import Pair
from dpo_jax.votes.strengths import Votes

MOST_WARNINGS = 20
"""Warnings of each kind; beyond these, they are counted."""

NAMES_SHOWN = 5


class Entrants(NamedTuple):
    """Responses that stand in several groups, each with an id of its own: entrants of a contest.

    Attributes:
      votes: by ids of entrants.
      groups: the group of each entrant; entrants of a group have consecutive ids.
      responses: the response that each entrant is.
    """

    votes: Votes
    groups: Int[np.ndarray, " entrants"]
    responses: Int[np.ndarray, " entrants"]


def entrants(votes: Votes, groups: Any = None) -> Entrants:
    """Separates a response that was compared in several groups of votes, so that each group can have its own ranking.

    Args:
      votes: votes by ids of responses.
      groups: the group of each vote, its prompt or its judge, say; `None` for one group.
    """
    sides = np.stack([np.asarray(side, np.int64) for side in votes.responses])
    size = int(sides.max()) + 1
    code = sides + (0 if groups is None else size * np.asarray(groups, np.int64))
    seen, ids = np.unique(code, return_inverse=True)
    chosen, rejected = ids.reshape(sides.shape).astype(np.int32)
    return Entrants(votes._replace(responses=Pair(chosen, rejected)), seen // size, seen % size)


class Record(NamedTuple):
    """How often each response won, lost and tied: numbers of votes."""

    wins: Int[np.ndarray, " responses"]
    losses: Int[np.ndarray, " responses"]
    ties: Int[np.ndarray, " responses"]


def record(votes: Votes, num_responses: int) -> Record:
    """Counts the votes on each response, each as one whatever its weight."""
    chosen, rejected = votes.responses
    tied = np.zeros(len(chosen), bool) if votes.ties is None else np.asarray(votes.ties)

    def count(ids: Any) -> np.ndarray:
        return np.bincount(ids, minlength=num_responses)

    ties = count(chosen[tied]) + count(rejected[tied])
    return Record(count(chosen[~tied]), count(rejected[~tied]), ties)


def islands(votes: Votes, num_responses: int) -> Int[np.ndarray, " responses"]:
    """Ids of sets of responses that no comparison connects: their strengths cannot be compared."""
    return _components(votes, num_responses, "weak")


def levels(votes: Votes, num_responses: int) -> Int[np.ndarray, " responses"]:
    """Ids of sets of responses that have won against each other, directly or in a circle; a tie counts as both.

    The likelihood has a finite maximum if and only if each island is one level (Ford, 1957).
    """
    return _components(votes, num_responses, "strong")


def warnings_of(contest: Entrants, groups: Sequence[str], responses: Sequence[str]) -> list[str]:
    """What the votes cannot say, in sentences: responses that never lost or never won, and those never compared.

    Args:
      contest: the votes.
      groups: names of the groups; an empty name is left out of the sentences.
      responses: names of the responses.
    """
    num = len(contest.groups)
    island, level = islands(contest.votes, num), levels(contest.votes, num)
    chosen, rejected = contest.votes.responses
    across = level[chosen] != level[rejected]  # never a tie
    lost, won = np.zeros((2, num), bool)
    lost[level[rejected[across]]] = True
    won[level[chosen[across]]] = True
    in_island = np.bincount(island, minlength=num)[island]
    wins, losses, ties = record(contest.votes, num)
    played = wins + losses + ties
    apart: list[str] = []
    never_lost: list[str] = []
    never_won: list[str] = []
    starts = np.searchsorted(contest.groups, np.arange(len(groups) + 1))
    for name, begin, end in zip(groups, starts[:-1], starts[1:], strict=True):
        where = f" ({name})" if name else ""
        members = np.arange(begin, end)

        def names(ids: Any) -> str:
            return _listed([responses[contest.responses[i]] for i in ids])

        parts = np.unique(island[begin:end])
        if len(parts) > 1:
            listed = "; ".join(f"{{{names(members[island[begin:end] == part])}}}" for part in parts[:NAMES_SHOWN])
            more = "; ..." if len(parts) > NAMES_SHOWN else ""
            apart.append(
                f"{len(parts):,} sets of responses were never compared with each other{where}: {listed}{more}. Ranks "
                "and differences across them say nothing."
            )
        for set_ in np.unique(level[begin:end]):
            ids = members[level[begin:end] == set_]
            if lost[set_] == won[set_] or (len(ids) > 1 and 2 * len(ids) > in_island[ids[0]]):
                continue
            sentences, word, bound = (never_lost, "lost", "above") if won[set_] else (never_won, "won", "below")
            if len(ids) == 1:
                against, verb = f"in {_votes(int(played[ids[0]]))}", "its strength"
            else:
                against, verb = "against the rest", "their strengths"
            sentences.append(f"{names(ids)} never {word} {against}{where}: no vote bounds {verb} from {bound}.")
    return [sentence for kind in (apart, never_lost, never_won) for sentence in _capped(kind)]


def _capped(sentences: list[str]) -> list[str]:
    more = len(sentences) - MOST_WARNINGS
    return [*sentences[:MOST_WARNINGS], *([f"{more:,} more warnings of this kind."] if more > 0 else [])]


def _votes(number: int) -> str:
    return f"{number:,} vote" if number == 1 else f"{number:,} votes"


def _listed(names: Sequence[str]) -> str:
    shown = [" ".join(name.split())[:60] for name in names[:NAMES_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else "")


def _components(votes: Votes, num_responses: int, connection: str) -> np.ndarray:
    chosen, rejected = (np.asarray(side) for side in votes.responses)
    tied = np.zeros(len(chosen), bool) if votes.ties is None else np.asarray(votes.ties)
    winners, losers = np.concatenate([chosen, rejected[tied]]), np.concatenate([rejected, chosen[tied]])
    wins = coo_array((np.ones(len(winners), np.int8), (winners, losers)), (num_responses, num_responses))
    return connected_components(wins, connection=connection)[1]
