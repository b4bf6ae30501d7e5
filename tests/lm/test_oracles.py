"""The same logits, tokens and training as Transformers and TRL (`tests/golden/scripts/language_models.py`)."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import lm, losses, train
from dpo_jax.lm.model import rows
from dpo_jax.lm.preferences import padded
from dpo_jax.types import Pair, Preferences

GOLDEN = Path(__file__).parent.parent / "golden" / "language_models"
LOGITS = np.load(GOLDEN / "logits.npz")
FOLDERS = sorted({name.split("/")[0] for name in LOGITS.files})


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_are_those_of_transformers(folder):
    """In float32, at most twice as far from a float64 reference as Transformers itself; in float64, nowhere."""
    tokens, exact = jnp.asarray(LOGITS[f"{folder}/tokens"]), LOGITS[f"{folder}/exact_logits"]
    model = lm.load(GOLDEN / folder)
    found = jax.jit(partial(rows, model.decoder))(model.params, tokens)
    of_transformers = np.abs(LOGITS[f"{folder}/logits"] - exact).max()
    assert np.abs(found - exact).max() < max(2 * of_transformers, 1e-5)
    with jax.enable_x64(True):
        model = lm.load(GOLDEN / folder, param_dtype=jnp.float64)
        score = jax.jit(lm.log_prob_fn(model.decoder))
        logps = score(model.params, tokens[:, :8], tokens[:, 8:])
        np.testing.assert_allclose(logps, LOGITS[f"{folder}/exact_logps"], rtol=1e-9)


def test_all_models_were_asked():
    assert {*FOLDERS} == {
        "llama3_scaled",
        "llama_linear",
        "llama_old_config",
        "llama_sharded_bf16",
        "llama_tied",
        "qwen2",
        "qwen3",
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_configurations_come_back(tmp_path, folder):
    model = lm.load(GOLDEN / folder)
    lm.save(tmp_path / "again", model)
    assert lm.load(tmp_path / "again").decoder == model.decoder


TOKENS = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
TEXT = lm.Text.load(GOLDEN / "chat_model")
MERGES = ("lines in front", "text that merges")
"""Rows whose prompt ends in white space that merges with that of the response: TRL shortens the prompt, we refuse."""


@pytest.mark.parametrize("row", [r for r in TOKENS["rows"] if r["name"] not in MERGES], ids=lambda row: row["name"])
def test_tokens_are_those_of_trl_up_to_the_end_token(tmp_path, row):
    """TRL also scores the newline that the template writes behind the end token, which no model will ever write."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row["row"]) + "\n", encoding="utf-8")
    if row["form"] == "implicit text":
        with pytest.raises(ValueError, match="without a column prompt, responses must be chats, or transcripts"):
            lm.read_preferences(path, TEXT)
        return
    if row["name"] == "empty response":
        with pytest.raises(ValueError, match=r"no rows that can be used: a response is empty \(1\)"):
            lm.read_preferences(path, TEXT)
        return
    data, _ = lm.read_preferences(path, TEXT)
    theirs = row["trl"]
    newline = [] if row["form"] == "text" else TEXT.prompt("\n")
    assert data.prompts[0].tolist() == theirs["prompt_ids"]
    for name, ours in data.responses._asdict().items():
        assert [int(token) for token in ours[0] if token >= 0] + newline == theirs[f"{name}_ids"]


