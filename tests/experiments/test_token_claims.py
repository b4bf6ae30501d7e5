"""The claims about tokens, from evidence of the right shapes, and the measures behind them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import strings, toy
from experiments.lab import claims_page
from experiments.lab.claim_figure import draw
from experiments.lab.judging import Estimate
from experiments.token_claims import measures, population, statements
from tests.experiments.token_evidence import FEW, made_up


@pytest.fixture(scope="module")
def claims():
    return statements.judge(made_up())


@pytest.mark.slow
def test_every_claim_follows_from_the_evidence(claims):
    assert len(claims) >= 14
    for name, claim in claims.items():
        assert np.isfinite(claim.effect.mean) and claim.effect.half > 0
        assert claim.verdict and claim.papers and claim.details
        assert all(np.isfinite(d.mean) for d in claim.details.values())
        json.dumps(claims_page.as_entry(name, claim))


@pytest.mark.slow
def test_every_claim_has_a_figure_and_a_text(claims):
    texts = claims_page.page_texts(
        {"claims": [claims_page.as_entry(name, claim) for name, claim in claims.items()]}, "token_claims"
    )
    assert texts.keys() == {"verdicts", *claims}
    for claim in claims.values():
        figure = draw(claim.panels, xlabel=claim.xlabel, title=claim.claim, log=claim.log)
        assert len(figure.axes) == len(claim.panels)


def test_the_best_is_chosen_in_other_worlds():
    tuning, reported = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[9.0, 9.0], [2.0, 3.0]])
    found = {"tuning": {"merit": tuning[None]}, "reported": {"merit": reported[None]}}
    np.testing.assert_array_equal(statements.best_of(found, 0)["merit"], [2.0, 3.0])


def test_what_keeps_chosen_strings_probable_is_the_best_of_what_does():
    shape = (1, 4, 2, 1)
    merit, change = np.zeros(shape), np.full(shape, -1.0)
    merit[0, 0, 0], merit[0, 2, 1], merit[0, 3, 1] = 9.0, 2.0, 1.0
    change[0, 2, 1] = change[0, 3, 1] = 0.0
    values = {"merit": merit, "chosen_change": change}
    found = {"tuning": values, "reported": values}
    assert statements.best_that_keeps(found, (0,))["merit"] == 2.0
    nowhere = {"merit": merit, "chosen_change": change - 5}
    assert statements.best_that_keeps({"tuning": nowhere, "reported": nowhere}, (0,))["chosen_change"] == -5.0


def test_no_loss_allows_for_what_does_not_matter():
    assert statements.no_loss(Estimate(-0.01, 0.02)).mean > 0


def test_accuracy_on_new_comparisons_is_that_by_hand():
    rng = np.random.default_rng(0)
    scores, rewards, weights = rng.normal(size=(3, 2, 5))
    weights = np.exp(weights)
    wins = 1 / (1 + np.exp(-(rewards[:, :, None] - rewards[:, None])))
    expected = []
    for prompt in range(2):
        total = right = 0.0
        for i in range(5):
            for j in range(5):
                if i != j:
                    share = weights[prompt, i] * weights[prompt, j]
                    win = wins[prompt, i, j]
                    right += share * (win if scores[prompt, i] > scores[prompt, j] else 1 - win)
                    total += share
        expected.append(right / total)
    found = measures.accuracy(*(jnp.asarray(x, jnp.float32) for x in (scores, rewards, weights)))
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_correlation_is_that_of_numpy():
    x, y, weights = np.random.default_rng(1).uniform(size=(3, 4, 3)).astype("f")
    cov = np.cov(x.ravel(), y.ravel(), aweights=weights.ravel())
    np.testing.assert_allclose(
        measures.correlation(jnp.asarray(x), jnp.asarray(y), jnp.asarray(weights)),
        cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1]),
        rtol=1e-4,
    )


def test_a_mean_is_that_of_the_chosen_responses():
    log_probs = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    found = measures.mean_where(log_probs, jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[False, True, True]]))
    np.testing.assert_allclose(found, (0.3 * 2 + 0.2 * 4) / 0.5, rtol=1e-6)


@pytest.mark.slow
def test_on_infinite_data_dpo_finds_the_optimum_and_means_do_not():
    start = jax.jit(FEW.start)(jax.random.key(0))
    run = jax.jit(population.on_all_pairs, static_argnums=0, static_argnames="loss")
    dpo, means = (run(FEW, start, loss=loss, beta=beta) for loss, beta in (("dpo", 0.5), ("ln-dpo", 1.0)))
    assert dpo["optimal_merit"] - dpo["merit"] < 1e-3 < means["optimal_merit"] - means["merit"]
    assert abs(dpo["longer"]) < 0.02


@pytest.mark.slow
def test_the_noise_of_rloo_is_that_of_all_groups():
    start = jax.jit(FEW.start)(jax.random.key(0))
    found = jax.jit(population.gradient_noise, static_argnums=0)(FEW, start)
    world, reference = population.small_world(start)
    probs, rewards = np.exp(np.float64(reference[0])), np.float64(world.rewards[0])
    score = np.stack([flat_score(reference, i) for i in range(len(probs))])
    estimates, weights = [], []
    for i, j in np.ndindex(len(probs), len(probs)):
        estimates.append((rewards[i] - rewards[j]) * (score[i] - score[j]) / 2)
        weights.append(probs[i] * probs[j])
    mean = np.average(estimates, axis=0, weights=weights)
    variance = np.average((np.array(estimates) - mean) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(found["rloo"], variance.sum() / (mean**2).sum(), rtol=1e-3)
    assert found["ppo"] < found["ppo_without_values"]


def flat_score(reference, i):
    """The gradient of the log-probability of a string with respect to the logits of next tokens."""
    every = population.SMALL
    logits = strings.next_token_log_probs(reference, every)

    def log_prob(logits):
        return strings.string_log_probs(jax.nn.log_softmax(logits), every)[0, i]

    return np.asarray(jax.grad(log_prob)(logits)).ravel()


def test_the_reference_of_the_small_world_knows_a_little():
    start = jax.eval_shape(FEW.start, jax.random.key(0))

    @jax.jit
    def rewards(key):
        world, reference = population.small_world(start._replace(key=key))
        plain = strings.reference_log_probs(population.SMALL, expected_length=1.5)[None]
        return toy.expected_reward(reference, world.rewards), toy.expected_reward(plain, world.rewards)

    informed, plain = rewards(jax.random.key(3))
    assert informed > plain
