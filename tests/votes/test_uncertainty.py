import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dpo_jax import votes
from dpo_jax.types import Pair

FOUR = np.array([0.9, 0.2, -0.3, -0.8])


@pytest.mark.slow
def test_bootstrap_and_curvature_agree_where_votes_are_many(draw):
    ballots = draw(0, FOUR, 4_000)
    refits = votes.bootstrap(jax.random.key(0), ballots, 4, num_fits=1_000)
    fitted = votes.fit(ballots, 4)
    covariance = votes.covariance(ballots, 4, fitted)
    draws = votes.approximate(jax.random.key(1), fitted, covariance, num_draws=4_000)
    covariance = np.asarray(covariance)[:4, :4]
    np.testing.assert_allclose(refits.strengths.std(axis=0), np.sqrt(np.diag(covariance)), rtol=0.1)
    np.testing.assert_allclose(np.cov(refits.strengths.T), covariance, atol=0.1 * covariance.max())
    for found in (refits, jax.device_get(draws)):
        low, high = votes.intervals(found)
        np.testing.assert_allclose((high - low) / 2, 1.96 * np.sqrt(np.diag(covariance)), rtol=0.15)
        np.testing.assert_allclose((low + high) / 2, fitted.strengths, atol=0.02)


@pytest.mark.slow
def test_against_a_fixed_opponent_refits_are_draws_from_the_exact_posterior(double):
    """A response with 7 wins and 2 losses against one that 10^6 virtual votes hold at average."""
    ballots = votes.Votes(Pair(np.array([0] * 7 + [1] * 2), np.array([1] * 7 + [0] * 2)))

    @jax.jit
    @jax.vmap
    def refit(key):
        weights, (won, lost) = votes.redraw(key, 9, 2)
        held = Pair(won.at[1].set(1e6), lost.at[1].set(1e6))
        fitted = votes.fit(ballots._replace(weights=weights), 2, prior=held)
        return fitted.strengths[0] - fitted.strengths[1]

    probabilities = jax.nn.sigmoid(refit(jax.random.split(jax.random.key(1), 2_000)))
    assert stats.kstest(np.asarray(probabilities), stats.beta(7.5, 2.5).cdf).pvalue > 0.01


def test_weights_of_a_bootstrap_have_the_stated_means_and_are_shared_by_clusters():
    keys = jax.random.split(jax.random.key(2), 4_000)
    clusters = jnp.array([0, 0, 1, 2])
    weights, virtual = jax.vmap(lambda key: votes.redraw(key, 4, 3, prior=2.0, clusters=clusters))(keys)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(weights.std(axis=0), 1, atol=0.08)
    assert abs(np.corrcoef(weights[:, 0], weights[:, 2])[0, 1]) < 0.06
    for side in virtual:
        np.testing.assert_allclose(side.mean(axis=0), 1, atol=0.06)
    weights, virtual = votes.redraw(keys[0], 4, 3, prior=0.0)
    np.testing.assert_array_equal(virtual.chosen, 0)


@pytest.mark.slow
def test_votes_in_clusters_are_worth_less(draw):
    """Every vote is repeated four times by the same judge: intervals are as wide as without the repetitions."""
    ballots = draw(3, FOUR, 500)
    repeated = jax.tree.map(lambda leaf: np.repeat(leaf, 4), ballots)
    judges = np.repeat(np.arange(500), 4)
    widths = {}
    for name, data, clusters in (("once", ballots, None), ("clusters", repeated, judges), ("votes", repeated, None)):
        refits = votes.bootstrap(jax.random.key(4), data, 4, num_fits=300, clusters=clusters)
        widths[name] = refits.strengths.std(axis=0).mean()
    assert widths["clusters"] == pytest.approx(widths["once"], rel=0.1)
    assert widths["votes"] == pytest.approx(widths["once"] / 2, rel=0.15)


