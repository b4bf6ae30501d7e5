"""The page of sweeps: its code runs and does what it says."""

import re
from pathlib import Path

import pytest
from matplotlib import figure as matplotlib_figure

from dpo_jax import sweep

PAGE = Path(sweep.__file__).parent / "README.md"


@pytest.mark.slow
def test_all_code_runs(as_users_have_it, monkeypatch, capsys):
    saved = []
    monkeypatch.setattr(matplotlib_figure.Figure, "savefig", lambda _, path: saved.append(path))
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, scope)
    assert dict(scope["results"].sizes) == {"beta": 2, "loss": 2, "seed": 10}
    low = scope["summary"].reward_difference.sel(statistic="low")
    assert low.sel(loss="dpo_loss").max() == 0
    assert capsys.readouterr().out.startswith("\\begin{tabular}{llrr}")
    assert saved == ["reward.png"]
