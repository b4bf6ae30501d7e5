"""Folders: what they hold, whose they are, and how damage shows."""

import contextlib
import functools
import importlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sweep
from dpo_jax.sweep import store
from tests.sweep import sweeps

planning = importlib.import_module("dpo_jax.sweep.planning")


# What a folder holds


def test_a_folder_holds_plain_arrays_and_says_what_made_them(whole):
    manifest = json.loads((whole / "sweep.json").read_text())
    assert manifest["axes"] == {"draws": [2, 3], "scale": [1.0, 2.0, 3.0, 4.0]}
    assert manifest["num_seeds"] == 9
    assert manifest["versions"]["jax"] == jax.__version__
    assert np.load(whole / "total.npy").shape == (2, 4, 9)
    assert np.load(whole / "part.column.npy").shape == (2, 4, 9, 2)


def test_results_are_read_from_the_folder(whole):
    results = sweeps.make(whole)
    np.testing.assert_array_equal(results["total"].values.ravel(), np.load(whole / "total.npy").ravel())
    assert not results["total"].values.flags.writeable


def test_a_sweep_that_is_done_is_not_computed_again(whole, expected, monkeypatch):
    told = []
    monkeypatch.setattr(planning, "compile_all", lambda *_: pytest.fail("compiled"))
    sweeps.make(whole, report=told.append)
    assert told == []
    assert sweeps.contents(whole) == expected


def test_a_sweep_goes_on_where_it_stopped(out, expected):
    told = []
    done = {int(path.name) for path in (out / "done").iterdir()}
    before = {path: path.stat().st_mtime_ns for path in (out / "done").iterdir()}
    sweeps.make(out, report=told.append)
    assert sweeps.contents(out) == expected
    assert told[0].resumed == told[0].done - 2 > 0
    assert len(told) == sweeps.NUM_BLOCKS - len(done)
    assert told[-1].done == told[-1].total == sweeps.NUM_RUNS
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_names_of_results_may_hold_slashes(tmp_path, key):
    run = lambda key: {"reward/chosen": 1.0, "reward%2Fchosen": 2.0}  # noqa: E731
    for _ in range(2):
        results = sweep.grid(run, key, num_seeds=2, out=tmp_path)
        assert {name: array.values.tolist() for name, array in results.items()} == {
            "reward/chosen": [1, 1],
            "reward%2Fchosen": [2, 2],
        }


def test_results_without_entries_are_stored(tmp_path, key):
    run = lambda key, *, scale: {"nothing": jnp.zeros((0, 2)), "value": scale}  # noqa: E731
    for _ in range(2):
        results = sweep.grid(run, key, num_seeds=3, out=tmp_path, scale=[1.0, 2.0])
        assert results["nothing"].shape == (2, 3, 0, 2)


# One at a time


def test_a_second_process_is_refused_at_once(tmp_path, expected):
    out, codes = tmp_path / "out", []

    def report(progress):
        if not codes and progress.done > 10:
            before = sweeps.contents(out)
            codes.append(sweeps.exit_code(sweeps.make_and_tell, out))
            assert sweeps.contents(out) == before

    sweeps.make(out, report=report)
    assert codes == [111]
    assert sweeps.contents(out) == expected


def test_the_refusal_says_why(tmp_path):
    def report(progress):
        with pytest.raises(BlockingIOError, match="in use by another process"):
            sweeps.make(tmp_path / "out")
        raise sweeps.StoppedError

    with pytest.raises(sweeps.StoppedError):
        sweeps.make(tmp_path / "out", report=report)


# Another sweep, or none


def noisy(key, *, scale, draws):
    return jax.tree.map(lambda leaf: 2 * leaf, sweeps.noisy(key, scale=scale, draws=draws))


def named(key, *, scale, draws):
    return sweeps.noisy(key, scale=scale, draws=draws)


def less(key, *, scale, draws):
    return {"total": scale}


less.__name__ = "noisy"


def with_a_table(key, *, scale, draws, entry):
    table = jnp.arange(5000.0).at[2500].set(entry)
    return scale * draws * table.sum()


