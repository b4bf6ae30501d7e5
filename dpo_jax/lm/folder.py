"""A model as a folder of Hugging Face Transformers: `load` and `save`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.lm.config import Config, from_json, to_json
from dpo_jax.lm.model import Decoder
from dpo_jax.lm.processes import is_first, wait_for_all
from dpo_jax.lm.sharding import to_host
from dpo_jax.lm.text import Text, read_object
from dpo_jax.types import Params

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "q/kernel": "self_attn.q_proj.weight",
    "q/bias": "self_attn.q_proj.bias",
    "k/kernel": "self_attn.k_proj.weight",
    "k/bias": "self_attn.k_proj.bias",
    "v/kernel": "self_attn.v_proj.weight",
    "v/bias": "self_attn.v_proj.bias",
    "q_norm/scale": "self_attn.q_norm.weight",
    "k_norm/scale": "self_attn.k_norm.weight",
    "out/kernel": "self_attn.o_proj.weight",
    "out/bias": "self_attn.o_proj.bias",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "gate/kernel": "mlp.gate_proj.weight",
    "gate/bias": "mlp.gate_proj.bias",
    "up/kernel": "mlp.up_proj.weight",
    "up/bias": "mlp.up_proj.bias",
    "down/kernel": "mlp.down_proj.weight",
    "down/bias": "mlp.down_proj.bias",
}
"""Parameters of a layer here, and their names in a folder; kernels stand transposed there."""

OTHERS = {"embedding": "model.embed_tokens.weight", "norm/scale": "model.norm.weight", "head": "lm_head.weight"}


class LanguageModel(NamedTuple):
    """A model as it stands in a folder.

    Attributes:
      decoder: the network; a Flax module.
      params: its variables, `{"params": ...}`.
      text: tokenizer and chat template; `None` without a tokenizer.
      files: other files of the folder, to be written back: their names and contents.
    """

    decoder: Decoder
    params: Params
    text: Text | None = None
    files: Mapping[str, bytes] = {}


def load(
    folder: str | Path,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    scan: bool = False,
    remat: bool = False,
) -> LanguageModel:
    """Loads Llama, SmolLM2, Qwen2, Qwen2.5 or Qwen3 from a folder.

    Args:
      folder: with `config.json` and `model.safetensors` (or several such files and their index), perhaps with
        `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`. With `huggingface_hub` installed, also
        the name of a repository, `owner/name`.
      dtype: of the computation; `None` means that of the parameters.
      param_dtype: of the parameters.
      scan, remat: see `Decoder`.

    Raises:
      OSError: a file is missing or cannot be read.
      ValueError: a file is damaged, does not fit the others, or describes something that is not implemented.
    """
    folder = _found(folder)
    content = _json(folder / CONFIG)
    try:
        config = from_json(content)
    except ValueError as problem:
        raise ValueError(f"{folder / CONFIG}: {problem}") from None
    decoder = Decoder(config, dtype=dtype, param_dtype=param_dtype, scan=scan, remat=remat)
    params = _params(folder, decoder)
    text = Text.load(folder) if (folder / "tokenizer.json").exists() else None
    if text is not None and text.size > config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has {text.size} tokens, but the embedding has {config.vocab_size} rows"
        )
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if _is_kept(path)}
    return LanguageModel(decoder, params, text, files)


def save(folder: str | Path, model: LanguageModel, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that `load` and Transformers read. It appears when it is complete, or not at all.

    Args:
      folder: must not exist yet, or be empty.
      model: weights keep their dtype.
      max_shard_bytes: of a file of weights; more are split.

    Raises:
      FileExistsError: the folder has files.
      OSError: it cannot be written.
      ValueError: parameters are not those of the decoder, or not finite.
    """
    tensors = dict(_named(model.decoder, model.params))
    dtype = str(jax.tree.leaves(model.params)[0].dtype)
    config = {**json.loads(model.files.get(CONFIG, b"{}")), **to_json(model.decoder.config, dtype)}
    config.pop("torch_dtype", None)
    others = [(name, content) for name, content in model.files.items() if name != CONFIG]
    write_folder(folder, itertools.chain(others, [(CONFIG, _as_json(config))], _weights(tensors, max_shard_bytes)))


