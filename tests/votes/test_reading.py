import csv
import gzip
import json
import string
import unicodedata
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_jax import votes

ROWS = [("tea?", "Assam", "Sencha"), ("tea?", "Sencha", "Keemun"), ("über, \n«tea»", "yes", "no")]
COLUMNS = ("prompt", "chosen", "rejected")


def rows_of(file):
    """The votes of a file by their names."""
    sides = [[file.responses[i] for i in ids] for ids in file.votes.responses]
    prompts = [file.columns["prompt"].names[i] for i in file.columns["prompt"].ids]
    return list(zip(prompts, *sides, strict=True))


def write_csv(path, rows, columns=COLUMNS):
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in map(str, row)) for row in (columns, *rows)]
    path.write_text("\r\n".join(quoted), encoding="utf-8", newline="")
    return path


def write_jsonl(path, rows, columns=COLUMNS):
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path, rows, columns=COLUMNS):
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    return path


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_reads_the_same(tmp_path, suffix):
    read = votes.read(WRITERS[suffix](tmp_path / f"file{suffix}", ROWS))
    assert rows_of(read) == ROWS
    assert read.responses == ("Assam", "Sencha", "Keemun", "yes", "no")
    assert read.columns["prompt"].names == ("tea?", "über, \n«tea»")
    assert (read.votes.ties, read.votes.weights, read.votes.first) == (None, None, None)
    assert read.unused_columns == ()


@pytest.mark.parametrize("suffix", WRITERS)
def test_weights_are_scaled_to_average_one(tmp_path, suffix):
    rows = [(*row, weight) for row, weight in zip(ROWS, (1, 2, 3), strict=True)]
    path = WRITERS[suffix](tmp_path / f"file{suffix}", rows, ("prompt", "chosen", "rejected", "weight"))
    np.testing.assert_allclose(votes.read(path).votes.weights, [0.5, 1.0, 1.5], rtol=1e-6)


@pytest.mark.parametrize("suffix", WRITERS)
def test_other_columns_are_named_and_numbers_are_names(tmp_path, suffix):
    rows = [("q", 1, 2.0, "Ann", 1.8), ("q", 2, 3.0, "Bob", 1.7)]
    columns = (" Prompt", "CHOSEN", "rejected ", " taster", "height")
    read = votes.read(WRITERS[suffix](tmp_path / f"file{suffix}", rows, columns))
    assert read.responses == ("1", "2", "3")
    assert read.unused_columns == ("taster", "height")


def tidy(text):
    return unicodedata.normalize("NFC", text).strip("\ufeff\u200b" + string.whitespace + "\u00a0\u2003\u3000")


text = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1).map(tidy).filter(bool)


