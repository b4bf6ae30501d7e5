"""Votes from a file: who was compared, what was chosen, by whom."""

import re
from array import array
from collections.abc import Iterable, Sequence
from contextlib import closing
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dpo_jax.records import excerpt, records, unit
from dpo_jax.types import Pair, Preferences
from dpo_jax.votes.cells import Names, as_weight, tidy
from dpo_jax.votes.graph import entrants
from dpo_jax.votes.strengths import Votes

REQUIRED = (("chosen", "rejected"), ("model_a", "model_b", "winner"))
OPTIONAL = ("prompt", "judge", "winner", "tie", "first", "weight")
SOMETIMES = {"winner", "tie", "first"}
"""Columns that some lines of a JSON Lines file may lack."""

LARGEST_WEIGHT_RATIO = 1e30
"""Weights in a file may differ by this factor."""

SIDES = {1: ("chosen", "modela", "a", "left"), -1: ("rejected", "modelb", "b", "right")}
ALIKE = ("both", "neither", "bothbad", "bothgood", "tiebothbad", "tiebothgood")
TIES = ("tie", "ties", "tied", "draw", "equal", "same", "nopreference", *ALIKE)
OUTCOMES = {**{word: side for side, words in SIDES.items() for word in words}, **dict.fromkeys(TIES, 0)}
SHORTHAND = ("a", "b", "left", "right")
"""A response of this name is meant, if there is one."""
YES, NO = ("true", "yes", "1", "t", "y", *TIES), ("", "false", "no", "0", "f", "n")


class Column(NamedTuple):
    """A column of names.

    Attributes:
      names: the distinct names, in order of appearance.
      ids: which one stands in each row.
    """

    names: tuple[str, ...]
    ids: Int[np.ndarray, " n"]


class VoteFile(NamedTuple):
    """Votes read from a file.

    Attributes:
      responses: names of the responses, in order of appearance.
      votes: the votes by ids of responses, in NumPy arrays; weights average 1.
      columns: the columns of names: `prompt` and `judge` if the file has them, and those asked for.
      unused_columns: names of the columns that were not read.
    """

    responses: tuple[str, ...]
    votes: Votes
    columns: dict[str, Column]
    unused_columns: tuple[str, ...] = ()


def read(path: str | Path, *, columns: Sequence[str] = ()) -> VoteFile:
    """Reads votes from a CSV, JSON Lines or Parquet file; the first two may be compressed by gzip.

    Names are compared without the white space around them, and in Unicode's composed form (NFC). Whole numbers have the
    same name for all types: 1, 1.0 and 1e0 are `1`. A CSV has no types; there, `2.0` is `2` if all responses, or all
    prompts, are whole numbers. Column names are case-insensitive.

    Args:
      path: a file that ends in `.csv`, `.jsonl`, `.ndjson` (or one of these and `.gz`) or `.parquet`, text in UTF-8,
        with the columns `chosen` and `rejected`, or `model_a`, `model_b` and `winner`, and optionally

        - `prompt` and `judge`: any names;
        - `winner`: the name of a response, `model_a`, `a`, `chosen`, `left` or the other side, or a tie (`tie`, `draw`,
          `both`, `tie (bothbad)`, ...);
        - `tie`: yes or no;
        - `first`: the response that was shown first, spelled as in `winner`; may be blank;
        - `weight`: a positive number.
      columns: names of further columns to read. Those that are not read are `unused_columns`.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is of another kind, empty, damaged or not text; a column is missing, given twice, in some
        lines only, or named almost like an optional one; a cell is blank, or not one of the words above; a row has too
        many or too few cells; both responses are the same; a weight is not positive and finite, or too small beside the
        largest; or a name is a floating-point number so large that its digits are lost. The message names the line (the
        row, in a Parquet file), counted from 1.
    """
    path = Path(path)
    extra = tuple(tidy(name).lower() for name in columns)
    for name in {*extra} & {*REQUIRED[0], *REQUIRED[1], *OPTIONAL[2:]}:
        raise ValueError(f"{path}: the column {name} holds no names to group votes by")
    reader = _Reader(path, extra)
    with closing(records(path, reader.layout)) as rows:
        for number, names, cells in rows:
            reader.add(number, dict(zip(reader.layouts[names], cells, strict=True)))
    return reader.finish()


