import json

import chex
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_jax import toy

ROWS = [("tea?", "Assam", "Sencha"), ("tea?", "Sencha", "Keemun"), ("über, \n«tea»", "yes", "no")]
NAMES = toy.Names(("tea?", "über, \n«tea»"), (("Assam", "Sencha", "Keemun"), ("yes", "no")))


def write_csv(path, rows, columns=("prompt", "chosen", "rejected")):
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in map(str, row)) for row in (columns, *rows)]
    path.write_text("\r\n".join(quoted), encoding="utf-8", newline="")
    return path


def write_jsonl(path, rows, columns=("prompt", "chosen", "rejected")):
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path, rows, columns=("prompt", "chosen", "rejected")):
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(columns, zip(*rows, strict=True), strict=True))), path)
    return path


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_reads_the_same(tmp_path, suffix):
    names, preferences = toy.read_comparisons(WRITERS[suffix](tmp_path / f"file{suffix}", ROWS))
    assert names == NAMES
    assert names.compared.tolist() == [[True, True, True], [True, True, False]]
    assert preferences.prompts.tolist() == [0, 0, 1]
    assert preferences.responses.chosen.tolist() == [0, 1, 0]
    assert preferences.responses.rejected.tolist() == [1, 2, 1]
    assert preferences.weights is None


@pytest.mark.parametrize("suffix", WRITERS)
def test_weights_are_scaled_to_average_one(tmp_path, suffix):
    rows = [(*row, weight) for row, weight in zip(ROWS, (1, 2, 3), strict=True)]
    path = WRITERS[suffix](tmp_path / f"file{suffix}", rows, ("prompt", "chosen", "rejected", "weight"))
    np.testing.assert_allclose(toy.read_comparisons(path).preferences.weights, [0.5, 1.0, 1.5], rtol=1e-6)


@pytest.mark.parametrize("suffix", WRITERS)
def test_other_columns_are_ignored_and_numbers_are_names(tmp_path, suffix):
    rows = [("q", 1, 2, "Ann"), ("q", 2, 3, "Bob")]
    path = WRITERS[suffix](tmp_path / f"file{suffix}", rows, ("prompt", "chosen", "rejected", "judge"))
    assert toy.read_comparisons(path).names.responses == (("1", "2", "3"),)


text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@given(rows=st.lists(st.tuples(text, text, text).filter(lambda row: row[1] != row[2]), min_size=1, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_any_text_survives(tmp_path, rows):
    for suffix, write in WRITERS.items():
        names, preferences = toy.read_comparisons(write(tmp_path / f"file{suffix}", rows))
        columns = (preferences.prompts, *preferences.responses)
        read = [
            (names.prompts[p], names.responses[p][c], names.responses[p][r])
            for p, c, r in zip(*(column.tolist() for column in columns), strict=True)
        ]
        assert read == rows


HEADER = "prompt,chosen,rejected\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "no column prompt, chosen, rejected; found none"),
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
        ("a.csv", b"prompt,chosen,rejected,weight\na,b,c,much\n", "line 2: weight must be positive.* 'much'"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b"}', "line 1: no column rejected"),
        ("a.jsonl", b'\n{"prompt"', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1: expected an object"),
        ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
        ("a.jsonl", b'{"prompt": NaN, "chosen": "b", "rejected": "c"}', "line 1: prompt is blank"),
        ("a.jsonl", b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', "line 1: prompt has half a character"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": true}', "weight must be positive"),
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
        ("a.txt", b"a,b,c", "expected a file that ends in .csv, .jsonl, .ndjson, .parquet"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        toy.read_comparisons(path)
    assert str(path) in str(caught.value)


def test_headers_as_other_programs_write_them(tmp_path):
    for header, row in (("", "0"), (" prompt", None)):
        path = tmp_path / "file.csv"
        cells = [header, "prompt", "chosen", "rejected"] if row else [header, " chosen", "rejected "]
        path.write_text(",".join(cells) + "\n" + ",".join([row, "q", "a", "b"] if row else ["q", "a", "b"]) + "\n")
        assert toy.read_comparisons(path).names == toy.Names(("q",), (("a", "b"),))


def test_responses_may_be_long(tmp_path):
    long = "x" * 300_000
    names, _ = toy.read_comparisons(write_csv(tmp_path / "file.csv", [("q", long, "b")]))
    assert names.responses == ((long, "b"),)


def test_bad_parquet_rows_are_refused_by_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [("a", "b", "c"), ("a", None, "c")])
    with pytest.raises(ValueError, match="row 2: chosen is blank"):
        toy.read_comparisons(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.csv"):
        toy.read_comparisons(tmp_path / "nowhere.csv")


def make_policy():
    log_probs = np.log(np.array([[0.2, 0.7, 0.1], [0.4, 0.6, 1.0]], np.float32))
    log_probs[1, 2] = -np.inf
    return toy.NamedPolicy(NAMES, log_probs, log_probs - 1)


def test_a_saved_policy_loads_again(tmp_path):
    policy = make_policy()
    toy.save_policy(tmp_path / "policy.npz", policy)
    loaded = toy.load_policy(tmp_path / "policy.npz")
    assert loaded.names == policy.names
    chex.assert_trees_all_equal(loaded[1:], policy[1:])


def test_ranking_names_the_best_first():
    ranking = make_policy().ranking("über, \n«tea»")
    assert [name for name, _ in ranking] == ["no", "yes"]
    np.testing.assert_allclose([probability for _, probability in ranking], [0.6, 0.4], rtol=1e-5)
    with pytest.raises(KeyError, match="no such prompt: 'coffee'"):
        make_policy().ranking("coffee")


def test_a_file_that_is_no_policy_is_refused(tmp_path):
    (tmp_path / "policy.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ValueError, match="does not hold a policy"):
        toy.load_policy(tmp_path / "policy.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="does not hold a policy"):
        toy.load_policy(tmp_path / "other.npz")
    toy.save_policy(tmp_path / "shapes.npz", make_policy()._replace(log_probs=np.zeros((3, 7), np.float32)))
    with pytest.raises(ValueError, match="the shapes differ"):
        toy.load_policy(tmp_path / "shapes.npz")
    with pytest.raises(FileNotFoundError):
        toy.load_policy(tmp_path / "nowhere.npz")
