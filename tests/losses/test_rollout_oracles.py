"""Values and gradients are those of TRL's trainers (`tests/golden/scripts/rollouts_in_*.py`)."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from tests.losses.oracles import deviation
from tests.losses.rollout_oracles import ENTRIES, NOT_OURS, OURS, compare, kind

COMPARED = [entry for entry in ENTRIES if kind(entry) in OURS]


@pytest.mark.parametrize("name", OURS)
def test_values_and_gradients_are_those_of_trl(name):
    with jax.enable_x64(True):
        for entry in COMPARED:
            if kind(entry) == name:
                for ours, theirs in compare(entry, jnp.float64):
                    assert deviation(ours, theirs) < 1e-12, entry


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_values_and_gradients_are_those_of_trl_in_single_precision(name):
    entry = next(entry for entry in COMPARED if kind(entry) == name)
    for ours, theirs in compare(entry, jnp.float32):
        assert deviation(ours, theirs) < 1e-5


def test_every_entry_is_compared_or_named_as_not_ours():
    assert {kind(entry) for entry in ENTRIES} == OURS.keys() | NOT_OURS.keys()
    assert not OURS.keys() & NOT_OURS.keys()


def test_trl_was_asked_enough():
    """So that an empty file cannot pass, nor one without gradients."""
    assert Counter(entry["oracle"] for entry in COMPARED) == {"TRL 1.16.0": 69, "TRL 0.28.0": 60}
    assert Counter(entry["oracle"] for entry in ENTRIES) == {"TRL 1.16.0": 75, "TRL 0.28.0": 60}
    without = {entry["loss"] for entry in COMPARED if not entry["gradients"]}
    assert without == {
        name for name in OURS if not name.endswith(("_loss", "_step")) and not name.startswith("grpo_loss")
    }


@pytest.mark.parametrize(
    ("of", "name"),
    [("grpo_loss, grpo", "epsilon"), ("grpo_loss, grpo", "beta"), ("cut_advantages", "lam"), ("ppo_step", "kl_coef")],
)
def test_a_wrong_number_would_show(of, name):
    entry = next(entry for entry in COMPARED if kind(entry) == of and entry["hyperparameters"].get("beta") != 0)
    hyperparameters = entry["hyperparameters"]
    wrong = {**entry, "hyperparameters": {**hyperparameters, name: 1.001 * hyperparameters[name]}}
    assert max(deviation(*numbers) for numbers in compare(wrong, jnp.float32)) > 1e-5
