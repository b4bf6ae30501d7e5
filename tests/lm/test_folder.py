"""Folders: what is loaded and saved, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_jax import lm
from tests.lm import tiny

QWEN3 = lm.Config(32, 8, 12, 2, 2, 1, 4, family="qwen3", qk_norm=True, tied=True, init_std=0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A complete folder."""
    folder = tmp_path_factory.mktemp("folders") / "model"
    files = {"chat_template.jinja": tiny.TEMPLATE.encode(), "generation_config.json": b"{}"}
    files["tokenizer.json"] = tiny.text().tokenizer.to_str().encode()
    files["tokenizer_config.json"] = json.dumps(tiny.SPECIAL).encode()
    model = lm.init(jax.random.key(0), tiny.CONFIG.__class__(**{**vars(tiny.CONFIG), "vocab_size": 260}))
    lm.save(folder, model._replace(files=files))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def change(path, **entries):
    content = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (tiny.CONFIG, {}),
        (tiny.CONFIG, {"scan": True}),
        (QWEN3, {"param_dtype": jnp.bfloat16}),
        pytest.param(QWEN3, {}, marks=pytest.mark.slow),
        pytest.param(QWEN3, {"scan": True}, marks=pytest.mark.slow),
        pytest.param(tiny.CONFIG, {"param_dtype": jnp.bfloat16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_saved_is_loaded(tmp_path, config, options):
    model = tiny.model(**options) if config is tiny.CONFIG else lm.init(jax.random.key(1), config, **options)
    lm.save(tmp_path / "model", model)
    again = lm.load(tmp_path / "model", **options)
    assert again.decoder == model.decoder
    same(again.params, model.params)


def test_several_files_of_weights_have_an_index(tmp_path):
    lm.save(tmp_path / "model", tiny.model(), max_shard_bytes=4000)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert len(names) > 4
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {name for name in names if name.endswith(".safetensors")}
    shards = [load_file(tmp_path / "model" / name) for name in names if name.endswith(".safetensors")]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert len(sizes) <= 2 * sum(sizes) / 4000 + 1  # two neighbours have more than the limit together
    same(lm.load(tmp_path / "model").params, tiny.model().params)


def test_scanned_and_unrolled_layers_are_the_same_files(saved):
    stacked, one_by_one = lm.load(saved, scan=True).params["params"], lm.load(saved).params["params"]
    for i in range(2):
        same(jax.tree.map(lambda leaf: leaf[i], stacked["layers"]), one_by_one[f"layers_{i}"])  # noqa: B023


def test_other_files_are_written_back(saved, tmp_path):
    lm.save(tmp_path / "again", lm.load(saved))
    for path in saved.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert lm.load(saved).text.stops == tiny.text().stops


def test_entries_of_the_configuration_that_are_not_known_here_are_kept(folder, tmp_path):
    change(folder / "config.json", something="else", torch_dtype="float32")
    lm.save(tmp_path / "again", lm.load(folder))
    content = json.loads((tmp_path / "again" / "config.json").read_text())
    assert content["something"] == "else" and content["dtype"] == "float32" and "torch_dtype" not in content


def test_nothing_is_written_over_or_left_half_written(folder, monkeypatch):
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        lm.save(folder, tiny.model())
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        lm.save(folder.parent / "new", tiny.model())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_parameters_of_another_model_and_nan_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="not those of the decoder"):
        lm.save(tmp_path / "new", lm.LanguageModel(tiny.model().decoder, lm.init(jax.random.key(0), QWEN3).params))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, tiny.model().params)
    with pytest.raises(ValueError, match=r"\['embedding'\] holds NaN"):
        lm.save(tmp_path / "new", tiny.model()._replace(params=broken))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "gpt2"}, "models of type 'gpt2' are not implemented; there are llama, qwen2, qwen3"),
        ({"model_type": None}, "models of type None"),
        ({"hidden_size": None}, "config.json: it has no hidden_size"),
        ({"hidden_size": "wide"}, "config.json: "),
        ({"hidden_act": "gelu"}, "not implemented: the activation 'gelu'"),
        ({"use_sliding_window": True}, "not implemented: attention in sliding windows"),
        ({"layer_types": ["sliding_attention"]}, "not implemented: attention in sliding windows"),
        ({"quantization_config": {"bits": 4}}, "not implemented: quantised weights"),
        ({"attention_dropout": 0.1}, "not implemented: dropout"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rotary positions of type 'yarn' are not implemented",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "it has no factor"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 heads"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": 100}, "has shape .260, 16., but config.json asks for .100, 16."),
        ({"vocab_size": 200}, "has shape"),
        ({"num_hidden_layers": 3}, "9 weights are missing, such as model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has weights that the model described by config.json lacks: model.layers.1"),
        ({"attention_bias": True}, "8 weights are missing, such as model.layers.0.self_attn.k_proj.bias"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_are_refused(folder, entries, message):
    change(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        lm.load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected an object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pytorch_model.bin is not read",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense"), "damaged, or no safetensors"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../b.safetensors"}}'
            ),
            "names a file outside the folder",
        ),
    ],
)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises((OSError, ValueError), match=message):
        lm.load(folder)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(folder, wrong):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(wrong)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: model.norm.weight holds NaN or infinite"):
        lm.load(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder):
    change(folder / "config.json", vocab_size=100)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="tokenizer.json has 260 tokens, but the embedding has 100 rows"):
        lm.load(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        lm.load(tmp_path / "nowhere")
