"""A run that is killed at any moment goes on with the same bits."""

import json
import multiprocessing
import time
from functools import partial

import jax
import numpy as np
import optax
import pytest

from dpo_jax import lm, losses, train
from tests import forked
from tests.lm import tiny


def tune(folder, report=lambda step: None):
    model = tiny.model()
    tuned = lm.tune(
        jax.random.key(1),
        model,
        lm.with_reference(model, tiny.pairs(12), cache=folder / "reference"),
        objective=partial(train.preference_objective, loss=losses.dpo_loss, beta=0.1),
        optimizer=lambda: optax.adam(1e-3),
        num_epochs=200,
        batch_size=4,
        folder=folder / "run",
        steps_per_checkpoint=3,
        report=report,
    )
    lm.save(folder / "tuned", model._replace(params=tuned.params))


def tune_and_tell(folder, pipe):
    tune(folder, lambda step: pipe.send(step.done))


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_bits(tmp_path):
    assert forked.exit_code(tune, tmp_path / "whole") == 0
    rng = np.random.default_rng(0)
    for _ in range(10):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = forked.start(tune_and_tell, tmp_path / "killed", theirs)
        theirs.close()
        try:
            ours.recv()  # it is under way
        except EOFError:
            pytest.fail("it had nothing left to do before it had been killed ten times")
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -9
    assert forked.exit_code(tune, tmp_path / "killed") == 0
    whole, killed = ((tmp_path / name / "tuned" / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    lines = [(tmp_path / name / "run" / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert len(json.loads(f"[{','.join(lines[0].splitlines())}]")) == 600
    assert not list((tmp_path / "killed" / "run").glob(".step-*"))
