import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import toy
from experiments import claims, contenders, dpo_vs_rlhf, evidence, harness, loss_variants, tuning
from experiments.claims import FAILS, HOLDS, OPEN, Estimate, estimate, verdict
from experiments.evidence import MANY_BETAS


@pytest.mark.parametrize(
    ("effect", "beyond", "expected"),
    [
        (Estimate(0.1, 0.05), 0.0, HOLDS),
        (Estimate(0.1, 0.2), 0.0, OPEN),
        (Estimate(-0.1, 0.05), 0.0, FAILS),
        (Estimate(0.002, 0.001), 0.01, FAILS),  # there, but nothing to speak of
        (Estimate(0.006, 0.005), 0.01, OPEN),
        (Estimate(0.02, 0.005), 0.01, HOLDS),
        (Estimate(np.nan, np.nan), 0.0, OPEN),
    ],
)
def test_verdicts(effect, beyond, expected):
    assert verdict(effect, beyond=beyond) == expected


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
    assert claims.equivalence(effect) == expected


def test_estimates_by_hand():
    found = estimate(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, [2.0, 4.302653 / np.sqrt(3)], rtol=1e-6)  # Student's t with two degrees
    assert np.isnan(estimate(np.array([1.0, np.nan])).mean)


def test_conditions_that_disagree_are_named():
    yes, no, perhaps = Estimate(0.1, 0.01), Estimate(-0.1, 0.01), Estimate(0.0, 0.1)
    assert claims.by_condition({"clean": yes, "noisy": yes}) == HOLDS
    assert claims.by_condition({"clean": no, "noisy": no}) == FAILS
    assert claims.by_condition({"clean": no, "noisy": perhaps}) == "fails, but for noisy, where it is not shown"
    assert claims.by_condition({"clean": yes, "noisy": no}) == "depends on the labels: clean holds, noisy fails"


@pytest.mark.parametrize(
    ("difference", "expected"), [(0.0, FAILS), (-0.1, FAILS), (0.1, HOLDS), (None, "depends on how well")]
)
def test_whether_exploration_helps_is_open_before(difference, expected):
    num = len(evidence.POWERS)
    offline = np.full((num, 4), 0.4) + 1e-4 * np.arange(4)
    gain = np.linspace(-0.1, 0.1, num)[:, None] if difference is None else difference
    measured = {"regret": offline, "log_coverage": offline}
    found = {
        name: {"expected_reward": offline + (gain if name == "online" else 0), **measured}
        for name in evidence.EXPLORERS
    }
    assert claims.exploration_helps({"exploration": found}).verdict.startswith(expected)


@pytest.fixture(scope="module")
def scene():
    return jax.jit(contenders.prepare)(jnp.uint32(5))


def test_sharpened_networks_have_their_logits_scaled(scene):
    logits = toy.score_table_fn(contenders.POLICY, scene.world.embeddings)
    for power in (0.0, -0.5, 2.0):
        scaled = logits(evidence.sharpened(scene.params, power))
        np.testing.assert_allclose(scaled, power * logits(scene.params), rtol=1e-5, atol=1e-5)


def test_accuracy_on_new_comparisons_is_that_of_all_pairs(scene):
    scores, rewards = np.asarray(scene.learned_rewards), np.float64(scene.world.rewards)
    total, num = 0.0, 0
    for prompt in range(5):
        for i in range(10):
            for j in range(10):
                if i != j:
                    wins = 1 / (1 + np.exp(rewards[prompt, j] - rewards[prompt, i]))
                    total += wins if scores[prompt, i] > scores[prompt, j] else 1 - wins
                    num += 1
    np.testing.assert_allclose(
        evidence.new_accuracy(scene.learned_rewards, scene.world.rewards), total / num, rtol=1e-5
    )
    assert (
        evidence.new_accuracy(scene.world.rewards, scene.world.rewards)
        == toy.bayes_prediction(scene.world.rewards)["accuracy"]
    )


def test_what_is_exact_is_that_of_the_closed_forms(scene):
    found = evidence.exact(scene)
    beta = MANY_BETAS.index(0.1)
    best = np.exp(np.float64(toy.optimal_policy(scene.log_probs, scene.learned_rewards, beta=0.1)))
    start, rewards, learned = (
        np.float64(table) for table in (np.exp(scene.log_probs), scene.world.rewards, scene.learned_rewards)
    )
    gain = ((best - start) * rewards).sum(-1).mean()
    np.testing.assert_allclose(found["maximised"]["gain"][beta], gain, atol=1e-5)
    excess = ((best - start) * (learned - rewards)).sum(-1).mean()
    np.testing.assert_allclose(found["maximised"]["overestimate"][beta], excess, atol=1e-5)


def test_the_script_judges_every_claim(as_users_have_it, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "enable_compilation_cache", lambda: None)
    for module in (dpo_vs_rlhf, tuning, loss_variants):
        monkeypatch.setattr(module, "RUNS_PER_CHUNK", 4)
    for module in (contenders, evidence, loss_variants):
        monkeypatch.setattr(module, "NUM_EPOCHS", 1)
    monkeypatch.setattr(contenders, "STEPS_PER_EPOCH", 4)
    monkeypatch.setattr(contenders, "PPO_ROUNDS", 3)
    for name, value in (("NUM_STEPS", 4), ("LONG", 2), ("NUM_TIMES", 2)):
        monkeypatch.setattr(evidence, name, value)
    claims.main(claims.Options(num_seeds=3, num_tuning_seeds=1, num_candidates=1, out=tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["claims"]) >= 15
    for claim in summary["claims"]:
        assert {"id", "claim", "effect", "interval", "verdict"} <= claim.keys()
        low, high = claim["interval"]
        assert low <= claim["effect"] <= high
        assert claim["verdict"].startswith((HOLDS, FAILS, OPEN, "depends on"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.json",
        *(f"{claim['id']}.png" for claim in summary["claims"]),
    }
    assert len({claim["id"] for claim in summary["claims"]}) == len(summary["claims"])
    assert "What the notebook claims, measured" in capsys.readouterr().out