def as_preferences(file: VoteFile) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], Preferences]:
    """Votes as data for training on tables: comparisons of responses that have ids within their prompt.

    A tie is two comparisons of half the weight.

    Returns:
      The names of the prompts (one empty name, if the file has no prompts); for each prompt the names of the responses
      that were compared; and the comparisons, in JAX arrays.
    """
    everything = Column(("",), np.zeros(len(file.votes.responses.chosen), np.int32))
    prompts = file.columns.get("prompt", everything)
    contest = entrants(file.votes, prompts.ids)
    starts = np.searchsorted(contest.groups, np.arange(len(prompts.names) + 1))
    names = [tuple(file.responses[i] for i in contest.responses[a:b]) for a, b in pairwise(starts)]
    chosen, rejected = (side - starts[prompts.ids] for side in contest.votes.responses)
    ids, ties, weights = prompts.ids, file.votes.ties, file.votes.weights
    if ties is not None:
        tied = np.flatnonzero(ties)
        own = np.where(ties, 0.5, 1.0) * (1.0 if weights is None else weights)
        ids, weights = np.append(ids, ids[tied]), np.append(own, own[tied])
        chosen, rejected = np.append(chosen, rejected[tied]), np.append(rejected, chosen[tied])
    data = Preferences(
        jnp.asarray(ids, jnp.int32),
        Pair(jnp.asarray(chosen, jnp.int32), jnp.asarray(rejected, jnp.int32)),
        None if weights is None else jnp.asarray(weights / weights.mean(), jnp.float32),
    )
    return prompts.names, tuple(names), data


