import json

import jax
import numpy as np
import pytest

from dpo_jax import toy
from experiments.claims import __main__ as script
from experiments.claims import evidence, statements
from experiments.claims.evidence import MANY_BETAS
from experiments.lab import claims_page, contenders, devices, judging
from experiments.lab.claim_figure import draw
from experiments.lab.judging import (
    FAILS,
    HOLDS,
    NO_DIFFERENCE,
    OPEN,
    SLIGHT,
    Estimate,
    by_condition,
    estimate,
    verdict,
)
from tests.experiments.evidence import made_up
from tests.experiments.small import PIPELINE


@pytest.mark.parametrize(
    ("effect", "matters", "expected"),
    [
        (Estimate(0.1, 0.05), 0.0, HOLDS),
        (Estimate(0.1, 0.2), 0.0, OPEN),
        (Estimate(-0.1, 0.05), 0.0, FAILS),
        (Estimate(0.02, 0.005), 0.01, HOLDS),
        (Estimate(0.002, 0.001), 0.01, SLIGHT),  # there, but it does not matter
        (Estimate(0.006, 0.005), 0.01, SLIGHT),  # there, and it may matter
        (Estimate(0.001, 0.002), 0.01, NO_DIFFERENCE),
        (Estimate(-0.002, 0.001), 0.01, NO_DIFFERENCE),
        (Estimate(-0.01, 0.005), 0.01, FAILS),
        (Estimate(0.0, 0.02), 0.01, OPEN),
        (Estimate(np.nan, np.nan), 0.0, OPEN),
    ],
)
def test_verdicts(effect, matters, expected):
    assert verdict(effect, matters=matters) == expected


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (Estimate(0.004, 0.001), HOLDS),
        (Estimate(-0.004, 0.001), HOLDS),
        (Estimate(0.004, 0.03), OPEN),
        (Estimate(0.05, 0.01), FAILS),
        (Estimate(-0.05, 0.01), FAILS),
    ],
)
def test_a_difference_that_should_be_nothing(effect, expected):
    assert judging.equivalence(effect) == expected


def test_estimates_by_hand():
    found = estimate(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, [2.0, 4.302653 / np.sqrt(3)], rtol=1e-6)  # Student's t with two degrees
    assert np.isnan(estimate(np.array([1.0, np.nan])).mean)


def test_conditions_that_disagree_are_named():
    yes, no = Estimate(0.1, 0.01), Estimate(-0.1, 0.01)
    assert by_condition({"clean": yes, "noisy": yes}) == HOLDS
    assert by_condition({"clean": yes, "noisy": no}) == "depends on the labels: holds (clean), fails (noisy)"


@pytest.mark.parametrize(
    ("difference", "expected"), [(0.0, NO_DIFFERENCE), (-0.1, FAILS), (0.1, HOLDS), (None, "depends on how well")]
)
def test_whether_exploration_helps_is_open_before(difference, expected):
    num = len(evidence.POWERS)
    offline = np.full((num, 4), 0.4) + 1e-4 * np.arange(4)
    gain = np.linspace(-0.1, 0.1, num)[:, None] if difference is None else difference
    measured = {"regret": offline, "log_coverage": offline, "optimal_reward": offline}
    found = {
        name: {"expected_reward": offline + (gain if name == "online" else 0), **measured}
        for name in evidence.EXPLORERS
    }
    rest = {"exact": {"sft_reward": offline[0]}, "dpo": {"gain": offline[: len(MANY_BETAS)]}}
    assert statements.exploration_helps({"exploration": found, **rest}).verdict.startswith(expected)


def test_clips_are_chosen_in_other_worlds():
    """In the tuning worlds the third clip is best; in the reported ones the first, by chance."""
    num = len(evidence.CLIPS)
    tuning, reported = np.zeros((2, num, 3)), np.zeros((2, num, 4)) + np.arange(4) * 1e-4
    tuning[:, 2], tuning[:, 1] = 1.0, -1.0
    reported[:, 0], reported[:, 2] = 0.9 + np.arange(4) * 1e-4, 0.05 + np.arange(4) * 1e-4
    found = {"by_clip": {"tuning": tuning, "reported": reported}, "exact": {"sft_reward": np.zeros(4)}}
    claim = statements.ppo_sensitive_to_clip(found)
    assert claim.effect.mean == pytest.approx(0.05)
    assert claim.details["best clip, learning rate 0.001"] == evidence.CLIPS[2]


