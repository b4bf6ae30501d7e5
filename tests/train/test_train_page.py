"""The page of training: its code runs, trains, and its two ways agree."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import train

PAGE = Path(train.__file__).parent / "README.md"


@pytest.mark.slow
def test_all_code_runs_and_every_training_learns(as_users_have_it, capsys):
    scope = {}
    with jax.numpy_rank_promotion("allow"):  # as users have it
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
            exec(block, scope)
    assert scope["history"]["loss"][-1] < 0.6 < np.log(2)
    assert scope["history"]["accuracy"][-1] > 0.9
    assert scope["kto_history"]["reward_margin"][-1] > 0.1
    reported = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert reported == ["5", "10"]
    loss, metrics = scope["objective"](scope["own"], scope["pairs"])
    np.testing.assert_allclose(loss, scope["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], scope["accuracy"], rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_margin"], scope["reward_margin"].mean(), rtol=1e-4)
