import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special

from dpo_jax import losses, train, votes
from dpo_jax.types import Pair, Preferences

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/strengths_in_statsmodels.json").read_text())["cases"]
MODELS = {"half_wins": votes.half_wins, "davidson": votes.davidson}


def of_case(case):
    columns = {name: np.array(values) for name, values in case["votes"].items()}
    return votes.Votes(
        Pair(columns["chosen"], columns["rejected"]),
        columns["tie"] if columns["tie"].any() else None,
        jnp.asarray(columns["weight"], jnp.float64),
        columns["first"] if columns["first"].any() else None,
    )


FAST = ("plain", "weak prior", "weights", "shown first", "davidson")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c["name"] in FAST else pytest.mark.slow, id=c["name"]) for c in GOLDEN],
)
def test_strengths_and_covariance_are_those_of_statsmodels(case, double):
    ballots, options = of_case(case), {"prior": float(case["prior"]), "model": MODELS[case["model"]]}
    fitted = votes.fit(ballots, 5, **options)
    np.testing.assert_allclose(fitted.strengths, case["strengths"], atol=1e-7)
    if case["prior"] == 0:
        np.testing.assert_allclose(fitted.first, case["first"], atol=1e-7)
        np.testing.assert_allclose(fitted.ties, case["ties"], atol=1e-7)
    covariance = votes.covariance(ballots, 5, fitted, **options)[:5, :5]
    np.testing.assert_allclose(covariance, case["covariance"], rtol=1e-5, atol=1e-8)


def test_strengths_are_those_of_choix(double):
    case = GOLDEN[0]
    np.testing.assert_allclose(votes.fit(of_case(case), 5, prior=0.0).strengths, case["choix"], atol=1e-7)


@pytest.mark.parametrize("model", [votes.half_wins, pytest.param(votes.davidson, marks=pytest.mark.slow)])
def test_the_maximum_is_that_of_another_optimizer(model, draw, double):
    """SciPy's BFGS on the likelihood, written again from the definitions."""
    ballots = draw(1, np.linspace(-2, 2, 6), 80, ties=0.2)
    ballots = ballots._replace(weights=jnp.asarray(np.random.default_rng(2).uniform(0.1, 2, 80)))

    def loss(params):
        strengths, log_nu = params[:6], params[6]
        chosen, rejected = (np.exp(strengths[side]) for side in ballots.responses)
        if model is votes.half_wins:
            by_vote = np.where(ballots.ties, np.sqrt(chosen * rejected), chosen) / (chosen + rejected)
        else:
            tie = np.exp(log_nu) * np.sqrt(chosen * rejected)
            by_vote = np.where(ballots.ties, tie, chosen) / (chosen + rejected + tie)
        prior = 0.5 * np.sum(special.log_expit(params) + special.log_expit(-params))
        return -np.asarray(ballots.weights) @ np.log(by_vote) - prior

    expected = optimize.minimize(loss, np.zeros(7), options={"gtol": 1e-9}).x
    found = votes.fit(ballots, 6, model=model)
    np.testing.assert_allclose(found.strengths, expected[:6] - expected[:6].mean(), atol=1e-5)
    np.testing.assert_allclose(found.ties, expected[6], atol=1e-5)


@pytest.mark.slow
def test_dpo_on_a_table_at_beta_one_is_bradley_terry(draw):
    """Training by any optimizer until it has converged gives the strengths, up to a constant."""
    ballots = draw(3, np.array([1.0, 0.3, -0.2, -1.1]), 400)
    data = Preferences(jnp.zeros(400, int), jax.tree.map(jnp.asarray, ballots.responses))

    def log_prob(logits, prompts, responses):
        return jax.tree.map(lambda ids: jax.nn.log_softmax(logits)[ids], responses)

    data = train.with_reference(log_prob, jnp.zeros(4), data)
    dpo = train.preference_objective(log_prob, losses.dpo_loss, beta=1.0)
    logits, _ = train.fit(
        jax.random.key(0), jnp.zeros(4), data, objective=dpo, optimizer=optax.adam(0.1), num_epochs=150, batch_size=400
    )
    np.testing.assert_allclose(logits - logits.mean(), votes.fit(ballots, 4, prior=0.0).strengths, atol=2e-3)


