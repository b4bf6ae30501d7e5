"""What holds of every loss: its equation, its gradient, its dtypes, extremes, jit, vmap, and errors at the call."""

import re
from collections import Counter
from functools import cache

import chex
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from dpo_jax import losses
from tests.losses import menu
from tests.losses.menu import (
    BATCH,
    BY_NAME,
    CASES,
    OF_RLHF,
    REFERENCE_FREE,
    UNPAIRED,
    Inputs,
    evaluate,
    expected,
    make_inputs,
    policy_arrays,
)

every_loss = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
TRACES = Counter()
"""How often the program of each loss was traced."""


@cache
def program(name):
    """Of eight comparisons in single precision, compiled once for all that is asked of a loss.

    A function of policy, reference, labels and the hyperparameters that are swept. It returns the losses and the
    gradients of their sum with respect to policy and hyperparameters.
    """

    @jax.jit
    def run(policy, reference, desirable, hyperparameters):
        TRACES[name] += 1
        inputs = Inputs(policy, reference, desirable)
        loss, pull_back = jax.vjp(lambda p, h: evaluate(BY_NAME[name], p, inputs, **h), policy, hyperparameters)
        return loss, *pull_back(jnp.ones_like(loss))

    def called(policy, reference, desirable, hyperparameters):
        sides = (tuple(np.float32(logps) for logps in side) for side in (policy, reference))
        return run(*sides, np.asarray(desirable), {n: np.float32(value) for n, value in hyperparameters.items()})

    return called


def by_program(case, inputs, **changed):
    """Losses, gradient, and gradient of hyperparameters."""
    swept = {h.name: case.hyperparameters[h.name] for h in case.swept} | changed
    return program(case.name)(inputs.policy, inputs.reference, inputs.desirable, swept)


def test_every_public_loss_is_on_the_menu():
    public = {name for name in dir(losses) if name.endswith("_loss")} - OF_RLHF
    missing = public - BY_NAME.keys()
    assert not missing, f"add a Case to tests/losses/menu.py for {missing}"
    assert len(BY_NAME) == len(CASES)


@every_loss
def test_all_its_numbers_are_swept(case):
    numbers = {name for name, value in case.hyperparameters.items() if isinstance(value, int | float)} - {"keep"}
    assert numbers == set(case.at(0)), f"swept, in the Case of {case.name}, must be of {numbers}"


@every_loss
def test_it_is_its_equation(case):
    inputs = make_inputs()
    np.testing.assert_allclose(by_program(case, inputs)[0], expected(case, inputs), rtol=1e-5)
    with jax.enable_x64(True):
        policy = policy_arrays(inputs, jnp.float64)
        loss = evaluate(case, policy, inputs, jnp.float64)
        np.testing.assert_allclose(loss, np.float64(expected(case, inputs)), rtol=1e-10)


@every_loss
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=10)
def test_it_is_its_equation_for_all_hyperparameters(case, data, seed):
    inputs = make_inputs(seed)
    changed = {h.name: data.draw(st.floats(h.low, h.high), label=h.name) for h in case.swept}
    with jax.enable_x64(True):
        loss = evaluate(case, policy_arrays(inputs, jnp.float64), inputs, jnp.float64, **changed)
        np.testing.assert_allclose(loss, np.float64(expected(case, inputs, **changed)), rtol=1e-9, atol=1e-12)


@every_loss
def test_its_gradient_is_that_of_finite_differences(case):
    """Central differences of the equation in extended precision, with respect to all log-probabilities."""
    inputs, step = make_inputs(1), 1e-6
    with jax.enable_x64(True):
        gradient = jax.grad(lambda policy: evaluate(case, policy, inputs, jnp.float64).sum())(
            policy_arrays(inputs, jnp.float64)
        )
    held = _frozen_statistics(case, inputs)
    for side, row in np.ndindex(3, len(inputs.policy[0])):
        values = []
        for sign in (1, -1):
            policy = np.array(inputs.policy, np.longdouble)
            policy[side, row] += sign * step
            values.append(expected(case, Inputs(tuple(policy), inputs.reference, inputs.desirable), **held).sum())
        slope = np.float64((values[0] - values[1]) / (2 * step))
        np.testing.assert_allclose(gradient[side][row], slope, rtol=1e-6, atol=1e-8)


def _frozen_statistics(case, inputs):
    """beta-DPO lets no gradient through its beta: it is worked out beforehand."""
    if case.name != "beta_dpo_loss":
        return {}
    h = case.hyperparameters
    surplus = float(np.mean(menu.quantities(inputs).D)) - h["moments"].mean
    return {"beta": h["beta"] * (1 + h["alpha"] * surplus), "alpha": 0.0}


