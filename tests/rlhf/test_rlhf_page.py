"""What the page of RLHF says is true: its code runs, and its table is the reported one."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from dpo_jax import losses, rlhf, toy
from experiments import dpo_vs_rlhf
from experiments.lab import page

PAGE = Path(rlhf.__file__).parent / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SUMMARY = json.loads((PAGE.parents[2] / "experiments/reported/dpo_vs_rlhf/summary.json").read_text())


@pytest.mark.slow
def test_all_code_runs_and_every_training_earns_reward():
    scope = {}
    for block in BLOCKS:
        exec(block, scope)
        if "tuned" in scope:
            params = scope.pop("tuned")
            log_probs = scope["table"](getattr(params, "policy", params))
            before, after = (
                toy.expected_reward(table, scope["world"].rewards).mean()
                for table in (scope["table"](scope["reference_params"]), log_probs)
            )
            assert jnp.isfinite(after)
            assert after > before, block


def test_its_table_is_that_of_the_reported_results():
    assert page.between(TEXT, "gradient_estimators") == dpo_vs_rlhf.estimators_table(SUMMARY)
    assert f"At the SFT policies of {SUMMARY['num_seeds']} worlds" in " ".join(TEXT.split())


def test_it_names_what_there_is():
    public = {name for name in dir(rlhf) if name.islower() and callable(getattr(rlhf, name))}
    helpers = {"collect_groups", "policy_gradient", "update_coefficient", "estimate_moments"}
    assert {f"rlhf.{name}" for name in public - helpers} <= set(re.findall(r"`(rlhf\.\w+)`", TEXT))
    for name in re.findall(r"`(\w+_(?:loss|estimate|advantages))`", TEXT):
        assert hasattr(losses, name), name


def test_rows_have_as_many_cells_as_their_headings():
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