@pytest.fixture(scope="module")
def scene():
    return jax.jit(lambda key: contenders.scene(PIPELINE, key))(jax.random.key(5))


def test_sharpened_networks_have_their_logits_scaled(scene):
    logits = toy.score_table_fn(PIPELINE.policy, scene.world.embeddings)
    for power in (0.0, -0.5, 2.0):
        scaled = logits(evidence.sharpened(scene.start.params, power))
        np.testing.assert_allclose(scaled, power * logits(scene.start.params), rtol=1e-5, atol=1e-5)


def test_accuracy_on_new_comparisons_is_that_of_all_pairs(scene):
    scores, rewards = np.asarray(scene.learned_rewards), np.float64(scene.true_rewards)
    total, num = 0.0, 0
    for prompt in range(5):
        for i in range(10):
            for j in range(10):
                if i != j:
                    wins = 1 / (1 + np.exp(rewards[prompt, j] - rewards[prompt, i]))
                    total += wins if scores[prompt, i] > scores[prompt, j] else 1 - wins
                    num += 1
    np.testing.assert_allclose(evidence.new_accuracy(scene.learned_rewards, scene.true_rewards), total / num, rtol=1e-5)
    assert (
        evidence.new_accuracy(scene.true_rewards, scene.true_rewards)
        == toy.bayes_prediction(scene.true_rewards)["accuracy"]
    )


def test_what_is_exact_is_that_of_the_closed_forms(scene):
    found = evidence.exact(scene)
    beta = MANY_BETAS.index(0.1)
    best = np.exp(np.float64(toy.optimal_policy(scene.start.log_probs, scene.learned_rewards, beta=0.1)))
    start, rewards, learned = (
        np.float64(table) for table in (np.exp(scene.start.log_probs), scene.true_rewards, scene.learned_rewards)
    )
    gain = ((best - start) * rewards).sum(-1).mean()
    np.testing.assert_allclose(found["maximised"]["gain"][beta], gain, atol=1e-5)
    excess = ((best - start) * (learned - rewards)).sum(-1).mean()
    np.testing.assert_allclose(found["maximised"]["overestimate"][beta], excess, atol=1e-5)


@pytest.fixture(scope="module")
def claims():
    return statements.judge(made_up())


def test_every_claim_has_an_effect_a_verdict_a_figure_and_a_text(claims):
    entries = [claims_page.as_entry(name, claim) for name, claim in claims.items()]
    texts = claims_page.page_texts({"claims": entries}, "claims")
    assert len(entries) >= 19
    for claim, entry in zip(claims.values(), entries, strict=True):
        low, high = entry["interval"]
        assert low <= entry["effect"] <= high
        assert entry["verdict"].startswith((HOLDS, FAILS, OPEN, NO_DIFFERENCE, "depends on"))
        assert texts[entry["id"]].startswith(f"**{entry['verdict'][0].upper()}{entry['verdict'][1:]}.**")
        assert f"reported/claims/{entry['id']}.png" in texts[entry["id"]]
        figure = draw(claim.panels, xlabel=claim.xlabel, title=claim.claim, log=claim.log)
        assert len(figure.axes) == len(claim.panels)


def test_numbers_on_the_page_have_the_digits_of_their_intervals():
    def number(effect, half):
        return claims_page._number({"effect": effect, "interval": [effect - half, effect + half]})

    assert number(0.12345, 0.0123) == "0.123 ± 0.012"
    assert number(-2.345, 0.5) == "-2.35 ± 0.50"
    assert number(0.00012345, 0.0000123) == "0.000123 ± 0.000012"
    assert claims_page._number(0.2) == "0.2"


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_the_script_judges_every_claim(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(evidence, "NUM_TIMES", 2)
    script.main(script.Options(num_seeds=3, num_tuning_seeds=1, num_candidates=1, out=tmp_path), PIPELINE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["claims"]) >= 18
    for claim in summary["claims"]:
        assert {"id", "claim", "effect", "interval", "verdict"} <= claim.keys()
        low, high = claim["interval"]
        assert low <= claim["effect"] <= high
        assert claim["verdict"].startswith((HOLDS, FAILS, OPEN, NO_DIFFERENCE, "depends on"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.json",
        *(f"{claim['id']}.png" for claim in summary["claims"]),
    }
    assert len({claim["id"] for claim in summary["claims"]}) == len(summary["claims"])
    said = capsys.readouterr().out
    assert "The notebook's claims, measured" in said
    assert "Beware: with 1 candidates in 1 tuning worlds" in said
