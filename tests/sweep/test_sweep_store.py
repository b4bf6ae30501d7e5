"""Folders: what they hold, whose they are, and how damage shows."""

import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sweep
from dpo_jax.sweep import store
from tests import forked
from tests.sweep import sweeps

grid_module = importlib.import_module("dpo_jax.sweep.grid")

planning = importlib.import_module("dpo_jax.sweep.planning")


# What a folder holds


def test_a_folder_holds_plain_arrays_and_says_what_made_them(whole):
    manifest = json.loads((whole / "sweep.json").read_text())
    assert manifest["axes"] == {"draws": "static", "scale": "traced"}
    (box,) = manifest["boxes"]
    assert box["combinations"] == [{"draws": 2}, {"draws": 3}]
    assert box["points"] == [{"scale": 1.0}, {"scale": 2.0}, {"scale": 3.0}, {"scale": 4.0}]
    assert box["seeds"] == {"from": 0, "below": 9}
    assert manifest["versions"]["jax"] == jax.__version__
    with np.load(whole / "blocks" / "0.npz") as block:
        assert {name: array.shape for name, array in block.items()} == {"_total": (2, 1), "_part.column": (2, 1, 2)}


def test_a_sweep_that_is_done_is_not_computed_again(whole, expected, monkeypatch):
    told = []
    monkeypatch.setattr(planning, "compile_all", lambda *_: pytest.fail("compiled"))
    sweeps.make(whole, report=told.append)
    assert told == []
    assert sweeps.contents(whole) == expected


def test_a_sweep_goes_on_where_it_stopped(out, expected):
    told = []
    before = {path: path.stat().st_mtime_ns for path in (out / "blocks").iterdir()}
    sweeps.make(out, report=told.append)
    assert sweeps.contents(out) == expected
    assert told[0].resumed == told[0].done - 2 > 0
    assert len(told) == sweeps.NUM_BLOCKS - len(before)
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
            codes.append(forked.exit_code(sweeps.make_and_tell, out))
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


