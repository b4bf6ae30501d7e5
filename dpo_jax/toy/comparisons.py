"""Comparisons from a file: prompts and responses named by strings.

Each prompt has a separate set of responses, those that were compared for it. Ids count from 0 within the prompt. Rows
of tables are padded with log-probability -inf.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dpo_jax.toy.world import LARGEST_WEIGHT_RATIO
from dpo_jax.types import Pair, Preferences

COLUMNS = ("prompt", "chosen", "rejected")
KNOWN_COLUMNS = (*COLUMNS, "weight")

SPACE_AROUND = re.compile("^[\\s\ufeff\u200b]+|[\\s\ufeff\u200b]+$")
"""White space, byte order marks and spaces of no width."""

WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")

LONGEST_NUMBER = 400
"""How many digits a number that serves as a name has at most, before the point or behind it."""

ROUNDING = 1e-3
"""How far the probabilities of a prompt in a file may be from a sum of 1."""


class Names(NamedTuple):
    """The names behind the ids.

    Attributes:
      prompts: the prompts.
      responses: for each prompt, the responses that were compared.
    """

    prompts: tuple[str, ...]
    responses: tuple[tuple[str, ...], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of a table: how many prompts, and how many responses at most."""
        return len(self.prompts), max(map(len, self.responses))

    @property
    def compared(self) -> Bool[np.ndarray, "prompts responses"]:
        """Which entries of a table have a response."""
        sizes = np.array([len(responses) for responses in self.responses])
        return np.arange(sizes.max()) < sizes[:, None]


class Comparisons(NamedTuple):
    """Comparisons read from a file.

    Attributes:
      names: the names behind the ids.
      preferences: the comparisons as ids; with weights, scaled to average 1, if the file has them.
      unused_columns: names of the columns that were not read.
    """

    names: Names
    preferences: Preferences
    unused_columns: tuple[str, ...] = ()


class NamedPolicy(NamedTuple):
    """A policy over named responses.

    Attributes:
      names: of the rows and columns of the tables.
      log_probs: the policy (nats); -inf where there is no response.
      reference_log_probs: the reference policy, likewise.
    """

    names: Names
    log_probs: Float[np.ndarray, "prompts responses"]
    reference_log_probs: Float[np.ndarray, "prompts responses"]

    def ranking(self, prompt: str) -> list[tuple[str, float]]:
        """The responses to a prompt with their probabilities, the most probable first.

        Raises:
          KeyError: the prompt is not among those the policy was made for.
          ValueError: a log-probability is NaN.
        """
        prompt = prompt if prompt in self.names.prompts else _tidy(prompt)
        if prompt not in self.names.prompts:
            raise KeyError(f"no such prompt: {prompt!r}")
        row = self.names.prompts.index(prompt)
        if np.isnan(self.log_probs[row]).any():
            raise ValueError(f"the policy is NaN for the prompt {prompt!r}")
        probabilities = np.exp(self.log_probs[row]).tolist()
        return sorted(zip(self.names.responses[row], probabilities, strict=False), key=lambda entry: -entry[1])


def read_comparisons(path: str | Path) -> Comparisons:
    """Reads comparisons from a CSV, JSON Lines or Parquet file.

    Names are compared without the white space around them, and in Unicode's composed form (NFC). Whole numbers have the
    same name for all types: 1, 1.0 and 1e0 are `1`. A CSV has no types; there, `2.0` is `2` if all prompts, or all
    responses, are whole numbers. Column names are case-insensitive.

    Args:
      path: a `.csv`, `.jsonl` (`.ndjson`) or `.parquet` file with the columns `prompt`, `chosen` and `rejected`, any
        strings or numbers, and optionally `weight`, a positive number. Other columns are not used. Text is UTF-8.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is of another kind, empty, damaged or not text; a column is missing, given twice, or named
        almost like `weight`; a cell is blank; a row has too many or too few cells; chosen equals rejected; a weight is
        not positive and finite, or too small beside the largest; or a name is a floating-point number so large that its
        digits are lost. The message names the line (the row, in a Parquet file), counted from 1.
    """
    path = Path(path)
    prompts: dict[str, int] = {}
    responses: list[dict[str, int]] = []
    ids: list[tuple[int, int, int]] = []
    weights: list[float] = []
    places: list[str] = []
    unused: dict[str, None] = {}
    weighted = None
    for place, record, others in _records(path):
        weighted = "weight" in record if weighted is None else weighted
        prompt, chosen, rejected, weight = _checked(record, weighted, f"{path}, {place}")
        row = prompts.setdefault(prompt, len(prompts))
        if row == len(responses):
            responses.append({})
        columns = [responses[row].setdefault(response, len(responses[row])) for response in (chosen, rejected)]
        ids.append((row, columns[0], columns[1]))
        weights.append(weight)
        places.append(place)
        unused.update(dict.fromkeys(others))
    if not ids:
        raise ValueError(f"{path} holds no comparisons")
    prompt_ids, chosen_ids, rejected_ids = jnp.asarray(np.array(ids, dtype=np.int32).T)
    relative = _relative(path, np.array(weights), places)
    return Comparisons(
        Names(tuple(prompts), tuple(map(tuple, responses))),
        Preferences(
            prompt_ids,
            Pair(chosen_ids, rejected_ids),
            None if np.all(relative == 1) else jnp.asarray(relative / relative.mean(), jnp.float32),
        ),
        tuple(unused),
    )