@every_loss
def test_gradients_with_respect_to_hyperparameters_are_finite(case):
    slopes = by_program(case, make_inputs())[2]
    assert slopes.keys() == {h.name for h in case.swept}
    chex.assert_tree_all_finite(slopes)


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_it_is_finite_at_the_extremes(case, dtype):
    """Margins of +-1e4 nats, log-probabilities of 0 and -1e4, under all combinations for policy and reference."""
    corners = np.array(np.meshgrid(*[[0.0, -1e4, -1.0]] * 6)).reshape(6, -1)
    inputs = Inputs(tuple(corners[:3]), tuple(corners[3:]), np.arange(corners.shape[1]) % 2 == 0)
    for desirable in (inputs.desirable, ~inputs.desirable) if case.kind == UNPAIRED else (inputs.desirable,):
        inputs = Inputs(inputs.policy, inputs.reference, desirable)
        changed = {"beta": 1.0} if "beta" in case.hyperparameters else {}
        if dtype == jnp.float32 and case.kind != BATCH:  # rows are by themselves: eight at a time
            for rows in np.resize(np.arange(corners.shape[1]), (-(-corners.shape[1] // 8), 8)):
                some = Inputs(
                    *(tuple(logps[rows] for logps in side) for side in (inputs.policy, inputs.reference)),
                    desirable[rows],
                )
                chex.assert_tree_all_finite(by_program(case, some, **changed)[:2])
            continue
        if "lengths" in case.hyperparameters:
            changed["lengths"] = (np.ones(corners.shape[1]), np.full(corners.shape[1], 3))

        def total(policy):
            loss = evaluate(case, policy, inputs, dtype, **changed)  # noqa: B023
            return loss.astype(jnp.float32).sum(), loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(policy_arrays(inputs, dtype))
        chex.assert_tree_all_finite((loss, gradient))
        assert loss.dtype == dtype


@every_loss
@given(
    logps=hnp.arrays(np.float32, (6, 8), elements=st.floats(-1e4, 0, width=32)),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=10)
def test_it_is_finite_for_all_log_probabilities_and_hyperparameters(case, logps, share):
    desirable = np.arange(8) % 2 == 0
    found = program(case.name)(tuple(logps[:3]), tuple(logps[3:]), desirable, case.at(share))
    chex.assert_tree_all_finite(found[:2])


MASKED = np.array(np.meshgrid(*[[False, True]] * 4)).reshape(4, 2, 8)
"""Policy chosen, policy rejected, reference chosen, reference rejected: which are -inf, in two batches of eight."""


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("case", [case for case in CASES if case.kind != BATCH], ids=lambda case: case.name)
def test_a_masked_response_has_the_loss_and_the_gradient_of_the_limit(case, batch):
    """Where equal infinities meet there is no limit; there as elsewhere nothing is NaN.

    A limit is infinite only if the loss goes on growing towards it.
    """
    masks, middle = MASKED[:, batch], np.full(8, -1.2, np.float32)
    hyperparameters = {h.name: float(case.hyperparameters[h.name]) for h in case.swept}

    def value_and_gradient(masked):
        logps = np.where(masks, np.float32(masked), np.float32([[-1.0], [-0.7], [-2.0], [-1.5]]))
        policy, reference = (logps[0], middle, logps[1]), (logps[2], middle, logps[3])
        loss, gradient, _ = program(case.name)(policy, reference, masks[1], hyperparameters)
        return np.asarray(loss), np.asarray(gradient)

    (loss, gradient), (limit, its_gradient) = value_and_gradient(-np.inf), value_and_gradient(-1e5)
    finite = np.isfinite(loss)
    assert not np.isnan(loss).any() and not np.isnan(gradient).any()
    assert np.isfinite(gradient[:, finite]).all()
    chosen, rejected, reference_chosen, reference_rejected = masks
    meet = chosen & rejected
    if case.kind != REFERENCE_FREE:
        meet |= (chosen & reference_chosen) | (rejected & reference_rejected) | (reference_chosen & reference_rejected)
    np.testing.assert_allclose(loss[finite & ~meet], limit[finite & ~meet], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient[:, finite & ~meet], its_gradient[:, finite & ~meet], rtol=1e-4, atol=1e-5)
    infinite = ~finite & ~meet
    on_the_way = np.array([value_and_gradient(-1.0)[0], limit, value_and_gradient(-1e10)[0]])[:, infinite]
    first, second = np.diff(np.sign(loss[infinite]) * on_the_way, axis=0)
    assert np.all(first > 1) and np.all(second >= first), "the loss is infinite, but bounded on the way there"


@every_loss
def test_bfloat16_is_close_to_float32(case):
    inputs = make_inputs()
    rounded = Inputs(
        *(tuple(np.float64(jnp.asarray(x, jnp.bfloat16)) for x in side) for side in (inputs.policy, inputs.reference)),
        inputs.desirable,
    )
    loss = evaluate(case, policy_arrays(rounded, jnp.bfloat16), rounded, jnp.bfloat16)
    np.testing.assert_allclose(np.float32(loss), by_program(case, rounded)[0], rtol=0.03, atol=0.03)


def at_three_values(case, inputs):
    """Of each hyperparameter: the values, and the losses at each."""
    values = {h.name: np.linspace(h.low, h.high, 3, dtype=np.float32) for h in case.swept}
    return {
        name: (column, np.stack([by_program(case, inputs, **{name: value})[0] for value in column]))
        for name, column in values.items()
    }


@every_loss
def test_jit_changes_nothing_and_hyperparameters_do(case):
    inputs = make_inputs()
    eager = evaluate(case, policy_arrays(inputs), inputs)
    np.testing.assert_allclose(by_program(case, inputs)[0], eager, rtol=1e-5, atol=1e-7)
    for name, (_, looped) in at_three_values(case, inputs).items():
        assert not np.allclose(looped[0], looped[-1]), f"{name} does nothing"


FEW = ("dpo_loss", "beta_dpo_loss", "simpo_loss", "kto_loss", "plackett_luce_loss")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c.name in FEW else pytest.mark.slow, id=c.name) for c in CASES]
)
def test_vmap_over_a_hyperparameter_is_a_loop(case):
    inputs = make_inputs()
    policy, loops = policy_arrays(inputs), at_three_values(case, inputs)

    @jax.jit
    def swept(values):
        return {
            name: jax.vmap(lambda value, name=name: evaluate(case, policy, inputs, **{name: value}))(column)
            for name, column in values.items()
        }

    for name, rows in swept({name: column for name, (column, _) in loops.items()}).items():
        np.testing.assert_allclose(rows, loops[name][1], rtol=1e-5, atol=1e-6)


