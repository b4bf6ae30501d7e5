import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import checks


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.interval("x", [1.0, 0.0], "(0, inf)"), "x must be in .0, inf., got 0.0 in row 1"),
        (lambda: checks.interval("x", jnp.bfloat16(-1), "(0, inf)"), "x must be in .0, inf., got -1.0"),
        (lambda: checks.interval("x", np.ones((2, 2)) * [[1], [-1]], "(0, inf)"), r"got -1.0 in row \(1, 0\)"),
        (lambda: checks.finite("x", np.inf), "x must be finite, got inf"),
        (lambda: checks.choices("x", [[0.5, 0.5], [1, 0]], at_least=2), "a positive weight, got 1 in row 1"),
        (lambda: checks.choices("x", jnp.array([[jnp.nan]])), r"got nan in row \(0, 0\)"),
        (lambda: checks.broadcasts("x", jnp.ones(2), (3,)), r"x must broadcast to the shape \(3,\), got shape \(2,\)"),
        (lambda: checks.ids("x", np.array([[0, 3]]), 3), r"x must be between 0 and 2, got 3 in row \(0, 1\)"),
        (lambda: checks.rows("x", {"a": jnp.zeros(())}), r"x\['a'\] has no rows"),
        (lambda: checks.interval("x", [0.1, 0.5], "(0, 0.5)"), "x must be in .0, 0.5., got 0.5 in row 1"),
        (lambda: checks.interval("x", [2.0, 0.9], "[1, inf)"), "x must be in .1, inf., got 0.9 in row 1"),
        (lambda: checks.interval("x", np.inf, "[1, inf)"), "x must be in .1, inf., got inf"),
        (lambda: checks.interval("x", jnp.float32(np.nan), "[1, inf)"), "x must be in .1, inf., got nan"),
        (lambda: checks.interval("x", 1.5, "(0, 1]"), "x must be in .0, 1., got 1.5"),
        (lambda: checks.interval("x", 0.0, "(0, inf]"), "x must be in .0, inf., got 0.0"),
        (lambda: checks.reference(None), "reference is missing: .*train.with_reference"),
        (lambda: checks.batch("x", jnp.float32(1)), "x must be a batch, with at least one axis, got a scalar"),
        (
            lambda: checks.lengths((jnp.ones(2), jnp.zeros(2)), (2,)),
            "lengths.rejected must be in .1, inf., got 0.0",
        ),
        (
            lambda: checks.rankings([jnp.ones(2)] * 2, [jnp.ones(2)] * 3),
            "policy ranks 2 responses, but reference",
        ),
    ],
)
def test_messages_name_argument_value_and_row(check, message):
    with pytest.raises(ValueError, match=message):
        check()


@pytest.mark.parametrize("value", ["0.1", None, object()])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="x must be in .0, inf., got"):
        checks.interval("x", value, "(0, inf)")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.boolean("x", jnp.ones(2)), "x must hold Booleans, got an array of shape"),
        (lambda: checks.size("x", True), "x must be a whole number known before tracing, got True"),
        (lambda: checks.lengths(jnp.ones(2), (2,)), "lengths must be a pair"),
        (
            lambda: checks.rankings(jnp.ones((2, 3)), None),
            "policy must be a sequence of two or more arrays, best",
        ),
        (lambda: checks.rankings([jnp.ones(2)], [jnp.ones(2)]), "policy must be a sequence of two or more"),
        (
            lambda: checks.same_structure("f", jnp.ones(2), (1, 2)),
            "f must return 2 arrays, one for each of the",
        ),
    ],
)
def test_wrong_kinds_are_named(check, message):
    with pytest.raises(TypeError, match=message):
        check()


def test_good_values_pass():
    checks.interval("x", np.inf, "(0, inf]")
    checks.boolean("x", np.array([True]))
    checks.lengths((np.ones(2), jnp.ones(2, int)), (2,))
    checks.hyperparameters((3,), beta=0.1, gamma=np.ones(3))
    checks.interval("x", [1, 2.5], "(0, inf)")
    checks.interval("x", jnp.bfloat16(1), "(0, inf)")
    checks.interval("x", 0, "[0, inf)")
    checks.interval("x", [1, 2.5], "[1, inf)")
    checks.choices("x", jnp.array([[0.0, 1.0]]))
    checks.log_probabilities(x=jnp.array([jnp.nan, -1.0]))  # NaN shows in the loss, and stops training
    checks.broadcasts("x", 1.0, (3,))
    checks.distinct("x", [1, 2], [2, 1])
    assert checks.rows("x", (jnp.zeros((3, 2)), None, jnp.zeros(3))) == 3


def test_traced_values_pass_and_traced_shapes_do_not():
    @jax.jit
    def traced(x):
        checks.interval("x", x, "(0, inf)")
        checks.interval("x", x, "[1, inf)")
        checks.ids("i", x.astype(int), 1)
        checks.distinct("x", x, x)
        with pytest.raises(ValueError, match="shapes must be equal"):
            checks.same_shape(x=x, y=x[1:])
        return x

    traced(-jnp.ones(3))
