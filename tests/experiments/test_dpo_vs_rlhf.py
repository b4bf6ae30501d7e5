import json
import subprocess
import sys

import numpy as np
import pytest

from experiments import contenders, dpo_vs_rlhf, harness, tuning
from experiments.contenders import CONTENDERS
from experiments.dpo_vs_rlhf import LEARNING_RATES, Options, gains, summarise_contender

FEW = tuple(c for c in CONTENDERS if c.name in ("DPO", "PPO, reward model", "RLOO, reward model", "Nash-MD, people"))


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
    entry = summarise_contender(dpo, found(by_rate, np.full((5, 2), 0.5), dpo), SFT, {"compile": 1.0, "run": 0.1})
    np.testing.assert_allclose(entry["worse_than_sft"]["mean"], (2 + 1) / (2 * len(LEARNING_RATES)))
    assert [each["worse_than_sft"] for each in entry["by_rate"]][:3] == [0.5, 1.0, 0.0]
    assert entry["at_edge"]
    np.testing.assert_allclose(entry["spread_of_gain"], np.std([0.1, 0.3], ddof=1))


def test_the_script_writes_table_figures_and_summary(as_users_have_it, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "enable_compilation_cache", lambda: None)
    for module in (dpo_vs_rlhf, tuning):
        monkeypatch.setattr(module, "RUNS_PER_CHUNK", 4)
    for name, value in (("NUM_EPOCHS", 1), ("STEPS_PER_EPOCH", 4), ("PPO_ROUNDS", 3)):
        monkeypatch.setattr(contenders, name, value)
    monkeypatch.setattr(dpo_vs_rlhf, "CONTENDERS", FEW)
    dpo_vs_rlhf.main(Options(num_seeds=3, num_tuning_seeds=1, out=tmp_path))
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
    ("arguments", "message"),
    [
        (["--num-seeds", "1"], "--num-seeds must be at least 2, got 1"),
        (["--num-tuning-seeds", "0"], "--num-tuning-seeds must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--out", __file__], "File exists"),
    ],
)
@pytest.mark.parametrize("module", ["experiments.dpo_vs_rlhf", "experiments.claims"])
def test_bad_options_end_in_one_line(arguments, message, module):
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