@every_loss
def test_one_trace_serves_all_hyperparameters(case):
    for share in (0.25, 0.75):
        by_program(case, make_inputs(), **case.at(share))
    assert TRACES[case.name] == 1


@pytest.mark.parametrize("alpha", [1e-8, 1e-6, 1e-3, 0.01, -0.01])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_alphapo_keeps_its_digits_near_simpo(alpha, dtype, tolerance):
    case, inputs = BY_NAME["alphapo_loss"], make_inputs()
    rounded = inputs.map(lambda logps: np.float64(jnp.asarray(logps, jnp.bfloat16)))
    loss = evaluate(case, policy_arrays(rounded, dtype), rounded, dtype, alpha=alpha)
    exact = np.float64(expected(case, rounded, alpha=np.longdouble(alpha)))
    np.testing.assert_allclose(np.float32(loss), exact, rtol=tolerance, atol=tolerance)


def test_alphapo_has_a_slope_at_its_limit():
    case, inputs, step = BY_NAME["alphapo_loss"], make_inputs(), 1e-5
    with jax.enable_x64(True):
        policy = policy_arrays(inputs, jnp.float64)
        slope = jax.grad(lambda alpha: evaluate(case, policy, inputs, jnp.float64, alpha=alpha).sum())(0.0)
    above, below = (expected(case, inputs, alpha=np.longdouble(sign * step)).sum() for sign in (1, -1))
    np.testing.assert_allclose(slope, np.float64((above - below) / (2 * step)), rtol=1e-7)


def test_the_menu_also_has_the_defaults():
    """What the table sets for the sake of an equation: all kept, and clipped."""
    inputs = make_inputs(3, num=20)
    policy = policy_arrays(inputs)
    chi = evaluate(BY_NAME["chi_po_loss"], policy, inputs, max_reward=np.inf)
    unclipped = evaluate(BY_NAME["dpo_loss, chi_square_kl"], policy, inputs)
    np.testing.assert_allclose(chi, unclipped, rtol=1e-5, atol=1e-6)
    kept = evaluate(BY_NAME["beta_dpo_loss"], policy, inputs, keep=0.8)
    assert jnp.sum(kept > 0) == 16


