"""Gradients that papers state, with respect to the log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.losses import menu
from tests.losses.menu import BY_NAME

BETA = 0.3  # as on the menu


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def gradient(name, **changed):
    """By autodiff, for the menu's inputs."""
    inputs = menu.make_inputs(5)
    policy = menu.policy_arrays(inputs, jnp.float64)
    case = BY_NAME[name]
    slopes = jax.grad(lambda policy: menu.evaluate(case, policy, inputs, jnp.float64, **changed).sum())(policy)
    x = menu.quantities(inputs)
    return np.float64(slopes[0]), np.float64(slopes[2]), jax.tree.map(np.float64, vars(x))


def assert_opposite(chosen, rejected, expected):
    np.testing.assert_allclose(chosen, expected, rtol=1e-9)
    np.testing.assert_allclose(rejected, -expected, rtol=1e-9)


def test_simpo_weighs_by_how_far_the_likelihoods_miss_the_target_margin():
    """Meng et al. 2024, 2405.14734, Sec. 2.3, for log-probabilities that are means already."""
    chosen, rejected, x = gradient("simpo_loss", beta=2.0, gamma=0.5)
    assert_opposite(chosen, rejected, -2.0 * special.expit(0.5 - 2.0 * (x["w"] - x["l"])))


def test_cpo_weighs_by_how_wrong_the_likelihoods_are():
    chosen, rejected, x = gradient("cpo_loss", sft_weight=0.8)
    assert_opposite(chosen + 0.8, rejected, -BETA * special.expit(-BETA * (x["w"] - x["l"])))


def test_orpo_multiplies_the_papers_two_factors():
    """Hong et al. 2024, 2403.07691, Eq. 8 to 10, whose sign is that of ascent."""
    chosen, rejected, x = gradient("orpo_loss", odds_weight=0.3)
    odds_w, odds_l = (np.exp(logp) / (1 - np.exp(logp)) for logp in (x["w"], x["l"]))
    delta = 1 / (1 + odds_w / odds_l)
    np.testing.assert_allclose(chosen + 1, -0.3 * delta / (1 - np.exp(x["w"])), rtol=1e-9)
    np.testing.assert_allclose(rejected, 0.3 * delta / (1 - np.exp(x["l"])), rtol=1e-9)


def test_ipo_pulls_in_proportion_to_the_distance_from_its_target():
    chosen, rejected, x = gradient("ipo_loss")
    assert_opposite(chosen, rejected, 2 * (x["D"] - 1 / (2 * BETA)))


def test_exo_pulls_in_proportion_to_the_distance_from_the_log_odds_of_the_label():
    chosen, rejected, x = gradient("exo_loss", label_smoothing=0.1)
    z = BETA * x["D"]
    assert_opposite(chosen, rejected, BETA * special.expit(z) * special.expit(-z) * (z - np.log(9.0)))


def test_kto_pulls_most_at_the_reference_point_and_the_same_on_both_sides():
    """Ethayarajh et al. 2024, 2402.01306, Sec. 4.2: lambda beta s (1 - s), up if desirable and down if not."""
    slope, _, x = gradient("kto_loss")
    s = special.expit(BETA * (x["C"] - 0.6))
    np.testing.assert_allclose(
        slope, np.where(menu.make_inputs(5).desirable, -1.5, 0.75) * BETA * s * (1 - s), rtol=1e-9
    )
