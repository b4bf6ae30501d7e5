"""The page of the world of strings: its code runs, and what it says is so."""

import re
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import strings

PAGE = Path(strings.__file__).parent / "README.md"


@pytest.mark.slow
def test_all_code_runs(as_users_have_it, capsys):
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, scope)
    np.testing.assert_allclose(scope["credit"], scope["advantages"], atol=1e-5)
    assert np.isfinite(scope["loss"]) and scope["metrics"]["accuracy"] == 0  # no margin yet
    assert "expected_reward" in capsys.readouterr().out