def save_policy(path: str | Path, policy: NamedPolicy) -> None:
    """Writes a policy to a file (NumPy's `.npz` format), which `load_policy` reads.

    Tables narrower than float32 are written in float32, their rows scaled to sum to 1. The file is not compressed, so
    loading it takes no more memory than its size.

    Raises:
      ValueError: it is not a valid policy: see `load_policy`.
    """
    log_probs, reference = _wide(policy.log_probs), _wide(policy.reference_log_probs)
    _check_names(policy.names)
    _check_table("log_probs", log_probs, policy.names)
    _check_table("reference", reference, policy.names)
    with Path(path).open("wb") as file:
        np.savez(file, names=np.bytes_(json.dumps(policy.names).encode()), log_probs=log_probs, reference=reference)


def load_policy(path: str | Path) -> NamedPolicy:
    """Reads a policy that `save_policy` wrote.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the file was not written by `save_policy`, or is damaged; the names are not lists of distinct strings;
        a table is of another shape, holds NaN or positive numbers, gives a probability to an entry without a name, or
        has rows whose probabilities do not sum to 1. Sizes are checked before arrays are read.
    """
    path = Path(path)
    most = max(2**22, 50 * path.stat().st_size)  # older files are compressed; text is less than that
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                prompts, responses = json.loads(_text_array(archive, "names", most))
                _check_names(Names(prompts, responses))
                names = Names(tuple(prompts), tuple(map(tuple, responses)))
                tables = [_table(archive, name, names) for name in ("log_probs", "reference")]
            return NamedPolicy(names, *tables)
        except Exception as problem:
            raise ValueError(f"{path} does not hold a policy: {problem}") from problem


def _text_array(archive: zipfile.ZipFile, name: str, most: int) -> str:
    """An array that is one string, unless it takes too many bytes."""
    if (size := archive.getinfo(f"{name}.npy").file_size) > most:
        raise ValueError(f"{name} would take {size:,} bytes when unpacked, more than {most:,}")
    shape, dtype = _header(archive, name)
    if shape != () or dtype.kind not in "SU":
        raise ValueError(f"{name} must be one string, got shape {shape} and dtype {dtype}")
    text = _array(archive, name).item()
    return text.decode() if isinstance(text, bytes) else text