@pytest.mark.parametrize("row", [r for r in TOKENS["rows"] if r["name"] in MERGES], ids=lambda row: row["name"])
def test_where_trl_shortens_the_prompt_we_refuse(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row["row"]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: the end of the prompt, .* becomes .* when a response follows"):
        lm.read_preferences(path, TEXT)


@pytest.mark.parametrize(
    "row", [r for r in TOKENS["rows"] if r["form"] != "implicit text"], ids=lambda row: row["name"]
)
def test_prompts_are_those_of_transformers(row):
    prompt = row["row"].get("prompt") or row["row"]["chosen"][:-1]
    assert TEXT.prompt(prompt) == row["transformers"]["prompt"]


TRAINING = json.loads((GOLDEN / "training.json").read_text(encoding="utf-8"))
NUMBERS = np.load(GOLDEN / "training.npz")
PAIRS = Preferences(
    padded([pair["prompt_ids"] for pair in TRAINING["pairs"]]),
    Pair(*(padded([pair[f"{side}_ids"] for pair in TRAINING["pairs"]]) for side in ("chosen", "rejected"))),
)
LOSSES = {
    "sigmoid": losses.dpo_loss,
    "ipo": losses.ipo_loss,
    "hinge": losses.hinge_loss,
    "robust": partial(losses.robust_dpo_loss, label_smoothing=0.1),
    "exo_pair": partial(losses.exo_loss, label_smoothing=1e-3),
    "nca_pair": losses.nca_loss,
    "apo_zero": losses.apo_zero_loss,
    "apo_down": losses.apo_down_loss,
    "sppo_hard": losses.sppo_loss,
    "aot": losses.aot_loss,
    "aot_unpaired": losses.aot_unpaired_loss,
    "discopop": partial(losses.discopop_loss, temperature=0.05),
}
ON_SUMS = {name: loss for name, loss in LOSSES.items() if name != "ipo"}


def fifty_steps(*which, mean=False, param_dtype=jnp.float32):
    """A program that trains by one of some losses: its index -> losses, parameters, final log-probabilities.

    The log-probabilities are those of the first batch.
    """
    model = lm.load(GOLDEN / "chat_model", param_dtype=param_dtype)
    score = lm.log_prob_fn(model.decoder, mean=mean)
    data = jax.tree.map(jnp.asarray, PAIRS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    @jax.jit
    def run(index, params):
        def loss(policy, reference, *, beta):
            return jax.lax.switch(index, [partial(each, beta=beta) for each in which], policy, reference)

        objective = train.preference_objective(score, loss, beta=0.1)
        with_reference = train.with_reference(score, params, data)
        state = train.init_state(params, objective=objective, optimizer=optimizer)
        batches = (jnp.arange(50)[:, None] % 6) * 4 + jnp.arange(4)[None]

        def step(state, batch):
            rows = jax.tree.map(lambda leaf: leaf[batch], with_reference)
            return train.update(state, rows, objective=objective, optimizer=optimizer)

        state, metrics = jax.lax.scan(step, state, batches)
        sums = lm.log_prob_fn(model.decoder)(
            state.params, data.prompts[:4], jax.tree.map(lambda r: r[:4], data.responses)
        )
        return metrics["loss"], state.params, sums

    return lambda index: run(index, model.params)


def compare(name, found, *, of_losses, of_logps):
    of_steps, _, logps = found
    np.testing.assert_allclose(of_steps, NUMBERS[f"{name}/loss"], atol=of_losses)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(getattr(logps, side), NUMBERS[f"{name}/final_{side}_logps"], atol=of_logps)


@pytest.fixture(scope="module")
def fifty_steps_on_sums():
    with jax.enable_x64(True):
        return fifty_steps(*ON_SUMS.values(), param_dtype=jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_fifty_steps_are_those_of_trl(fifty_steps_on_sums, name):
    """In float64: what is left is the rounding of TRL, which trains in float32. IPO takes means over tokens there."""
    largest = NUMBERS[f"{name}/loss"].max()
    sharpened = 20 if name == "discopop" else 1  # its temperature of 0.05 multiplies differences
    with jax.enable_x64(True):
        if name in ON_SUMS:
            found = fifty_steps_on_sums([*ON_SUMS].index(name))
        else:
            found = fifty_steps(LOSSES[name], mean=True, param_dtype=jnp.float64)(0)
        compare(name, found, of_losses=1e-5 * max(1, largest) * sharpened, of_logps=1e-2)


@pytest.mark.slow
def test_fifty_steps_of_dpo_are_those_of_trl_in_float64_to_the_last_parameter(fifty_steps_on_sums):
    """What is left is the 1e-6 that PyTorch adds to the norm where it clips."""
    with jax.enable_x64(True):
        found = fifty_steps_on_sums([*ON_SUMS].index("sigmoid"))
        compare("sigmoid_exact", found, of_losses=1e-7, of_logps=1e-4)
        from dpo_jax.lm.folder import _named

        ours = dict(_named(lm.load(GOLDEN / "chat_model").decoder, found[1]))
        for name in (n for n in NUMBERS.files if n.startswith("sigmoid_exact/parameters/")):
            np.testing.assert_allclose(ours[name.split("/")[-1]], NUMBERS[name], atol=2e-6)


@pytest.mark.slow
def test_fifty_steps_of_dpo_are_those_of_trl_in_float32():
    compare("sigmoid", fifty_steps(losses.dpo_loss)(0), of_losses=1e-5, of_logps=1e-2)