def write_folder(folder: str | Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes files into a new folder, which appears when it is complete, or not at all.

    Of several processes, the first writes, and all go on when it has.

    Raises:
      FileExistsError: the folder has files already.
      OSError: it cannot be written.
    """
    if is_first():
        _write(Path(folder), files)
    wait_for_all(f"written: {folder}")


def _write(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files:
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def init(key: Key[Array, ""], config: Config, **options: Any) -> LanguageModel:
    """A model with random parameters and no tokenizer.

    Args:
      key: typed PRNG key.
      config: sizes.
      **options: of `Decoder`.
    """
    checks.key(key)
    decoder = Decoder(config, **options)
    return LanguageModel(decoder, _initial(decoder, key))


def shapes(decoder: Decoder) -> Params:
    """The parameters of a decoder, as `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: _initial(decoder, jax.random.key(0)))


def _initial(decoder: Decoder, key: Key[Array, ""]) -> Params:
    token = jnp.zeros(1, jnp.int32)
    return decoder.init(key, token, token, lambda queries, *others: (queries, others[-1]))


def _found(folder: str | Path) -> Path:
    """The folder; that of a repository is downloaded if `huggingface_hub` can."""
    path = Path(folder)
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        with contextlib.suppress(ImportError):
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    if not path.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    return path


def _json(path: Path) -> dict[str, Any]:
    """An object in a file that must be there."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: expected a folder as Transformers' save_pretrained writes it")
    return read_object(path)


def _is_kept(path: Path) -> bool:
    """Whether a file of a folder is written back as it is."""
    kept = path.suffix in (".json", ".jinja", ".txt", ".model") or path.name.upper().startswith("LICENSE")
    return path.is_file() and kept and path.name != INDEX


def _params(folder: Path, decoder: Decoder) -> Params:
    """Reads the weights."""
    wanted, num_layers = shapes(decoder), decoder.config.num_layers
    paths, structure = jax.tree.flatten_with_path(wanted)
    needed = [_names(path, num_layers) for path, _ in paths]
    files = _files_of_weights(folder)
    known = {name for names in needed for name in names}
    foreign = sorted(
        n for n in files if n not in known and not n.endswith("rotary_emb.inv_freq") and n != OTHERS["head"]
    )
    if foreign:
        raise ValueError(f"{files[foreign[0]]} has weights that the model described by {CONFIG} lacks: {foreign[0]}")
    if missing := sorted(known - files.keys()):
        raise ValueError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}")
    leaves = []
    for names, (_, leaf) in zip(needed, paths, strict=True):
        stacked = len(leaf.shape) > 0 and len(names) > 1
        shape = leaf.shape[1:] if stacked else leaf.shape
        arrays = [_read(files[name], name, shape, leaf.dtype) for name in names]
        leaves.append(jnp.stack(arrays) if stacked else jnp.asarray(arrays[0]))
    return jax.tree.unflatten(structure, leaves)


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).exists():
        index = _json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map")
        files = sorted(set(index.values()))
        if strange := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX} names a file outside the folder: {strange[0]}")
    else:
        files = [WEIGHTS]
    found: dict[str, Path] = {}
    for name in files:
        path = folder / name
        if not path.exists():
            others = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.gguf"), *folder.glob("*.pt*")])
            raise FileNotFoundError(
                f"{path} is missing" + (f"; {others[0]} is not read, only safetensors are" if others else "")
            )
        try:
            with safe_open(path, framework="flax") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except SafetensorError as problem:
            raise ValueError(f"{path}: damaged, or no safetensors ({problem})") from None
    return found


def _read(path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """One tensor, in the orientation and dtype of the decoder."""
    from safetensors import safe_open

    with safe_open(path, framework="flax") as file:
        array = np.asarray(file.get_tensor(name))
    transposed = name.endswith("_proj.weight")
    if array.shape != (shape[::-1] if transposed else shape):
        expected = shape[::-1] if transposed else shape
        raise ValueError(f"{path}: {name} has shape {array.shape}, but {CONFIG} asks for {expected}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{path}: {name} is of dtype {array.dtype}: quantised weights are not implemented")
    array = (array.T if transposed else array).astype(dtype)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{path}: {name} holds NaN or infinite values")
    return array


def _names(path: Any, num_layers: int) -> list[str]:
    """The names of a parameter in a folder: one, or one for each layer if they are stacked."""
    _, first, *rest = (key.key for key in path)
    if not first.startswith("layers"):
        return [OTHERS["/".join([first, *rest])]]
    numbers = range(num_layers) if first == "layers" else [int(first.removeprefix("layers_"))]
    return [f"model.layers.{i}.{LAYER['/'.join(rest)]}" for i in numbers]


def _named(decoder: Decoder, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a folder, with their names there."""
    wanted = jax.tree.flatten_with_path(shapes(decoder))[0]
    found = jax.tree.flatten_with_path(params)[0]
    if [(path, leaf.shape) for path, leaf in wanted] != [(path, jnp.shape(leaf)) for path, leaf in found]:
        raise ValueError("the parameters are not those of the decoder: names or shapes differ")
    for path, leaf in found:
        names, array = _names(path, decoder.config.num_layers), to_host(leaf)
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{jax.tree_util.keystr(path)} holds NaN or infinite values")
        for name, part in zip(names, array if len(names) > 1 else [array], strict=True):
            yield name, np.ascontiguousarray(part.T if name.endswith("_proj.weight") else part)


def _weights(tensors: dict[str, np.ndarray], max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Files of weights, and their index if there are several."""
    from safetensors.numpy import save as serialize

    shards = _shards(tensors, max_bytes)
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        yield name, serialize(shard, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        yield INDEX, _as_json({"metadata": {"total_size": total}, "weight_map": where})


def _shards(tensors: dict[str, np.ndarray], max_bytes: int) -> list[dict[str, np.ndarray]]:
    """Tensors in files of at most so many bytes; a larger one has a file of its own."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