def test_fits_stop_when_they_are_told_to_and_before(draw):
    ballots = draw(4, np.linspace(-1, 1, 8), 300)
    assert 2 < int(votes.fit(ballots, 8).steps) < 10
    assert int(votes.fit(ballots, 8, max_steps=2).steps) == 2


@pytest.mark.slow
def test_fits_do_not_depend_on_where_they_start_or_stop(draw):
    ballots = draw(4, np.linspace(-1, 1, 8), 300)
    once = votes.fit(ballots, 8)
    for start in (once._replace(strengths=once.strengths + 3), once._replace(strengths=-2 * once.strengths)):
        np.testing.assert_allclose(votes.fit(ballots, 8, start=start).strengths, once.strengths, atol=1e-4)
    np.testing.assert_allclose(votes.fit(ballots, 8, max_steps=1000).strengths, once.strengths, atol=1e-5)
    assert int(once.steps) < 10
    assert int(votes.fit(ballots, 8, max_steps=2).steps) == 2


@pytest.mark.parametrize(("wins", "prior"), [(105, 1.0), (3, 1.0), (3, 0.1), (10_000, 1.0)])
def test_of_two_responses_the_probability_is_known(wins, prior, double):
    """Strengths are s and -s, so that the slope is wins (1 - sigmoid(2 s)) - prior (sigmoid(s) - 1/2), which is 0."""
    ballots = votes.Votes(Pair(np.zeros(3, int), np.ones(3, int)), weights=np.full(3, wins / 3))
    found = float(votes.fit(ballots, 2, prior=prior).strengths[0])
    expected = optimize.brentq(lambda s: wins * special.expit(-2 * s) - prior * (special.expit(s) - 0.5), 0, 50)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_it_works_under_vmap_and_takes_traced_priors(draw):
    several = [draw(seed, np.linspace(-1, 1, 5), 60) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    priors = jnp.array([0.5, 1.0, 2.0])
    found = jax.jit(jax.vmap(lambda ballots, prior: votes.fit(ballots, 5, prior=prior).strengths))(stacked, priors)
    for row, ballots, prior in zip(found, several, priors.tolist(), strict=True):
        np.testing.assert_allclose(row, votes.fit(ballots, 5, prior=prior).strengths, atol=1e-4)


def test_groups_have_averages_of_their_own(draw):
    ballots = draw(5, np.array([1.0, 0.0, -1.0]), 90)
    two = Pair(*(np.concatenate([side, side + 3]) for side in ballots.responses))
    groups = np.repeat([0, 1], 3)
    fitted, once = votes.fit(votes.Votes(two), 6, groups=groups), votes.fit(ballots, 3)
    np.testing.assert_allclose(fitted.strengths, np.tile(once.strengths, 2), atol=1e-4)
    covariance = np.asarray(votes.covariance(votes.Votes(two), 6, fitted, groups=groups))
    np.testing.assert_allclose(covariance[:3, :3], votes.covariance(ballots, 3, once)[:3, :3], atol=1e-4)
    np.testing.assert_allclose(covariance[:3, 3:6], 0, atol=1e-5)


def test_long_chains_converge(double):
    """200 responses in a row, each compared with its neighbours only: the system is badly conditioned."""
    ids = np.arange(199)
    ballots = votes.Votes(
        Pair(np.concatenate([ids, ids, ids + 1]), np.concatenate([ids + 1, ids + 1, ids])),
    )
    found = votes.fit(ballots, 200, prior=0.0)
    np.testing.assert_allclose(-np.diff(found.strengths), np.log(2), rtol=1e-5)


def test_votes_are_summed_up(draw):
    ballots = draw(6, np.linspace(-1, 1, 4), 500, ties=0.2)
    ballots = ballots._replace(first=np.random.default_rng(0).choice([-1, 0, 1], 500))
    distinct, rows = votes.tally(ballots)
    assert len(distinct.ties) < 100
    np.testing.assert_array_equal(distinct.weights, np.bincount(rows))
    for column in ("ties", "first"):
        both = getattr(distinct, column)[rows], getattr(ballots, column)
        turned = np.where(distinct.responses.chosen[rows] == ballots.responses.chosen, 1, -1)
        np.testing.assert_array_equal(both[0] * (turned if column == "first" else 1), both[1])


@pytest.mark.slow
def test_fits_to_sums_of_votes_are_those_to_votes(draw):
    ballots = draw(6, np.linspace(-1, 1, 4), 500, ties=0.2)
    ballots = ballots._replace(first=np.random.default_rng(0).choice([-1, 0, 1], 500))
    distinct, _ = votes.tally(ballots)
    for model in MODELS.values():
        fits = [votes.fit(each, 4, model=model) for each in (ballots, distinct)]
        for one, other in zip(fits[0][:3], fits[1][:3], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_ties_of_equals_have_davidsons_share():
    """Of 3 votes between two responses, one each and a tie: nu / (2 + nu) = 1/3, so that log nu = 0."""
    ballots = votes.Votes(Pair(np.array([0, 1, 0]), np.array([1, 0, 1])), np.array([False, False, True]))
    fitted = votes.fit(ballots, 2, model=votes.davidson)
    np.testing.assert_allclose([*fitted.strengths, fitted.ties], 0, atol=1e-5)
    total = sum(
        np.exp(float(votes.davidson(jnp.array([margin]), tied, jnp.array(0.7))[0]))
        for margin, tied in ((1.3, False), (-1.3, False), (1.3, True))
    )
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"responses": Pair(np.array([0, 3]), np.array([1, 2]))}, {}, "chosen must be .*, got 3 in row 1"),
        ({"responses": Pair(np.array([0, 1]), np.array([1, -1]))}, {}, "rejected must be .*, got -1 in row 1"),
        ({"weights": np.array([1.0, -2.0])}, {}, "weights must be in .0, inf., got -2.0 in row 1"),
        ({}, {"prior": -1.0}, "prior must be in .0, inf., got -1.0"),
    ],
)
def test_bad_votes_are_refused(changes, options, message):
    ballots = votes.Votes(Pair(np.array([0, 1]), np.array([1, 2])))._replace(**changes)
    with pytest.raises(ValueError, match=message):
        votes.fit(ballots, 3, **options)