@given(rows=st.lists(st.tuples(text, text, text).filter(lambda row: row[1] != row[2]), min_size=1, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_any_text_survives(tmp_path, rows):
    for suffix, write in WRITERS.items():
        assert rows_of(votes.read(write(tmp_path / f"file{suffix}", rows))) == rows


HEADER = "prompt,chosen,rejected\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no column chosen, rejected; found none"),
        ("a.csv", b"prompt,chosen\na,b\n", "no column rejected; found prompt, chosen"),
        ("a.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", "two columns have the same name"),
        ("a.csv", HEADER.encode(), "holds no comparisons"),
        ("a.csv", (HEADER + "a,b,c\na,b, \n").encode(), "line 3: rejected is blank"),
        ("a.csv", (HEADER + "a,b\n").encode(), "line 2: rejected is blank"),
        ("a.csv", (HEADER + "a,b,c,d\n").encode(), "line 2: more cells than columns"),
        ("a.csv", (HEADER + 'a,b,"c\n').encode(), "line 2: unexpected end of data"),
        ("a.csv", (HEADER + "a,b,c\nx,y,y\n").encode(), "line 3: chosen and rejected are the same, 'y'"),
        ("a.csv", HEADER.encode() + b"a,b,c\na,b,\xff\n", "line 3: not UTF-8 text .byte 0xff"),
        ("a.csv", b"prompt,chosen,rejected,weight\na,b,c,2\na,b,c,-1\n", "line 3: weight must be positive.* '-1'"),
        ("a.csv", b"prompt,chosen,rejected,weight\na,b,c,nan\n", "line 2: weight must be positive.* 'nan'"),
        ("a.csv", b"prompt,chosen,rejected,weight\na,b,c,0\n", "line 2: weight must be positive.* '0'"),
        ("a.csv", b"prompt,chosen,rejected,weight\na,b,c,much\n", "line 2: weight must be positive.* 'much'"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b"}', "line 1: no column rejected"),
        ("a.jsonl", b'\n{"prompt"', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1: expected an object"),
        ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
        ("a.jsonl", b'{"prompt": NaN, "chosen": "b", "rejected": "c"}', "line 1: prompt is blank"),
        ("a.jsonl", b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', "line 1: prompt has half a character"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": true}', "weight must be positive"),
        ("a.jsonl", b'{"prompt": "a", "chosen": 1, "rejected": 1.0}', "line 1: chosen and rejected are the same, '1'"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "'chosen' is given twice"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", " Chosen": "d"}', "line 1: two columns have the"),
        ("a.jsonl", b'{"prompt": "a", "chosen": 1e999999999, "rejected": "c"}', "chosen is a number with too many"),
        ("a.jsonl", b'{"prompt": "a", "chosen": Infinity, "rejected": "c"}', "chosen is a number with too many"),
        ("a.csv", (HEADER + "a, b,b\n").encode(), "line 2: chosen and rejected are the same, 'b'"),
        ("a.csv", (HEADER + "a,e\u0301,\u00e9\n").encode(), "line 2: chosen and rejected are the same, '\u00e9'"),
        ("a.csv", (HEADER + "a,b,\u200b\n").encode(), "line 2: rejected is blank"),
        ("a.csv", b"prompt,chosen,rejected,Chosen \na,b,c,d\n", "two columns have the same name, 'chosen'"),
        ("a.csv", b"prompts,chosen,rejected\na,b,c\n", "the column 'prompts' would not be used: call it prompt, or"),
        ("a.csv", b"chosen,rejected,ties\na,b,1\n", "the column 'ties' would not be used: call it tie, or something"),
        ("a.csv", b"model_a,model_b\na,b\n", "no column winner; found model_a, model_b"),
        ("a.csv", b"model_a,model_b,winner\na,b,c\n", "line 2: winner must name one of the two.*or tie, got 'c'"),
        ("a.csv", b"model_a,model_b,winner\na,b,\n", "line 2: winner is blank"),
        ("a.csv", b"model_a,model_b,winner\nx,tie,tie\n", "line 2: winner could mean either response, got 'tie'"),
        ("a.csv", b"model_a,model_b,winner\nx,x,tie\n", "line 2: model_a and model_b are the same, 'x'"),
        ("a.csv", b"chosen,rejected,tie\na,b,perhaps\n", "line 2: tie must be yes or no, got 'perhaps'"),
        ("a.csv", b"chosen,rejected,first\na,b,tie\n", "line 2: first must name one of the two.* model_b, got 'tie'"),
        ("a.csv", b"chosen,rejected,judge\na,b,\n", "line 2: judge is blank"),
        ("a.jsonl", b'{"chosen": "a", "rejected": "b", "tie": 2}', "line 1: tie must be yes or no, got 2"),
        (
            "a.jsonl",
            b'{"chosen": "a", "rejected": "b"}\n{"prompt": "q", "chosen": "a", "rejected": "b"}',
            "prompt is given in",
        ),
        ("a.csv.gz", b"chosen,rejected", "not a gzip file, or damaged"),
        ("a.csv.gz", gzip.compress(b"chosen,rejected\na,b\n" * 99, mtime=0)[:-20], "not a gzip file, or damaged"),
        (
            "a.csv.gz",
            gzip.compress(b"chosen,rejected\na,b\na,a\n", mtime=0),
            "line 3: chosen and rejected are the same",
        ),
        ("a.parquet.gz", b"PAR1", "expected a file that ends in"),
        ("a.csv", b"prompt,chosen,rejected,judge,Judge\na,b,c,d,e\n", "two columns have the same name, 'judge'"),
        (
            "a.csv",
            b"prompt,chosen,rejected,Weights\na,b,c,2\n",
            "the column 'Weights' would not be used: call it weight",
        ),
        ("a.csv", b"prompt,chosen,rejected,wieght\na,b,c,2\n", "the column 'wieght' would not be used: call it weight"),
        (
            "a.csv",
            b"prompts,choosen,rejected\na,b,c\n",
            "no column chosen; found prompts, choosen, rejected. Is it 'choosen' for chosen",
        ),
        ("a.csv", b"prompt;chosen;rejected\na;b;c\n", "separated by commas, but are by ';'"),
        ("a.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16"), "UTF-16 it seems: save it as UTF-8"),
        ("a.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16-le"), "UTF-16 it seems: save it as UTF-8"),
        ("a.csv", b"prompt,chosen,rejected,weight\na,b,c,2\na,b,c,\n", "line 3: weight must be positive.* ''"),
        (
            "a.csv",
            b"prompt,chosen,rejected,weight\na,b,c,1\na,b,c,1e-60\n",
            "line 3: the weight 1e-60 is too small.*line 2",
        ),
        (
            "a.jsonl",
            (
                b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1}\n'
                b'{"prompt": "a", "chosen": "b", "rejected": "c"}'
            ),
            "line 2: weight is given in some lines only",
        ),
        ("a.csv", b"prompt,chosen,rejected,weight\na,b,c,1e999\n", "line 2: weight must be positive"),
        ("a.jsonl", b'{"prompt": ["a"], "chosen": "b", "rejected": "c"}', "line 1: prompt must be text"),
        ("a.jsonl", b'{"prompt": null, "chosen": "b", "rejected": "c"}', "line 1: prompt is blank"),
        ("a.parquet", b"PAR1 and then nothing", "not a Parquet file"),
        (
            "a.txt",
            b"a,b,c",
            "expected a file that ends in .csv, .jsonl, .ndjson, .parquet, or .gz after the first three",
        ),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        votes.read(path)
    assert str(path) in str(caught.value)


def test_headers_as_other_programs_write_them(tmp_path):
    for header, row in (("", "0"), (" prompt", None)):
        path = tmp_path / "file.csv"
        cells = [header, "prompt", "chosen", "rejected"] if row else [header, " chosen", "rejected "]
        path.write_text(",".join(cells) + "\n" + ",".join([row, "q", "a", "b"] if row else ["q", "a", "b"]) + "\n")
        assert rows_of(votes.read(path)) == [("q", "a", "b")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", '"prompt","chosen","rejected"\nq,a,b\n'),
        ("a.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert rows_of(votes.read(tmp_path / name)) == [("q", "a", "b")]


def test_spaces_before_quotes_are_not_part_of_a_name(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text('prompt, chosen, rejected\nq, "a, b", c\nq,c,"a, b "\n')
    assert votes.read(path).responses == ("a, b", "c")


def test_nested_cells_are_refused_by_row(tmp_path):
    for cells in ([["b"], ["c"]], [{"text": "b"}, {"text": "c"}]):
        columns = {"prompt": ["q", "q"], "chosen": ["a", "a"], "rejected": cells}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="row 1: rejected must be text, got "):
            votes.read(tmp_path / "a.parquet")


def test_responses_may_be_long(tmp_path):
    long, usual_limit = "x" * 300_000, csv.field_size_limit()
    assert votes.read(write_csv(tmp_path / "file.csv", [("q", long, "b")])).responses == (long, "b")
    assert csv.field_size_limit() == usual_limit < len(long)  # it holds for the whole process


def test_bad_parquet_rows_are_refused_by_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [("a", "b", "c"), ("a", None, "c")])
    with pytest.raises(ValueError, match="row 2: chosen is blank"):
        votes.read(path)


def test_a_name_is_one_name_however_it_is_written(tmp_path):
    path = tmp_path / "a.jsonl"
    numbers = ["1", "1.0", "1e0", '"1"', '" 1 "', "10E-1"], ["9007199254740993", "9007199254740993.0"], ["2.5", "2.50"]
    others = ['"caf\u00e9"', '"cafe\u0301 "', '"caf\\u00e9"']
    pairs = [(name, "0") for names in (*numbers, others) for name in names]
    path.write_text("".join(f'{{"prompt": "q", "chosen": {a}, "rejected": {b}}}\n' for a, b in pairs), encoding="utf-8")
    expected = ("1", "0", "9007199254740993", "2.5", "caf\u00e9")
    assert votes.read(path).responses == expected


def test_numbers_of_a_parquet_file_are_names_whatever_their_type(tmp_path):
    columns = {
        "prompt": pyarrow.array([1, 1, 2]),
        "chosen": pyarrow.array([Decimal("1.00"), Decimal("2.00"), Decimal("2.50")]),
        "rejected": pyarrow.array([2.0, 3.0, 1.0]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert rows_of(votes.read(tmp_path / "a.parquet")) == [("1", "1", "2"), ("1", "2", "3"), ("2", "2.5", "1")]
    columns["chosen"] = pyarrow.array([1.0, 2.0**53, 1.0])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 2: chosen is a number with too many digits for a name, 90071992547409"):
        votes.read(tmp_path / "a.parquet")
    columns["chosen"] = pyarrow.array([True, True, True])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 1: chosen must be text, got True"):
        votes.read(tmp_path / "a.parquet")


def test_text_in_a_csv_that_looks_like_a_number_stays_text_beside_other_text(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("1.0", "1.0", "v2"), ("2", "2", "1")])
    assert rows_of(votes.read(path)) == [("1", "1.0", "v2"), ("2", "2", "1")]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()])
@pytest.mark.parametrize("encoded", [False, True])
def test_text_of_a_parquet_file_may_be_of_any_type(tmp_path, kind, encoded):
    def write(rejected):
        cells = [["q", "q"], ["a", "\u00fc"], rejected]
        columns = [pyarrow.array([x if isinstance(x, bytes) else x.encode() for x in column]) for column in cells]
        buffers = [pyarrow.Array.from_buffers(pyarrow.string(), 2, column.buffers()) for column in columns]
        columns = [
            column if kind == pyarrow.binary() else text.cast(kind, safe=False)
            for column, text in zip(columns, buffers, strict=True)
        ]
        columns = [column.dictionary_encode() if encoded else column for column in columns]
        pyarrow.parquet.write_table(pyarrow.table(columns, ["prompt", "chosen", "rejected"]), tmp_path / "a.parquet")

    try:
        write(["b", "b"])
    except pyarrow.ArrowNotImplementedError:
        pytest.skip("this version of Arrow does not write it")
    assert votes.read(tmp_path / "a.parquet").responses == ("a", "b", "\u00fc")
    write(["b", b"caf\xe9"])
    with pytest.raises(ValueError, match=r"a\.parquet, column rejected, row 2: not UTF-8 text .byte 0xe9"):
        votes.read(tmp_path / "a.parquet")


def test_weights_of_a_file_that_are_not_zero_stay_so(tmp_path):
    rows = [("q", "a", "b", 1e-300), ("q", "b", "c", 1e-271)]
    path = write_csv(tmp_path / "a.csv", rows, ("prompt", "chosen", "rejected", "weight"))
    weights = votes.read(path).votes.weights
    assert np.all(weights > 1e-30)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.csv"):
        votes.read(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "A.JSONL.GZ"])