def test_each_differs_from_every_other():
    """No copy in disguise: somewhere, with its own hyperparameters, each loss has another value."""
    inputs = make_inputs(3)
    values = {case.name: np.asarray(evaluate(case, policy_arrays(inputs), inputs)) for case in CASES}
    for i, (name, value) in enumerate(values.items()):
        for other in list(values)[i + 1 :]:
            assert not np.allclose(value, values[other], rtol=1e-3), (name, other)


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != BATCH], ids=lambda case: case.name)
def test_each_row_is_by_itself_and_hyperparameters_may_differ_by_row(case):
    inputs = make_inputs(num=8)
    values = {h.name: np.linspace(h.low, h.high, 8) for h in case.swept}
    together = evaluate(
        case, policy_arrays(inputs), inputs, **{n: jnp.asarray(v, jnp.float32) for n, v in values.items()}
    )
    if "lengths" in case.hyperparameters:  # they are no argument of the program
        for row in range(8):
            one = Inputs(
                *(tuple(x[row : row + 1] for x in side) for side in (inputs.policy, inputs.reference)),
                inputs.desirable[row : row + 1],
            )
            changed = {name: float(value[row]) for name, value in values.items()}
            changed["lengths"] = tuple(side[row : row + 1] for side in case.hyperparameters["lengths"])
            alone = evaluate(case, policy_arrays(one), one, **changed)
            np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=1e-6)
        return
    for row in range(8):
        alike = inputs.map(lambda column, row=row: np.repeat(column[row], 8))
        alone = by_program(case, alike, **{name: value[row] for name, value in values.items()})[0]
        np.testing.assert_allclose(np.full(8, together[row]), alone, rtol=1e-5, atol=1e-6)


@every_loss
def test_hyperparameters_do_not_change_the_dtype(case):
    """Neither arrays nor NumPy's numbers, of more digits or fewer than the log-probabilities have."""
    inputs = make_inputs()
    for dtype, wide in ((jnp.bfloat16, np.float32), (jnp.float32, np.float64)):
        with jax.enable_x64(True):
            changed = {h.name: wide(case.hyperparameters[h.name]) for h in case.swept}
            arrays = {name: jnp.asarray(value) for name, value in changed.items()}
            if "moments" in case.hyperparameters:
                mean, std = jnp.asarray(menu.MOMENTS.mean, wide), jnp.asarray(menu.MOMENTS.std, wide)
                arrays["moments"] = menu.MOMENTS._replace(mean=mean, std=std)
            for values in (changed, arrays):
                loss = jax.eval_shape(
                    lambda policy: evaluate(case, policy, inputs, dtype, **values),  # noqa: B023
                    policy_arrays(inputs, dtype),
                )
                assert loss.dtype == dtype


# Bad input


@every_loss
def test_bad_hyperparameters_are_refused_at_the_call(case):
    inputs = make_inputs()
    policy = policy_arrays(inputs)
    for h in case.swept:
        with pytest.raises(ValueError, match=re.escape(f"{h.name} must be {h.must_be}, got {h.bad}")):
            evaluate(case, policy, inputs, **{h.name: h.bad})
        with pytest.raises(ValueError, match=f"{h.name} must broadcast to the shape"):
            evaluate(case, policy, inputs, **{h.name: jnp.full((2, 1), case.hyperparameters[h.name])})


@every_loss
@pytest.mark.usefixtures("as_users_have_it")
def test_arrays_that_do_not_match_are_refused(case):
    inputs = make_inputs()
    policy = policy_arrays(inputs)
    with pytest.raises(ValueError, match="shape"):
        evaluate(case, (policy[0][:3], policy[1][:3], policy[2]), inputs)
    with pytest.raises(TypeError, match="floating-point"):
        evaluate(case, tuple(jnp.ones(8, int) for _ in policy), inputs)
    with pytest.raises(TypeError, match="must be an array|must be a"):
        evaluate(case, tuple([-1.0] * 8 for _ in policy), inputs)


@every_loss
def test_what_is_no_log_probability_is_refused_where_it_is_known(case):
    inputs = make_inputs()
    policy = policy_arrays(inputs)
    for above, dtype in ((1e-4, jnp.float32), (0.05, jnp.bfloat16)):  # rounding
        evaluate(case, tuple(side.at[3].set(above) for side in policy_arrays(inputs, dtype)), inputs, dtype)
    wrong = tuple(side.at[3].set(0.5) for side in policy)
    with pytest.raises(ValueError, match=r"policy.* must be zero or negative, .* got 0.5 in row 3"):
        evaluate(case, wrong, inputs)
    jax.eval_shape(lambda policy: evaluate(case, policy, inputs), wrong)
    if case.kind != REFERENCE_FREE:
        spoilt = Inputs(inputs.policy, tuple(0.5 + 0 * side for side in inputs.reference), inputs.desirable)
        with pytest.raises(ValueError, match=r"reference.* must be zero or negative, .* got 0.5"):
            evaluate(case, policy, spoilt)


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != REFERENCE_FREE], ids=lambda case: case.name)
@pytest.mark.usefixtures("as_users_have_it")
def test_a_missing_reference_is_named(case):
    inputs = make_inputs()
    without = Inputs(inputs.policy, None, inputs.desirable)
    with pytest.raises(ValueError, match="reference is missing.*train.with_reference"):
        evaluate(case, policy_arrays(inputs), without)
    with pytest.raises(TypeError, match="dtypes must be equal.*bfloat16"):
        evaluate(case, policy_arrays(inputs, jnp.bfloat16), inputs)
