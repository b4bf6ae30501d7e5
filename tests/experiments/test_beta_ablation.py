import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import toy
from experiments import beta_ablation
from experiments.lab import devices
from experiments.lab.pipeline import BETAS
from tests.experiments.small import PIPELINE

GOLDEN = Path(__file__).parents[1] / "golden" / "notebook_in_torch.jsonl"
REPORTED = Path(beta_ablation.__file__).parent / "reported" / "beta_ablation" / "summary.json"
STATISTICS = ("expected_reward", "gain", "loss", "accuracy", "reward_margin", "kl_to_reference", "optimal_reward")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """In float64, so that rounding errors do not grow."""
    out = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(devices, "enable_compilation_cache", lambda: None)
        beta_ablation.main(beta_ablation.Options(seed=5, num_seeds=3, betas=(0.1, 2.0), out=out), PIPELINE)
    return out, json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_summary_has_the_agreed_keys(finished):
    out, summary = finished
    names = {"summary.json", "dpo_training.png", "beta_ablation.png", "frontier.png"}
    assert {path.name for path in out.iterdir()} == names
    assert summary["num_seeds"] == 3
    assert summary["sft"]["expected_reward"].keys() == {"mean", "stderr"}
    assert [entry["beta"] for entry in summary["betas"]] == [0.1, 2.0]
    assert all(entry[name].keys() == {"mean", "stderr"} for entry in summary["betas"] for name in STATISTICS)
    assert summary["seconds"].keys() == {"prepare", "compile", "run"}
    assert summary["versions"]["jax"] == jax.__version__


@pytest.mark.slow
def test_summary_is_the_mean_over_seeds_run_alone(finished):
    _, summary = finished
    rewards, kls = [], []

    @jax.jit
    def alone(key):
        start, pairs, train_key, _ = beta_ablation.prepare(PIPELINE, key)
        dpo = partial(PIPELINE.dpo, train_key, start, pairs)
        policies = [PIPELINE.table(start.world)(dpo(beta)[0]) for beta in (0.1, 2.0)]
        return start, jnp.stack(policies)

    with jax.enable_x64(True):
        for seed in range(3):
            start, log_probs = alone(jax.random.fold_in(jax.random.key(5), seed))
            rewards.append([toy.expected_reward(table, start.world.rewards).mean() for table in log_probs])
            kls.append([toy.kl_to_reference(table, start.log_probs).mean() for table in log_probs])
    for i, entry in enumerate(summary["betas"]):
        for name, values in (("expected_reward", rewards), ("kl_to_reference", kls)):
            column = np.array(values)[:, i]
            np.testing.assert_allclose(entry[name]["mean"], column.mean(), rtol=1e-6)
            np.testing.assert_allclose(entry[name]["stderr"], column.std(ddof=1) / 3**0.5, rtol=1e-6)
        gain = entry["expected_reward"]["mean"] - summary["sft"]["expected_reward"]["mean"]
        assert entry["gain"]["mean"] == pytest.approx(gain, abs=1e-6)


@pytest.mark.slow
def test_nothing_predicts_new_pairs_better_than_the_true_rewards(finished):
    _, summary = finished
    for entry in summary["betas"]:
        assert entry["population_loss"]["mean"] > summary["bayes"]["loss"]["mean"]
        assert entry["population_accuracy"]["mean"] < summary["bayes"]["accuracy"]["mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 0}, "--num-seeds must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"seed": 2**32}, r"--seed must be below 2\*\*32"),
        ({"betas": (0.1, -1.0)}, "--betas must be in .0, inf., got -1.0 in row 1"),
        ({"betas": ()}, "--betas needs at least one value"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        beta_ablation.main(beta_ablation.Options(**{"out": tmp_path / "out", **options}))
    assert not (tmp_path / "out").exists()


def golden():
    """What PyTorch found: for each statistic an array [seeds] or [seeds, betas]."""
    runs = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    return {name: np.array([run[name] for run in runs]) for name in runs[0]}


def compare(theirs, ours):
    """How many combined standard errors lie between PyTorch's runs and our mean and standard error."""
    stderr = theirs.std(ddof=1) / len(theirs) ** 0.5
    return abs(theirs.mean() - ours["mean"]) / np.hypot(stderr, ours["stderr"])


@pytest.mark.slow
def test_a_fresh_run_is_like_pytorch():
    """64 new seeds beside PyTorch's 500: nothing differs by more than three combined standard errors."""
    summary, _ = beta_ablation.ablate(10_000, 64, BETAS)
    theirs = golden()
    theirs["gain"] = theirs["expected_reward"] - theirs["sft_reward"][:, None]
    for column, entry in enumerate(summary["betas"]):
        for name in ("gain", "loss", "accuracy", "reward_margin", "kl_to_reference"):
            assert compare(theirs[name][:, column], entry[name]) < 3, (name, entry["beta"])
    gain = theirs["sft_reward"] - theirs["demonstrator_reward"]
    assert compare(gain, summary["sft"]["gain_over_demonstrations"]) < 3


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", ["gain", "loss", "accuracy", "reward_margin", "kl_to_reference", "expected_reward"])
def test_reported_results_are_those_of_pytorch(name, beta):
    """Two sets of random worlds: every figure lies within two combined standard errors."""
    summary, theirs = json.loads(REPORTED.read_text()), golden()
    theirs["gain"] = theirs["expected_reward"] - theirs["sft_reward"][:, None]
    column = [entry["beta"] for entry in summary["betas"]].index(beta)
    assert summary["num_seeds"] >= 1000
    assert compare(theirs[name][:, column], summary["betas"][column][name]) < 2


def test_reported_sft_is_that_of_pytorch():
    summary, theirs = json.loads(REPORTED.read_text()), golden()
    assert compare(theirs["sft_reward"], summary["sft"]["expected_reward"]) < 2
    gain = theirs["sft_reward"] - theirs["demonstrator_reward"]
    assert compare(gain, summary["sft"]["gain_over_demonstrations"]) < 2