def test_compressed_files_read_the_same(tmp_path, name):
    write = write_csv if "csv" in name else write_jsonl
    plain = write(tmp_path / "plain", ROWS)
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert rows_of(votes.read(tmp_path / name)) == ROWS


WINNERS = {
    "A": 1, "model_a": 1, "Model A": 1, "left": 1, "one": 1, "b": -1, "model_b": -1, "right": -1, "two": -1,
    "tie": 0, "Tie (bothbad)": 0, "tie (bothgood)": 0, "draw": 0, "both": 0, "neither": 0, "no preference": 0,
}  # fmt: skip


def test_winners_are_spelled_in_many_ways(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("one", "two", word) for word in WINNERS], ("model_a", "model_b", "winner"))
    file = votes.read(path)
    outcome = np.where(file.votes.ties, 0, np.where(file.votes.responses.chosen == 0, 1, -1))
    assert dict(zip(WINNERS, outcome.tolist(), strict=True)) == WINNERS
    assert file.columns == {}


def test_names_come_before_shorthand(tmp_path):
    rows = [("A", "B", "A"), ("B", "A", "A"), ("B", "A", "model_a")]
    file = votes.read(write_csv(tmp_path / "a.csv", rows, ("model_a", "model_b", "winner")))
    assert [file.responses[i] for i in file.votes.responses.chosen] == ["A", "A", "B"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_ties_of_chosen_and_rejected(tmp_path, suffix):
    cells = [True, False, False] if suffix != ".csv" else ["TRUE", "", "no"]
    rows = [("a", "b", cell) for cell in cells]
    file = votes.read(WRITERS[suffix](tmp_path / f"a{suffix}", rows, ("chosen", "rejected", "tie")))
    assert file.votes.ties.tolist() == [True, False, False]
    rows = [("a", "b", winner) for winner in ("chosen", "tie", "rejected", "b")]
    file = votes.read(WRITERS[suffix](tmp_path / f"a{suffix}", rows, ("chosen", "rejected", "winner")))
    assert file.votes.ties.tolist() == [False, True, False, False]
    assert [file.responses[i] for i in file.votes.responses.chosen] == ["a", "a", "b", "b"]


def test_who_was_shown_first(tmp_path):
    rows = [("a", "b", "a", "b"), ("a", "b", "b", "model_b"), ("a", "b", "b", ""), ("a", "b", "tie", "left")]
    file = votes.read(write_csv(tmp_path / "a.csv", rows, ("model_a", "model_b", "winner", "first")))
    assert file.votes.first.tolist() == [-1, 1, 0, 1]


def test_further_columns_are_read_when_asked_for(tmp_path):
    path = write_csv(
        tmp_path / "a.csv", [("a", "b", "en", 7), ("b", "a", "de", 8)], ("chosen", "rejected", "Lang", "x")
    )
    file = votes.read(path, columns=["lang"])
    assert file.columns["lang"].names == ("en", "de")
    assert file.columns["lang"].ids.tolist() == [0, 1]
    assert file.unused_columns == ("x",)
    with pytest.raises(ValueError, match="the column winner holds no names to group votes by"):
        votes.read(path, columns=["winner"])
    with pytest.raises(ValueError, match="no column language; found chosen, rejected, Lang, x"):
        votes.read(path, columns=["language"])


def test_as_preferences_numbers_responses_within_their_prompt(tmp_path):
    rows = [("p", "a", "b", ""), ("q", "c", "b", ""), ("p", "b", "c", "tie")]
    file = votes.read(write_csv(tmp_path / "a.csv", rows, (*COLUMNS, "tie")))
    prompts, responses, data = votes.as_preferences(file)
    assert (prompts, responses) == (("p", "q"), (("a", "b", "c"), ("b", "c")))
    found = [
        (prompts[p], responses[p][c], responses[p][r]) for p, c, r in zip(data.prompts, *data.responses, strict=True)
    ]
    assert found == [("p", "a", "b"), ("q", "c", "b"), ("p", "b", "c"), ("p", "c", "b")]
    np.testing.assert_allclose(data.weights, np.array([1, 1, 0.5, 0.5]) / 0.75, rtol=1e-6)
