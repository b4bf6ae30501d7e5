"""Comparisons from a file: real prompts and responses, named by strings, as a world of their own.

Each prompt has its own responses, those that were compared for it. Their ids count from 0 within the prompt; a prompt
with fewer responses than another one has rows of its tables filled with log-probability -inf.
"""

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dpo_jax.types import Pair, Preferences

COLUMNS = ("prompt", "chosen", "rejected")


class Names(NamedTuple):
    """What the ids stand for.

    Attributes:
      prompts: the prompts.
      responses: for each prompt, the responses that were compared.
    """

    prompts: tuple[str, ...]
    responses: tuple[tuple[str, ...], ...]

    @property
    def compared(self) -> Bool[np.ndarray, "prompts responses"]:
        """Which entries of a table stand for a response."""
        sizes = np.array([len(responses) for responses in self.responses])
        return np.arange(sizes.max()) < sizes[:, None]


class Comparisons(NamedTuple):
    """Comparisons read from a file.

    Attributes:
      names: what the ids stand for.
      preferences: the comparisons as ids; with weights, scaled to average 1, if the file has them.
    """

    names: Names
    preferences: Preferences


class NamedPolicy(NamedTuple):
    """A policy over named responses.

    Attributes:
      names: what rows and columns of the tables stand for.
      log_probs: the policy (nats); -inf where there is no response.
      reference: the reference policy, likewise.
    """

    names: Names
    log_probs: Float[np.ndarray, "prompts responses"]
    reference: Float[np.ndarray, "prompts responses"]

    def ranking(self, prompt: str) -> list[tuple[str, float]]:
        """The responses to a prompt with their probabilities, the most probable first.

        Raises:
          KeyError: the prompt is not among those the policy was made for.
        """
        if prompt not in self.names.prompts:
            raise KeyError(f"no such prompt: {prompt!r}")
        row = self.names.prompts.index(prompt)
        probabilities = np.exp(self.log_probs[row]).tolist()
        return sorted(zip(self.names.responses[row], probabilities, strict=False), key=lambda entry: -entry[1])


def read_comparisons(path: str | Path) -> Comparisons:
    """Reads comparisons from a CSV, JSON Lines or Parquet file.

    Args:
      path: a `.csv`, `.jsonl` (`.ndjson`) or `.parquet` file with the columns `prompt`, `chosen` and `rejected`, any
        strings, and optionally `weight`, a positive number. Other columns are ignored. Text is UTF-8.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is of another kind, empty, damaged or not text, a column is missing, a cell is blank, a row
        has too many or too few cells, chosen equals rejected, or a weight is not positive and finite. The message
        names the line (the row, in a Parquet file), counted from 1.
    """
    path = Path(path)
    prompts: dict[str, int] = {}
    responses: list[dict[str, int]] = []
    ids: list[tuple[int, int, int]] = []
    weights: list[float] = []
    weighted = None
    for place, record in _records(path):
        weighted = "weight" in record if weighted is None else weighted
        prompt, chosen, rejected, weight = _checked(record, weighted, f"{path}, {place}")
        row = prompts.setdefault(prompt, len(prompts))
        if row == len(responses):
            responses.append({})
        columns = [responses[row].setdefault(response, len(responses[row])) for response in (chosen, rejected)]
        ids.append((row, columns[0], columns[1]))
        weights.append(weight)
    if not ids:
        raise ValueError(f"{path} holds no comparisons")
    prompt_ids, chosen_ids, rejected_ids = jnp.asarray(np.array(ids, dtype=np.int32).T)
    relative = np.array(weights) / max(weights)
    return Comparisons(
        Names(tuple(prompts), tuple(map(tuple, responses))),
        Preferences(
            prompt_ids,
            Pair(chosen_ids, rejected_ids),
            None if np.all(relative == 1) else jnp.asarray(relative / relative.mean(), jnp.float32),
        ),
    )


def save_policy(path: str | Path, policy: NamedPolicy) -> None:
    """Writes a policy to a file (NumPy's `.npz` format), which `load_policy` reads."""
    with Path(path).open("wb") as file:
        np.savez_compressed(
            file, names=json.dumps(policy.names), log_probs=policy.log_probs, reference=policy.reference
        )


def load_policy(path: str | Path) -> NamedPolicy:
    """Reads a policy that `save_policy` wrote.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file was not written by `save_policy`, or is damaged.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            prompts, responses = json.loads(str(arrays["names"]))
            names = Names(tuple(prompts), tuple(map(tuple, responses)))
            policy = NamedPolicy(names, arrays["log_probs"], arrays["reference"])
        shapes = {
            "names": names.compared.shape,
            "log_probs": policy.log_probs.shape,
            "reference": policy.reference.shape,
        }
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the shapes differ: {shapes}")
        return policy
    except OSError:
        raise
    except Exception as problem:
        raise ValueError(f"{path} does not hold a policy: {problem}") from problem


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    readers = {".csv": _csv_records, ".jsonl": _json_records, ".ndjson": _json_records, ".parquet": _parquet_records}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # responses may be long
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        _check_columns(path, reader.fieldnames)
        for record in reader:
            if None in record:
                raise ValueError(f"{path}, line {reader.line_num}: more cells than columns")
            yield f"line {reader.line_num}", record
    except csv.Error as problem:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {problem}") from problem


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"{path}, line {number}: not JSON ({problem})") from problem
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {_excerpt(line)}")
        _check_columns(f"{path}, line {number}", record)
        yield f"line {number}", record


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            wanted = [name for name in (*COLUMNS, "weight") if name in file.schema_arrow.names]
            records = file.read(columns=wanted).to_pylist()
    except pyarrow.ArrowInvalid as problem:
        raise ValueError(f"{path}: not a Parquet file ({problem})") from problem
    for number, record in enumerate(records, start=1):
        yield f"row {number}", record


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text (byte {content[problem.start]:#04x})") from problem


def _check_columns(place: str | Path, names: Any) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{place}: no column {', '.join(missing)}; found {', '.join(map(str, names)) or 'none'}")
    if any(list(names).count(name) > 1 for name in (*COLUMNS, "weight")):
        raise ValueError(f"{place}: two columns have the same name, among {', '.join(names)}")


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


def _cell(record: dict[str, Any], name: str, place: str) -> str:
    cell = record[name]
    if cell is None or (isinstance(cell, str) and not cell.strip()) or cell != cell:  # NaN differs from itself
        raise ValueError(f"{place}: {name} is blank")
    if not isinstance(cell, str | int | float) or isinstance(cell, bool):
        raise ValueError(f"{place}: {name} must be text, got {_excerpt(cell)}")
    text = str(cell)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{place}: {name} has half a character (a lone surrogate), {_excerpt(cell)}")
    return text


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:50]}..."
