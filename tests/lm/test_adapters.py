"""Adapters: nothing at the start, the same when merged, and in the format of PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_jax import lm
from tests.lm import tiny

MODEL = tiny.model()
LORA = lm.LoRA(rank=3, alpha=6.0)
DATA = jax.tree.map(jnp.asarray, tiny.pairs(4))
SCORE = jax.jit(lm.log_prob_fn(MODEL.decoder))


def trained(lora=LORA, decoder=MODEL.decoder, seed=1):
    """An adapter that changes something."""
    adapter = lm.init_adapter(jax.random.key(seed), decoder, lora)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), adapter)


def score(params):
    return np.asarray(SCORE(params, DATA.prompts, DATA.responses).chosen)


def test_a_new_adapter_changes_nothing_to_the_bit():
    new = lm.init_adapter(jax.random.key(0), MODEL.decoder, LORA)
    with_new = lm.with_adapter(MODEL.params, new, LORA)
    np.testing.assert_array_equal(score(with_new), score(MODEL.params))


def test_it_adds_its_product_to_each_matrix():
    adapter = trained()
    by_hand = jax.tree.map(lambda leaf: leaf, MODEL.params)
    for layer, matrices in adapter.items():
        for matrix, pair in matrices.items():
            by_hand["params"][layer][matrix]["kernel"] += 2.0 * np.asarray(pair["down"]) @ np.asarray(pair["up"])
    expected = score(by_hand)
    assert np.abs(expected - score(MODEL.params)).max() > 0.1
    np.testing.assert_allclose(score(lm.with_adapter(MODEL.params, adapter, LORA)), expected, atol=5e-5)
    np.testing.assert_allclose(score(lm.merge(MODEL.params, adapter, LORA)), expected, atol=5e-5)


def test_merging_leaves_the_model_as_it_was():
    before = jax.tree.map(np.array, MODEL.params)
    lm.merge(MODEL.params, trained(), LORA)
    jax.tree.map(np.testing.assert_array_equal, MODEL.params, before)


def test_several_adapters_are_not_merged_as_one():
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), trained())
    with pytest.raises(ValueError, match=r"of several adapters, take one"):
        lm.merge(MODEL.params, several, LORA)


def test_only_chosen_layers_and_matrices_have_one():
    lora = lm.LoRA(rank=2, top_layers=1, matrices=("q", "down"))
    adapter = lm.init_adapter(jax.random.key(0), MODEL.decoder, lora)
    assert {layer: {*matrices} for layer, matrices in adapter.items()} == {"layers_1": {"q", "down"}}
    assert adapter["layers_1"]["down"]["down"].shape == (24, 2)


def test_scanned_layers_have_stacked_adapters():
    scanned = tiny.model(scan=True)
    adapter = trained(decoder=scanned.decoder)
    one_by_one = {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], adapter["layers"]) for i in range(2)}  # noqa: B023
    unrolled = {f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], scanned.params["params"]["layers"]) for i in range(2)}  # noqa: B023
    others = {name: leaf for name, leaf in scanned.params["params"].items() if name != "layers"}
    run = jax.jit(lm.log_prob_fn(scanned.decoder))
    found = run(lm.with_adapter(scanned.params, adapter, LORA), DATA.prompts, DATA.responses)
    np.testing.assert_allclose(
        found.chosen, score(lm.with_adapter({"params": {**others, **unrolled}}, one_by_one, LORA)), atol=5e-5
    )
    with pytest.raises(ValueError, match="scanned layers have adapters on all of them"):
        lm.init_adapter(jax.random.key(0), scanned.decoder, lm.LoRA(top_layers=1))


def test_it_is_written_as_peft_names_it(tmp_path):
    adapter = trained()
    lm.save_adapter(tmp_path / "adapter", adapter, LORA, base_name="some/model")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    place = "base_model.model.model.layers.1.self_attn.o_proj"
    np.testing.assert_array_equal(tensors[f"{place}.lora_A.weight"], adapter["layers_1"]["out"]["down"].T)
    np.testing.assert_array_equal(tensors[f"{place}.lora_B.weight"], adapter["layers_1"]["out"]["up"].T)
    assert len(tensors) == 2 * 2 * 7
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6.0, "LORA")
    assert "o_proj" in config["target_modules"] and config["layers_to_transform"] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"top_layers": 0}, "top_layers must be"),
        ({"matrices": ("q", "qkv")}, "there is no matrix 'qkv'; there are q, k"),
        ({"matrices": ()}, "matrices must name"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lm.LoRA(**options)


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(ValueError, match="top_layers must be at most 2, the number of layers, got 3"):
        lm.init_adapter(jax.random.key(0), MODEL.decoder, lm.LoRA(top_layers=3))
