import json

import jax
import numpy as np
import pytest

from dpo_jax import toy
from experiments import dpo_vs_rlhf
from experiments.claims import __main__ as claims
from experiments.dpo_vs_rlhf import (
    LEARNING_RATES,
    Options,
    StrengthTrials,
    gains,
    measure,
    price_of,
    summarise_contender,
)
from experiments.lab import contenders, devices
from experiments.lab.contenders import CONTENDERS, contender
from tests.experiments.small import PIPELINE

FEW = tuple(c for c in CONTENDERS if c.name in ("DPO", "PPO, reward model", "Nash-MD, people"))


@pytest.fixture(scope="module")
def scene():
    return jax.jit(lambda key: contenders.scene(PIPELINE, key))(jax.random.key(3))


def test_measures_by_hand(scene):
    reference, rewards = scene.start.log_probs, scene.true_rewards
    log_probs = toy.optimal_policy(reference, scene.learned_rewards, beta=0.2)
    measured = jax.jit(lambda log_probs: measure(scene, log_probs, 0.3))(log_probs)
    probs = np.exp(np.float64(log_probs))
    np.testing.assert_allclose(
        measured["learned_reward"], (probs * np.float64(scene.learned_rewards)).sum(-1).mean(), rtol=1e-5
    )
    best = toy.optimal_policy(reference, rewards, beta=0.3)

    def objective(table):
        found = toy.evaluate(table, reference, rewards)
        return found["expected_reward"] - 0.3 * found["kl_to_reference"]

    np.testing.assert_allclose(measured["regret"], objective(best) - objective(log_probs), atol=1e-5)


def test_the_price_is_that_of_the_objective():
    assert price_of(contender("DPO"), 0.3) == 0.3
    assert price_of(contender("Nash-MD, people"), 0.025) == 0.1
    assert price_of(contender("PPO, KL held, reward model"), 0.8) == 0.1


@pytest.mark.slow
def test_a_run_that_diverges_is_nan(scene):
    (trial,) = (StrengthTrials.of([(0.1, np.inf)]),)
    row = jax.tree.map(lambda column: column[0], trial)
    measured = jax.jit(lambda trial: dpo_vs_rlhf.run(PIPELINE, scene, method="RLOO, reward model", trial=trial))(row)
    assert all(np.isnan(value) for value in measured.values())


def found(reward_by_rate, reward_by_strength, contender):
    def measured(reward):
        reward = np.asarray(reward, np.float64)
        rest = dict.fromkeys(("kl_to_reference", "learned_reward", "regret", "win_rate"), np.ones_like(reward))
        return {"expected_reward": reward, **rest}

    return {
        "chosen": [LEARNING_RATES[0]] * len(contender.strengths),
        "by_rate": measured(reward_by_rate),
        "by_strength": measured(reward_by_strength),
    }


SFT = {"expected_reward": np.array([0.4, 0.2]), "learned_reward": np.array([0.5, 0.5])}


def test_gains_are_paired_by_world():
    entry = gains(
        {name: np.array([0.6, 0.4]) for name in ("expected_reward", "learned_reward", "kl_to_reference")}, SFT
    )
    np.testing.assert_allclose([entry["gain"]["mean"], entry["gain"]["stderr"]], [0.2, 0.0], atol=1e-12)
    np.testing.assert_allclose(entry["overestimate"]["mean"], -0.2)


def test_runs_that_end_worse_or_not_at_all_are_counted():
    dpo = CONTENDERS[0]
    by_rate = np.full((len(LEARNING_RATES), 2), 0.5)
    by_rate[0] = [0.3, 0.3]  # worse in the first world only
    by_rate[1] = [np.nan, 0.1]
    measured = found(by_rate, np.full((5, 2), 0.5), dpo)
    entry = summarise_contender(dpo, measured, SFT, {"compile": 1.0, "run": 0.1}, PIPELINE)
    np.testing.assert_allclose(entry["worse_than_sft"]["mean"], (2 + 1) / (2 * len(LEARNING_RATES)))
    assert [each["worse_than_sft"] for each in entry["by_rate"]][:3] == [0.5, 1.0, 0.0]
    assert entry["at_edge"]
    np.testing.assert_allclose(entry["spread_of_gain"], np.std([0.1, 0.3], ddof=1))


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_the_script_writes_table_figures_and_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(dpo_vs_rlhf, "CONTENDERS", FEW)
    monkeypatch.setattr(dpo_vs_rlhf, "UNPULLED", {"DPO": 0.003})
    dpo_vs_rlhf.main(Options(num_seeds=3, num_tuning_seeds=1, out=tmp_path), PIPELINE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["name"] for entry in summary["methods"]] == [contender.name for contender in FEW]
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.json",
        "frontier.png",
        "overoptimisation.png",
        "learning_rates.png",
    }
    for entry in summary["methods"]:
        assert len(entry["by_strength"]) == 5
        assert len(entry["by_rate"]) == len(LEARNING_RATES)
        assert {"gain", "learned_gain", "kl_to_reference", "regret", "worse_than_sft"} <= entry.keys()
        assert entry["seconds"].keys() == {"compile", "run"}
    assert summary["gradient_estimators"]["RLOO, 4"]["alignment"]["mean"] > 0.9999
    np.testing.assert_allclose(summary["gradient_estimators"]["Dr. GRPO, 4"]["scale"]["mean"], 0.75, rtol=1e-4)
    assert "DPO and RLHF, means over worlds and 95% intervals" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 1}, "--num-seeds must be at least 2, got 1"),
        ({"num_tuning_seeds": 0}, "--num-tuning-seeds must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"out": __file__}, "File exists"),
    ],
)
@pytest.mark.parametrize("command", [dpo_vs_rlhf, claims])
def test_bad_options_end_in_one_line(options, message, command, tmp_path):
    options = {name: type(tmp_path)(value) if name == "out" else value for name, value in options.items()}
    with pytest.raises(SystemExit, match=message):
        command.main(command.Options(**{"out": tmp_path / "out", **options}))
