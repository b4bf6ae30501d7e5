"""Preferences in a file, row by row: prompts and responses, as text or as messages of a chat."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.lm.text import Prompt
from dpo_jax.records import excerpt, records, unit

TURN = re.compile(r"\n\n(Human|Assistant):")
"""How transcripts of HH-RLHF mark who speaks."""

SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Kind(NamedTuple):
    """What rows hold.

    Attributes:
      name: in messages.
      responses: names of the columns that hold responses; where there are two names for one, both.
      optional: names of columns that may be missing.
    """

    name: str
    responses: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ("weight",)


PAIRS = Kind("pairs", (("chosen",), ("rejected",)))
RANKINGS = Kind("rankings", (("responses",),))
LABELS = Kind("labels", (("response", "completion"), ("label", "desirable")))
DEMONSTRATIONS = Kind("demonstrations", (("response", "completion", "messages"),))


class Example(NamedTuple):
    """A row of a file.

    Attributes:
      place: file and line, for messages.
      prompt: text, or messages.
      responses: their texts; the best first.
      weight: how much it counts.
      label: whether the response is good; `None` but for labels.
      problem: why it cannot be used; `None` if it can.
    """

    place: str
    prompt: Prompt
    responses: tuple[str, ...]
    weight: float = 1.0
    label: bool | None = None
    problem: str | None = None


def read_examples(path: str | Path, kind: Kind) -> Iterator[Example]:
    """The rows of a file that ends in `.jsonl`, `.csv` (both perhaps with `.gz`) or `.parquet`.

    Prompts and responses are text, or messages (a list of objects with `role` and `content`; in CSV, as JSON). Without
    a column `prompt`, the prompt is what the responses share: all messages but the last; transcripts with `Human:` and
    `Assistant:`, as in HH-RLHF, are read as messages.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, lacks a column, or a cell is of the wrong kind. The message names the line.
    """
    path = Path(path)
    layouts: dict[tuple[str, ...], dict[str, int]] = {}

    def wanted(place: str, names: Sequence[str]) -> Sequence[int]:
        plain = [str(name).strip().lower() for name in names]
        found = {}
        for group in kind.responses:
            used = [name for name in group if name in plain]
            if len(used) != 1:
                what = "has no column" if not used else "has more than one column of"
                raise ValueError(f"{place}: for {kind.name}, it {what} {' or '.join(group)}; found {', '.join(names)}")
            found[group[0]] = plain.index(used[0])
        found.update({name: plain.index(name) for name in ("prompt", *kind.optional) if name in plain})
        layouts[tuple(names)] = {name: i for i, name in enumerate(found)}
        return list(found.values())

    with closing(records(path, wanted)) as rows:
        for number, names, cells in rows:
            place = f"{path}, {unit(path)} {number}"
            row = {name: cells[i] for name, i in layouts[tuple(names)].items()}
            yield _example(place, row, kind, from_csv=".csv" in path.suffixes)


def holds_pairs(path: str | Path) -> bool:
    """Whether the first row of a file has a chosen and a rejected response.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged.
    """
    with closing(records(Path(path), lambda _, names: range(min(1, len(names))))) as rows:
        names = {name.strip().lower() for _, columns, _ in itertools.islice(rows, 1) for name in columns}
    return {"chosen", "rejected"} <= names


def _example(place: str, row: Mapping[str, Any], kind: Kind, *, from_csv: bool) -> Example:
    label = _label(place, row["label"]) if kind is LABELS else None
    cells = row["responses"] if kind is RANKINGS else [row[group[0]] for group in kind.responses if group[0] != "label"]
    if from_csv:
        cells = [_from_json(cell) for cell in ([cells] if kind is RANKINGS else cells)]
        cells = cells[0] if kind is RANKINGS else cells
    if kind is RANKINGS and (not isinstance(cells, list) or len(cells) < 2):
        raise ValueError(f"{place}: responses must be a list of two or more, the best first, got {excerpt(cells)}")
    weight = _weight(place, row.get("weight"))
    prompt = row.get("prompt")
    prompt = _from_json(prompt) if from_csv else prompt
    if prompt is None:
        return _with_implicit_prompt(place, cells, weight, label)
    prompt = _prompt(place, prompt)
    responses = tuple(_response(place, cell, prompt) for cell in cells)
    return Example(place, prompt, responses, weight, label, _problem(responses))


def _with_implicit_prompt(place: str, cells: Sequence[Any], weight: float, label: bool | None) -> Example:
    dialogues = [_transcript(place, cell) if isinstance(cell, str) else _messages(place, cell) for cell in cells]
    for dialogue in dialogues:
        if len(dialogue) < 2 or dialogue[-1]["role"] != "assistant":
            raise ValueError(f"{place}: without a column prompt, a dialogue must end with a message of the assistant")
    prompt = dialogues[0][:-1]
    responses = tuple(dialogue[-1]["content"] for dialogue in dialogues)
    differ = any(dialogue[:-1] != prompt for dialogue in dialogues)
    return Example(place, prompt, responses, weight, label, "prompts differ" if differ else _problem(responses))


def _problem(responses: Sequence[str]) -> str | None:
    if not all(response.strip() for response in responses):
        return "a response is empty"
    return "responses are equal" if len(set(responses)) < len(responses) else None


def _prompt(place: str, cell: Any) -> Prompt:
    if isinstance(cell, str):
        if not cell.strip():
            raise ValueError(f"{place}: prompt is blank")
        return cell
    return _messages(place, cell)


def _response(place: str, cell: Any, prompt: Prompt) -> str:
    """The text of a response."""
    if isinstance(cell, str):
        return cell
    messages = _messages(place, cell)
    if isinstance(prompt, str):
        raise ValueError(f"{place}: the prompt is text, but a response is a chat: give both in one form")
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{place}: a response must be one message of the assistant, got messages of {roles}")
    return messages[0]["content"]


def _messages(place: str, cell: Any) -> list[dict[str, str]]:
    if not isinstance(cell, list) or not cell:
        raise ValueError(f"{place}: expected text or a list of messages, got {excerpt(cell)}")
    for message in cell:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{place}: a message must have a role and a content, both text, got {excerpt(message)}")
    return [{"role": message["role"], "content": message["content"]} for message in cell]


def _transcript(place: str, text: str) -> list[dict[str, str]]:
    """A dialogue in which `Human:` and `Assistant:`, behind an empty line each, begin the messages."""
    before, *parts = TURN.split("\n\n" + text.lstrip("\n"))
    if not parts or before.strip():
        raise ValueError(
            f"{place}: without a column prompt, responses must be chats, or transcripts with 'Human:' and "
            f"'Assistant:', got {excerpt(text)}"
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": content.strip()} for speaker, content in turns]


def _from_json(cell: Any) -> Any:
    """A cell of CSV: messages if it is a JSON list, or else text."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _weight(place: str, cell: Any) -> float:
    if cell is None:
        return 1.0
    try:
        weight = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{place}: weight must be a positive number, got {excerpt(cell)}")
    return weight


def _label(place: str, cell: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    found = words.get(str(cell).strip().lower()) if isinstance(cell, bool | str | int) else None
    if found is None:
        raise ValueError(f"{place}: label must be true or false, got {excerpt(cell)}")
    return found