@pytest.mark.slow
def test_many_stacked_fits_with_random_priors_end():
    """A condition that is evaluated twice, and rounded in two ways, would never end some of them."""
    ballots = votes.Votes(Pair(np.zeros(90, int), np.ones(90, int)))

    @jax.jit
    @jax.vmap
    def refit(key):
        return votes.fit(ballots, 10, prior=votes.redraw(key, 90, 10)[1])

    fits = refit(jax.random.split(jax.random.key(0), 300))
    assert fits.steps.max() <= 50
    assert jnp.isfinite(fits.strengths).all()


@pytest.mark.parametrize("start", [(0.0, 0.0), (3.0, -3.0)])
def test_steps_that_go_too_far_are_halved(start):
    """Nine wins to one, and half a win each of the prior against an average response."""
    ballots = votes.Votes(Pair(np.array([0] * 9 + [1]), np.array([1] * 9 + [0])))
    strengths, zero = jnp.asarray(start), jnp.zeros(())
    found = votes.fit(ballots, 2, start=votes.Fit(strengths, zero, zero, zero, zero, zero))

    def minus_slope(s):  # of the likelihood in half the difference, by hand
        return 9 * special.expit(-2 * s) - special.expit(2 * s) + (special.expit(-s) - special.expit(s)) / 2

    np.testing.assert_allclose(found.strengths[0], optimize.brentq(minus_slope, 0, 5), rtol=1e-4)


def test_being_shown_first_has_a_prior_of_its_own():
    """Whoever is shown first wins, four times: exp(advantage) = 1 + 2 * 4 / prior, if strengths are equal."""
    ballots = votes.Votes(Pair(np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0])), first=np.ones(4, int))
    for prior in (1.0, 4.0):
        np.testing.assert_allclose(votes.fit(ballots, 2, prior=prior).first, np.log(1 + 8 / prior), rtol=1e-4)
