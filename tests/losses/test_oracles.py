"""The same losses and gradients as independent implementations (`tests/golden/scripts/losses_in_*.py`)."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses
from tests.losses import oracles
from tests.losses.oracles import ENTRIES, INPUTS, compare, deviation

STATISTICS = ("bco_shift", "kto_reference_point")
COMPARED = [entry for entry in ENTRIES if entry["loss"] not in STATISTICS]
GROUPS = sorted({(entry["oracle"], entry["loss"]) for entry in COMPARED})


@pytest.mark.parametrize(("oracle", "loss"), GROUPS)
def test_losses_and_gradients_are_those_of(oracle, loss):
    """To ten digits where the oracle has them; one of each loss in single precision, too."""
    entries = [entry for entry in COMPARED if (entry["oracle"], entry["loss"]) == (oracle, loss)]
    for entry in entries:
        if entry["dtype"] != "float64" or entry is entries[0]:
            for ours, theirs in compare(entry, jnp.float32):
                assert deviation(ours, theirs) < 1e-5, entry
        if entry["dtype"] == "float64":
            with jax.enable_x64(True):
                for ours, theirs in compare(entry, jnp.float64):
                    assert deviation(ours, theirs) < 1e-10, entry


@pytest.mark.slow
@pytest.mark.parametrize(("oracle", "loss"), GROUPS)
def test_in_single_precision_they_are_nearly_those_of(oracle, loss):
    for entry in COMPARED:
        if (entry["oracle"], entry["loss"], entry["dtype"]) == (oracle, loss, "float64"):
            for ours, theirs in compare(entry, jnp.float32):
                assert deviation(ours, theirs) < 1e-5, entry


def test_the_oracles_were_asked_enough():
    """So that an empty file cannot pass: each dialect has its losses, and few numbers are missing."""
    num = Counter(entry["oracle"] for entry in COMPARED)
    assert num == {
        "TRL 0.28.0": 106,
        "TRL 1.16.0": 122,
        "torchtune 0.6.1": 6,
        "direct-preference-optimization 8a4023f": 6,
    }
    missing = [entry for entry in COMPARED if None in np.ravel(entry["values"])]
    assert {entry["loss"] for entry in missing} == {"discopop_loss"}  # TRL multiplies infinity by zero
    assert all(entry["values"].count(None) == 1 for entry in missing)


def test_a_wrong_number_would_show():
    entry = next(entry for entry in COMPARED if entry["loss"] == "ipo_loss")
    wrong = {**entry, "hyperparameters": {"beta": entry["hyperparameters"]["beta"] * 1.0001}}
    assert max(deviation(*numbers) for numbers in compare(wrong, jnp.float32)) > 1e-5


def test_dialects():
    """What TRL changed between releases: smoothing is ignored in 1.16, and IPO is fed with means."""
    smoothed = {e["oracle"] for e in ENTRIES if e["loss"] == "dpo_loss" and e["hyperparameters"].get("label_smoothing")}
    assert "TRL 0.28.0" in smoothed
    assert "TRL 1.16.0" not in smoothed
    taken = {(e["oracle"], e["takes"]) for e in ENTRIES if e["loss"] == "ipo_loss" and not e["divergence"]}
    assert {("TRL 0.28.0", "sums"), ("TRL 1.16.0", "means")} <= taken


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e["loss"] == "kto_reference_point"], ids=lambda e: e["oracle"])
def test_the_reference_point_is_that_of(entry):
    sides = ("reference", "policy") if entry["hyperparameters"]["swapped"] else ("policy", "reference")
    point = losses.kto_reference_point(*(jnp.asarray(INPUTS["mismatched"][side]) for side in sides))
    np.testing.assert_allclose(point, entry["values"], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_shift_is_that_of_trl_after_batches_of_equal_size(beta):
    """TRL 0.28's DPOTrainer, whose running mean counts batches; in pairs, as many responses are good as bad."""
    entry = next(
        e for e in ENTRIES
        if e["loss"] == "bco_shift" and e["hyperparameters"]["beta"] == beta and e["note"].startswith("DPOTrainer")
    )  # fmt: skip
    policy, reference = (jnp.concatenate(oracles.pair(side, jnp.float32)) for side in ("policy", "reference"))
    desirable, state = jnp.arange(32) < 16, losses.Shift()
    for batch, expected in zip(entry["hyperparameters"]["batches"], entry["values"], strict=True):
        assert batch["rows"] == 16
        rewards = beta * (reference - policy if batch["swapped"] else policy - reference)
        state = losses.update_shift(state, rewards, desirable)
        np.testing.assert_allclose(state.value, expected, rtol=1e-5, atol=1e-6)