def test_weighted_votes_count_by_their_weights(draw):
    """Twice, and not at all: one program for both ways to say so."""
    ballots = draw(5, FOUR, 200)
    doubled = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), ballots)
    repeated = doubled._replace(weights=np.ones(400, np.float32))
    weighted = doubled._replace(weights=np.repeat(np.float32([2.0, 0.0]), 200))
    for model in (votes.half_wins, votes.davidson):
        one, other = (votes.fit(data, 4, model=model) for data in (repeated, weighted))
        np.testing.assert_allclose(one.strengths, other.strengths, atol=1e-4)
        if model is votes.half_wins:
            unweighted = votes.fit(doubled, 4)
            np.testing.assert_allclose(unweighted.strengths, one.strengths, atol=1e-4)
            covariances = (votes.covariance(data, 4, one) for data in (repeated, weighted))
            np.testing.assert_allclose(*covariances, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_redrawn_votes_keep_their_weights():
    """100 votes for a weigh 3 each, 100 for b weigh 1: the odds are 3, and not 1.

    Each side's weights vary as the sum of 100 exponential numbers does, by a tenth: the log-odds by 0.14.
    """
    ids, done = np.repeat([0, 1], 100), []
    ballots = votes.Votes(Pair(ids, 1 - ids), weights=np.repeat([3.0, 1.0], 100))
    refits = votes.bootstrap(jax.random.key(0), ballots, 2, num_fits=400, report=done.append)
    differences = refits.strengths[:, 0] - refits.strengths[:, 1]
    assert refits.strengths.shape == (400, 2)
    assert np.mean(differences) == pytest.approx(np.log(3), abs=0.03)
    assert np.std(differences) == pytest.approx(np.sqrt(2 / 100), rel=0.12)
    assert done == [400]


def test_draws_around_the_maximum_have_its_covariance_and_intervals_hold_95_percent():
    root = np.array([[0.3, 0.0, 0.0, 0.0], [-0.2, 0.1, 0.0, 0.0], [0.1, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    fitted = votes.Fit(np.array([0.5, -0.5]), *np.array([0.0, 0.2, -1.0, 0.0, 0.0]))
    fitted, covariance = jax.tree.map(jnp.float32, (fitted, root @ root.T))
    draws = jax.device_get(votes.approximate(jax.random.key(1), fitted, covariance, num_draws=20_000))
    found = np.column_stack([draws.strengths, draws.first, draws.ties])
    np.testing.assert_allclose(found.mean(axis=0), [0.5, -0.5, 0.2, -1.0], atol=0.01)
    np.testing.assert_allclose(np.cov(found.T), covariance, atol=0.003)
    low, high = votes.intervals(draws)
    deviations = np.sqrt(np.diag(covariance))[:2]
    np.testing.assert_allclose((low + high) / 2, fitted.strengths, atol=0.01)
    np.testing.assert_allclose((high - low) / 2, 1.96 * deviations, rtol=0.03)


@pytest.mark.slow
def test_the_same_key_gives_the_same_fits_and_reports_are_made(draw):
    ballots, done = draw(6, FOUR, 50), []
    one = votes.bootstrap(jax.random.key(0), ballots, 4, num_fits=7, report=done.append)
    other = votes.bootstrap(jax.random.key(0), ballots, 4, num_fits=7)
    np.testing.assert_array_equal(one.strengths, other.strengths)
    assert done == [7]
    assert one.strengths.shape == (7, 4)


def test_comparisons_by_hand():
    strengths = np.array([[0.0, 1.0], [2.0, 1.0], [3.0, 1.0], [5.0, 1.0], [1.0, 1.0]], np.float32)
    nothing = np.zeros(5)
    refits = votes.Fit(strengths, nothing, nothing, nothing, nothing, nothing)
    fitted = votes.Fit(np.array([2.0, 1.0]), nothing, nothing, nothing, nothing, nothing)
    found = votes.compare(fitted, refits, np.array([[0, 1]]), np.array([[1, 0]]))
    np.testing.assert_allclose(found.better, [[0.7, 0.3]])
    np.testing.assert_allclose(found.win_probability, special.expit([[1.0, -1.0]]))
    low, high = special.expit(np.quantile(strengths[:, 0] - 1, [0.025, 0.975]))
    np.testing.assert_allclose([found.low, found.high], [[[low, 1 - high]], [[high, 1 - low]]], rtol=1e-6)
    assert not found.separable.any()
    assert votes.compare(fitted, refits._replace(strengths=strengths + np.array([9, 0])), 0, 1).separable


def test_ranks_are_those_of_each_group():
    groups = np.array([0, 0, 0, 1, 1])
    strengths = np.array([[0.1, 0.5, 0.5, -1.0, 2.0], [0.9, 0.5, 0.4, 3.0, 2.0]])
    assert votes.ranks(strengths[0], groups).tolist() == [3, 1, 2, 2, 1]
    nothing = np.zeros(2)
    low, high = votes.rank_intervals(votes.Fit(strengths, nothing, nothing, nothing, nothing, nothing), groups)
    assert low.tolist() == [1, 1, 2, 1, 1]
    assert high.tolist() == [3, 2, 3, 2, 2]