SWEEP = {"num_seeds": 9, "runs_at_once": 2, "draws": [2, 3], "scale": [1.0, 2.0, 3.0, 4.0]}
OTHERS = {
    "values": (r"axes\.scale was \[1.0, 2.0, 3.0, 4.0\] and is now \[1.0, 2.0, 3.0, 5.0\]", {"scale": [1.0, 2, 3, 5]}),
    "fewer values": (r"axes\.scale was", {"scale": [1.0, 2.0]}),
    "names": (r"axes\.draws was \[2, 3\] and is now \[2\]", {"draws": [2]}),
    "more axes": (r"axes\.shift was null and is now \[0.5\]", {"shift": [0.5]}),
    "seeds": ("num_seeds was 9 and is now 10", {"num_seeds": 10}),
    "code": ("what run computes with draws=2 has changed", {"run": noisy}),
    "name": ('run was "noisy" and is now "named"', {"run": named}),
    "results": (r"dims\.part\.column was|results\.part\.column was", {"run": less}),
    "dims": ("dims.part.column was", {"dims": {"part": ["column"]}}),
    "size of blocks": ("2 runs at once, not 1", {"runs_at_once": 1}),
    "key": ("key was", {"key": jax.random.key(6)}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_sweep_is_refused_before_anything_is_compiled(whole, expected, monkeypatch, what):
    message, changes = OTHERS[what]
    options = {"run": sweeps.noisy, "key": sweeps.base_key(), **SWEEP, **changes}
    monkeypatch.setattr(planning, "compile_all", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=f"holds another sweep: {message}"):
        sweep.grid(out=whole, **options)
    assert sweeps.contents(whole) == expected


@pytest.mark.parametrize(("change", "num_traced"), [({"num_seeds": 10}, 0), ({"factor": 2.0}, 2)])
def test_a_refusal_traces_no_more_than_it_must(tmp_path, key, change, num_traced):
    traced = []

    def make(factor=1.0, num_seeds=2):
        def run(key, *, name):
            traced.append(name)
            return factor if name == "b" else 1.0

        sweep.grid(run, key, num_seeds=num_seeds, out=tmp_path, name=["a", "b", "c", "d"])

    make()
    traced.clear()
    with pytest.raises(ValueError, match=r"num_seeds was 2|what run computes with name='b' has changed"):
        make(**change)
    assert len(traced) == num_traced


def test_zeros_of_both_signs_are_told_apart(tmp_path, key):
    run = lambda key, *, a: 1 / a  # noqa: E731
    sweep.grid(run, key, num_seeds=1, out=tmp_path, a=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"axes\.a was \[0.0, 1.0\] and is now \[-0.0, 1.0\]"):
        sweep.grid(run, key, num_seeds=1, out=tmp_path, a=[-0.0, 1.0])


def test_a_sweep_goes_on_only_with_the_memory_that_it_was_begun_with(out, expected):
    before = sweeps.contents(out)
    with pytest.raises(ValueError, match=r"2 runs at once take .* bytes of memory .* only 20 may be used"):
        sweeps.make(out, memory_limit=20)
    assert sweeps.contents(out) == before
    sweeps.make(out, memory_limit=10**6)
    assert sweeps.contents(out) == expected


def test_more_runs_at_once_are_allowed_and_not_made(out, expected):
    sweep.grid(sweeps.noisy, sweeps.base_key(), out=out, **{**SWEEP, "runs_at_once": 3})
    assert sweeps.contents(out) == expected


def test_functions_without_names_of_their_own_can_go_on(tmp_path, key):
    def run(key, *, function):
        return function(jax.random.normal(key))

    def stop(progress):
        raise sweeps.StoppedError

    options = {"num_seeds": 4, "runs_at_once": 1, "out": tmp_path}
    for report in (stop, None):
        function = [functools.partial(lambda x, factor: x * factor, factor=factor) for factor in (2.0, 3.0)]
        with pytest.raises(sweeps.StoppedError) if report else contextlib.nullcontext():
            results = sweep.grid(run, key, report=report, function=function, **options)["result"]
    np.testing.assert_allclose(results[1] / results[0], 1.5, rtol=1e-6)
    with pytest.raises(ValueError, match="what run computes with function=.* has changed"):
        sweep.grid(
            run,
            key,
            function=[functools.partial(lambda x, factor: x + factor, factor=f) for f in (2.0, 3.0)],
            **options,
        )


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path, key):
    with pytest.raises(ValueError, match=r"need 40,000,000,000,000,000 more bytes in .*, and only .* are free"):
        sweep.grid(lambda key: jnp.zeros((10**7,)), key, num_seeds=10**9, runs_at_once=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_axes_in_another_order_are_another_sweep(whole, expected):
    options = dict(reversed(SWEEP.items()))
    with pytest.raises(ValueError, match="another sweep: order of axes"):
        sweep.grid(sweeps.noisy, sweeps.base_key(), out=whole, **options)
    assert sweeps.contents(whole) == expected


def test_another_version_makes_another_sweep(whole, expected, monkeypatch):
    monkeypatch.setattr(planning, "version", lambda package: "0.0.7")
    with pytest.raises(ValueError, match='versions.dpo_jax was .* and is now "0.0.7"'):
        sweeps.make(whole)
    assert sweeps.contents(whole) == expected


@pytest.mark.parametrize("num_runs", [1, 2, 4])
def test_numbers_that_a_run_closes_over_belong_to_the_sweep(tmp_path, key, num_runs):
    for entry in (1.0, 1.0):
        run = lambda key, *, scale, draws, entry=entry: with_a_table(key, scale=scale, draws=draws, entry=entry)  # noqa: E731
        sweep.grid(run, key, out=tmp_path, **{**SWEEP, "runs_at_once": num_runs})
    run = lambda key, *, scale, draws: with_a_table(key, scale=scale, draws=draws, entry=2.0)  # noqa: E731
    with pytest.raises(ValueError, match="another sweep: what run computes with draws=2 has changed"):
        sweep.grid(run, key, out=tmp_path, **{**SWEEP, "runs_at_once": num_runs})


def test_every_process_looks_whether_it_is_its_sweep(whole, expected, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="another sweep: num_seeds"):
        sweep.grid(sweeps.noisy, sweeps.base_key(), out=whole, **{**SWEEP, "num_seeds": 10})
    assert sweeps.contents(whole) == expected


@pytest.mark.parametrize(
    "name", ["notes.txt", "weights.npy", "total.npy", "data/notes.txt", "done/total.npy", "done/0"]
)
def test_a_folder_with_other_files_is_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        sweeps.make(tmp_path)
    assert sweeps.contents(tmp_path) == {name: b"mine"}
    assert not (tmp_path / ".lock").exists()


def loop(path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


PLACES = {
    "in a loop of symbolic links": (loop, OSError),
    "is a link to .*nothing, which does not exist": (lambda path: path.symlink_to("nothing"), FileNotFoundError),
    "is a file: choose another folder": (lambda path: path.write_text("mine"), NotADirectoryError),
}


@pytest.mark.parametrize("message", PLACES)
@pytest.mark.parametrize("below", [".", "a/b"])
def test_what_is_no_folder_is_told_in_words(tmp_path, message, below):
    make, error = PLACES[message]
    make(tmp_path / "out")
    with pytest.raises(error, match=message):
        sweeps.make(tmp_path / "out" / below)


def test_a_link_to_a_folder_is_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    store.check_place(tmp_path / "link" / "a" / "b")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        sweeps.make(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# Damage


def change(name, function):
    return lambda folder: (folder / name).write_bytes(function((folder / name).read_bytes()))


def remove(name):
    return lambda folder: (folder / name).unlink()


def flipped(data, byte, bit=0):
    return data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :]


def say(**changes):
    return change("sweep.json", lambda data: json.dumps({**json.loads(data), **changes}).encode())


DAMAGE = {
    "an array is cut": ("total.npy cannot be read", change("total.npy", lambda data: data[:-1])),
    "an array is empty": ("total.npy cannot be read", change("total.npy", lambda data: b"")),
    "an array is missing": ("total.npy cannot be read", remove("total.npy")),
    "an array has grown": ("total.npy is not as it was made", change("total.npy", lambda data: data + bytes(8))),
    "a header is garbage": ("total.npy cannot be read", change("total.npy", lambda data: b"x" * len(data))),
    "another dtype": ("total.npy holds >f4", change("total.npy", lambda data: data.replace(b"<f4", b">f4"))),
    "another order": ("not as it was made", change("total.npy", lambda data: data.replace(b"False", b"True ", 1))),
    "a byte of a result": ("block 0 is not what was written", change("total.npy", lambda data: flipped(data, 128))),
    "a checksum is empty": ("block 1 is not what was written", change("done/1", lambda data: b"")),
    "a checksum is garbage": ("block 1 is not what was written", change("done/1", lambda data: b"\xff" * 9)),
    "half a sweep.json": ("sweep.json cannot be read", change("sweep.json", lambda data: data[: len(data) // 2])),
    "garbage in sweep.json": ("sweep.json cannot be read", change("sweep.json", lambda data: b"\xff\xfe{")),
    "a list in sweep.json": ("format", change("sweep.json", lambda data: b"[]")),
    "another format": ("format", say(format=99)),
    "no size of blocks": ("runs_at_once", say(runs_at_once={})),
    "blocks of no size": ("runs_at_once", say(runs_at_once={"seeds": 0, "points": 2})),
    "blocks of a text's size": ("runs_at_once", say(runs_at_once={"seeds": "2", "points": 2})),
}


def make_as_it_was(out):
    """Without saying how many runs at once."""
    return sweep.grid(sweeps.noisy, sweeps.base_key(), out=out, **{**SWEEP, "runs_at_once": None})


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("make", [sweeps.make, make_as_it_was])
def test_damage_is_found_and_nothing_written_over_it(out, what, make):
    message, damage = DAMAGE[what]
    damage(out)
    before = sweeps.contents(out)
    with pytest.raises(sweep.DamagedStoreError, match=f"(?s){message}"):
        make(out)
    assert sweeps.contents(out) == before


def test_all_damage_is_named_at_once(tmp_path, whole):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for number in range(3, 15):
        (out / "done" / str(number)).write_text("00000000\n")
    with pytest.raises(sweep.DamagedStoreError, match=r"blocks 3, .*, 12, ... \(12 in all\) are not .*repair=True"):
        sweeps.make(out)
    for name in ("total", "part.column"):
        (out / f"{name}.npy").write_bytes(b"")
    with pytest.raises(sweep.DamagedStoreError, match=r"part.column.npy cannot be read .*; total.npy cannot be read"):
        sweeps.make(out)


@pytest.mark.parametrize("what", DAMAGE)
def test_repair_makes_again_what_is_damaged_and_nothing_else(tmp_path, whole, expected, what):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    message, damage = DAMAGE[what]
    damage(out)
    if "sweep.json" in message or "format" in message or "runs_at_once" in message:
        with pytest.raises(sweep.DamagedStoreError, match=message):
            sweeps.make(out, repair=True)
        return
    told = []
    sweeps.make(out, repair=True, report=told.append)
    assert sweeps.contents(out) == expected
    assert len(told) == (1 if "block" in message else sweeps.NUM_BLOCKS)


def test_a_complete_folder_is_read_without_writing(tmp_path, whole, expected, monkeypatch):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / ".lock").unlink()
    for name in ("mkdir", "unlink", "touch"):
        monkeypatch.setattr(Path, name, lambda *_, **__: pytest.fail("the file system is read-only"))
    sweeps.make(out)
    assert sweeps.contents(out) == expected
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_data_are_on_the_disk_before_a_block_is_done(tmp_path, whole, monkeypatch, seconds):
    monkeypatch.setattr(store, "SECONDS_BETWEEN_SYNCS", seconds)
    blocks = sweep.plan(sweeps.noisy, sweeps.base_key(), **SWEEP).blocks()
    synced, marked, fsync = {}, [], os.fsync

    def noted(descriptor):
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.suffix == ".npy":
            synced[path.name] = np.load(path)
        if path.parent.name == "done":
            marked.append(block := blocks[int(path.name.split(".")[1])])
            for name in ("total.npy", "part.column.npy"):
                part = block.combination, block.points, block.seeds
                np.testing.assert_array_equal(synced[name][part], np.load(whole / name)[part])

    monkeypatch.setattr(os, "fsync", noted)
    sweeps.make(tmp_path / "out")
    assert marked == blocks


def test_every_bit_of_an_array_is_looked_after(tmp_path, whole):
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    plan = sweep.plan(sweeps.noisy, sweeps.base_key(), **SWEEP)
    kept = store.Folder(folder, json.loads((folder / "sweep.json").read_text()))
    kept.verify(plan.blocks())
    data = (folder / "total.npy").read_bytes()
    array = kept.arrays()["total"]
    bits = [(byte, bit) for byte in range(128) for bit in range(8)] + [(byte, 0) for byte in range(128, len(data), 8)]
    for byte, bit in bits:
        (folder / "total.npy").write_bytes(flipped(data, byte, bit))
        try:
            kept.verify(plan.blocks())
        except sweep.DamagedStoreError:
            continue
        assert byte < 128
        np.testing.assert_array_equal(kept.arrays()["total"], array)


def test_what_nothing_says_is_done_is_done_again(out, expected):
    shutil.rmtree(out / "done")
    sweeps.make(out)
    assert sweeps.contents(out) == expected


def test_the_size_of_blocks_is_that_of_the_first_start(out, expected):
    make_as_it_was(out)
    assert sweeps.contents(out) == expected
