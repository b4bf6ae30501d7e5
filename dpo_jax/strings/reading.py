"""Rewards from a file: a score for each string."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo_jax.strings.space import MOST_STRINGS, Strings

Column = str | int
"""The name of a column, or its number, counted from 0."""

LARGEST = float(np.finfo(np.float32).max)
"""The largest score."""


class Scores(NamedTuple):
    """What a file says about strings.

    Attributes:
      strings: all strings over the letters of the file; of one length if all its strings are.
      rewards: the score of each string.
    """

    strings: Strings
    rewards: Float[Array, " responses"]


def read_scores(
    path: str | Path,
    *,
    string: Column | Sequence[Column] = "string",
    score: Column = "score",
    missing: float | None = None,
) -> Scores:
    r"""Reads scores of strings from a table: CSV, or TSV if the name ends in `.tsv` or `.txt`; perhaps with `.gz`.

    The first line names the columns. The alphabet is the letters that occur, in alphabetical order.

    Args:
      path: the file.
      string: the column that holds the strings, by its name or its number from 0. With several columns, the strings
        of a line have the same score, as the two strands of DNA do.
      score: the column that holds the scores.
      missing: the score of strings that the file lacks; `None` means that it must have all of them.

    Raises:
      OSError: the file cannot be read.
      ValueError: naming the line: a column is missing, or its name occurs twice; a line has more or fewer cells than
        the first; a score is no finite number; a string has two scores, or letters that cannot be printed; strings are
        missing; or there are too many strings to list.
    """
    path = Path(path)
    columns = [string] if isinstance(string, str | int) else list(string)
    if not columns:
        raise ValueError("string must name a column")
    if missing is not None and not abs(missing) <= LARGEST:
        raise ValueError(f"missing must be a finite number, got {missing}")
    found: dict[str, tuple[float, int]] = {}
    lines = _lines(path)
    places, width = None, 0
    for number, cells in lines:
        if places is None:
            places, width = [_place(path, cells, column) for column in (*columns, score)], len(cells)
            continue
        if len(cells) != width:
            raise ValueError(f"{path}, line {number}: {len(cells)} cells, but {width} names of columns")
        value = _number(path, number, cells[places[-1]])
        for text in {cells[place].strip() for place in places[:-1]}:
            if not text.isprintable():
                raise ValueError(f"{path}, line {number}: {text!r} has letters that cannot be printed")
            if text in found:
                raise ValueError(f"{path}, line {number}: {text!r} has a score already, in line {found[text][1]}")
            found[text] = value, number
    if not found:
        raise ValueError(f"{path} has no strings")
    return _scores(path, found, missing)


def _scores(path: Path, found: dict[str, tuple[float, int]], missing: float | None) -> Scores:
    """The table of rewards."""
    lengths, alphabet = {len(text) for text in found}, "".join(sorted({letter for text in found for letter in text}))
    if not alphabet:
        raise ValueError(f"{path} has the empty string alone")
    try:
        strings = Strings(len(alphabet), max(lengths), fixed_length=len(lengths) == 1, alphabet=alphabet)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem
    rewards = np.full(strings.num_responses, math.nan if missing is None else missing, np.float32)
    rewards[np.asarray(strings.ids_of(list(found)))] = [value for value, _ in found.values()]
    if unknown := np.flatnonzero(np.isnan(rewards)).tolist():
        raise ValueError(
            f"{path} lacks {len(unknown):,} of the {strings.num_responses:,} strings over {alphabet!r}, such as "
            f"{strings.text(unknown[:1])[0]!r}: give their score by `missing`"
        )
    return Scores(strings, jnp.asarray(rewards))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, with their numbers from 1, as cells."""
    open_it = gzip.open if path.suffix == ".gz" else Path.open
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    with open_it(path, "rb") as file:
        decoded = (line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(file))
        reader = csv.reader(decoded, delimiter="\t" if kind in (".tsv", ".txt") else ",")
        try:
            for cells in reader:
                if any(cells):
                    yield reader.line_num, cells
                if reader.line_num > 2 * MOST_STRINGS:
                    raise ValueError(f"{path} has more than {2 * MOST_STRINGS:,} lines: too many strings to list")
        except csv.Error as problem:
            raise ValueError(f"{path}, line {reader.line_num}: {problem}") from problem
        except (UnicodeDecodeError, EOFError, zlib.error) as problem:  # when the next line is read
            raise ValueError(f"{path}, line {reader.line_num + 1}: {problem}") from problem


def _place(path: Path, names: list[str], column: Column) -> int:
    """The number of a column."""
    names = [name.strip() for name in names]
    if isinstance(column, int):
        if not 0 <= column < len(names):
            raise ValueError(f"{path} has {len(names)} columns, and none of number {column}, counted from 0")
        return column
    if names.count(column) != 1:
        what = "no" if column not in names else "more than one"
        raise ValueError(f"{path} has {what} column {column!r}; it has {', '.join(map(repr, names))}")
    return names.index(column)


def _number(path: Path, line: int, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        raise ValueError(f"{path}, line {line}: a score must be a finite number, got {cell!r}")
    return value