def _table(archive: zipfile.ZipFile, name: str, names: Names) -> np.ndarray:
    """A table of log-probabilities of the size that the names imply."""
    expected, (shape, dtype) = names.shape, _header(archive, name)
    if shape != expected or dtype.kind != "f":
        raise ValueError(f"the shapes differ, or the types: {name} must be floats {expected}, got {dtype} {shape}")
    table = _array(archive, name)
    _check_table(name, table, names)
    return table


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, read before the array; an error if it does not match the size in the file."""
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        size = member.tell() + math.prod(shape) * dtype.itemsize
    if size != entry.file_size:
        raise ValueError(f"{name} takes {entry.file_size:,} bytes, but its header says {size:,}")
    return shape, dtype


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _wide(table: Any) -> np.ndarray:
    """A table in float32 at least; rows are scaled to sum to 1 where digits are added."""
    array = np.asarray(table)
    if array.dtype in (np.float32, np.float64):
        return array
    array = array.astype(np.float32)
    return array - np.log(np.exp(array).sum(axis=-1, keepdims=True))


def _check_names(names: Names) -> None:
    """Prompts are distinct strings, and so are the responses to each, of which there is at least one."""
    if not isinstance(names.responses, list | tuple) or len(names.responses) != len(names.prompts):
        raise ValueError(f"names.responses must be {len(names.prompts)} lists, one for each prompt")
    for place, listed in (("prompts", names.prompts), *((f"responses[{i}]", x) for i, x in enumerate(names.responses))):
        if not isinstance(listed, list | tuple) or not listed or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"names.{place} must be a list of strings that is not empty, got {_excerpt(listed)}")
        if len(set(listed)) < len(listed):
            twice = next(name for i, name in enumerate(listed) if name in listed[:i])
            raise ValueError(f"names.{place} must be distinct, got {_excerpt(twice)} twice")


def _check_table(name: str, table: np.ndarray, names: Names) -> None:
    """Each row is a distribution over the named responses."""
    if table.shape != names.shape:
        raise ValueError(f"the shapes differ: {name} must have shape {names.shape}, got {table.shape}")
    compared = names.compared
    wrong = {
        "zero or negative, as a log-probability is": ~(table <= ROUNDING),
        "-inf where there is no response": ~compared & (table != -np.inf),
    }
    for what, where in wrong.items():
        if where.any():
            row, column = map(int, np.argwhere(where)[0])
            raise ValueError(f"{name} must be {what}, got {table[row, column]} in row {(row, column)}")
    sums = np.exp(table.astype(np.float64)).sum(axis=-1)
    uneven = np.flatnonzero(~(np.abs(sums - 1) <= ROUNDING))
    if uneven.size:
        row = int(uneven[0])
        raise ValueError(f"{name}: the probabilities of a prompt must sum to 1, got {sums[row]:.6g} in row {row}")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """The place of a row, its cells by the names of `KNOWN_COLUMNS`, and its unused columns."""
    readers = {".csv": _csv_records, ".jsonl": _json_records, ".ndjson": _json_records, ".parquet": _parquet_records}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    csv.field_size_limit(2**31 - 1)  # responses may be long
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True, skipinitialspace=True)
    rows: list[tuple[str, list[str]]] = []
    try:
        header = next(reader, [])
        for separator in ";\t|":
            if len(header) == 1 and separator in header[0]:
                raise ValueError(f"{path}: cells must be separated by commas, but are by {separator!r}: {header[0]!r}")
        layout = _layout(path, header)
        for row in reader:
            if len(row) > len(header):
                raise ValueError(f"{path}, line {reader.line_num}: more cells than columns")
            if row:
                rows.append((f"line {reader.line_num}", row))
    except csv.Error as problem:
        raise ValueError(f"{path}, line {reader.line_num}: {problem}") from problem
    for columns in (COLUMNS[:1], COLUMNS[1:]):
        _read_whole_numbers([row for _, row in rows], [layout.positions[name] for name in columns])
    for place, row in rows:
        cells = {name: row[i] if i < len(row) else None for name, i in layout.positions.items()}
        yield place, cells, layout.unused


def _read_whole_numbers(rows: list[list[str]], positions: list[int]) -> None:
    """If all cells of some columns are whole numbers, `2.0` becomes `2`: pandas writes floats if a value is missing."""
    if all(i < len(row) and WHOLE_NUMBER.fullmatch(row[i].strip()) for row in rows for i in positions):
        for row in rows:
            for i in positions:
                row[i] = row[i].strip().partition(".")[0]


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    layouts: dict[tuple[str, ...], _Layout] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_float=Decimal, object_pairs_hook=_unique)
        except (ValueError, ArithmeticError, RecursionError) as problem:
            raise ValueError(f"{path}, line {number}: not JSON ({problem})") from problem
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {_excerpt(line)}")
        names = tuple(record)
        if names not in layouts:
            layouts[names] = _layout(f"{path}, line {number}", names)
        cells = list(record.values())
        known = {name: cells[i] for name, i in layouts[names].positions.items()}
        yield f"line {number}", known, layouts[names].unused


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return record


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as opened:
        try:
            with pyarrow.parquet.ParquetFile(opened) as file:
                layout = _layout(path, file.schema_arrow.names)
                wanted = {name: file.schema_arrow.names[i] for name, i in layout.positions.items()}
                table = file.read(columns=list(wanted.values()))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
            raise ValueError(f"{path}: not a Parquet file ({problem})") from problem
    columns = {name: _values(table[original], f"{path}, column {original}") for name, original in wanted.items()}
    for number, cells in enumerate(zip(*columns.values(), strict=True), start=1):
        yield f"row {number}", dict(zip(columns, cells, strict=True)), layout.unused


def _values(column: Any, place: str) -> list[Any]:
    """The cells of a Parquet column; its bytes are text."""
    cells = []
    for number, scalar in enumerate(column, start=1):
        try:
            cell = scalar.as_py()
            cells.append(cell.decode() if isinstance(cell, bytes) else cell)
        except UnicodeDecodeError as problem:
            byte = problem.object[problem.start]
            raise ValueError(f"{place}, row {number}: not UTF-8 text (byte {byte:#04x})") from problem
        except ValueError as problem:  # dates that Python has no type for
            raise ValueError(f"{place}, row {number}: {problem}") from problem
    return cells


def _text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        raise ValueError(f"{path}: not UTF-8 text, but UTF-16 it seems: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text (byte {content[problem.start]:#04x})") from problem


class _Layout(NamedTuple):
    """Which column is which.

    Attributes:
      positions: of the columns that are read, by the names used here.
      unused: names of the others.
    """

    positions: dict[str, int]
    unused: tuple[str, ...]


def _layout(place: str | Path, names: Sequence[str]) -> _Layout:
    tidy = [_tidy(name) for name in names]
    plain = [name.lower() for name in tidy]
    found = f"found {', '.join(tidy) or 'none'}"
    for name in plain:
        if name and plain.count(name) > 1:
            raise ValueError(f"{place}: two columns have the same name, {name!r}; {found}")
    positions = {name: plain.index(name) for name in KNOWN_COLUMNS if name in plain}
    unused = {plain[i]: name for i, name in enumerate(tidy) if plain[i] not in positions}
    missing = [name for name in COLUMNS if name not in positions]
    if missing:
        meant = [f"{unused[near]!r} for {name}" for name in missing if (near := _near(name, unused))]
        hint = f". Is it {', '.join(meant)}? Then rename it" if meant else ""
        raise ValueError(f"{place}: no column {', '.join(missing)}; {found}{hint}")
    if "weight" not in positions and (near := _near("weight", unused)):
        raise ValueError(f"{place}: the column {unused[near]!r} would not be used: call it weight, or something else")
    return _Layout(positions, tuple(unused.values()))


def _near(name: str, others: Iterable[str]) -> str | None:
    """The column whose spelling is closest to a name, if any is close; `height` is not `weight`."""
    return next(iter(get_close_matches(name, [x for x in others if x.startswith(name[0])], n=1, cutoff=0.82)), None)


def _checked(record: dict[str, Any], weighted: bool, place: str) -> tuple[str, str, str, float]:
    prompt, chosen, rejected = (_cell(record, name, place) for name in COLUMNS)
    if chosen == rejected:
        raise ValueError(f"{place}: chosen and rejected are the same, {_excerpt(chosen)}")
    if weighted != ("weight" in record):
        raise ValueError(f"{place}: weight is given in some lines only")
    return prompt, chosen, rejected, _weight(record["weight"], place) if weighted else 1.0


def _weight(cell: Any, place: str) -> float:
    try:
        weight = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{place}: weight must be positive and finite, got {_excerpt(cell)}")
    return weight


def _relative(path: Path, weights: np.ndarray, places: list[str]) -> np.ndarray:
    """Weights relative to the largest; an error if the range is too large for single precision."""
    low, high = int(weights.argmin()), int(weights.argmax())
    relative = weights / weights[high]
    if relative[low] * LARGEST_WEIGHT_RATIO < 1:
        raise ValueError(
            f"{path}, {places[low]}: the weight {weights[low]:g} is too small beside {weights[high]:g} in "
            f"{places[high]}: weights may differ by a factor of {LARGEST_WEIGHT_RATIO:g}; leave the comparison out"
        )
    return relative


def _cell(record: dict[str, Any], name: str, place: str) -> str:
    cell = record[name].item() if isinstance(record[name], np.generic) else record[name]
    if cell is None or (isinstance(cell, str) and not _tidy(cell)) or cell != cell:  # NaN differs from itself
        raise ValueError(f"{place}: {name} is blank")
    if isinstance(cell, bool) or not isinstance(cell, str | int | float | Decimal):
        raise ValueError(f"{place}: {name} must be text, got {_excerpt(cell)}")
    text = _tidy(cell) if isinstance(cell, str) else _number(cell, f"{place}: {name}")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{place}: {name} has half a character (a lone surrogate), {_excerpt(cell)}")
    return text


def _number(cell: int | float | Decimal, place: str) -> str:
    """The name of a number, independent of its type."""
    number = Decimal(repr(cell) if isinstance(cell, float) else cell)
    if (isinstance(cell, float) and abs(cell) >= 2**53) or abs(number.adjusted()) > LONGEST_NUMBER:
        raise ValueError(f"{place} is a number with too many digits for a name, {_excerpt(cell)}: write it as text")
    digits = f"{number:f}"
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def _tidy(text: str) -> str:
    """Text in composed form (NFC), without visible or invisible white space around it."""
    return SPACE_AROUND.sub("", unicodedata.normalize("NFC", text))


def _excerpt(value: Any) -> str:
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 50 else f"{text[:50]}..."
