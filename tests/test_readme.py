"""What the README says is true: its code runs, its numbers are the reported ones, its links lead somewhere."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import losses
from dpo_jax.intervals import half_width
from tests.golden import deviations
from tests.losses.menu import OF_RLHF

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def table_row(entry):
    """A row of the table of results."""

    def cell(name, digits):
        return f"{entry[name]['mean']:.{digits}f} ± {entry[name]['stderr']:.{digits}f}"

    columns = (("loss", 4), ("accuracy", 4), ("kl_to_reference", 4), ("expected_reward", 3), ("gain", 4))
    optimum = (f"{entry[name]['mean']:.3f}" for name in ("optimal_reward", "optimal_kl"))
    cells = [f"{entry['beta']:g}", *(cell(*column) for column in columns), *optimum]
    return "| " + " | ".join(cells) + " |"


def variants_row(summary, name):
    """A row of the table of losses: what a loss gains over SFT in each setting, and what it owes to clean labels."""
    entries = {entry["setting"]: entry for entry in summary["losses"] if entry["name"] == name}

    def cell(setting, gain):
        found = entries[setting][gain]
        return f"{found['mean']:+.3f} ± {half_width(found['stderr'], summary['num_seeds']):.3f}"

    cells = [cell(setting, "gain") for setting in summary["settings"]]
    return "| " + " | ".join([name, *cells, cell("clean", "gain_from_labels")]) + " |"


def rlhf_row(entry, num_seeds):
    """A row of the table of DPO and RLHF."""
    gain = f"{entry['gain']['mean']:+.3f} ± {half_width(entry['gain']['stderr'], num_seeds):.3f}"
    counts = (f"{entry[name]:,}" for name in ("labels", "samples", "steps"))
    means = [f"{entry['spread_of_gain']:.3f}"]
    means += [f"{entry[name]['mean']:.3f}" for name in ("kl_to_reference", "learned_gain")]
    stages = " → ".join(entry["stages"][1:])
    seconds, worse = f"{1000 * entry['seconds']['run']:.0f}", f"{entry['worse_than_sft']['mean']:.0%}"
    return "| " + " | ".join([entry["name"], stages, *counts, seconds, gain, *means, worse]) + " |"


def notebooks_row(entry):
    """A row of the table of notebooks."""
    cells = [f"{entry['num']:,}", f"{entry['compile_seconds']:.1f} s", f"{entry['seconds']:.2f} s"]
    return (
        "| "
        + " | ".join([*cells, f"{entry['runs_per_second']:.0f}", cost(entry["microseconds_per_step_and_run"])])
        + " |"
    )


def torch_row(entry):
    """A row of the comparison with PyTorch: microseconds, and how many times those of the library."""
    costs, times = entry["microseconds_per_step_and_run"], entry["times_jax"]
    names = ("tutorial's loop", "stacked", "by hand", "by hand, compiled")
    rivals = [f"{cost(costs[name])} ({cost(times[name])}×)" if name in costs else "" for name in names]
    return "| " + " | ".join([f"{entry['num']:,}", cost(costs["jax"]), *rivals]) + " |"


def cost(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def test_it_spells_out_what_dpo_is_in_the_first_line():
    assert "Direct Preference Optimization" in README.splitlines()[0]


def test_the_quickstart_is_short_and_all_code_runs():
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 15
    scope = {}
    for block in BLOCKS:
        exec(block, scope)
    assert scope["history"]["loss"][-1] < scope["history"]["loss"][0]
    assert scope["rewards"].shape == (20,)
    assert jax.numpy.isfinite(scope["loss"])
    ramp, _ = scope["ramp"](scope["start"], scope["pairs"])
    assert ramp == 0.5  # no log-ratio yet


def test_its_table_is_that_of_the_reported_results():
    summary = json.loads((ROOT / "experiments/reported/beta_ablation/summary.json").read_text())
    assert summary["num_seeds"] == 1000
    for entry in summary["betas"]:
        assert table_row(entry) in README
    sft = summary["sft"]["expected_reward"]
    assert f"{sft['mean']:.3f} ± {sft['stderr']:.3f}" in README
    words = " ".join(README.split())
    assert f"foretell only {summary['bayes']['accuracy']['mean']:.1%} of new comparisons" in words
    assert f"with a loss of {summary['bayes']['loss']['mean']:.3f}" in words
    population = [entry["population_loss"]["mean"] for entry in summary["betas"]]
    assert f"between {min(population):.3f} and {max(population):.3f}" in words


def test_what_it_says_of_the_losses_is_what_was_measured():
    rows = json.loads((ROOT / "experiments/reported/losses/summary.json").read_text())["losses"]
    words = " ".join(README.split())
    public = {name for name in dir(losses) if name.endswith("_loss")} - OF_RLHF
    assert f"{len(public)} losses, and what composes" in words
    assert f"for {sum(bool(row['oracles']) for row in rows)} of the rows" in words
    float64, float32 = (
        deviations.rounded_up(max(row["oracle"][dtype] or 0 for row in rows)) for dtype in ("float64", "float32")
    )
    assert f"is {float64} in float64 and {float32} in float32" in words


def test_its_table_of_losses_is_that_of_the_reported_results():
    summary = json.loads((ROOT / "experiments/reported/loss_variants/summary.json").read_text())
    table = README.split("| loss | clean |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 8
    for row in table:
        assert row == variants_row(summary, row.split(" | ")[0].removeprefix("| ")), row
    words = " ".join(README.split())
    assert f"Means over {summary['num_seeds']} worlds with 95% intervals" in words
    assert f"All {len(summary['losses']) // len(summary['settings'])} methods" in words
    assert f"made in {summary['seconds']['total'] / 60:.0f} minutes on two cores" in words
    at_edge = sum(bool(entry["at_edge"]) for entry in summary["losses"])
    assert f"In {at_edge} of {len(summary['losses'])} cases a hyperparameter was best near" in words


def test_its_table_of_rlhf_is_that_of_the_reported_results():
    summary = json.loads((ROOT / "experiments/reported/dpo_vs_rlhf/summary.json").read_text())
    for entry in summary["methods"]:
        assert rlhf_row(entry, summary["num_seeds"]) in README
    words = " ".join(README.split())
    assert f"made in {summary['seconds']['total'] / 60:.0f} minutes on two cores by `python -m experiments.dpo" in words
    gains = {entry["name"]: entry["gain"]["mean"] for entry in summary["methods"]}
    learned = [e["gain"]["mean"] for e in summary["methods"] if e["judge"] in ("comparisons", "reward model")]
    best, known = summary["baseline_gains"]["optimum of the reward model"]["gain"]["mean"], gains["RLOO, true reward"]
    assert f"gains more than {max(learned):.3f}; perfect reinforcement learning" in words
    assert f"of the reward model gains {best:.3f}, and the policies that see the truth gain {known:.3f}" in words
    for name in ("online DPO, people", "XPO, people", "Nash-MD, people"):
        assert gains[name] > known - 0.01


def test_what_it_says_of_learning_rates_and_overoptimisation_is_what_was_measured():
    summary = json.loads((ROOT / "experiments/reported/dpo_vs_rlhf/summary.json").read_text())
    methods = {entry["name"]: entry for entry in summary["methods"]}
    words = " ".join(README.split())
    erring = [e for e in summary["methods"] if e["judge"] in ("comparisons", "reward model")]
    assert max(entry["learning_rate"] for entry in erring) == 0.0003
    for name in ("PPO, true reward", "RLOO, true reward"):
        gains = [e["gain"]["mean"] for e in methods[name]["by_rate"] if 0.0002 < e["learning_rate"] < 0.02]
        assert max(gains) - min(gains) < 0.004
    worse = [e["worse_than_sft"] for e in methods["GRPO, reward model"]["by_rate"] if e["learning_rate"] > 0.0002]
    assert f"from 0.0003 on, {min(worse):.0%} of runs or more end worse" in words
    falls = {name: (max(c["gain"]["mean"]), c["gain"]["mean"][-1]) for name, c in summary["courses"].items()}
    top, end = falls["PPO, reward model"]
    assert f"PPO falls from a gain of {top:.3f} to {end:.3f}" in words
    top, end = falls["DPO"]
    assert f"and falls from {top:.3f} to {end:.3f}" in words
    for name in ("PPO, reward model", "RLOO, reward model"):
        scores = np.array(summary["courses"][name]["learned_gain"]["mean"])
        assert np.all(np.diff(scores) > -0.001)


def test_what_it_says_of_costs_is_what_was_measured():
    summary = json.loads((ROOT / "experiments/reported/benchmark/summary.json").read_text())
    for entry in summary["notebooks"]:
        assert notebooks_row(entry) in README
    for entry in summary["torch"]["runs"]:
        assert torch_row(entry) in README
    words = " ".join(README.split())
    dpo = {entry["num"]: entry for entry in summary["dpo"]}
    most = max(dpo)
    assert f"{most:,} DPO runs took {dpo[most]['seconds']:.0f} s" in words
    assert f"({cost(dpo[most]['microseconds_per_step_and_run'])} µs per step and run)" in words
    assert f"PyTorch {summary['torch']['version']}" in words


def test_what_the_page_of_fast_parts_says_of_a_gpu_is_what_was_estimated():
    summary = json.loads((ROOT / "experiments/reported/described_devices/h200/summary.json").read_text())
    words = " ".join((ROOT / "dpo_jax/fast/README.md").read_text(encoding="utf-8").split())
    assert f"{summary['kernels_per_step']:.0f} kernels a step" in words
    assert f"move {summary['bytes_per_step_and_run']:,.0f} bytes per step and run" in words
    least = summary["bytes_per_step_and_run"] / summary["least_bytes_per_step_and_run"]
    assert f"{least:.1f} times the least there is" in words
    assert f"take about {summary['seconds_at_least_for_100000']:.1f} s at least" in words
    on_tpu = json.loads((ROOT / "experiments/reported/described_devices/v5e/summary.json").read_text())
    assert f"{on_tpu['num']} notebooks take {on_tpu['memory']['temp'] / 1e6:.0f} MB of temporaries" in words
    assert f"{on_tpu['kernels_per_step']:.0f} kernels a step" in words
    assert f"{on_tpu['bytes_per_step_and_run']:,.0f} bytes per step and run go to the chip's memory" in words


def test_what_it_says_of_claims_is_what_was_measured():
    summary = json.loads((ROOT / "experiments/reported/claims/summary.json").read_text())
    words = " ".join(README.split())
    assert f"{len(summary['claims'])} claims, is measured in {summary['num_seeds']:,} worlds" in words
    by_id = {claim["id"]: claim for claim in summary["claims"]}
    for name in ("raises_chosen", "dpo_not_exploited", "ipo_robust"):
        assert by_id[name]["verdict"] == "fails"
    fell = by_id["raises_chosen"]["details"]["share of chosen that became less probable"]["effect"]
    assert f"({fell:.0%} become less probable)" in words


def test_what_it_says_of_kto_is_what_was_measured():
    summary = json.loads((ROOT / "experiments/reported/loss_variants/summary.json").read_text())
    for setting in summary["settings"]:
        gain = {e["name"]: e["gain"]["mean"] for e in summary["losses"] if e["setting"] == setting}
        assert abs(gain["kto"] - gain["apo-zero, unpaired"]) < 0.004
        if setting == "on-policy":
            assert gain["kto, exact KL"] > gain["kto"] + 0.004


def test_what_it_says_of_sharpening_is_what_was_measured():
    """At the KL where DPO arrives, and nothing that was learnt from clean labels lies clearly above the curve."""
    summary = json.loads((ROOT / "experiments/reported/loss_variants/summary.json").read_text())
    curve = summary["baselines"]["clean"]["sharpened"]
    clean = [entry for entry in summary["losses"] if entry["setting"] == "clean"]

    def sharpened(entry):
        kls, rewards = (curve[name]["mean"] for name in ("kl_to_reference", "expected_reward"))
        return np.interp(entry["kl_to_reference"]["mean"], kls, rewards)

    (dpo,) = (entry for entry in clean if entry["name"] == "dpo")
    said = f"earns {sharpened(dpo):.3f} at the KL where DPO on clean labels earns {dpo['expected_reward']['mean']:.3f}"
    assert said in " ".join(README.split())
    assert max(entry["expected_reward"]["mean"] - sharpened(entry) for entry in clean) < 0.001


def test_the_quickstart_prints_what_it_says(capsys):
    exec(BLOCKS[0], {})
    before, after = map(float, re.findall(r"0\.\d+", capsys.readouterr().out))
    assert f"{before:.2f} and {after:.2f}" in README


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md"])
def test_its_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_continuous_integration_runs_its_commands():
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()
    ]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert {f"as_a_newcomer '{command}'" for command in commands[:2]} <= set(script)
