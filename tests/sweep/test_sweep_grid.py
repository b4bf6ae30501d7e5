"""The same numbers, whoever computes them: a loop, one program, small blocks, several devices, several processes."""

import importlib
import threading
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sweep
from dpo_jax.types import Ratio
from tests import forked
from tests.sweep import sweeps

AXES = {"draws": sweep.static([2, 3]), "scale": [1.0, 2.0, 3.0], "shift": [0.0, 0.25]}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
grid_module = importlib.import_module("dpo_jax.sweep.grid")
planning = importlib.import_module("dpo_jax.sweep.planning")
programs = importlib.import_module("dpo_jax.sweep.programs")


@pytest.fixture(scope="module")
def whole():
    """A grid in one block for each program."""
    return sweep.grid(sweeps.noisy, sweeps.base_key(), num_seeds=7, runs_at_once=1000, **AXES)


# Executors agree


def test_a_grid_is_a_loop_over_points_and_seeds(whole):
    looped = sweeps.loop(sweeps.noisy, sweeps.base_key(), num_seeds=7, **AXES)
    close(whole["total"], looped["total"])
    close(whole["part.column"], looped["part"]["column"])


@pytest.mark.parametrize("runs_at_once", [1, 2, 3, 4, 5, 7, 11, 12, 17, 18, 30, 41])
def test_blocks_of_any_size_give_the_same(whole, runs_at_once):
    again = sweep.grid(sweeps.noisy, sweeps.base_key(), num_seeds=7, runs_at_once=runs_at_once, **AXES)
    sweeps.assert_same(whole, again, close)


@pytest.mark.slow
def test_training_in_a_grid_is_training_in_a_loop():
    results = sweeps.SWEEPS["training"](sweeps.base_key())
    axes = {"beta": [0.05, 0.1, 0.5, 1.0], "learning_rate": [0.1, 1.0]}
    looped = sweeps.loop(sweeps.training, sweeps.base_key(), num_seeds=5, **axes)
    assert set(results.data_vars) == set(looped)
    for name, array in looped.items():
        close(results[name], array)
    assert (results["loss"].isel(epoch=-1) < results["loss"].isel(epoch=0)).mean() > 0.9


@pytest.mark.slow
def test_several_devices_give_the_same_bits_and_files(tmp_path):
    devices = forked.start(sweeps.make_on_devices, tmp_path / "4", "training", 4)
    alone = sweeps.make(tmp_path / "1", "training")
    devices.join(120)
    assert devices.exitcode == 0
    assert alone["loss"].shape == (4, 2, 5, 3)
    assert sweeps.contents(tmp_path / "1") == sweeps.contents(tmp_path / "4")


