import json
import string
import tracemalloc
import unicodedata
import zipfile
from decimal import Decimal

import chex
import jax.numpy as jnp
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
    names, preferences, _ = toy.read_comparisons(WRITERS[suffix](tmp_path / f"file{suffix}", ROWS))
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
def test_other_columns_are_named_and_numbers_are_names(tmp_path, suffix):
    rows = [("q", 1, 2.0, "Ann", 1.8), ("q", 2, 3.0, "Bob", 1.7)]
    columns = (" Prompt", "CHOSEN", "rejected ", " judge", "height")
    read = toy.read_comparisons(WRITERS[suffix](tmp_path / f"file{suffix}", rows, columns))
    assert read.names.responses == (("1", "2", "3"),)
    assert read.unused_columns == ("judge", "height")


def tidy(text):
    return unicodedata.normalize("NFC", text).strip("\ufeff\u200b" + string.whitespace + "\u00a0\u2003\u3000")


text = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1).map(tidy).filter(bool)


@given(rows=st.lists(st.tuples(text, text, text).filter(lambda row: row[1] != row[2]), min_size=1, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_any_text_survives(tmp_path, rows):
    for suffix, write in WRITERS.items():
        names, preferences, _ = toy.read_comparisons(write(tmp_path / f"file{suffix}", rows))
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
        ("a.jsonl", b'{"prompt": "a", "chosen": 1, "rejected": 1.0}', "line 1: chosen and rejected are the same, '1'"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "'chosen' is given twice"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", " Chosen": "d"}', "line 1: two columns have the"),
        ("a.jsonl", b'{"prompt": "a", "chosen": 1e999999999, "rejected": "c"}', "chosen is a number with too many"),
        ("a.jsonl", b'{"prompt": "a", "chosen": Infinity, "rejected": "c"}', "chosen is a number with too many"),
        ("a.csv", (HEADER + "a, b,b\n").encode(), "line 2: chosen and rejected are the same, 'b'"),
        ("a.csv", (HEADER + "a,e\u0301,\u00e9\n").encode(), "line 2: chosen and rejected are the same, '\u00e9'"),
        ("a.csv", (HEADER + "a,b,\u200b\n").encode(), "line 2: rejected is blank"),
        ("a.csv", b"prompt,chosen,rejected,Chosen \na,b,c,d\n", "two columns have the same name, 'chosen'"),
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
            "no column prompt, chosen.*'prompts' for prompt, 'choosen' for",
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", '"prompt","chosen","rejected"\nq,a,b\n'),
        ("a.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert toy.read_comparisons(tmp_path / name).names == toy.Names(("q",), (("a", "b"),))


def test_spaces_before_quotes_are_not_part_of_a_name(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text('prompt, chosen, rejected\nq, "a, b", c\nq,c,"a, b "\n')
    assert toy.read_comparisons(path).names.responses == (("a, b", "c"),)


def test_nested_cells_are_refused_by_row(tmp_path):
    for cells in ([["b"], ["c"]], [{"text": "b"}, {"text": "c"}]):
        columns = {"prompt": ["q", "q"], "chosen": ["a", "a"], "rejected": cells}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="row 1: rejected must be text, got "):
            toy.read_comparisons(tmp_path / "a.parquet")


def test_responses_may_be_long(tmp_path):
    long = "x" * 300_000
    names, *_ = toy.read_comparisons(write_csv(tmp_path / "file.csv", [("q", long, "b")]))
    assert names.responses == ((long, "b"),)


def test_bad_parquet_rows_are_refused_by_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [("a", "b", "c"), ("a", None, "c")])
    with pytest.raises(ValueError, match="row 2: chosen is blank"):
        toy.read_comparisons(path)


def test_a_name_is_one_name_however_it_is_written(tmp_path):
    path = tmp_path / "a.jsonl"
    numbers = ["1", "1.0", "1e0", '"1"', '" 1 "', "10E-1"], ["9007199254740993", "9007199254740993.0"], ["2.5", "2.50"]
    others = ['"caf\u00e9"', '"cafe\u0301 "', '"caf\\u00e9"']
    pairs = [(name, "0") for names in (*numbers, others) for name in names]
    path.write_text("".join(f'{{"prompt": "q", "chosen": {a}, "rejected": {b}}}\n' for a, b in pairs), encoding="utf-8")
    expected = ("1", "0", "9007199254740993", "2.5", "caf\u00e9")
    assert toy.read_comparisons(path).names.responses == (expected,)


def test_numbers_of_a_parquet_file_are_names_whatever_their_type(tmp_path):
    columns = {
        "prompt": pyarrow.array([1, 1, 2]),
        "chosen": pyarrow.array([Decimal("1.00"), Decimal("2.00"), Decimal("2.50")]),
        "rejected": pyarrow.array([2.0, 3.0, 1.0]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert toy.read_comparisons(tmp_path / "a.parquet").names.responses == (("1", "2", "3"), ("2.5", "1"))
    columns["chosen"] = pyarrow.array([1.0, 2.0**53, 1.0])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 2: chosen is a number with too many digits for a name, 90071992547409"):
        toy.read_comparisons(tmp_path / "a.parquet")
    columns["chosen"] = pyarrow.array([True, True, True])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 1: chosen must be text, got True"):
        toy.read_comparisons(tmp_path / "a.parquet")


def test_text_in_a_csv_that_looks_like_a_number_stays_text_beside_other_text(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("1.0", "1.0", "v2"), ("2", "2", "1")])
    assert toy.read_comparisons(path).names == toy.Names(("1", "2"), (("1.0", "v2"), ("2", "1")))


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
    assert toy.read_comparisons(tmp_path / "a.parquet").names.responses == (("a", "b", "\u00fc"),)
    write(["b", b"caf\xe9"])
    with pytest.raises(ValueError, match=r"a\.parquet, column rejected, row 2: not UTF-8 text .byte 0xe9"):
        toy.read_comparisons(tmp_path / "a.parquet")


def test_weights_of_a_file_that_are_not_zero_stay_so(tmp_path):
    rows = [("q", "a", "b", 1e-300), ("q", "b", "c", 1e-271)]
    path = write_csv(tmp_path / "a.csv", rows, ("prompt", "chosen", "rejected", "weight"))
    weights = toy.read_comparisons(path).preferences.weights
    assert jnp.all(weights > 1e-30)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.csv"):
        toy.read_comparisons(tmp_path / "nowhere.csv")


def make_policy():
    log_probs = np.log(np.array([[0.2, 0.7, 0.1], [0.4, 0.6, 1.0]], np.float32))
    reference = np.log(np.array([[0.3, 0.3, 0.4], [0.5, 0.5, 1.0]], np.float32))
    log_probs[1, 2] = reference[1, 2] = -np.inf
    return toy.NamedPolicy(NAMES, log_probs, reference)


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
    assert make_policy().ranking(" u\u0308ber, \n\u00abtea\u00bb") == ranking
    with pytest.raises(KeyError, match="no such prompt: 'coffee'"):
        make_policy().ranking("coffee")
    with pytest.raises(ValueError, match="NaN for the prompt 'tea"):
        make_policy()._replace(log_probs=table_with(0, 1, np.nan)).ranking("tea?")


def write_policy(path, **changes):
    """A policy as older versions wrote it, compressed, perhaps with changes."""
    policy = make_policy()
    arrays = {"names": json.dumps(policy.names), "log_probs": policy.log_probs, "reference": policy.reference_log_probs}
    np.savez_compressed(path, **{**arrays, **changes})
    return path


def test_a_policy_of_an_older_version_loads(tmp_path):
    loaded = toy.load_policy(write_policy(tmp_path / "policy.npz"))
    assert loaded.names == NAMES
    chex.assert_trees_all_equal(loaded[1:], make_policy()[1:])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_a_saved_policy_of_any_precision_loads_again(tmp_path, dtype):
    names = toy.Names(("q",), (tuple(map(str, range(100))),))
    table = jnp.full((1, 100), -np.log(100)).astype(dtype) if dtype != np.float64 else np.full((1, 100), -np.log(100))
    toy.save_policy(tmp_path / "policy.npz", toy.NamedPolicy(names, table, table))
    np.testing.assert_allclose(np.exp(toy.load_policy(tmp_path / "policy.npz").log_probs), 0.01, rtol=1e-5)


def table_with(row, column, value):
    table = make_policy().log_probs.copy()
    table[row, column] = value
    return table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": np.zeros((3, 7), np.float32)}, "the shapes differ"),
        ({"log_probs": table_with(0, 1, np.nan)}, r"log_probs must be zero or negative.* got nan in row \(0, 1\)"),
        ({"reference": table_with(0, 1, 0.5)}, r"reference must be zero or negative.* got 0.5 in row \(0, 1\)"),
        ({"log_probs": table_with(1, 2, -50.0)}, r"must be -inf where there is no response, got -50.0 in row \(1, 2\)"),
        (
            {"reference": table_with(1, 1, -50.0)},
            "reference: the probabilities of a prompt must sum to 1, got 0.4 in row 1",
        ),
        ({"log_probs": np.zeros((2, 3), "<U3")}, "must be floats"),
        ({"names": json.dumps([["q", "r"], [["a", "b", "c"]]])}, "names.responses must be 2 lists"),
        ({"names": json.dumps([["q", "q"], [["a", "b", "c"], ["a", "b"]]])}, "names.prompts must be distinct, got 'q'"),
        ({"names": json.dumps([["q", "r"], [["a", "b", "b"], ["a", "b"]]])}, r"names.responses\[0\] must be distinct"),
        (
            {"names": json.dumps([["q", "r"], [["a", "b", 3], ["a", "b"]]])},
            r"names.responses\[0\] must be a list of str",
        ),
        ({"names": json.dumps([["q", "r"], ["abc", ["a", "b"]]])}, r"names.responses\[0\] must be a list of strings"),
        ({"names": json.dumps([["q", "r"], [["a", "b", "c"], []]])}, r"names.responses\[1\] must be a list of strings"),
        ({"names": json.dumps([["q", "r"], [["a", "b"], ["a", "b"]]])}, "the shapes differ"),
        ({"names": np.zeros(3)}, "names must be one string"),
    ],
)
def test_a_policy_that_is_none_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        toy.load_policy(write_policy(tmp_path / "policy.npz", **changes))
    assert str(tmp_path / "policy.npz") in str(caught.value)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    for policy in (
        make_policy()._replace(log_probs=table_with(0, 1, np.nan)),
        make_policy()._replace(names=toy.Names(("q", "q"), NAMES.responses)),
        make_policy()._replace(reference_log_probs=np.zeros((3, 7), np.float32)),
    ):
        with pytest.raises(ValueError, match="must"):
            toy.save_policy(tmp_path / "policy.npz", policy)
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_is_not_unpacked_to_a_large_one(tmp_path):
    """Sizes are compared before memory is taken: for the tables as the names say, for the names by the file's size."""
    bomb = np.zeros(1_000_000)  # 8 MB, or 8 kB when compressed
    tracemalloc.start()
    for name, message in (("log_probs", "the shapes differ"), ("names", "would take 8,000,128 bytes when unpacked")):
        with pytest.raises(ValueError, match=message):
            path = write_policy(tmp_path / "policy.npz", **{name: bomb})
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            toy.load_policy(path)
        assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    tracemalloc.stop()
    header = (
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }".ljust(117) + b"\n"
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("names", "log_probs"):
            archive.writestr(f"{name}.npy", header + bytes(1_000_000))
    with pytest.raises(ValueError, match="names takes 1,000,128 bytes, but its header says 152"):
        toy.load_policy(path)


def test_a_file_that_is_no_policy_is_refused(tmp_path):
    (tmp_path / "policy.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ValueError, match="does not hold a policy"):
        toy.load_policy(tmp_path / "policy.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="does not hold a policy"):
        toy.load_policy(tmp_path / "other.npz")
    toy.save_policy(tmp_path / "cut.npz", make_policy())
    content = (tmp_path / "cut.npz").read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 30):
        (tmp_path / "cut.npz").write_bytes(content[:size])
        with pytest.raises(ValueError, match="does not hold a policy"):
            toy.load_policy(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError):
        toy.load_policy(tmp_path / "nowhere.npz")