class _Reader:
    """Collects records, column by column."""

    def __init__(self, path: Path, extra: tuple[str, ...]) -> None:
        self.path, self.extra = path, extra
        self.layouts: dict[tuple[str, ...], tuple[str, ...]] = {}  # the names of the columns as they are used here
        self.unused: dict[str, None] = {}
        csv = path.name.lower().endswith((".csv", ".csv.gz"))
        self.responses = Names(self.where, whole_numbers=csv)
        self.columns: dict[str, Names] = {}
        self.new_column = lambda: Names(self.where, whole_numbers=csv)
        self.numbers, self.outcomes, self.first, self.weights = array("q"), array("b"), array("b"), array("d")

    def where(self, number: int) -> str:
        return f"{self.path}, {unit(self.path)} {number}"

    def layout(self, place: str, names: Sequence[str]) -> Sequence[int]:
        """Finds the columns by their names; an error if one is missing, given twice, or almost one of ours."""
        originals = [tidy(name) for name in names]
        plain = [name.lower() for name in originals]
        found = f"found {', '.join(originals) or 'none'}"
        for name in plain:
            if name and plain.count(name) > 1:
                raise ValueError(f"{place}: two columns have the same name, {name!r}; {found}")
        required = REQUIRED["model_a" in plain and "chosen" not in plain]
        used = [name for name in dict.fromkeys((*required, *OPTIONAL, *self.extra)) if name in plain]
        unused = {name: original for name, original in zip(plain, originals, strict=True) if name not in used}
        missing = [name for name in (*required, *self.extra) if name not in used]
        if missing:
            meant = [f"{unused[near]!r} for {name}" for name in missing if (near := _near(name, unused))]
            hint = f". Is it {', '.join(meant)}? Then rename it" if meant else ""
            raise ValueError(f"{place}: no column {', '.join(missing)}; {found}{hint}")
        for name in OPTIONAL:
            if name not in used and (near := _near(name, unused)):
                message = f"the column {unused[near]!r} would not be used: call it {name}, or something else"
                raise ValueError(f"{place}: {message}")
        before = next(iter(self.layouts.values()), used)
        for name in sorted({*used}.symmetric_difference(before) - SOMETIMES):
            raise ValueError(f"{place}: {name} is given in some lines only")
        self.layouts[tuple(names)] = tuple(used)
        self.unused.update(dict.fromkeys(unused.values()))
        return [plain.index(name) for name in used]

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Adds a record, the cells by the names of their columns."""
        sides = REQUIRED["chosen" not in record][:2]
        a, b = (record[side] for side in sides)
        for side in sides:
            self.responses.add(record[side], number, side)
        for name, cell in record.items():
            if name == "weight":
                self.weights.append(as_weight(cell, self.where(number)))
            elif name in ("prompt", "judge", *self.extra):
                self.columns.setdefault(name, self.new_column()).add(cell, number, name)
        self.numbers.append(number)
        outcome = 1
        if "winner" in record:
            outcome = self._side(record["winner"], a, b, "winner", number)
        if "tie" in record and self._yes(record["tie"], number):
            outcome = 0
        self.outcomes.append(outcome)
        first = record.get("first")
        self.first.append(0 if _blank(first) else self._side(first, a, b, "first", number))

    def finish(self) -> VoteFile:
        """The votes."""
        if not self.numbers:
            raise ValueError(f"{self.path} holds no comparisons")
        responses, ids = self.responses.finish()
        columns = {name: Column(*column.finish()) for name, column in self.columns.items()}
        a, b = ids.reshape(-1, 2).T
        if (same := np.flatnonzero(a == b)).size:
            row = int(same[0])
            sides = " and ".join(REQUIRED["chosen" not in next(iter(self.layouts.values()))][:2])
            raise ValueError(f"{self.where(self.numbers[row])}: {sides} are the same, {excerpt(responses[a[row]])}")
        outcomes, first = (np.frombuffer(column, np.int8) for column in (self.outcomes, self.first))
        swapped = outcomes < 0
        votes = Votes(
            Pair(np.where(swapped, b, a), np.where(swapped, a, b)),
            outcomes == 0 if (outcomes == 0).any() else None,
            self._relative_weights(),
            np.where(swapped, -first, first) if first.any() else None,
        )
        return VoteFile(responses, votes, columns, tuple(self.unused))

    def _side(self, cell: Any, a: Any, b: Any, column: str, number: int) -> int:
        """1 for the first response of a row, -1 for the second, 0 for a tie."""
        if _blank(cell):
            raise ValueError(f"{self.where(number)}: {column} is blank")
        text = tidy(str(cell))
        named = {1: text == tidy(str(a)), -1: text == tidy(str(b))}
        meant = {side for side, same in named.items() if same}
        if _plain(text) in OUTCOMES and not (meant and _plain(text) in SHORTHAND):
            meant.add(OUTCOMES[_plain(text)])
        if len(meant) > 1:
            raise ValueError(f"{self.where(number)}: {column} could mean either response, got {excerpt(cell)}")
        if not meant or (column == "first" and meant == {0}):
            words = "model_a or model_b" + (", or tie" if column == "winner" else "")
            raise ValueError(
                f"{self.where(number)}: {column} must name one of the two responses, or be {words}, got {excerpt(cell)}"
            )
        return meant.pop()

    def _yes(self, cell: Any, number: int) -> bool:
        """Whether a cell of the column `tie` says that it was one."""
        plain = "" if cell is None else str(cell).strip().lower().removesuffix(".0")
        if plain not in (*YES, *NO):
            raise ValueError(f"{self.where(number)}: tie must be yes or no, got {excerpt(cell)}")
        return plain in YES

    def _relative_weights(self) -> np.ndarray | None:
        """Weights that average 1; an error if the range is too large for single precision."""
        if not self.weights:
            return None
        weights = np.frombuffer(self.weights)
        low, high = int(weights.argmin()), int(weights.argmax())
        relative = weights / weights[high]
        if relative[low] * LARGEST_WEIGHT_RATIO < 1:
            raise ValueError(
                f"{self.where(self.numbers[low])}: the weight {weights[low]:g} is too small beside {weights[high]:g} "
                f"in {unit(self.path)} {self.numbers[high]}: weights may differ by a factor of "
                f"{LARGEST_WEIGHT_RATIO:g}; leave the comparison out"
            )
        return None if np.all(relative == 1) else relative / relative.mean()


def _blank(cell: Any) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not tidy(cell))


def _plain(text: str) -> str:
    return re.sub("[^a-z]", "", text.lower())


def _near(name: str, others: Iterable[str]) -> str | None:
    """The column whose spelling is closest to a name, if any is close; `height` is not `weight`."""
    return next(iter(get_close_matches(name, [x for x in others if x.startswith(name[0])], n=1, cutoff=0.82)), None)
