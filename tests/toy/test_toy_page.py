"""The page of the one-token world: its code runs, and its values are exact."""

import re
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import toy

PAGE = Path(toy.__file__).parent / "README.md"


@pytest.mark.slow
def test_all_code_runs(as_users_have_it):
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, scope)
    reference = np.exp(scope["reference_log_probs"])
    optimum = reference * np.exp(np.asarray(scope["rewards"]) / 0.1)
    np.testing.assert_allclose(np.exp(scope["optimum"]), optimum / optimum.sum(-1, keepdims=True), rtol=1e-4)
    assert dict(scope["results"].sizes) == {"beta": 2, "seed": 4}
    assert (scope["results"].expected_reward > scope["results"].sft_reward).any()
    assert scope["pairs"].responses.chosen.max() < 3
