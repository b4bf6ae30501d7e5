"""Files of preferences: what is used, what is dropped and why, and what is refused."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dpo_jax import lm
from tests.lm import tiny
from tests.lm.tiny import write_lines

USER, YES, NO = (
    {"role": "user", "content": "ab?"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)
EXPLICIT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
TEXT = tiny.text()


def words(array):
    """Rows of tokens as text."""
    return [TEXT.decode([token for token in row if token >= 0]) for row in np.asarray(array).tolist()]


def read(path, **options):
    data, report = lm.read_preferences(path, TEXT, **options)
    return [words(side) for side in (data.prompts, *data.responses)], report


CHAT = ["<|im_start|>user\nab?<|im_end|>\n<|im_start|>assistant\n"], ["yes<|im_end|>"], ["no<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        EXPLICIT,
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"chosen": "\n\nHuman: ab?\n\nAssistant: yes", "rejected": "\n\nHuman: ab?\n\nAssistant: no"},
        {**EXPLICIT, "weight": 1.0, "score": 3, "Source": "a"},
    ],
    ids=["explicit", "implicit", "responses as text", "transcript", "more columns"],
)
def test_chats_have_many_forms(tmp_path, row):
    assert tuple(read(write_lines(tmp_path / "a.jsonl", [row]))[0]) == CHAT


def test_pairs_are_read_as_labels_too(tmp_path):
    rows = [EXPLICIT, {**EXPLICIT, "chosen": "maybe", "weight": 2.0}]
    labels, report = lm.read_labels(write_lines(tmp_path / "a.jsonl", rows), TEXT)
    assert words(labels.responses) == [f"{word}<|im_end|>" for word in ("yes", "no", "maybe", "no")]
    assert labels.desirable.tolist() == [True, False, True, False] and labels.weights.tolist() == [1, 1, 2, 2]
    assert len(labels.prompts) == 4 and report.used == 2


def test_text_is_scored_as_it_stands(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [EXPLICIT, {"prompt": "Q:", "chosen": " yes", "rejected": " no"}])
    found, report = read(path)
    assert [rows[1] for rows in found] == ["Q:", " yes<|im_end|>", " no<|im_end|>"]
    assert f"text, not chats, so the chat template is not used: 1 (the first: {path}, line 2)" in str(report)


def test_kinds_of_files_hold_the_same(tmp_path):
    rows = [
        {"prompt": "Q: é\n", "chosen": 'a "b", c', "rejected": "two\nlines"},
        {"prompt": "P", "chosen": "x", "rejected": "y"},
    ]
    expected = read(write_lines(tmp_path / "a.jsonl", rows))[0]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    cells = [["prompt", "chosen", "rejected"], *(list(row.values()) for row in rows)]
    quoted = "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in cells)
    (tmp_path / "a.csv").write_text(quoted, encoding="utf-8")
    for name in ("a.jsonl.gz", "a.parquet", "a.csv"):
        assert read(tmp_path / name)[0] == expected


def test_chats_fit_into_parquet_and_csv(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([EXPLICIT]), tmp_path / "a.parquet")
    cells = [json.dumps(EXPLICIT[name]).replace('"', '""') for name in ("prompt", "chosen", "rejected")]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n" + ",".join(f'"{cell}"' for cell in cells) + "\n")
    assert tuple(read(tmp_path / "a.parquet")[0]) == tuple(read(tmp_path / "a.csv")[0]) == CHAT


def test_the_report_counts_what_is_dropped_by_reason(tmp_path):
    other = {"role": "user", "content": "else?"}
    rows = [
        EXPLICIT,
        {"prompt": "Q", "chosen": "", "rejected": "b"},
        {"prompt": "Q", "chosen": "a", "rejected": "a"},
        {"prompt": "Q", "chosen": "a", "rejected": " \n"},
        {"prompt": "Q", "chosen": "a", "rejected": "a<|im_end|>"},
    ]
    _, report = read(write_lines(tmp_path / "a.jsonl", rows))
    assert (report.rows, report.used) == (5, 1)
    assert {reason: len(places) for reason, places in report.dropped.items()} == {
        "a response is empty": 2,
        "responses are equal": 1,
        "responses are equal, as they are scored": 1,
    }
    assert "2 (the first: " in str(report) and "line 2)" in str(report)
    differ = {"chosen": [USER, YES], "rejected": [other, NO]}
    (tmp_path / "b").mkdir()
    _, report = read(write_lines(tmp_path / "b" / "a.jsonl", [differ, {"chosen": [USER, YES], "rejected": [USER, NO]}]))
    assert list(report.dropped) == ["prompts differ"]


def test_the_report_shows_prompt_response_and_end_apart(tmp_path):
    _, report = read(write_lines(tmp_path / "a.jsonl", [EXPLICIT]))
    (shown,) = report.shown
    assert r"assistant\n'" in shown
    assert "chosen (4 tokens): 'yes', then the end token '<|im_end|>'" in shown


def test_long_rows_lose_the_beginning_of_the_prompt_then_the_end_of_a_response(tmp_path):
    row = {"prompt": "0123456789", "chosen": "xyz", "rejected": "uvwxyz"}
    cut = lambda length: read(write_lines(tmp_path / "a.jsonl", [row]), max_length=length)  # noqa: E731
    assert cut(17)[0] == [["0123456789"], ["xyz<|im_end|>"], ["uvwxyz<|im_end|>"]]
    found, report = cut(12)
    assert found == [["56789"], ["xyz<|im_end|>"], ["uvwxyz<|im_end|>"]]
    assert list(report.shortened) == ["a prompt lost its beginning"]
    found, report = cut(5)
    assert found == [["9"], ["xyz<|im_end|>"], ["uvwx"]]
    assert len(report.shortened) == 2
    assert "rejected (4 tokens): 'uvwx', without an end token" in str(report)


def test_pairs_that_become_equal_are_dropped(tmp_path):
    rows = [
        {"prompt": "Q", "chosen": "same then", "rejected": "same now"},
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
    ]
    _, report = read(write_lines(tmp_path / "a.jsonl", rows), max_length=5)
    assert {reason: len(places) for reason, places in report.dropped.items()} == {
        "responses are equal, as they are scored": 1
    }


def test_labels_rankings_and_demonstrations_are_read(tmp_path):
    rows = [
        {"prompt": "Q", "completion": "a", "label": True},
        {"prompt": "Q", "completion": "b", "label": "False", "weight": 2},
    ]
    labels, _ = lm.read_labels(write_lines(tmp_path / "a.jsonl", rows), TEXT)
    assert words(labels.responses) == ["a<|im_end|>", "b<|im_end|>"]
    assert labels.desirable.tolist() == [True, False] and labels.weights.tolist() == [1.0, 2.0]
    rows = [{"prompt": [USER], "responses": ["best", "good", [NO]]}]
    ranked, _ = lm.read_rankings(write_lines(tmp_path / "b.jsonl", rows), TEXT)
    assert [words(side)[0] for side in ranked.responses] == ["best<|im_end|>", "good<|im_end|>", "no<|im_end|>"]
    shown, _ = lm.read_demonstrations(write_lines(tmp_path / "c.jsonl", [{"messages": [USER, YES]}]), TEXT)
    assert words(shown.responses) == ["yes<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "a"}, "line 2: for pairs, it has no column rejected; found prompt, chosen"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "line 2: prompt is blank"),
        ({"prompt": "Q", "chosen": 3, "rejected": "b"}, "line 2: expected text or a list of messages, got 3"),
        ({"prompt": "Q", "chosen": [], "rejected": "b"}, "line 2: expected text or a list of messages"),
        ({"prompt": "Q", "chosen": [YES], "rejected": "b"}, "line 2: the prompt is text, but a response is a chat"),
        (
            {"prompt": [USER], "chosen": [USER, YES], "rejected": "b"},
            "must be one message of the assistant, got .* user, assistant",
        ),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [NO]},
            "must be one message of the assistant, got messages of user",
        ),
        (
            {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"},
            "line 2: a message must have a role and a content",
        ),
        ({"chosen": "a", "rejected": "b"}, "line 2: without a column prompt, responses must be chats, or transcripts"),
        ({"chosen": [USER], "rejected": [USER]}, "a dialogue must end with a message of the assistant"),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "weight": 0},
            "line 2: weight must be a positive number, got 0",
        ),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "weight": "x"}, "line 2: weight must be a positive number"),
        ({"prompt": "xa", "chosen": "b", "rejected": "c"}, "line 2: the end of the prompt, 'a', becomes 'ab'"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path, row, message):
    good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    path = write_lines(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows that can be used"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "Q", "chosen": "a", "rejected": "a"}\n', r"no rows that can be used: responses are equal \(1\)"),
    ],
)
def test_files_without_pairs_are_refused(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.jsonl")


def test_labels_of_one_kind_and_unlike_rankings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="all labels are true: losses of labels need both kinds"):
        lm.read_labels(write_lines(tmp_path / "a.jsonl", [{"prompt": "Q", "response": "a", "label": 1}]), TEXT)
    with pytest.raises(ValueError, match="line 1: label must be true or false, got 'good'"):
        lm.read_labels(write_lines(tmp_path / "a.jsonl", [{"prompt": "Q", "response": "a", "label": "good"}]), TEXT)
    rows = [{"prompt": "Q", "responses": ["a", "b"]}, {"prompt": "Q", "responses": ["a", "b", "c"]}]
    with pytest.raises(ValueError, match="line 2: 3 responses, but 2 before"):
        lm.read_rankings(write_lines(tmp_path / "a.jsonl", rows), TEXT)
    with pytest.raises(ValueError, match="line 1: responses must be a list of two or more"):
        lm.read_rankings(write_lines(tmp_path / "a.jsonl", [{"prompt": "Q", "responses": ["a"]}]), TEXT)
    with pytest.raises((TypeError, ValueError), match="max_length must be"):
        read(tmp_path / "a.jsonl", max_length=1)
