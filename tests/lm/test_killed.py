"""A run that is killed at any moment goes on with the same bits."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

PROGRAM = """
import sys
from functools import partial
from pathlib import Path
import jax
import optax
from dpo_jax import lm, losses, train
from tests.lm import tiny

folder = Path(sys.argv[1])
model = tiny.model()
tuned = lm.tune(
    jax.random.key(1),
    model,
    lm.with_reference(model, tiny.pairs(12), cache=folder / "reference"),
    objective=partial(train.preference_objective, loss=losses.dpo_loss, beta=0.1),
    optimizer=lambda: optax.adam(1e-3),
    num_epochs=400,
    batch_size=4,
    folder=folder / "run",
    steps_per_checkpoint=3,
    report=lambda step: print(step.done, flush=True),
)
lm.save(folder / "tuned", model._replace(params=tuned.params))
"""


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, check=True)
    rng, kills = np.random.default_rng(0), 0
    while kills < 10:
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
        first = process.stdout.readline()  # it is under way, or had nothing left to do
        assert first, "it finished before it had been killed ten times"
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        kills += 1
    subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, check=True)
    whole, killed = ((tmp_path / name / "tuned" / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    lines = [(tmp_path / name / "run" / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert len(json.loads(f"[{','.join(lines[0].splitlines())}]")) == 1200
    assert not list((tmp_path / "killed" / "run").glob(".step-*"))
