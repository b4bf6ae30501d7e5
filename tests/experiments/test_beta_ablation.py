import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import toy
from experiments import beta_ablation, harness
from experiments.notebook import BETAS, ablate

GOLDEN = Path(__file__).parents[1] / "golden" / "notebook_in_torch.jsonl"
REPORTED = Path(beta_ablation.__file__).parent / "reported" / "beta_ablation" / "summary.json"
STATISTICS = ("expected_reward", "gain", "loss", "accuracy", "reward_margin", "kl_to_reference", "optimal_reward")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three seeds in chunks of two, so that the last chunk is cut; in float64, so that rounding errors do not grow."""
    out = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(beta_ablation, "SEEDS_PER_CHUNK", 2)
        patch.setattr(harness, "enable_compilation_cache", lambda: None)
        beta_ablation.main(beta_ablation.Options(seed=5, num_seeds=3, betas=(0.1, 2.0), out=out))
    return out, json.loads((out / "summary.json").read_text())


def test_summary_has_the_agreed_keys(finished):
    out, summary = finished
    names = {"summary.json", "dpo_training.png", "beta_ablation.png", "frontier.png"}
    assert {path.name for path in out.iterdir()} == names
    assert summary["num_seeds"] == 3
    assert summary["sft"]["expected_reward"].keys() == {"mean", "stderr"}
    assert [entry["beta"] for entry in summary["betas"]] == [0.1, 2.0]
    assert all(entry[name].keys() == {"mean", "stderr"} for entry in summary["betas"] for name in STATISTICS)
    assert summary["seconds"].keys() == {"compile", "run"}
    assert summary["versions"]["jax"] == jax.__version__


def test_summary_is_the_mean_over_seeds_run_alone(finished):
    _, summary = finished
    rewards, kls = [], []
    with jax.enable_x64(True):
        program = jax.jit(lambda key: ablate(key, jnp.array([0.1, 2.0], jnp.float32)))
        for seed in (5, 6, 7):
            start, policies = program(jax.random.key(seed))
            rewards.append(policies.expected_reward.mean(-1))
            kls.append(toy.kl_to_reference(policies.log_probs, jnp.stack([start.sft.log_probs] * 2)).mean(-1))
    for i, entry in enumerate(summary["betas"]):
        for name, values in (("expected_reward", rewards), ("kl_to_reference", kls)):
            column = np.array(values)[:, i]
            np.testing.assert_allclose(entry[name]["mean"], column.mean(), rtol=1e-6)
            np.testing.assert_allclose(entry[name]["stderr"], column.std(ddof=1) / 3**0.5, rtol=1e-6)
        assert entry["optimal_reward"]["mean"] > summary["sft"]["expected_reward"]["mean"]
        gain = entry["expected_reward"]["mean"] - summary["sft"]["expected_reward"]["mean"]
        assert entry["gain"]["mean"] == pytest.approx(gain, abs=1e-6)


def test_the_largest_seeds_can_be_used(monkeypatch):
    seen = []
    monkeypatch.setattr(harness.Program, "__call__", lambda _, seeds, betas: seen.append(seeds) or {"x": seeds})
    monkeypatch.setattr(beta_ablation, "SEEDS_PER_CHUNK", 2)
    monkeypatch.setattr(beta_ablation, "run", lambda seed, betas: {"x": seed * betas[0]})
    results = beta_ablation.run_all(2**32 - 3, 3, (1.0,), harness.Stopwatch())
    assert results["x"].tolist() == [2**32 - 3, 2**32 - 2, 2**32 - 1]
    assert [chunk.tolist() for chunk in seen] == [[2**32 - 3, 2**32 - 2], [2**32 - 1, 2**32 - 1]]


def test_nothing_foretells_new_pairs_better_than_the_true_rewards(finished):
    _, summary = finished
    for entry in summary["betas"]:
        assert entry["population_loss"]["mean"] > summary["bayes"]["loss"]["mean"]
        assert 0.5 < entry["population_accuracy"]["mean"] < summary["bayes"]["accuracy"]["mean"]
        assert entry["accuracy"]["mean"] > summary["bayes"]["accuracy"]["mean"]  # on what it has learnt by heart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 0}, "--num-seeds must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
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


def test_a_fresh_run_is_like_pytorch():
    """64 new seeds beside PyTorch's 500: nothing differs by more than three combined standard errors."""
    watch = harness.Stopwatch()
    summary = beta_ablation.summarise(beta_ablation.run_all(10_000, 64, BETAS, watch), BETAS)
    theirs = golden()
    theirs["gain"] = theirs["expected_reward"] - theirs["sft_reward"][:, None]
    for column, entry in enumerate(summary["betas"]):
        for name in ("gain", "loss", "accuracy", "reward_margin", "kl_to_reference"):
            assert compare(theirs[name][:, column], entry[name]) < 3, (name, entry["beta"])
    gain = theirs["sft_reward"] - theirs["demonstrator_reward"]
    assert compare(gain, summary["sft"]["gain_over_demonstrations"]) < 3


def test_runs_have_the_notebooks_length():
    """Steps, which averages hardly show: 100 epochs of 500 in batches of 32, 50 of about 1,800 in batches of 64."""
    start, policies = jax.eval_shape(lambda key: ablate(key, jnp.ones(1)), jax.random.key(0))
    assert start.sft.history["loss"].shape == (100,)
    assert policies.history["loss"].shape == (1, 50)
    start, policies = jax.jit(lambda key: ablate(key, jnp.ones(1)))(jax.random.key(0))
    assert start.sft.history["step"][-1] == 100 * -(-500 // 32)
    assert policies.history["step"][0, -1] == 50 * -(-1800 // 64)
    assert len(start.preferences.prompts) == 1800


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