@pytest.mark.parametrize("num_devices", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_seeds_that_devices_cannot_share_evenly_are_no_problem(tmp_path, num_devices):
    assert forked.exit_code(sweeps.make_on_devices, tmp_path / "many", "noisy", num_devices) == 0
    sweeps.make(tmp_path / "one", "noisy")
    assert sweeps.contents(tmp_path / "many") == sweeps.contents(tmp_path / "one")


def test_the_last_seeds_may_be_too_few_for_their_device(tmp_path):
    assert forked.exit_code(sweeps.make_on_devices, tmp_path, "uneven", 2) == 0
    looped = sweeps.loop(sweeps.noisy, sweeps.base_key(), num_seeds=5, scale=[1.0, 2.0])
    close(sweep.open_results(tmp_path)["total"], looped["total"])


def test_a_sweep_in_memory_has_the_bits_of_one_in_a_folder(tmp_path):
    sweeps.assert_same(sweeps.make(None), sweeps.make(tmp_path / "out"))


def test_memory_decides_the_size_of_blocks_and_not_the_results(whole, key):
    def hungry(key, *, scale):
        matrix = scale + jax.random.normal(key, (200, 20))
        return (matrix @ matrix.T).max()

    options = {"num_seeds": 6, "scale": [1.0, 2.0, 3.0]}
    much = sweep.plan(hungry, key, **options)
    limit = much.programs.memory // 2
    little = planning.fitted(sweep.plan(hungry, key, memory_limit=limit, **options))
    assert much.shape == (6, 3)
    assert little.shape.seeds * little.shape.points < 18
    assert 0 < little.programs.memory <= limit
    results = [sweep.grid(hungry, key, memory_limit=limit, **options) for limit in (None, limit)]
    sweeps.assert_same(*results, close)


def product(key, *, size, scale):
    return (scale * jax.random.normal(key, (size, 50)) @ jnp.ones((50, size))).sum()


@pytest.mark.parametrize("sizes", [[4, 300], pytest.param([300, 4], marks=pytest.mark.slow)])
def test_memory_is_that_of_all_programs(key, sizes):
    options = {"num_seeds": 16, "scale": [1.0, 2.0]}
    plans = [sweep.plan(product, key, size=sweep.static(some), **options) for some in (sizes, [300], [4])]
    both, large, small = (plan.programs.memory for plan in plans)
    assert both == large > 10 * small
    limited = planning.fitted(sweep.plan(product, key, memory_limit=large // 3, size=sweep.static(sizes), **options))
    assert limited.programs.memory <= large // 3
    with pytest.raises(ValueError, match="one run takes"):
        sweep.grid(product, key, memory_limit=large // 64, size=sweep.static(sizes), **options)


def test_memory_is_that_of_preparing_too(key):
    def run(start, *, scale):
        return scale * start

    prepare = partial(product, size=300, scale=1.0)
    alone, prepared = (
        sweep.plan(run, key, num_seeds=16, scale=[1.0], prepare=of).programs.memory
        for of in (jax.random.uniform, prepare)
    )
    assert prepared > 10 * alone


def test_memory_holds_the_results_of_two_blocks():
    """One block is computed while the one before it is fetched."""
    program = jax.jit(lambda x: jnp.full(1000, x)).lower(1.0).compile()
    assert programs.bytes_needed(program) >= 2 * 4000


@pytest.mark.parametrize("num_points", [128, 129, 200, 256, 257])
def test_blocks_are_as_even_as_can_be(key, num_points):
    plan = sweep.plan(sweeps.noisy, key, num_seeds=1, runs_at_once=128, scale=np.linspace(1, 2, num_points))
    sizes = [len(block.points) for block in plan.blocks()]
    assert len(sizes) == plan.num_blocks == -(-num_points // 128)
    assert max(sizes) == plan.shape.points < min(sizes) + len(sizes)
    seeds = sweep.plan(sweeps.noisy, key, num_seeds=num_points, runs_at_once=256, scale=[1.0, 2.0])
    assert seeds.shape == (plan.shape.points, 2)


# Common random numbers


def test_points_share_their_seeds(whole):
    noise = whole["total"].sel(shift=0.0, draws=3)
    np.testing.assert_array_equal(noise.sel(scale=2.0), 2 * noise.sel(scale=1.0))
    assert len(np.unique(noise.sel(scale=1.0))) == 7


def test_a_seed_is_the_key_folded_with_its_number_however_many_there_are(key):
    few, many = (sweep.grid(lambda key: jax.random.bits(key), key, num_seeds=n, runs_at_once=4) for n in (3, 10))
    expected = [int(jax.random.bits(jax.random.fold_in(key, seed))) for seed in range(10)]
    assert few["result"].values.tolist() == expected[:3]
    assert many["result"].values.tolist() == expected


# No more work than there is


@pytest.mark.parametrize("runs_at_once", [5, 1000])
def test_a_run_is_traced_once_for_each_combination_of_discrete_values(key, runs_at_once):
    @chex.assert_max_traces(n=6)
    def run(key, *, scale, shift, draws, name):
        return sweeps.noisy(key, scale=scale, shift=shift, draws=draws)

    chex.clear_trace_counter()
    axes = {
        "draws": sweep.static([1, 2, 3]),
        "name": ["a", "b"],
        "scale": np.linspace(1, 2, 5),
        "shift": np.linspace(0, 1, 4),
    }
    results = sweep.grid(run, key, num_seeds=3, runs_at_once=runs_at_once, **axes)
    assert results["total"].shape == (3, 2, 5, 4, 3)


def test_what_a_seed_shares_is_prepared_once(key):
    prepared, started = [], []

    def prepare(key):
        matrix_key, run_key = jax.random.split(key)
        jax.debug.callback(lambda _: prepared.append(1), matrix_key)
        return {"matrix": jax.random.normal(matrix_key, (3, 3)), "key": run_key}

    def run(start, *, scale, name):
        jax.debug.callback(lambda _: started.append(1), scale * start["matrix"].sum())
        return scale * start["matrix"].sum() + (name == "b") * jax.random.normal(start["key"])

    axes = {"name": ["a", "b", "c"], "scale": [1.0, 2.0]}
    results = sweep.grid(run, key, num_seeds=4, prepare=prepare, **axes)
    jax.effects_barrier()
    assert (len(prepared), len(started)) == (4, 24)
    composed = sweep.grid(lambda key, **point: run(prepare(key), **point), key, num_seeds=4, **axes)
    close(results.result, composed.result)


def test_starts_serve_several_sweeps(key):
    def prepare(key):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (3,)), second

    def run(start, *, scale):
        return scale * start[0].sum() + jax.random.normal(start[1])

    starts = sweep.prepare(prepare, key, num_seeds=7, runs_at_once=3)
    whole = sweep.grid(run, key, num_seeds=7, prepare=prepare, scale=[1.0, 2.0])
    close(sweep.grid(run, starts, scale=[1.0, 2.0]).result, whole.result)
    some = sweep.grid(run, starts.sel([5, 2]), scale=[2.0])
    close(some.result, whole.result.sel(scale=[2.0], seed=[5, 2]))
    assert some.seed.values.tolist() == [5, 2]
    with pytest.raises(KeyError, match="no start for seed 9"):
        sweep.grid(run, starts, seeds=[1, 9], scale=[1.0])
    with pytest.raises(ValueError, match="already applied"):
        sweep.grid(run, starts, prepare=prepare, scale=[1.0])


def test_seeds_are_those_that_are_given(key):
    many = sweep.grid(sweeps.noisy, key, num_seeds=10, scale=[1.0, 2.0])
    some = sweep.grid(sweeps.noisy, key, seeds=[7, 2, 3], scale=[1.0, 2.0])
    close(some.total, many.total.sel(seed=[7, 2, 3]))
    for seeds, message in (([], "names none"), ([1, 1], "a seed twice"), ([-1], "at least 0"), ([2**32], "below")):
        with pytest.raises(ValueError, match=message):
            sweep.grid(sweeps.noisy, key, seeds=seeds, scale=[1.0])
    with pytest.raises(ValueError, match="one of the two"):
        sweep.grid(sweeps.noisy, key, num_seeds=3, seeds=[1], scale=[1.0])


def test_programs_are_kept_for_a_function_and_its_values(key, monkeypatch):
    compiled = []
    compile_fast = programs.compile_fast
    monkeypatch.setattr(programs, "compile_fast", lambda lowered: compiled.append(1) or compile_fast(lowered))

    def run(key, *, size, scale):
        return scale * jnp.ones(int(size) + 1).sum() * (1.25 if size is True else 1.0)

    options = {"num_seeds": 2, "runs_at_once": (2, 2), "prepare": lambda key: key}
    for scales in ([1.0, 2.0], [3.0, 4.0, 5.0]):
        for size, factor in ((1, 2.0), (True, 2.5)):
            results = sweep.grid(run, key, size=sweep.static([size]), scale=scales, **options)
            assert results.result.sel(size=size, seed=0).values.tolist() == [factor * scale for scale in scales]
    assert len(compiled) == 3  # of two values, and of the keys


def test_compiling_does_not_repeat_for_further_blocks(key, monkeypatch):
    compiled = []
    compile_fast = programs.compile_fast
    monkeypatch.setattr(programs, "compile_fast", lambda lowered: compiled.append(1) or compile_fast(lowered))
    run = lambda key, **point: sweeps.noisy(key, **point)  # noqa: E731
    sweep.grid(run, key, num_seeds=5, runs_at_once=2, prepare=lambda key: key, **AXES)
    assert len(compiled) == 3  # for two values of draws, and for keys


# Labels


def test_dimensions_are_axes_as_given_then_seeds_then_the_results_own(key):
    def run(key, *, scale, size, shift):
        return {"history": {"loss": scale * jnp.arange(4.0) + shift, "step": jnp.arange(4)}, "matrix": jnp.eye(2, 3)}

    axes = {"scale": [1.0, 2.0], "size": sweep.static([8, 16, 32]), "shift": [0.5]}
    results = sweep.grid(run, key, num_seeds=5, dims={"history": ["epoch"], "matrix": ["row", "column"]}, **axes)
    assert results["history.loss"].dims == ("scale", "size", "shift", "seed", "epoch")
    assert results["matrix"].dims == ("scale", "size", "shift", "seed", "row", "column")
    assert dict(results.sizes) == {"scale": 2, "size": 3, "shift": 1, "seed": 5, "epoch": 4, "row": 2, "column": 3}
    assert results["size"].values.tolist() == [8, 16, 32]
    assert results["seed"].values.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(
        results["history.loss"].sel(scale=2.0, size=16, shift=0.5, seed=3), [0.5, 2.5, 4.5, 6.5]
    )


def test_without_names_the_results_own_dimensions_are_numbered(key):
    results = sweep.grid(lambda key: {"a": jnp.eye(2, 3)}, key, num_seeds=2)
    assert results["a"].dims == ("seed", "a_0", "a_1")


def test_the_longest_name_in_dims_decides(key):
    def run(key):
        return {"a": {"b": jnp.zeros(2), "c": jnp.zeros(3)}}

    results = sweep.grid(run, key, num_seeds=1, dims={"a": ["x"], "a.c": ["y"]})
    assert (results["a.b"].dims, results["a.c"].dims) == (("seed", "x"), ("seed", "y"))


def test_results_keep_their_dtype(key):
    run = lambda key: {"whole": jnp.int8(3), "truth": jnp.array([True, False]), "number": jnp.float16(0.5), "plain": 2}  # noqa: E731
    results = sweep.grid(run, key, num_seeds=2)
    dtypes = {name: array.dtype for name, array in results.items()}
    assert dtypes == {"whole": np.int8, "truth": np.bool_, "number": np.float16, "plain": np.int32}
    assert results["truth"].values.tolist() == [[True, False]] * 2


def test_one_result_without_a_name_is_called_result(key):
    assert list(sweep.grid(lambda key: jax.random.normal(key), key, num_seeds=2)) == ["result"]


def test_a_ratio_is_one_number(key):
    results = sweep.grid(lambda _, x: {"share": Ratio(x, 4.0)}, key, num_seeds=1, x=[1.0, 2.0])
    assert results.share.values.ravel().tolist() == [0.25, 0.5]


def test_double_precision_holds_in_every_program(key):
    with jax.enable_x64(True):
        axes = {"draws": sweep.static([2, 3]), "scale": [0.1, 0.2]}
        results = sweep.grid(sweeps.noisy, key, num_seeds=3, **axes)
        looped = sweeps.loop(sweeps.noisy, key, num_seeds=3, **axes)
    assert results["total"].dtype == np.float64
    np.testing.assert_allclose(results["total"], looped["total"], rtol=1e-12)


def test_programs_of_another_precision_are_others(key):
    def run(key):
        return jax.random.uniform(key)

    assert sweep.grid(run, key, num_seeds=1).result.dtype == np.float32
    with jax.enable_x64(True):
        assert sweep.grid(run, key, num_seeds=1).result.dtype == np.float64


def test_a_constant_and_a_computed_number_are_the_same_result(key):
    run = lambda key, *, name: 0.0 if name == "none" else jax.random.normal(key)  # noqa: E731
    results = sweep.grid(run, key, num_seeds=3, name=["none", "some"])
    assert (results["result"].sel(name="none") == 0).all()
    assert (results["result"].sel(name="some") != 0).all()


# Plan and progress


@pytest.mark.parametrize("runs_at_once", [1, 5, 8, 1000])
def test_the_plan_tells_what_the_grid_does(key, runs_at_once):
    plan = sweep.plan(sweeps.noisy, key, num_seeds=7, runs_at_once=runs_at_once, **AXES)
    results = sweep.grid(sweeps.noisy, key, num_seeds=7, runs_at_once=runs_at_once, **AXES)
    assert plan.num_runs == results["total"].size == 2 * 3 * 2 * 7
    assert plan.result_bytes == sum(array.nbytes for array in results.data_vars.values())
    assert len(plan.runs) == 2
    assert plan.shape.seeds * plan.shape.points <= runs_at_once
    cells = np.zeros((2, 6, 7), int)
    for number, block in enumerate(plan.blocks()):
        assert block.number == number
        cells[np.ix_([block.combination], block.points, block.seeds)] += 1
    assert (cells == 1).all()
    assert "168 runs" in str(plan) or plan.num_runs != 168
    assert "traced: scale, shift; static: draws" in str(plan)


def test_progress_grows_to_the_total(key):
    told = []
    sweep.grid(sweeps.noisy, key, num_seeds=7, runs_at_once=5, report=told.append, **AXES)
    assert [progress.total for progress in told] == [84] * len(told)
    done = [progress.done for progress in told]
    assert done == sorted(set(done))
    assert done[-1] == 84
    assert len(done) > 10
    assert all(progress.resumed == 0 for progress in told)
    assert all(progress.compile_seconds >= 0 and progress.run_seconds >= 0 for progress in told)


def test_a_sweep_may_run_in_a_thread(key):
    found = []
    thread = threading.Thread(target=lambda: found.append(sweep.grid(sweeps.noisy, key, num_seeds=2, scale=[1.0])))
    thread.start()
    thread.join()
    assert found[0]["total"].shape == (1, 2)


# Bad input, before anything is computed


def differing(key, *, name):
    return {"a": jnp.zeros(2)} if name == "x" else {"a": jnp.zeros(3)}


def scaled(key, *, scale, shift=0.0):
    return {"a": scale * jnp.ones((2, 3)) + shift}


BAD = {
    "no seeds": (ValueError, "num_seeds must be at least 1", scaled, {"num_seeds": 0, "scale": [1.0]}),
    "too many seeds": (ValueError, "num_seeds must be at most", scaled, {"num_seeds": 2**32 + 1, "scale": [1.0]}),
    "half a seed": (TypeError, "num_seeds must be a whole", scaled, {"num_seeds": 1.5, "scale": [1.0]}),
    "no runs at once": (ValueError, "runs_at_once must be at least 1", scaled, {"runs_at_once": 0, "scale": [1.0]}),
    "no memory": (ValueError, "memory_limit must be at least 1", scaled, {"memory_limit": 0, "scale": [1.0]}),
    "no devices": (ValueError, "devices", scaled, {"devices": [], "scale": [1.0]}),
    "little memory": (ValueError, "one run takes .* bytes", scaled, {"memory_limit": 10, "scale": [1.0]}),
    "unknown axis": (TypeError, "takes no argument 'size'.*: scale, shift", scaled, {"scale": [1.0], "size": [2]}),
    "a share of nowhere": (ValueError, "shares need a folder", scaled, {"scale": [1.0], "share": (1, 2), "out": None}),
    "a share before": (ValueError, "i from 1 to n", scaled, {"scale": [1.0], "share": (0, 2)}),
    "a share beyond": (ValueError, "i from 1 to n", scaled, {"scale": [1.0], "share": (3, 2)}),
    "missing axis": (TypeError, "also needs 'scale'", scaled, {"shift": [1.0]}),
    "empty axis": (ValueError, "axis scale has no values", scaled, {"scale": []}),
    "value twice": (ValueError, "axis scale has the value 1.0 twice", scaled, {"scale": [1.0, 2.0, 1.0]}),
    "not finite": (ValueError, "axis scale must be finite, got inf", scaled, {"scale": [1.0, float("inf")]}),
    "other shapes": (ValueError, r"\['a'\] differ between .*y.* and .*x", differing, {"name": ["x", "y"]}),
    "other names": (ValueError, "differ", lambda key, *, name: {name: 1.0}, {"name": ["x", "y"]}),
    "a key": (TypeError, "result 'result' is a key", lambda key: key, {}),
    "bfloat16": (TypeError, "return float32", lambda key: jnp.bfloat16(1), {}),
    "nothing": (TypeError, "returned nothing", lambda key: {}, {}),
    "names that collide": (ValueError, "same name", lambda key: {"a": {"b": 1.0}, "a.b": 2.0}, {}),
    "named as an axis": (ValueError, "'scale'", lambda key, *, scale: {"scale": scale}, {"scale": [1.0]}),
    "too few dims": (ValueError, "dims names 1 dimensions of 'a'", scaled, {"scale": [1.0], "dims": {"a": ["x"]}}),
    "dims of nothing": (ValueError, r"dims names \['b'\]", scaled, {"scale": [1.0], "dims": {"b": ["x"]}}),
    "dims of an axis": (ValueError, "'scale'", scaled, {"scale": [1.0], "dims": {"a": ["x", "scale"]}}),
    "dims of two lengths": (
        ValueError,
        "conflicting sizes",
        lambda key: {"a": jnp.zeros(2), "b": jnp.zeros(3)},
        {"dims": {"a": ["x"], "b": ["x"]}},
    ),
    "python's if": (jax.errors.ConcretizationTypeError, "traced", lambda key, *, a: a if a > 0 else -a, {"a": [1.0]}),
}


def test_an_axis_that_decides_a_shape_is_told_how_to_be_static(key):
    with pytest.raises(TypeError) as problem:
        sweep.grid(lambda key, *, size: {"total": jnp.zeros(size).sum()}, key, num_seeds=1, size=[2, 3])
    assert "Wrap what decides a shape or a branch in sweep.static; traced: size" in problem.value.__notes__


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_anything_is_computed(key, tmp_path, monkeypatch, as_users_have_it, what):
    error, message, run, options = BAD[what]
    monkeypatch.setattr(grid_module, "_compute", lambda *_: pytest.fail("computed"))
    for out in (None, tmp_path / "out"):
        with pytest.raises(error, match=message):
            sweep.grid(run, key, **{"num_seeds": 3, "out": out, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "method", "error", "scales"),
    [
        ("traced", None, KeyError, "any"),
        ("stacked", None, NotImplementedError, "any"),
        ("run", "sequential", jax.errors.JaxRuntimeError, "1.0 to 2.0"),
    ],
)
def test_an_error_names_the_runs_that_it_came_from(key, name, method, error, scales):
    def ask(scale):
        raise OSError("not there")

    def run(key, *, name, scale):
        if name == "traced":
            raise KeyError("no such loss")
        number = jax.ShapeDtypeStruct((), jnp.float32)
        return scale if name == "fine" else jax.pure_callback(ask, number, scale, vmap_method=method)

    with pytest.raises(error) as problem:
        sweep.grid(run, key, num_seeds=1, name=["fine", name], scale=[1.0, 2.0])
    assert problem.value.__notes__[-1] == f"This came from run with name='{name}', scale={scales}."


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_that_draw_otherwise_beside_others_are_refused(as_users_have_it, impl):
    with pytest.raises(ValueError, match=f"of the kind {impl}.*threefry2x32"):
        sweep.grid(scaled, jax.random.key(0, impl=impl), num_seeds=3, scale=[1.0])


def test_only_one_typed_key_is_a_key(tmp_path, as_users_have_it):
    for key, error in (
        (0, TypeError),
        (jax.random.PRNGKey(0), TypeError),
        (jax.random.split(sweeps.base_key()), ValueError),
    ):
        with pytest.raises(error, match="key"):
            sweep.grid(scaled, key, num_seeds=3, scale=[1.0], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_that_memory_cannot_hold_need_a_folder(key):
    with pytest.raises(ValueError, match=r"results take .* bytes of memory"):
        sweep.grid(lambda key: jnp.zeros((1000,)), key, num_seeds=10**9)


def test_numbers_of_numpys_are_numbers(key, as_users_have_it):
    options = {"scale": [1.0, 2.0], "num_seeds": np.int64(3), "runs_at_once": np.int32(4), "memory_limit": 10**8}
    results = sweep.grid(sweeps.noisy, key, **options)
    assert dict(results.sizes)["seed"] == 3
