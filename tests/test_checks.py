import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import checks


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.positive("x", [1.0, 0.0]), "x must be positive and finite, got 0.0 in row 1"),
        (lambda: checks.positive("x", jnp.bfloat16(-1)), "x must be positive and finite, got -1.0"),
        (lambda: checks.positive("x", np.ones((2, 2)) * [[1], [-1]]), r"got -1.0 in row \(1, 0\)"),
        (lambda: checks.finite("x", np.inf), "x must be finite, got inf"),
        (lambda: checks.choices("x", [[0.5, 0.5], [1, 0]], at_least=2), "a positive weight, got 1 in row 1"),
        (lambda: checks.choices("x", jnp.array([[jnp.nan]])), r"got nan in row \(0, 0\)"),
        (lambda: checks.broadcasts("x", jnp.ones(2), (3,)), r"x must broadcast to the shape \(3,\), got shape \(2,\)"),
        (lambda: checks.ids("x", np.array([[0, 3]]), 3), r"x must be between 0 and 2, got 3 in row \(0, 1\)"),
        (lambda: checks.rows("x", {"a": jnp.zeros(())}), r"x\['a'\] has no rows"),
    ],
)
def test_messages_name_argument_value_and_row(check, message):
    with pytest.raises(ValueError, match=message):
        check()


@pytest.mark.parametrize("value", ["0.1", None, object()])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="x must be positive and finite, got"):
        checks.positive("x", value)


def test_good_values_pass():
    checks.positive("x", [1, 2.5])
    checks.positive("x", jnp.bfloat16(1))
    checks.not_negative("x", 0)
    checks.choices("x", jnp.array([[0.0, 1.0]]))
    checks.broadcasts("x", 1.0, (3,))
    checks.distinct("x", [1, 2], [2, 1])
    assert checks.rows("x", (jnp.zeros((3, 2)), None, jnp.zeros(3))) == 3


def test_traced_values_pass_and_traced_shapes_do_not():
    @jax.jit
    def traced(x):
        checks.positive("x", x)
        checks.ids("i", x.astype(int), 1)
        checks.distinct("x", x, x)
        with pytest.raises(ValueError, match="shapes must be equal"):
            checks.same_shape(x=x, y=x[1:])
        return x

    traced(-jnp.ones(3))