SWEEP = {"num_seeds": 9, "runs_at_once": 2, "draws": sweep.static([2, 3]), "scale": [1.0, 2.0, 3.0, 4.0]}
OTHERS = {
    "more axes": (r"axes\.shift was null and is now \"traced\"", {"shift": [0.5]}),
    "another kind of axis": (r"axes\.draws was \"static\"", {"draws": [2, 3]}),
    "code": ("what run computes with draws=2 has changed", {"run": noisy}),
    "name": ('run was "noisy" and is now "named"', {"run": named}),
    "results": (r"results\.part\.column was", {"run": less}),
    "dims": ("dims.part.column was", {"dims": {"part": ["column"]}, "num_seeds": 10}),
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


def test_numbers_and_truth_values_are_told_apart(tmp_path):
    store.refuse_other(tmp_path, {"a": {"b": 1}}, {"a": {"b": 1}})
    with pytest.raises(ValueError, match="another sweep: a.b was 1 and is now true"):
        store.refuse_other(tmp_path, {"a": {"b": 1}}, {"a": {"b": True}})


def test_zeros_of_both_signs_are_told_apart(tmp_path, key):
    run = lambda key, *, a: 1 / a  # noqa: E731
    sweep.grid(run, key, num_seeds=1, out=tmp_path, a=[0.0, 1.0])
    results = sweep.grid(run, key, num_seeds=1, out=tmp_path, a=[-0.0, 1.0])
    assert results.result.values.ravel().tolist() == [-np.inf, 1.0]


@pytest.mark.parametrize(("change", "num_traced"), [({"key": 1}, 0), ({"factor": 2.0}, 2)])
def test_a_refusal_traces_no_more_than_it_must(tmp_path, key, change, num_traced):
    traced = []

    def make(factor=1.0, key=0):
        def run(key, *, name):
            traced.append(name)
            return factor if name == "b" else 1.0

        sweep.grid(run, jax.random.key(key), num_seeds=2, out=tmp_path, name=["a", "b", "c", "d"])

    make()
    traced.clear()
    with pytest.raises(ValueError, match=r"key was|what run computes with name='b' has changed"):
        make(**change)
    assert len(traced) == num_traced


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


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path, key, monkeypatch):
    monkeypatch.setattr(grid_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=399))
    with pytest.raises(ValueError, match=r"need 400 more bytes in .*, and only 399 are free"):
        sweep.grid(lambda key: jnp.zeros((10,)), key, num_seeds=10, runs_at_once=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_axes_in_another_order_are_another_sweep(whole, expected):
    options = dict(reversed(SWEEP.items()))
    with pytest.raises(ValueError, match="another sweep: order of axes"):
        sweep.grid(sweeps.noisy, sweeps.base_key(), out=whole, **options)
    assert sweeps.contents(whole) == expected


def test_another_version_makes_another_sweep(whole, expected, monkeypatch):
    assert {*json.loads((whole / "sweep.json").read_text())["versions"]} == {"dpo_jax", "jax", "jaxlib"}
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


def test_starts_belong_to_the_sweep_with_their_seeds(tmp_path, key):
    starts = sweep.prepare(jax.random.normal, key, num_seeds=2)
    sweep.grid(lambda start: start, starts, out=tmp_path)
    swapped = sweep.Starts(starts.values, [1, 0])
    with pytest.raises(ValueError, match="another sweep: key was"):
        sweep.grid(lambda start: start, swapped, out=tmp_path)


# Growing


def trained(key, *, beta, learning_rate):
    return sweeps.training(key, beta=beta, learning_rate=learning_rate)


GROWTH = {
    "seeds": [{"num_seeds": 3}, {"num_seeds": 8}],
    "values": [{"beta": [0.1]}, {"beta": [0.5, 0.1, 0.05]}],
    "both": [{"num_seeds": 3, "beta": [0.5]}, {"num_seeds": 5, "beta": [0.1, 0.5]}, {"learning_rate": [1.0, 0.3]}],
    "other seeds": [{"num_seeds": None, "seeds": [6, 1]}, {"num_seeds": None, "seeds": [1, 2, 6]}],
}


@pytest.mark.parametrize("how", GROWTH)
def test_a_folder_grows_without_computing_anything_twice(tmp_path, key, how):
    options = {"num_seeds": 4, "beta": [0.1, 1.0], "learning_rate": [0.3]}
    done = 0
    for change in GROWTH[how]:
        told, asked = [], options | change
        grown = sweep.grid(trained, key, out=tmp_path, runs_at_once=(2, 2), report=told.append, **asked)
        done += sum(p.done - p.resumed for p in told[-1:])
        at_once = sweep.grid(trained, key, runs_at_once=(2, 2), **asked)
        sweeps.assert_same(grown, at_once)
    everything = sweep.open_results(tmp_path)
    assert int(everything.loss.notnull().all("loss_0").sum()) == done
    np.testing.assert_array_equal(everything.loss.sel(dict(grown.coords)), grown.loss)


def test_a_static_axis_grows(tmp_path, whole, expected):
    for draws in ([3], [2, 3]):
        grown = sweep.grid(sweeps.noisy, sweeps.base_key(), out=tmp_path, **{**SWEEP, "draws": sweep.static(draws)})
    sweeps.assert_same(grown, sweeps.make(None))


def test_code_of_a_value_that_was_added_belongs_to_the_sweep(tmp_path, key):
    def run_with(factor):
        def run(key, *, draws):
            return jax.random.normal(key, (draws,)).sum() * (factor if draws == 3 else 1.0)

        return run

    for draws in ([2], [2, 3]):
        sweep.grid(run_with(1.0), key, num_seeds=2, out=tmp_path, draws=sweep.static(draws))
    with pytest.raises(ValueError, match="what run computes with draws=3 has changed"):
        sweep.grid(run_with(5.0), key, num_seeds=2, out=tmp_path, draws=sweep.static([2, 3]))


def test_less_may_be_asked_of_a_folder_than_it_holds(whole, expected):
    some = sweep.grid(sweeps.noisy, sweeps.base_key(), out=whole, **{**SWEEP, "scale": [3.0], "num_seeds": 2})
    sweeps.assert_same(some, sweeps.make(None).sel(scale=[3.0], seed=[0, 1]))
    assert sweeps.contents(whole) == expected


def test_results_are_opened_without_the_function_that_made_them(whole, half):
    sweeps.assert_same(sweep.open_results(whole), sweeps.make(None))
    some = sweep.open_results(half)
    assert not some.complete
    assert sweep.open_results(whole).complete
    assert 0 < int(some.total.isnull().sum()) < some.total.size
    np.testing.assert_array_equal(some.total.fillna(0), sweeps.make(None).total.where(some.total.notnull(), 0))
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        sweep.open_results(whole / "nothing")


def test_the_folder_of_the_command_is_opened_too(tmp_path):
    """It keeps its sweep in `runs`, beside tables and figures."""
    sweeps.make(tmp_path / "out" / "runs")
    (tmp_path / "out" / "summary.csv").write_text("a table")
    sweeps.assert_same(sweep.open_results(tmp_path / "out"), sweeps.make(None))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        sweep.open_results(tmp_path / "other")


# Shares


def test_shares_make_the_whole_and_wait_for_nobody(tmp_path, expected):
    for i in (2, 3, 1, 3):
        results = sweeps.make(tmp_path / "out", share=(i, 3))
    assert results.complete
    assert sweeps.contents(tmp_path / "out") == expected


def test_a_share_that_died_is_started_again_alone(tmp_path, expected):
    for i in (1, 2):
        with pytest.raises(sweeps.StoppedError) if i == 1 else contextlib.nullcontext():
            sweeps.make(tmp_path / "out", share=(i, 2), report=(lambda _: sweeps.stop()) if i == 1 else None)
    assert not sweep.open_results(tmp_path / "out").complete
    sweeps.make(tmp_path / "out", share=(1, 2))
    assert sweeps.contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "name", ["notes.txt", "weights.npy", "total.npy", "data/notes.txt", "blocks/total.npy", "blocks/0.npz"]
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


def shortened(data):
    """A block of fewer points."""
    with np.load(io.BytesIO(data)) as block:
        np.savez(made := io.BytesIO(), **{name: array[:1] for name, array in block.items()})
    return made.getvalue()


DAMAGE = {
    "a block is cut": ("block 1 is not what was written", change("blocks/1.npz", lambda data: data[:-1])),
    "a block is empty": ("block 1 is not what was written", change("blocks/1.npz", lambda data: b"")),
    "a block is garbage": ("block 1 is not what was written", change("blocks/1.npz", lambda data: b"x" * len(data))),
    "another shape": ("block 1 is not what was written .*something else", change("blocks/1.npz", shortened)),
    "another dtype": ("block 1 is not", change("blocks/1.npz", lambda data: data.replace(b"<f4", b">f4"))),
    "another order": ("block 1 is not", change("blocks/1.npz", lambda data: data.replace(b"False", b"True ", 1))),
    "a byte of a result": ("block 1 is not what was written", change("blocks/1.npz", lambda data: flipped(data, 200))),
    "half a sweep.json": ("sweep.json cannot be read", change("sweep.json", lambda data: data[: len(data) // 2])),
    "garbage in sweep.json": ("sweep.json cannot be read", change("sweep.json", lambda data: b"\xff\xfe{")),
    "a list in sweep.json": ("format", change("sweep.json", lambda data: b"[]")),
    "another format": ("format", say(format=99)),
    "no size of blocks": ("size of blocks as {}", say(block={})),
    "blocks of no size": ("size of blocks", say(block={"seeds": 0, "points": 2})),
    "blocks of a text's size": ("size of blocks", say(block={"seeds": "2", "points": 2})),
    "no boxes": ("gives boxes as None", say(boxes=None)),
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


def test_all_damage_is_named_and_repaired_at_once(tmp_path, whole, expected):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for number in range(3, 15):
        (out / "blocks" / f"{number}.npz").write_bytes(b"")
    with pytest.raises(sweep.DamagedStoreError, match=r"blocks 3, .*, 12, ... \(12 in all\) are not .*repair=True"):
        sweeps.make(out)
    sweeps.make(out, repair=True)
    assert sweeps.contents(out) == expected


@pytest.mark.parametrize("what", DAMAGE)
def test_repair_makes_again_what_is_damaged_and_nothing_else(tmp_path, whole, expected, what):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    message, damage = DAMAGE[what]
    damage(out)
    if "block 1" not in message:
        with pytest.raises(sweep.DamagedStoreError, match=message):
            sweeps.make(out, repair=True)
        return
    told = []
    sweeps.make(out, repair=True, report=told.append)
    assert sweeps.contents(out) == expected
    assert len(told) == 1


def test_a_complete_folder_is_read_without_writing(tmp_path, whole, expected, monkeypatch):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for lock in out.glob(".*lock"):
        lock.unlink()
    for name in ("mkdir", "unlink", "touch"):
        monkeypatch.setattr(Path, name, lambda *_, **__: pytest.fail("the file system is read-only"))
    sweeps.make(out)
    assert sweeps.contents(out) == expected
    assert not list(out.glob(".*lock"))


def test_data_are_on_the_disk_before_a_block_is_done(tmp_path, expected, monkeypatch):
    synced, fsync, replace = set(), os.fsync, Path.replace

    def noted(descriptor):
        fsync(descriptor)
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())

    def renamed(path, target):
        assert path in synced
        assert path.read_bytes() == expected[str(target.relative_to(tmp_path / "out"))]
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    sweeps.make(tmp_path / "out")
    assert len(synced) == sweeps.NUM_BLOCKS + 1


def test_every_bit_of_a_block_is_looked_after(tmp_path, whole):
    folder = store.Folder(Path(shutil.copytree(whole, tmp_path / "out")))
    plan = sweep.plan(sweeps.noisy, sweeps.base_key(), **SWEEP)
    block, shapes = plan.blocks()[1], plan.result_shapes
    file, wanted = folder.path / "blocks" / "1.npz", folder.read(block, shapes)
    data = file.read_bytes()
    for byte, bit in itertools.product(range(len(data)), (0, 7)):
        file.write_bytes(flipped(data, byte, bit))
        with contextlib.suppress(sweep.DamagedStoreError):
            for name, array in folder.read(block, shapes).items():  # what zip files say twice, or for nobody
                np.testing.assert_array_equal(array, wanted[name])


def test_what_nothing_says_is_done_is_done_again(out, expected):
    shutil.rmtree(out / "blocks")
    sweeps.make(out)
    assert sweeps.contents(out) == expected


def test_the_size_of_blocks_is_that_of_the_first_start(out, expected):
    make_as_it_was(out)
    assert sweeps.contents(out) == expected
