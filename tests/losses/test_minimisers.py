"""Where each loss of one comparison has its minimum, which a wrong sign, factor or formula would move."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special

from dpo_jax import losses
from dpo_jax.types import Pair
from tests.losses.menu import with_log_ratios

BETA = 0.3


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


# One comparison, won with probability P: the minimum in z = beta * margin

AROUND = np.geomspace(1e-6, 8, 1000)
logit = special.logit
array = partial(jnp.asarray, dtype=jnp.float64)


def risk(loss, win, z, *, beta, lift=0.4, lengths=None, **hyperparameters):
    """The mean loss of a comparison that is won with a given probability, at each z.

    Both log-ratios are lifted a little, which losses of the margin must not notice, unless they have a divergence.
    """
    ratios = Pair(lift + array(z) / (2 * beta), lift - array(z) / (2 * beta))
    columns = {} if lengths is None else {"lengths": Pair(*(jnp.full(np.shape(z), length) for length in lengths))}
    turned_columns = jax.tree.map(turned, columns, is_leaf=is_pair)
    won = loss(*with_log_ratios(ratios), beta=beta, **hyperparameters, **columns)
    lost = loss(*with_log_ratios(turned(ratios)), beta=beta, **hyperparameters, **turned_columns)
    return win * won + (1 - win) * lost


def turned(pair):
    return Pair(*pair[::-1])


def is_pair(value):
    return isinstance(value, Pair)


def assert_minimum(function, at):
    """Lower there than a hair to either side, and than anywhere else."""
    points = at + np.concatenate([[0.0], AROUND, -AROUND])
    values = np.asarray(function(points))
    assert np.all(values[1:] > values[0]), f"expected at {at}, as low at {points[1:][values[1:] <= values[0]]}"


def offset_minimiser(win, offset):
    """The root of (1 - P) x^2 - (2P - 1) e^offset x - P, which is exp(z)."""
    half = (2 * win - 1) * np.exp(offset) / 2
    return np.log((half + np.sqrt(half**2 + win * (1 - win))) / (1 - win))


AT = {
    "dpo": (losses.dpo_loss, {}, logit),
    "conservative dpo": (losses.dpo_loss, {"label_smoothing": 0.2}, lambda p: logit(0.8 * p + 0.2 * (1 - p))),
    "ipo": (losses.ipo_loss, {}, lambda p: (2 * p - 1) / 2),
    "hinge": (losses.hinge_loss, {}, lambda p: np.sign(p - 0.5)),
    "squared": (losses.squared_loss, {}, lambda p: 2 * p - 1),
    "truncated quadratic": (losses.truncated_quadratic_loss, {}, lambda p: 2 * p - 1),
    "exponential": (losses.exponential_loss, {}, lambda p: logit(p) / 2),
    "savage": (losses.savage_loss, {}, logit),
    "exo": (losses.exo_loss, {"label_smoothing": 0.1}, lambda p: (2 * p - 1) * np.log(9.0)),
    "offset": (losses.offset_dpo_loss, {"offset": 0.7}, lambda p: offset_minimiser(p, 0.7)),
    "r-dpo": (
        losses.length_regularized_dpo_loss,
        {"alpha": 0.1, "lengths": (7, 4)},
        lambda p: logit(p) - 0.1 * (7 - 4),
    ),
    "robust dpo": (losses.robust_dpo_loss, {"label_smoothing": 0.05}, lambda p: logit((p - 0.05) / 0.9)),
}
"""Loss, hyperparameters, and where the minimum is if the comparison is won with probability p."""

ELSEWHERE = {losses.discopop_loss}
"""Losses of the margin for whose minimum no formula is known."""

wins = pytest.mark.parametrize("win", [0.3, 0.55, 0.7, 0.9])
betas = pytest.mark.parametrize("beta", [0.1, 1.0])


def test_no_loss_of_the_margin_is_left_out():
    known = {loss for loss, _, _ in AT.values()} | ELSEWHERE
    missing = {loss.__name__ for loss in set(losses.LOSSES_OF_THE_MARGIN) - known}
    hint = f"add to AT in this file where {missing} has its minimum, or to ELSEWHERE if no formula is known"
    assert not missing, hint
    assert known == set(losses.LOSSES_OF_THE_MARGIN)


@betas
@wins
@pytest.mark.parametrize("name", AT)
def test_one_comparison_has_its_minimum_where_theory_says(name, win, beta):
    loss, hyperparameters, minimiser = AT[name]
    assert_minimum(lambda z: risk(loss, win, z, beta=beta, **hyperparameters), minimiser(win))


@betas
@pytest.mark.parametrize("win", [0.1, 0.55, 0.9])
@pytest.mark.parametrize("flip", [0.1, 0.3])
def test_robust_dpo_sees_through_flipped_labels_and_dpo_does_not(win, flip, beta):
    seen = (1 - flip) * win + flip * (1 - win)
    assert_minimum(lambda z: risk(losses.robust_dpo_loss, seen, z, beta=beta, label_smoothing=flip), logit(win))
    assert_minimum(lambda z: risk(losses.dpo_loss, seen, z, beta=beta), logit(seen))


@betas
def test_a_comparison_that_is_always_won_pulls_ipo_to_exactly_one_over_two_beta(beta):
    def loss(margin):
        return losses.ipo_loss(*with_log_ratios(Pair(margin, margin * 0)), beta=beta)

    target = jnp.float64(1 / (2 * beta))
    assert (loss(target), jax.grad(loss)(target)) == (0, 0)
    assert_minimum(lambda margin: loss(array(margin)), target)


@betas
@pytest.mark.parametrize("win", [0.55, 0.9])
@pytest.mark.parametrize(
    ("divergence", "link"),
    [
        (losses.forward_kl, lambda u: -np.exp(-u)),
        (losses.jensen_shannon, special.log_expit),
        (losses.alpha_divergence(0.4), lambda u: -np.exp(-0.6 * u) / 0.6),
        (losses.alpha_divergence(2.0), np.exp),
        (losses.chi_square_kl, lambda u: np.exp(u) + u),
    ],
)
def test_with_a_divergence_the_scores_differ_by_the_log_odds(divergence, link, win, beta):
    loss, lift = losses.with_divergence(losses.dpo_loss, divergence), 0.4

    def surplus(z):
        return beta * (link(lift + z / (2 * beta)) - link(lift - z / (2 * beta))) - logit(win)

    at = optimize.brentq(surplus, -8, 8, xtol=1e-12)
    assert_minimum(lambda z: risk(loss, win, z, beta=beta, lift=lift), at)


@pytest.mark.parametrize("tau", [0.02, 0.05])
def test_discopop_has_a_local_minimum_left_of_zero(tau):
    """A comparison that is always won: further left it falls, then it rises, and right of zero it falls again."""

    def loss(z):
        return risk(losses.discopop_loss, 1.0, z, beta=1.0, temperature=tau)

    z = np.linspace(-1, 1, 20_001)
    turns = z[1:-1][np.diff(np.sign(np.diff(loss(z)))) != 0]
    expected = [optimize.brentq(_discopop_slope, *bracket, args=(tau,)) for bracket in ((-6 * tau, 0), (0, 6 * tau))]
    np.testing.assert_allclose(turns, expected, atol=2e-4)
    assert expected[0] < 0 < expected[1]


def _discopop_slope(z, tau):
    g, logistic = special.expit(z / tau), -special.log_expit(z)
    return -(1 - g) * special.expit(-z) - g * np.exp(-z) + g * (1 - g) / tau * (np.exp(-z) - logistic)
