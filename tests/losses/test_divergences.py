from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.losses import LOSSES_OF_THE_MARGIN, alpha_divergence, forward_kl, with_divergence
from tests.losses.menu import BY_NAME, CASES, SINGLE, evaluate, make_inputs, policy_arrays

LINKS = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jensen_shannon": losses.jensen_shannon,
    "chi_square_kl": losses.chi_square_kl,
    "alpha 0.4": alpha_divergence(0.4),
    "alpha 2": alpha_divergence(2.0),
}
GENERATORS = {
    "reverse_kl": lambda z: z * np.log(z) - z,
    "forward_kl": lambda z: z - np.log(z),
    "jensen_shannon": lambda z: z * np.log(z) - (z + 1) * np.log((z + 1) / 2),
    "chi_square_kl": lambda z: z**2 / 2 + z * np.log(z) - z,
    "alpha 0.4": lambda z: (z**0.4 / 0.4 - z) / -0.6,
    "alpha 2": lambda z: z**2 / 2 - z,
}
"""Convex functions f whose divergence E[f(pi / pi_ref)] is meant; terms linear in z change no divergence."""


@pytest.mark.parametrize("name", LINKS)
def test_links_are_derivatives_of_their_divergence(name):
    ratio, step = np.geomspace(0.05, 20, 30, dtype=np.longdouble), 1e-6
    slope = (GENERATORS[name](ratio + step) - GENERATORS[name](ratio - step)) / (2 * step)
    with jax.enable_x64(True):
        np.testing.assert_allclose(LINKS[name](jnp.log(jnp.float64(ratio))), np.float64(slope), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LINKS)
def test_links_increase(name):
    assert jnp.all(jnp.diff(LINKS[name](jnp.linspace(-10, 10, 50))) > 0)


@pytest.mark.parametrize("loss", LOSSES_OF_THE_MARGIN, ids=lambda loss: loss.__name__)
def test_reverse_kl_changes_nothing(loss):
    case, inputs = BY_NAME[loss.__name__], make_inputs()
    changed = type(case)(case.name, with_divergence(loss, losses.reverse_kl), case.equation, case.hyperparameters, "")
    policy = policy_arrays(inputs)
    np.testing.assert_allclose(evaluate(changed, policy, inputs), evaluate(case, policy, inputs), rtol=1e-5, atol=1e-6)


def test_alpha_ends_at_reverse_and_forward_kl():
    ratios = jnp.array([-3.0, -1e-4, 0.0, 2.0])
    np.testing.assert_allclose(alpha_divergence(1.0)(ratios), ratios)
    np.testing.assert_allclose(alpha_divergence(1.0 + 1e-6)(ratios), ratios, rtol=1e-4)
    np.testing.assert_allclose(alpha_divergence(0.0)(ratios), forward_kl(ratios), rtol=1e-5, atol=1e-7)


def test_alpha_has_a_slope_at_its_limit():
    slope = jax.grad(lambda alpha: alpha_divergence(alpha)(jnp.float32(1.5)))(1.0)
    np.testing.assert_allclose(slope, 1.5**2 / 2, rtol=1e-5)


def test_alpha_may_be_swept():
    """Also through reverse KL, where the formula is a limit."""
    inputs, alphas = make_inputs(), jnp.array([0.0, 1.0, 2.0])

    def loss(alpha):
        case = BY_NAME["dpo_loss"]
        swept = with_divergence(losses.dpo_loss, alpha_divergence(alpha))
        return evaluate(type(case)("", swept, case.equation, case.hyperparameters, ""), policy_arrays(inputs), inputs)

    swept = jax.jit(jax.vmap(loss))(alphas)
    np.testing.assert_allclose(swept, jnp.stack([loss(alpha) for alpha in alphas]), rtol=1e-5)
    np.testing.assert_allclose(swept[1], evaluate(BY_NAME["dpo_loss"], policy_arrays(inputs), inputs), rtol=1e-5)


def test_rankings_take_divergences_too():
    """Of two, they are pairs."""
    inputs = make_inputs()
    pair = tuple(policy_arrays(inputs)[i] for i in (0, 2))
    reference = tuple(jnp.asarray(inputs.reference[i], jnp.float32) for i in (0, 2))
    ranked, paired = (
        with_divergence(loss, forward_kl)(pair, reference, beta=0.3)
        for loss in (losses.plackett_luce_loss, losses.dpo_loss)
    )
    np.testing.assert_allclose(ranked, paired, rtol=1e-5)
    three = with_divergence(losses.plackett_luce_loss, losses.reverse_kl)
    policy, references = policy_arrays(inputs), tuple(jnp.asarray(side, jnp.float32) for side in inputs.reference)
    expected = losses.plackett_luce_loss(policy, references, beta=0.3)
    np.testing.assert_allclose(three(policy, references, beta=0.3), expected, rtol=1e-5)


