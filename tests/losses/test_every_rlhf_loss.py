"""What holds of every elementwise function of RLHF: equation, gradient, dtypes, extremes, jit, vmap, and errors."""

from functools import partial

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dpo_jax import losses
from tests.losses.menu import OF_RLHF
from tests.losses.rlhf_menu import (
    CASES,
    NUM,
    RANGES,
    compiled,
    evaluate,
    expected,
    make_arrays,
    make_hyperparameters,
    slopes,
)

every_function = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_every_loss_of_rlhf_is_here():
    names = {case.name.partition(",")[0] for case in CASES}
    assert names == OF_RLHF | {name for name in dir(losses) if name.endswith("_estimate")}
    assert all(hasattr(losses, name) for name in names)


@every_function
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_it_is_its_equation(case, data):
    arrays = [data.draw(hnp.arrays(float, NUM, elements=st.floats(*RANGES[name])), name) for name in case.arrays]
    hyperparameters = {name: data.draw(st.floats(*RANGES[name]), name) for name in case.hyperparameters}
    exact = np.float64(expected(case, arrays, hyperparameters))
    with jax.enable_x64(True):
        values, _ = compiled(case, jnp.float64)(arrays, hyperparameters)
    np.testing.assert_allclose(values, exact, rtol=1e-10, atol=1e-12)


@every_function
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=10)
def test_its_gradient_is_that_of_finite_differences(case, seed, share):
    """By all arrays and hyperparameters; random numbers do not lie at kinks."""
    arrays, hyperparameters = make_arrays(case, seed), make_hyperparameters(case, share)
    with jax.enable_x64(True):
        _, (by_arrays, by_hyperparameters) = compiled(case, jnp.float64)(arrays, hyperparameters)
    exact, exact_by_hyperparameters = slopes(case, arrays, hyperparameters)
    np.testing.assert_allclose(by_arrays, exact, rtol=1e-6, atol=1e-8)
    for name, slope in exact_by_hyperparameters.items():
        np.testing.assert_allclose(by_hyperparameters[name], slope, rtol=1e-6, atol=1e-8)


@every_function
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_other_precisions_are_close_and_stay_what_they_are(case, dtype, tolerance):
    arrays = [np.float64(jnp.asarray(array, jnp.bfloat16)) for array in make_arrays(case, 2)]
    hyperparameters = make_hyperparameters(case)
    values = evaluate(case, arrays, dtype, **hyperparameters)
    assert values.dtype == dtype
    exact = np.float64(expected(case, arrays, hyperparameters))
    np.testing.assert_allclose(np.float64(values), exact, rtol=tolerance, atol=tolerance)


@every_function
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_it_is_finite_at_the_extremes(case, dtype):
    """Ratios of exp(+-1e4), rewards and values of +-1e4, with a clip and without."""
    ends = [(0.0, -1e4, -1.0) if RANGES[name][1] < 0 else (-1e4, 0.5, 1e4) for name in case.arrays]
    corners = np.resize(np.array(np.meshgrid(*ends)).reshape(len(ends), -1), (len(ends), 81))
    arrays = [jnp.asarray(side, dtype) for side in corners]
    clipped = make_hyperparameters(case)
    for hyperparameters in (clipped, {n: np.inf if n.startswith("clip") else v for n, v in clipped.items()}):
        values, pull_back = jax.vjp(partial(case.function, **hyperparameters), *arrays)
        chex.assert_tree_all_finite((values, pull_back(jnp.ones_like(values))))
        assert values.dtype == dtype


@every_function
def test_hyperparameters_do_not_change_the_dtype(case):
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in make_arrays(case)]
    for wide in (np.float32, jnp.float32):
        hyperparameters = {name: wide(value) for name, value in make_hyperparameters(case).items()}
        assert jax.eval_shape(partial(case.function, **hyperparameters), *arrays).dtype == jnp.bfloat16


LOGPS = [name for name, (_, high) in RANGES.items() if high == -0.01]


@every_function
def test_what_is_no_log_probability_is_refused_where_it_is_known(case):
    arrays, hyperparameters = make_arrays(case), make_hyperparameters(case)
    for place, name in enumerate(case.arrays):
        wrong = [np.where(np.arange(NUM) == 3, 0.5, array) if i == place else array for i, array in enumerate(arrays)]
        if name in LOGPS:
            with pytest.raises(ValueError, match=f"{name} must be zero or negative, .*got 0.5 in row 3"):
                evaluate(case, wrong, **hyperparameters)
        else:
            evaluate(case, wrong, **hyperparameters)


@every_function
def test_what_is_ruled_out_is_never_nan(case):
    """Log-probabilities of -inf in all places that have them, advantages of 0; hyperparameters that may be 0, are."""
    ends = [(-1.0, -np.inf) if name in LOGPS else (0.0, 1.0, -1.0) for name in case.arrays]
    corners = np.array(np.meshgrid(*ends)).reshape(len(ends), -1)
    places = [i for i, name in enumerate(case.arrays) if not name.startswith(("old", "reference"))]
    hyperparameters = make_hyperparameters(case)
    for zero in (0.0, 1.0):
        may_be_zero = ("alpha", "centring", *(["beta"] if case.name.startswith("grpo") else []))
        changed = hyperparameters | {name: zero for name in may_be_zero if name in hyperparameters}
        values, (slopes, _) = compiled(case, jnp.float32)(corners, changed)
        assert not np.isnan(values).any()
        assert np.isfinite(np.array([slopes[i] for i in places])[:, np.isfinite(values)]).all()


@every_function
def test_vmap_over_a_hyperparameter_is_a_loop_and_rows_may_differ(case):
    arrays, hyperparameters = make_arrays(case, 3), make_hyperparameters(case)
    for name in case.hyperparameters:

        def values(value, name=name):
            return evaluate(case, arrays, **hyperparameters | {name: value})

        swept = jnp.linspace(*RANGES[name], NUM)
        table = jax.jit(jax.vmap(values))(swept)
        looped = [expected(case, arrays, hyperparameters | {name: value}) for value in np.float64(swept)]
        np.testing.assert_allclose(table, np.float64(looped), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values(swept), jnp.diag(table), rtol=1e-5, atol=1e-6)
        assert not jnp.allclose(table[0], table[-1]), f"{name} does nothing"


# Bad input

BAD = {
    "beta": (-0.1, np.inf),
    "clip": (0.0, -0.1),
    "clip_high": (0.0, -0.1),
    "margin": (np.inf, -np.inf),
    "centring": (-0.1, np.inf),
    "alpha": (-0.1, np.inf),
}


@every_function
def test_bad_hyperparameters_are_refused_at_the_call(case):
    arrays, hyperparameters = make_arrays(case), make_hyperparameters(case)
    for name in case.hyperparameters:
        for value in (np.nan, *BAD[name]):
            with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
                evaluate(case, arrays, **hyperparameters | {name: value})
        with pytest.raises(ValueError, match=f"{name} must broadcast to the shape"):
            evaluate(case, arrays, **hyperparameters | {name: jnp.full((2, 1), hyperparameters[name])})


@every_function
@pytest.mark.usefixtures("as_users_have_it")
def test_arrays_that_do_not_match_are_refused(case):
    hyperparameters = make_hyperparameters(case)
    arrays = [jnp.asarray(array, jnp.float32) for array in make_arrays(case)]
    for place, array in enumerate(arrays):

        def call(other, place=place):
            return case.function(*arrays[:place], other, *arrays[place + 1 :], **hyperparameters)

        with pytest.raises(ValueError, match="shapes must be equal"):
            call(array[:1])
        with pytest.raises(TypeError, match="must hold floating-point numbers"):
            call(jnp.ones(NUM, int))
        with pytest.raises(TypeError, match="must be an array"):
            call(array.tolist())
        with pytest.raises(TypeError, match="dtypes must be equal, got .*bfloat16"):
            call(array.astype(jnp.bfloat16))
