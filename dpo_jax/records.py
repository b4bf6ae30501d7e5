"""Rows of CSV, JSON Lines and Parquet files, with the number of their line."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

Record = tuple[int, tuple[str, ...], Sequence[Any]]
"""The number of the line (of the row, in Parquet) counted from 1; the names of the columns; the cells, or fewer."""

Wanted = Callable[[str, Sequence[str]], Sequence[int]]
"""`wanted(place, columns)`: the positions of the columns to read."""


def records(path: Path, wanted: Wanted) -> Generator[Record, None, None]:
    """The rows of a file that ends in `.csv`, `.jsonl`, `.ndjson` (all three also with `.gz`) or `.parquet`.

    Args:
      path: the file, its text in UTF-8.
      wanted: chooses columns. It is called once for each set of columns: once, but for JSON Lines.

    Yields:
      Records with the cells of the chosen columns: strings in CSV, any type elsewhere, `None` if missing.

    Raises:
      OSError: the file cannot be opened.
      ValueError: the file is of another kind, or damaged. The message names the line.
    """
    readers = {".csv": _csv_records, ".jsonl": _json_records, ".ndjson": _json_records, ".parquet": _parquet_records}
    kind = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    if kind.lower() not in readers or (kind != path.suffix and kind.lower() == ".parquet"):
        raise ValueError(f"{path}: expected a file that ends in {', '.join(readers)}, or .gz after the first three")
    return readers[kind.lower()](path, wanted)


def unit(path: Path) -> str:
    """What the number of a record counts."""
    return "row" if path.suffix.lower() == ".parquet" else "line"


def excerpt(value: Any) -> str:
    """A value as it stands in error messages."""
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 50 else f"{text[:50]}..."


def _csv_records(path: Path, wanted: Wanted) -> Generator[Record, None, None]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True, skipinitialspace=True)
    usual_limit = csv.field_size_limit(2**31 - 1)  # of the whole process; responses may be long
    try:
        header = tuple(next(reader, []))
        for separator in ";\t|":
            if len(header) == 1 and separator in header[0]:
                raise ValueError(f"{path}: cells must be separated by commas, but are by {separator!r}: {header[0]!r}")
        positions = wanted(str(path), header)
        last = max(positions, default=0)
        for row in reader:
            if len(row) > len(header):
                raise ValueError(f"{path}, line {reader.line_num}: more cells than columns")
            if row:
                cells = row if len(row) > last else [*row, *[None] * (last + 1 - len(row))]
                yield reader.line_num, header, [cells[i] for i in positions]
    except csv.Error as problem:
        raise ValueError(f"{path}, line {reader.line_num}: {problem}") from problem
    finally:
        csv.field_size_limit(usual_limit)


def _json_records(path: Path, wanted: Wanted) -> Generator[Record, None, None]:
    layouts: dict[tuple[str, ...], Sequence[int]] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_float=Decimal, object_pairs_hook=_unique)
        except (ValueError, ArithmeticError, RecursionError) as problem:
            raise ValueError(f"{path}, line {number}: not JSON ({problem})") from problem
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {excerpt(line)}")
        names = tuple(record)
        if names not in layouts:
            layouts[names] = wanted(f"{path}, line {number}", names)
        cells = list(record.values())
        yield number, names, [cells[i] for i in layouts[names]]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return record


def _parquet_records(path: Path, wanted: Wanted) -> Generator[Record, None, None]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as opened:
        try:
            with pyarrow.parquet.ParquetFile(opened) as file:
                names = tuple(file.schema_arrow.names)
                chosen = [names[i] for i in wanted(str(path), names)]
                table = file.read(columns=chosen)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as problem:
            raise ValueError(f"{path}: not a Parquet file ({problem})") from problem
    columns = [_values(table[name], f"{path}, column {name}") for name in chosen]
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        yield number, names, cells


def _values(column: Any, place: str) -> Iterator[Any]:
    """The cells of a Parquet column; its bytes are text."""
    for number, scalar in enumerate(column, start=1):
        try:
            cell = scalar.as_py()
            yield cell.decode() if isinstance(cell, bytes) else cell
        except UnicodeDecodeError as problem:
            byte = problem.object[problem.start]
            raise ValueError(f"{place}, row {number}: not UTF-8 text (byte {byte:#04x})") from problem
        except ValueError as problem:  # dates that Python has no type for
            raise ValueError(f"{place}, row {number}: {problem}") from problem


def _text(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as problem:
            raise ValueError(f"{path}: not a gzip file, or damaged ({problem})") from problem
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        raise ValueError(f"{path}: not UTF-8 text, but UTF-16 it seems: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text (byte {content[problem.start]:#04x})") from problem
