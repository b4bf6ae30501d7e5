import gzip

import numpy as np
import pytest

from dpo_jax import strings

SCORES = {"aa": 0.5, "ab": -1.0, "ba": 2.0, "bb": 0.25}
ALL = "string,score\naa,0.5\nab,-1\nba,2\nbb,0.25\n"


@pytest.fixture
def write(tmp_path):
    def written(content, name="scores.csv"):
        path, content = tmp_path / name, content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return written


def scores_of(read):
    """The score of each string."""
    texts = read.strings.text(range(read.strings.num_responses))
    return dict(zip(texts, np.asarray(read.rewards).tolist(), strict=True))


@pytest.mark.parametrize("name", ["s.csv", "s.tsv", "s.txt", "s.csv.gz", "s.tsv.gz", "s.anything"])
@pytest.mark.parametrize(
    "change", [str, lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t + "\n,\n", str.strip]
)
def test_every_kind_of_file_reads_the_same(write, name, change):
    content = change(ALL)
    if "tsv" in name or "txt" in name:
        content = content.replace(",", "\t")
    read = strings.read_scores(write(content, name))
    assert read.strings == strings.Strings(2, 2, fixed_length=True, alphabet="ab")
    assert scores_of(read) == SCORES


def test_lines_may_stand_in_any_order_and_cells_have_quotes_and_blanks(write):
    path = write('id, score ,string\n1, 2e0,"ba"\n\n2,0.25, bb\n3,-1,ab\n4,0.5,"aa "\n')
    assert scores_of(strings.read_scores(str(path))) == SCORES


def test_columns_can_be_named_or_numbered(write):
    path = write(ALL.replace("string", "seq").replace("score", "E"))
    for string, score in (("seq", "E"), (0, 1), ("seq", 1), (["seq"], "E")):
        assert scores_of(strings.read_scores(path, string=string, score=score)) == SCORES


def test_strings_of_a_line_have_the_same_score(write):
    """As the two strands of DNA; some strands are their own complement."""
    path = write("8-mer\t8-mer.1\tE-score\nAA\tTT\t0.5\nAT\tAT\t-0.25\nTA\tTA\t1\n", "file.txt")
    read = strings.read_scores(path, string=("8-mer", "8-mer.1"), score="E-score")
    assert scores_of(read) == {"AA": 0.5, "AT": -0.25, "TA": 1.0, "TT": 0.5}


def test_strings_of_several_lengths_have_an_end(write):
    read = strings.read_scores(write("string,score\nb,1\n,2\na,3\n"))
    assert read.strings == strings.Strings(2, 1, alphabet="ab")
    assert scores_of(read) == {"": 2.0, "a": 3.0, "b": 1.0}


def test_letters_are_any_and_in_alphabetical_order(write):
    read = strings.read_scores(write("string,score\nβ,1\nα,2\nz,3\nZ,4\n"))
    assert read.strings.alphabet == "Zzαβ"
    assert read.rewards.tolist() == [4.0, 3.0, 2.0, 1.0]


def test_missing_strings_have_the_score_that_is_given(write):
    path = write("string,score\naa,0.5\nba,2\nb,7\n")
    read = strings.read_scores(path, missing=-3.0)
    assert scores_of(read) == {"": -3.0, "a": -3.0, "b": 7.0, "aa": 0.5, "ab": -3.0, "ba": 2.0, "bb": -3.0}
    with pytest.raises(ValueError, match="lacks 4 of the 7 strings over 'ab', such as '': give their score by `miss"):
        strings.read_scores(path)
    for wrong in (float("nan"), float("inf"), 1e300):
        with pytest.raises(ValueError, match="missing must be a finite number, got"):
            strings.read_scores(path, missing=wrong)