def test_losses_of_ones_own_are_welcome():
    def ramp_loss(policy, reference, *, beta):
        ratios = losses.log_ratios(policy, reference)
        return jax.nn.sigmoid(-beta * (ratios.chosen - ratios.rejected))

    policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    expected = 1 / (1 + np.exp(np.tanh(1.0) - np.tanh(-1.0)))
    for loss in (ramp_loss, jax.jit(ramp_loss)):
        np.testing.assert_allclose(with_divergence(loss, jnp.tanh)(policy, reference, beta=1.0), [expected], rtol=1e-5)


def test_partials_and_own_links_are_welcome():
    policy, reference = (jnp.array([-1.0]), jnp.array([-3.0])), (jnp.array([-2.0]), jnp.array([-2.0]))
    smoothed = with_divergence(partial(losses.dpo_loss, label_smoothing=0.1), jnp.tanh)
    margin = np.tanh(1.0) - np.tanh(-1.0)
    expected = 0.9 * np.logaddexp(0, -margin) + 0.1 * np.logaddexp(0, margin)
    np.testing.assert_allclose(smoothed(policy, reference, beta=1.0), [expected], rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if getattr(losses, case.name, None) not in (None, losses.plackett_luce_loss, *LOSSES_OF_THE_MARGIN)
    ],
    ids=lambda case: case.name,
)
def test_other_losses_are_refused_at_once_with_the_reason(case):
    with pytest.raises(
        ValueError, match=f"{case.name} cannot take a divergence: .* cancel.* dpo_loss, robust_dpo_loss"
    ):
        with_divergence(case.loss, forward_kl)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (losses.xpo_loss, "xpo_loss"),
        (losses.bradley_terry_loss, "bradley_terry_loss"),
        (losses.grpo_loss, "grpo_loss"),
        (losses.log_ratios, "log_ratios"),
        (losses.with_sft(losses.dpo_loss, weight=1.0), "with_sft"),
        (losses.weighted_sum((1.0, losses.dpo_loss)), "weighted_sum"),
        (losses.with_weights(losses.dpo_loss), "with_weights"),
        (with_divergence(losses.dpo_loss, forward_kl), "with_divergence"),
        (partial(losses.xpo_loss, alpha=0.1), "xpo_loss"),
        (jax.jit(partial(losses.xpo_loss, alpha=0.1)), "xpo_loss"),
        (partial(jax.jit(jax.tree_util.Partial(losses.nca_loss)), beta=0.1), "nca_loss"),
    ],
)
def test_all_else_of_the_library_is_refused_whatever_it_is_wrapped_in(loss, name):
    with pytest.raises(ValueError, match=f"^{name} cannot take a divergence"):
        with_divergence(loss, forward_kl)


def test_a_link_gives_a_score_for_each_log_ratio_in_its_dtype():
    policy = reference = (jnp.array([-1.0, -2.0]), jnp.array([-3.0, -1.0]))
    column = jnp.array([[0.5], [2.0]])
    with jax.numpy_rank_promotion("allow"):
        for link in (alpha_divergence(column), lambda ratio: column * ratio):
            with pytest.raises(ValueError, match="alpha must broadcast|shapes must be equal, got log_ratios"):
                with_divergence(losses.dpo_loss, link)(policy, reference, beta=0.1)
    narrow = jax.tree.map(lambda side: side.astype(jnp.bfloat16), policy)
    for link in (alpha_divergence(column[:, 0]), lambda ratio: column[:, 0] * ratio):
        assert with_divergence(losses.dpo_loss, link)(narrow, narrow, beta=jnp.ones(2)).dtype == jnp.bfloat16


def test_the_list_is_that_of_losses_which_a_shift_of_both_ratios_does_not_change():
    inputs = make_inputs()
    policy = policy_arrays(inputs)
    lifted = tuple(side - 0.3 for side in policy)
    for case in CASES:
        if case.name in vars(losses) and case.kind == SINGLE:
            unchanged = np.allclose(evaluate(case, policy, inputs), evaluate(case, lifted, inputs), rtol=1e-4)
            assert unchanged == (case.loss in LOSSES_OF_THE_MARGIN), f"{case.name} belongs into another file of losses"


def test_bad_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        alpha_divergence(float("nan"))
