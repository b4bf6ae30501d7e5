"""Cells of a file as names, weights and outcomes."""

import math
import re
import unicodedata
from array import array
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np

from dpo_jax.records import excerpt

SPACE_AROUND = re.compile("^[\\s\ufeff\u200b]+|[\\s\ufeff\u200b]+$")
"""White space, byte order marks and spaces of no width."""

WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")

LONGEST_NUMBER = 400
"""How many digits a number that serves as a name has at most, before the point or behind it."""


class Names:
    """Gives ids to names, from 0 in order of appearance; a name may be spelled in several ways.

    Args:
      where: the place of a record in words, from its number.
      whole_numbers: whether `2.0` is `2` if all names are whole numbers, as pandas writes them.
    """

    def __init__(self, where: Callable[[int], str], *, whole_numbers: bool) -> None:
        self._where, self._whole_numbers = where, whole_numbers
        self._spellings: dict[str, tuple[int, int, str]] = {}  # its number, and record and column where it came first
        self._cells = array("q")

    def add(self, cell: Any, number: int, column: str) -> None:
        """Adds a cell of a record.

        Raises:
          ValueError: it is missing, or neither text nor a number.
        """
        text = cell if type(cell) is str else as_text(cell, self._where(number), column)
        entry = self._spellings.get(text)
        if entry is None:
            entry = self._spellings[text] = (len(self._spellings), number, column)
        self._cells.append(entry[0])

    def finish(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The distinct names, and the id of each cell.

        Raises:
          ValueError: a name is blank, or has half a character.
        """
        spellings = list(self._spellings)
        if self._whole_numbers and all(WHOLE_NUMBER.fullmatch(text.strip()) for text in spellings):
            spellings = [text.strip().partition(".")[0] for text in spellings]
        ids: dict[str, int] = {}
        merged = np.empty(len(spellings), np.int32)
        for (spelling, number, column), text in zip(self._spellings.values(), spellings, strict=True):
            merged[spelling] = ids.setdefault(as_text(text, self._where(number), column), len(ids))
        return tuple(ids), merged[np.frombuffer(self._cells, np.int64)]


def as_text(cell: Any, place: str, column: str) -> str:
    """A cell as a name.

    Raises:
      ValueError: it is blank, neither text nor a number, or has half a character.
    """
    cell = cell.item() if isinstance(cell, np.generic) else cell
    if cell is None or (isinstance(cell, str) and not tidy(cell)) or cell != cell:  # NaN differs from itself
        raise ValueError(f"{place}: {column} is blank")
    if isinstance(cell, bool) or not isinstance(cell, str | int | float | Decimal):
        raise ValueError(f"{place}: {column} must be text, got {excerpt(cell)}")
    text = tidy(cell) if isinstance(cell, str) else _number(cell, f"{place}: {column}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{place}: {column} has half a character (a lone surrogate), {excerpt(cell)}")
    return text


def as_weight(cell: Any, place: str) -> float:
    """A cell as a weight.

    Raises:
      ValueError: it is not a positive, finite number.
    """
    try:
        weight = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{place}: weight must be positive and finite, got {excerpt(cell)}")
    return weight


def tidy(text: str) -> str:
    """Text in composed form (NFC), without visible or invisible white space around it."""
    return SPACE_AROUND.sub("", text if text.isascii() else unicodedata.normalize("NFC", text))


def _number(cell: int | float | Decimal, place: str) -> str:
    """The name of a number, independent of its type."""
    number = Decimal(repr(cell) if isinstance(cell, float) else cell)
    if (isinstance(cell, float) and abs(cell) >= 2**53) or abs(number.adjusted()) > LONGEST_NUMBER:
        raise ValueError(f"{place} is a number with too many digits for a name, {excerpt(cell)}: write it as text")
    digits = f"{number:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits
