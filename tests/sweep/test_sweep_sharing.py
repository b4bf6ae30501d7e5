"""What all programs of a grid do with the key alone is found, done once for each seed, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sweep
from dpo_jax.sweep.programs import share_work, trace
from tests.sweep import sweeps


def num_shared(run, **discrete):
    """How many values the runs share, which have a traced `scale`."""
    name, values = next(iter(discrete.items()))
    runs = share_work([trace(run, sweeps.base_key(), ["scale"], {name: value}) for value in values])
    return len(runs[0].values())


@pytest.mark.parametrize("runs_at_once", [4, 8, 1000])
def test_what_depends_on_the_key_alone_is_made_once_for_each_seed(key, monkeypatch, runs_at_once):
    def run(key, *, name, size, scale):
        noise = jax.random.normal(key)
        return {"a": scale * noise + size, "b": jnp.zeros(3) + noise if name == "zero" else noise * jnp.ones(3)}

    axes = {"name": ["zero", "one"], "size": [1, 2, 3], "scale": np.linspace(1, 2, 8)}
    plan = sweep.plan(run, key, num_seeds=5, runs_at_once=runs_at_once, **axes)
    assert all("erf_inv" in str(run.common) and "erf_inv" not in str(run.rest) for run in plan.runs)
    seeds, values = [], sweep.Plan.values
    monkeypatch.setattr(sweep.Plan, "values", lambda plan, made: seeds.extend(made.tolist()) or values(plan, made))
    results = sweep.grid(run, key, num_seeds=5, runs_at_once=runs_at_once, **axes)
    assert seeds == list(range(5))
    noise = [float(jax.random.normal(jax.random.fold_in(key, seed))) for seed in range(5)]
    np.testing.assert_allclose(results["b"], np.broadcast_to(np.array(noise)[:, None], (2, 3, 8, 5, 3)), rtol=1e-5)
    np.testing.assert_allclose(results["a"].sel(size=2, name="one", scale=1.0), np.array(noise) + 2, rtol=1e-5)


def test_what_depends_on_a_discrete_value_is_made_for_each(key):
    def run(key, *, size, scale):
        return scale * jnp.sin(size * jax.random.uniform(key))

    for traced in sweep.plan(run, key, num_seeds=2, size=[1, 10], scale=[1.0, 2.0]).runs:
        assert "sin" in str(traced.rest)
        assert "sin" not in str(traced.common)


def test_what_does_not_depend_on_the_key_is_not_repeated_for_each_seed(key):
    def run(key, *, scale):
        table = jnp.sin(jnp.arange(1e5))
        return (scale * table).sum() * jax.random.uniform(key) * jnp.take(table, jax.random.randint(key, (), 0, 100))

    axes = {"scale": [1.0, 2.0]}
    plan = sweep.plan(run, key, num_seeds=64, **axes)
    assert plan.runs[0].common is not None
    assert plan.memory < 20 * 1e5 * 4
    result = sweep.grid(run, key, num_seeds=64, **axes)["result"]
    np.testing.assert_allclose(result, sweeps.loop(run, key, num_seeds=64, **axes), rtol=1e-4)


def test_what_the_host_does_is_told_apart(key):
    def run(key, *, name, scale):
        function = (lambda x: np.float32(x + 100)) if name == "a" else (lambda x: np.float32(x + 200))
        number = jax.ShapeDtypeStruct((), jnp.float32)
        return scale * jax.jit(lambda x: jax.pure_callback(function, number, x, vmap_method="sequential"))(
            jax.random.uniform(key)
        )

    result = sweep.grid(run, key, num_seeds=2, name=["a", "b"], scale=[1.0])["result"].squeeze()
    np.testing.assert_allclose(result.sel(name="b") - result.sel(name="a"), 100, rtol=1e-5)


def test_shared_values_may_be_keys(key):
    def run(key, *, name, scale):
        for_data, for_noise = jax.random.split(key)
        data = jax.random.normal(for_data, (3,)).sum()
        return data + scale * (jax.random.normal(for_noise) if name == "normal" else jax.random.uniform(for_noise))

    axes = {"name": ["normal", "uniform"], "scale": [0.5, 1.0]}
    result = sweep.grid(run, key, num_seeds=4, **axes)["result"]
    np.testing.assert_allclose(result, sweeps.loop(run, key, num_seeds=4, **axes), rtol=1e-5, atol=1e-6)
    assert num_shared(run, name=axes["name"]) == 2


def test_constants_that_differ_are_told_apart(key):
    tables = {name: np.arange(5, dtype=np.float32) + i for i, name in enumerate(["a", "b"])}

    def run(key, *, name, scale):
        return scale * jnp.asarray(tables[name])[jax.random.randint(key, (), 0, 5)]

    result = sweep.grid(run, key, num_seeds=6, name=["a", "b"], scale=[1.0, 2.0])["result"]
    np.testing.assert_allclose(result.sel(name="b", scale=1.0) - result.sel(name="a", scale=1.0), 1.0)


def test_constants_inside_of_functions_are_told_apart(key):
    tables = {name: np.arange(5, dtype=np.float32) + i for i, name in enumerate(["a", "b"])}

    def run(key, *, name, scale):
        look_up = jax.jit(lambda i: jnp.asarray(tables[name])[i])
        return scale * look_up(jax.random.randint(key, (), 0, 5))

    result = sweep.grid(run, key, num_seeds=6, name=["a", "b"], scale=[1.0, 2.0])["result"]
    np.testing.assert_allclose(result.sel(name="b", scale=1.0) - result.sel(name="a", scale=1.0), 1.0)


def test_functions_that_differ_are_told_apart(key):
    def run(key, *, name, scale):
        power = jax.custom_jvp(lambda x: x**2 if name == "square" else x**3)
        power.defjvp(lambda primals, tangents: (power(primals[0]), tangents[0]))
        return scale * power(jax.random.uniform(key))

    result = sweep.grid(run, key, num_seeds=6, name=["square", "cube"], scale=[1.0])["result"].squeeze()
    np.testing.assert_allclose(result.sel(name="cube") ** 2, result.sel(name="square") ** 3, rtol=1e-5)


def test_work_before_the_first_difference_is_shared_and_no_more():
    def run(key, *, name, scale):
        first = jnp.sin(jax.random.normal(key))
        second = jnp.cos(first) if name == "cos" else jnp.tan(first)
        return {"first": first, "second": second, "scaled": scale * jnp.exp(second)}

    assert num_shared(run, name=["cos", "tan"]) == 1
    assert num_shared(run, name=["cos", "sin"]) == 1
    assert num_shared(run, name=["sin", "tan"]) == 3  # the same program twice: all but the scaling
    assert num_shared(lambda key, *, name, scale: scale, name=["a", "b"]) == 0


def test_everything_may_be_shared(key):
    result = sweep.grid(lambda key, *, scale: jax.random.uniform(key), key, num_seeds=2, scale=[1.0, 2.0])["result"]
    expected = [float(jax.random.uniform(jax.random.fold_in(key, seed))) for seed in range(2)]
    np.testing.assert_allclose(result, [expected, expected], rtol=1e-6)


def test_effects_stay_with_every_run(key, capfd):
    def run(key, *, scale):
        jax.debug.print("drawn {}", jax.random.uniform(key))
        return scale * jax.random.uniform(key)

    (shared,) = share_work([trace(run, key, ["scale"], {})])
    assert any(equation.effects for equation in shared.rest.eqns)
    assert not any(equation.effects for equation in shared.common.eqns)
    sweep.grid(run, key, num_seeds=2, scale=[1.0, 2.0])
    jax.effects_barrier()
    assert "drawn" in capfd.readouterr().out
