"""What the README says is true: its code runs, its numbers are right."""

import re
from pathlib import Path

import jax
import pytest

from dpo_jax import losses
from experiments.lab.methods import METHODS
from tests.losses.menu import OF_RLHF

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_it_is_short_and_spells_out_what_dpo_is_in_the_first_line():
    assert "Direct Preference Optimization" in README.splitlines()[0]
    assert len(README.encode()) <= 10_000


def test_the_quickstart_is_short():
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 15


@pytest.mark.slow
def test_all_code_runs(capsys):
    scope = {}
    exec(BLOCKS[0], scope)
    before, after = map(float, re.findall(r"0\.\d+", capsys.readouterr().out))
    assert f"{before:.2f} and {after:.2f}" in README
    for block in BLOCKS[1:]:
        exec(block, scope)
    assert scope["history"]["loss"][-1] < scope["history"]["loss"][0]
    assert scope["rewards"].shape == (20,)
    assert jax.numpy.isfinite(scope["loss"])
    ramp, _ = scope["ramp"](scope["start"], scope["pairs"])
    assert ramp == 0.5  # no log-ratio yet


def test_its_numbers_of_losses_and_methods_are_right():
    public = {name for name in dir(losses) if name.endswith("_loss")} - OF_RLHF
    for phrase in (f"{len(public)} losses as pure functions", f"{len(METHODS)} methods compared"):
        assert phrase in README, f"the README must say: {phrase}"


def test_continuous_integration_runs_its_commands():
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()
    ]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert {f"as_a_newcomer '{command}'" for command in commands[:2]} <= set(script)
