"""Axes: numbers are traced, anything else is static; what they are called; what is refused."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sweep
from dpo_jax.sweep.axes import read_axes


def anything(key, **point):
    return 0.0


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 1.0], [0.5, 1.0]),
        ((1, 2.5), [1.0, 2.5]),
        (np.linspace(0, 1, 3), [0.0, 0.5, 1.0]),
        (np.array([0.5, 2], np.float32), [0.5, 2.0]),
        (jnp.array([0.5, 2]), [0.5, 2.0]),
        (jnp.array([0.5, 2], jnp.bfloat16), [0.5, 2.0]),
        ([jnp.float32(0.5), np.float64(2)], [0.5, 2.0]),
        ((x / 2 for x in range(3)), [0.0, 0.5, 1.0]),
        ([8, 16], [8, 16]),
        (range(3), [0, 1, 2]),
        (np.array([8, 16]), [8, 16]),
        (jnp.array([8, 16]), [8, 16]),
    ],
)
def test_numbers_are_traced(values, expected):
    axis = read_axes(anything, {"a": values}).traced["a"]
    assert axis.values.tolist() == axis.coordinate.tolist() == expected
    assert axis.values.dtype == (np.float32 if isinstance(expected[0], float) else np.int32)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (sweep.static([8, 16]), [8, 16]),
        (sweep.static(range(3)), [0, 1, 2]),
        (sweep.static(np.array([8, 16])), [8, 16]),
        (sweep.static([0.5, 1.0]), [0.5, 1.0]),
        (["adam", "sgd"], ["adam", "sgd"]),
        (np.array(["adam", "sgd"]), ["adam", "sgd"]),
        ([True, False], [True, False]),
        (np.array([True, False]), [True, False]),
        ([double, triple], ["double", "triple"]),
        ([None, 0.5], ["None", 0.5]),
        ([(8,), (8, 8)], ["(8,)", "(8, 8)"]),
        ([((1,), (1, 2)), ()], ["((1,), (1, 2))", "()"]),
        ([object(), "x"], ["<object object>", "x"]),  # its address is another one in each process
        ([functools.partial(double, 1), "x"], ["double(1)", "x"]),
        ([functools.partial(functools.partial(double, x=1), y=triple)], ["double(x=1, y=triple)"]),
    ],
)
def test_anything_else_is_static(values, labels):
    axes = read_axes(anything, {"a": values})
    axis = axes.static["a"]
    assert axes.traced == {}
    assert list(axis.names) == axis.coordinate.tolist() == labels
    assert [type(label) for label in axis.names] == [type(label) for label in labels]
    assert [point["a"] for point in axes.combinations] == list(axis.values)


def test_a_run_gets_numbers_of_pythons_for_static_values(key):
    kinds = []
    sweep.grid(lambda key, *, a: kinds.append(type(a)) or 0.0, key, num_seeds=1, a=sweep.static(np.arange(2)))
    assert kinds == [int, int]


def test_the_last_axis_varies_fastest():
    axes = read_axes(anything, {"a": [1.0, 2.0], "b": ["x", "y"], "c": [3.0, 4.0], "d": sweep.static([5, 6])})
    assert axes.points(range(4))["a"].tolist() == [1, 1, 2, 2]
    assert axes.points(range(4))["c"].tolist() == [3, 4, 3, 4]
    assert [tuple(point.values()) for point in axes.combinations] == [("x", 5), ("x", 6), ("y", 5), ("y", 6)]
    assert list(axes.axes) == ["a", "b", "c", "d"]


def test_labels_of_several_kinds_stay_what_they_are(key):
    result = sweep.grid(lambda key, *, a: float(a or 0.0), key, num_seeds=1, a=[None, 0.5, True])["result"].isel(seed=0)
    assert result["a"].values.tolist() == ["None", 0.5, True]
    assert result.sel(a=0.5) == 0.5


LITERALS = [0.01, 0.1, 0.125, 0.3, 1 / 3, 1.0, 3e-4]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("of", [list, np.array, jnp.array])
def test_values_are_selected_by_what_was_written(key, dtype, of):
    literals = [value for value in LITERALS if value != 1 / 3 or dtype in (np.float32, np.float64)]
    given = of([np.asarray(value, dtype)[()] for value in literals])
    result = sweep.grid(lambda key, *, a: a, key, num_seeds=1, a=given)["result"].isel(seed=0)
    for value, handed in zip(literals, given, strict=True):
        assert result.sel(a=value) == np.float32(handed)


def test_values_that_a_range_makes_are_selected_by_short_numbers(key):
    values = jnp.geomspace(0.01, 10, 4)
    result = sweep.grid(lambda key, *, a: a, key, num_seeds=1, a=values)["result"].isel(seed=0)
    assert (result.sel(a=[0.01, 0.1, 1, 10]).values == values).all()
    fine = np.float32(1) + np.arange(4, dtype=np.float32) * np.finfo(np.float32).eps
    assert read_axes(anything, {"a": fine}).axes["a"].coordinate.tolist() == fine.tolist()


def test_labels_that_are_no_int64_stay_what_they_are():
    assert read_axes(anything, {"a": sweep.static([2**63 + 1, 1])}).axes["a"].coordinate.tolist() == [2**63 + 1, 1]


def test_no_axes_are_one_point():
    axes = read_axes(anything, {})
    assert (axes.num_points, axes.points(range(1)), axes.combinations) == (1, {}, [{}])


def test_static_values_label_results(key):
    def run(key, *, function, size, flag, scale):
        return function(scale) * size + (100 if flag else 0)

    axes = {
        "flag": np.array([True, False]),
        "scale": [0.5, 1.0],
        "function": [double, triple],
        "size": sweep.static([1, 10]),
    }
    result = sweep.grid(run, key, num_seeds=1, **axes)["result"].isel(seed=0)
    assert result.dims == ("flag", "scale", "function", "size")
    assert result.sel(function="triple", size=10, flag=True, scale=0.5) == 115
    assert result.sel(function="double", size=1, flag=False, scale=1.0) == 2


@pytest.mark.parametrize(
    ("error", "message", "values"),
    [
        (TypeError, "axis a must be a list of values, got 'adam'", "adam"),
        (TypeError, "axis a must be a list of values, got 0.5", 0.5),
        (TypeError, "axis a must be a list of values", {0.5, 1.0}),
        (TypeError, "axis a must be a list of values", np.float32(0.5)),
        (TypeError, "axis a must be a list of values", jnp.float32(0.5)),
        (ValueError, "axis a has the value .* twice", np.ones((2, 2))),
        (ValueError, r"common leading axis, got b \(2,\), c \(3,\)", {"b": np.ones(2), "c": np.ones(3)}),
        (ValueError, r"common leading axis, got b \(\)", {"b": 1.0}),
        (ValueError, "common leading axis, got no arrays", {}),
        (ValueError, "axis a: b must be finite", {"b": np.array([1, np.nan])}),
        (TypeError, "axis a: b must hold numbers", {"b": np.array(["x"])}),
        (ValueError, "axis a has no values", {"b": np.ones(0)}),
        (ValueError, "axis a must fit into int32, got 4294967296", [1, 2**32]),
        (ValueError, "axis a has no values", sweep.static([])),
        (ValueError, "axis a has the value 8 twice", sweep.static([8, 8])),
        (ValueError, "axis a has no values", []),
        (ValueError, "axis a has no values", np.array([])),
        (ValueError, "axis a must be finite, got nan", [1.0, np.nan]),
        (ValueError, "axis a must be finite, got -inf", np.array([1.0, -np.inf])),
        (ValueError, r"axis a must be finite, got 1e\+300", [1.0, 1e300]),
        (ValueError, "axis a has the value 0.5 twice", [0.5, 1.0, 0.5]),
        (ValueError, "axis a has the value 1.0 twice", [1, 0.5, 1.0]),
        (ValueError, "axis a has the value 2 twice", [1, 2, 2]),
        (ValueError, "axis a must be finite, got nan", [None, np.nan]),
        (ValueError, "axis a must be finite, got inf", [True, np.inf]),
        (ValueError, "axis a must be finite, got a number of 401 digits", [10**400, 0.5]),
        (ValueError, "axis a has values that float32 does not tell apart: 0.1 and 0.1000000001", [0.1, 0.1 + 1e-10]),
        (ValueError, "axis a has values that float32 does not tell apart: 0.0 and 1e-50", [0.0, 1e-50]),
        (ValueError, "axis a has 1e-46, which becomes 0 in float32", [1e-46]),
        (ValueError, "axis a has -1e-39, which becomes 0 in float32", np.array([0.0, -1e-39])),
        (ValueError, "axis a has .*e-4., which becomes 0 in float32", [1, np.float32(1e-40)]),
        (ValueError, "axis a has the value 'x' twice", ["x", "y", "x"]),
        (ValueError, "axis a has the value 'double' twice", [double, double]),
        (ValueError, "axis a has the value '<lambda>' twice", [lambda x: x, lambda x: -x]),
    ],
)
def test_what_is_no_list_of_distinct_finite_values_is_refused(as_users_have_it, error, message, values):
    with pytest.raises(error, match=message):
        read_axes(anything, {"a": values})


def test_axes_are_what_run_takes():
    def run(key, a, *, b=1.0):
        return a + b

    assert list(read_axes(run, {"a": [1.0]}).axes) == ["a"]
    assert list(read_axes(run, {"b": [1.0], "a": [1.0]}).axes) == ["b", "a"]
    with pytest.raises(TypeError, match="takes no argument 'c'; it takes, besides the key: a, b"):
        read_axes(run, {"a": [1.0], "c": [1.0]})
    with pytest.raises(TypeError, match="takes no argument 'key'"):
        read_axes(run, {"a": [1.0], "key": [1]})
    with pytest.raises(TypeError, match="also needs 'a'"):
        read_axes(run, {"b": [1.0]})
    with pytest.raises(TypeError, match="besides the key: none"):
        read_axes(lambda key: key, {"a": [1.0]})


def test_no_axis_is_called_seed():
    with pytest.raises(ValueError, match="seed"):
        read_axes(anything, {"seed": [1.0]})


def test_a_table_is_one_axis_of_rows(key):
    def run(key, *, candidate):
        return candidate["beta"] * candidate["more"]["rate"].sum()

    table = {"beta": np.array([0.1, 1.0, 10.0]), "more": {"rate": np.arange(6.0).reshape(3, 2)}}
    results = sweep.grid(run, key, num_seeds=2, runs_at_once=2, candidate=table)
    np.testing.assert_allclose(results.result, np.repeat([[0.1], [5.0], [90.0]], 2, axis=1), rtol=1e-6)
    assert results["candidate.beta"].dims == ("candidate",)
    assert results["candidate.beta"].values.tolist() == table["beta"].tolist()
    assert results["candidate.more.rate"].shape == (3, 2)
    best = results.result.mean("seed").idxmax("candidate")
    assert results["candidate.beta"].sel(candidate=best) == 10.0


def test_an_array_of_rows_is_a_table(key):
    results = sweep.grid(lambda key, *, a: a.sum(), key, num_seeds=1, a=np.arange(6).reshape(3, 2))
    assert results.result.values.ravel().tolist() == [1, 5, 9]
    assert results["a.value"].values.tolist() == [[0, 1], [2, 3], [4, 5]]