BAD = {
    "empty": ("", "scores.csv has no strings"),
    "blank lines": ("\n\n,\n", "scores.csv has no strings"),
    "header only": ("string,score\n", "scores.csv has no strings"),
    "no string": ("sequence,score\na,1\n", "has no column 'string'; it has 'sequence', 'score'"),
    "no score": ("string,E\na,1\n", "has no column 'score'; it has 'string', 'E'"),
    "names twice": ("string,score,score\na,1,2\n", "has more than one column 'score'"),
    "other separator": ("string;score\na;1\n", "has no column 'string'; it has 'string;score'"),
    "few cells": ("string,score\na,1\nb\n", "line 3: 1 cells, but 2 names of columns"),
    "many cells": ("string,score\n\na,1\nb,1,5\n", "line 4: 3 cells, but 2 names of columns"),
    "no number": ("string,score\na,1\nb,x\n", "line 3: a score must be a finite number, got 'x'"),
    "blank score": ("string,score\na,\nb,1\n", "line 2: a score must be a finite number, got ''"),
    "NaN": ("string,score\na,nan\n", "line 2: a score must be a finite number, got 'nan'"),
    "infinite": ("string,score\na,-inf\n", "line 2: a score must be a finite number, got '-inf'"),
    "beyond float32": ("string,score\na,1e39\n", "line 2: a score must be a finite number, got '1e39'"),
    "twice": ("string,score\na,1\nb,1\na,1\n", "line 4: 'a' has a score already, in line 2"),
    "after quotes": ('string,score,note\na,1,"x\ny"\nb,?,z\n', "line 4: a score must be a finite number"),
    "quoted newline": ('string,score\n"a\nb",1\n', r"line 3: 'a\\nb' has letters that cannot be printed"),
    "NUL": ("string,score\na,1\nb\0,1\n", r"line 3: 'b\\x00' has letters that cannot be printed|line contains NUL"),
    "not UTF-8": (b"string,score\na,1\n\xff,1\n", "line 3: 'utf-8' codec can't decode byte 0xff"),
    "UTF-16": ("string,score\na,1\n".encode("utf-16"), "line 1: 'utf-8' codec can't decode byte 0xff"),
    "missing": ("string,score\naa,1\nbb,1\n", "lacks 2 of the 4 strings over 'ab', such as 'ab'"),
    "the empty string": ("string,score\n,1\n", "has the empty string alone"),
    "too many": ("string,score\n" + "acgt" * 3 + ",1\n", "csv: 4 letters and a horizon of 12 make more than"),
    "too long": (
        "string,score\n" + "a" * 101 + ",1\n",
        "csv: 1 letters and a horizon of 101 make more than 100 letters",
    ),
    "field limit": ("string,score\n\n" + "a" * 200_000 + ",1\n", "line 3: field larger than field limit"),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_files_are_refused(write, content):
    content, message = content
    with pytest.raises(ValueError, match=message):
        strings.read_scores(write(content))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"score": 2}, "has 2 columns, and none of number 2, counted from 0"),
        ({"string": -1}, "has 2 columns, and none of number -1, counted from 0"),
        ({"string": ["string", "other"]}, "has no column 'other'"),
        ({"string": []}, "string must name a column"),
    ],
)
def test_columns_that_are_not_there_are_refused(write, columns, message):
    with pytest.raises(ValueError, match=message):
        strings.read_scores(write(ALL), **columns)


def test_the_wrong_byte_is_found_in_its_line(write):
    lines = "".join(f"{number:05},1\n" for number in range(2000))
    with pytest.raises(ValueError, match="line 2002: 'utf-8' codec"):
        strings.read_scores(write(b"string,score\n" + lines.encode() + b"\xe9,1\n"))


def test_damaged_archives_are_refused(write, tmp_path):
    whole = gzip.compress(("string,score\n" + "".join(f"{n:04},{n}\n" for n in range(3000))).encode())
    for content in (whole[: len(whole) // 2], whole[:500] + bytes(50) + whole[550:]):
        path = tmp_path / "scores.csv.gz"
        path.write_bytes(content)
        with pytest.raises((ValueError, OSError)):
            strings.read_scores(path)
    path.write_bytes(ALL.encode())
    with pytest.raises(OSError, match="Not a gzipped file"):
        strings.read_scores(path)


def test_files_that_are_not_there_are_an_error_of_the_system(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(OSError, match="none.csv|directory|denied"):
            strings.read_scores(path)


def test_too_many_lines_are_not_read(write, monkeypatch):
    monkeypatch.setattr(strings.reading, "MOST_STRINGS", 4)
    with pytest.raises(ValueError, match="has more than 8 lines: too many strings to list"):
        strings.read_scores(write("string,score\n" + "".join(f"{n},1\n" for n in range(10))))
