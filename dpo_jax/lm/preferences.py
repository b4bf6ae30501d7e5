"""Preferences in a file as arrays of tokens, and a report of what was used, dropped and shortened."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax import checks
from dpo_jax.lm.examples import (
    DEMONSTRATIONS,
    LABELS,
    PAIRS,
    RANKINGS,
    Example,
    Kind,
    holds_pairs,
    read_examples,
)
from dpo_jax.lm.stream import PADDING
from dpo_jax.lm.text import Text
from dpo_jax.types import Demonstrations, Labels, Pair, Preferences


class Tokens(NamedTuple):
    """A row as it is scored.

    Attributes:
      place: file and line.
      prompt: its tokens.
      responses: the tokens of each.
    """

    place: str
    prompt: list[int]
    responses: list[list[int]]


@dataclass
class Report:
    """What became of the rows of a file. As text, it is meant to be read before training.

    Attributes:
      source: the file.
      rows: their number.
      used: how many are trained on.
      dropped: the places of others, by reason.
      shortened: the places of rows whose prompt or responses were cut.
      without_template: the places of prompts that are text, though there is a chat template.
      lengths: numbers of tokens `[used]`, of prompts and of each response.
      shown: the first rows, as they are scored.
    """

    source: str
    rows: int = 0
    used: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    shortened: dict[str, list[str]] = field(default_factory=dict)
    without_template: list[str] = field(default_factory=list)
    lengths: dict[str, Int[np.ndarray, " used"]] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.used:,} of {self.rows:,} rows are used"]
        lines += [f"  dropped, {reason}: {_some(places)}" for reason, places in self.dropped.items()]
        lines += [f"  shortened, {what}: {_some(places)}" for what, places in self.shortened.items()]
        if self.without_template:
            lines.append(f"  text, not chats, so the chat template is not used: {_some(self.without_template)}")
        lines.append("tokens (median, 90 %, longest):")
        for name, lengths in self.lengths.items():
            middle, most, longest = np.percentile(lengths, [50, 90, 100]).astype(int)
            lines.append(f"  {name}: {middle}, {most}, {longest}")
        return "\n".join([*lines, "as they are scored:", *self.shown])


def read_preferences(path: str | Path, text: Text, *, max_length: int = 512) -> tuple[Preferences, Report]:
    """Reads pairs: columns `chosen` and `rejected`, perhaps `prompt` and `weight`. See `read_examples`.

    Args:
      path: the file.
      text: tokenizer and chat template.
      max_length: tokens of a prompt and one response. Of longer ones, the prompt loses its beginning, and what is left
        of a response that is still too long its end.

    Returns:
      Tokens, -1 where there is none, and the report.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, a cell is of the wrong kind, the end of a prompt merges with a response, or no row is
        left. The message names the line.
    """
    data, examples, report = _read(path, text, PAIRS, ("chosen", "rejected"), max_length)
    prompts, (chosen, rejected) = _arrays(data)
    return Preferences(prompts, Pair(chosen, rejected), _weights(examples)), report


def read_rankings(path: str | Path, text: Text, *, max_length: int = 512) -> tuple[Preferences, Report]:
    """Reads rankings: a column `responses`, lists of the same number of responses from best to worst.

    See `read_preferences`; the responses of a row are a tuple of arrays.
    """
    data, examples, report = _read(path, text, RANKINGS, None, max_length)
    prompts, responses = _arrays(data)
    return Preferences(prompts, tuple(responses), _weights(examples)), report


def read_labels(path: str | Path, text: Text, *, max_length: int = 512) -> tuple[Labels, Report]:
    """Reads single responses, good or bad: columns `response` (or `completion`) and `label`.

    A file of pairs is read as labels, too: chosen responses are good, rejected ones bad. See `read_preferences`.

    Raises:
      ValueError: also if all labels are the same.
    """
    if holds_pairs(path):
        pairs, report = read_preferences(path, text, max_length=max_length)
        return _split(pairs), report
    data, examples, report = _read(path, text, LABELS, ("response",), max_length)
    prompts, (responses,) = _arrays(data)
    labels: Any = np.array([example.label for example in examples])
    if labels.all() or not labels.any():
        raise ValueError(f"{path}: all labels are {str(bool(labels[0])).lower()}: losses of labels need both kinds")
    return Labels(prompts, responses, labels, _weights(examples)), report


def read_demonstrations(path: str | Path, text: Text, *, max_length: int = 512) -> tuple[Demonstrations, Report]:
    """Reads responses to imitate: a column `response`, `completion` or `messages`. See `read_preferences`."""
    data, examples, report = _read(path, text, DEMONSTRATIONS, ("response",), max_length)
    prompts, (responses,) = _arrays(data)
    return Demonstrations(prompts, responses, _weights(examples)), report


def padded(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "rows longest"]:
    """Rows of tokens as an array, -1 behind the end of each."""
    longest = max(map(len, rows))
    return np.array([[*row, *[PADDING] * (longest - len(row))] for row in rows], np.int32)


def _read(
    path: str | Path, text: Text, kind: Kind, names: tuple[str, ...] | None, max_length: int
) -> tuple[list[Tokens], list[Example], Report]:
    checks.size("max_length", max_length)
    if max_length < 2:
        raise ValueError("max_length must be at least 2: a token of the prompt, and one of the response")
    report = Report(str(path))
    data: list[Tokens] = []
    examples: list[Example] = []
    for example in read_examples(path, kind):
        report.rows += 1
        tokens = None if example.problem else _cut(_tokens(example, text), max_length, report)
        problem = example.problem or _same(tokens)
        if tokens is None or problem:
            report.dropped.setdefault(str(problem), []).append(example.place)
            continue
        if data and len(tokens.responses) != len(data[0].responses):
            raise ValueError(f"{example.place}: {len(tokens.responses)} responses, but {len(data[0].responses)} before")
        if isinstance(example.prompt, str) and text.template is not None:
            report.without_template.append(example.place)
        data.append(tokens)
        examples.append(example)
    if not data:
        reasons = ", ".join(f"{reason} ({len(places)})" for reason, places in report.dropped.items())
        raise ValueError(f"{path} has no rows that can be used" + (f": {reasons}" if reasons else ""))
    names = names or tuple(f"response {i}" for i in range(1, 1 + len(data[0].responses)))
    report.used = len(data)
    report.lengths = {"prompt": np.array([len(row.prompt) for row in data])}
    report.lengths.update({name: np.array([len(row.responses[i]) for row in data]) for i, name in enumerate(names)})
    report.shown = [_shown(row, names, text) for row in data[:3]]
    return data, examples, report


def _tokens(example: Example, text: Text) -> Tokens:
    try:
        pairs = [text.encode(example.prompt, response) for response in example.responses]
    except ValueError as problem:
        raise ValueError(f"{example.place}: {problem}") from None
    if not pairs[0][0]:
        raise ValueError(f"{example.place}: the prompt has no tokens")
    return Tokens(example.place, pairs[0][0], [response for _, response in pairs])


def _cut(row: Tokens, max_length: int, report: Report) -> Tokens:
    """A row of at most so many tokens: the end of its prompt, and the beginning of its responses."""
    responses = [response[: max_length - 1] for response in row.responses]
    room = max_length - max(map(len, responses))
    if responses != row.responses:
        report.shortened.setdefault("a response lost its end", []).append(row.place)
    if len(row.prompt) > room:
        report.shortened.setdefault("a prompt lost its beginning", []).append(row.place)
    return Tokens(row.place, row.prompt[-room:], responses)


def _same(row: Tokens | None) -> str | None:
    if row is None or all(a != b for a, b in itertools.combinations(row.responses, 2)):
        return None
    return "responses are equal, as they are scored"


def _arrays(data: Sequence[Tokens]) -> tuple[Any, list[Any]]:
    num = len(data[0].responses)
    return padded([row.prompt for row in data]), [padded([row.responses[i] for row in data]) for i in range(num)]


def _split(pairs: Preferences) -> Labels:
    """Both responses of each pair as rows of their own, neighbours."""
    longest = max(side.shape[1] for side in pairs.responses)
    sides = [np.pad(side, ((0, 0), (0, longest - side.shape[1])), constant_values=PADDING) for side in pairs.responses]
    responses: Any = np.stack(sides, axis=1).reshape(-1, longest)
    prompts: Any = np.repeat(pairs.prompts, 2, axis=0)
    labels: Any = np.tile([True, False], len(pairs.prompts))
    return Labels(prompts, responses, labels, None if pairs.weights is None else np.repeat(pairs.weights, 2))  # type: ignore[arg-type]


def _weights(examples: Sequence[Example]) -> Any:
    weights = np.array([example.weight for example in examples], np.float32)
    return None if np.all(weights == 1) else weights


def _some(places: Sequence[str]) -> str:
    """How many places there are, and the first of them."""
    return f"{len(places):,} (the first: {places[0]})"


def _shown(row: Tokens, names: Sequence[str], text: Text) -> str:
    """A row as it is scored."""
    lines = [f"  {row.place}", f"    prompt ({len(row.prompt)} tokens): {text.decode(row.prompt)!r}"]
    for name, response in zip(names, row.responses, strict=True):
        ended = response[-1] in text.stops
        body = text.decode(response[:-1] if ended else response)
        end = f"then the end token {text.decode(response[-1:])!r}" if ended else "without an end token"
        lines.append(f"    {name} ({len(response)} tokens): {body!r}, {end}")
    return "\n".join(lines)
