"""Low-rank adapters: a few parameters that are trained in place of a model's own.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dpo_jax import checks
from dpo_jax.lm.folder import LAYER, shapes, write_folder
from dpo_jax.lm.model import Decoder
from dpo_jax.lm.sharding import to_host
from dpo_jax.types import LogProbFn, Params

MATRICES = ("q", "k", "v", "out", "gate", "up", "down")
"""Matrices of a layer that can have an adapter."""


@dataclass(frozen=True)
class LoRA:
    r"""Which matrices have an adapter: :math:`W + \frac{\alpha}{r} A B`, with :math:`B = 0` at the start.

    Attributes:
      rank: :math:`r`.
      alpha: :math:`\alpha`.
      top_layers: how many layers have adapters, from the last; `None` means all. The layers below them are computed
        once for all adapters that are stacked by `vmap`.
      matrices: a choice of `MATRICES`.
    """

    rank: int = 16
    alpha: float = 32.0
    top_layers: int | None = None
    matrices: tuple[str, ...] = MATRICES

    def __post_init__(self) -> None:
        checks.size("rank", self.rank)
        checks.interval("alpha", self.alpha, "(0, inf)")
        if self.top_layers is not None:
            checks.size("top_layers", self.top_layers)
        if unknown := [name for name in self.matrices if name not in MATRICES]:
            raise ValueError(f"there is no matrix {unknown[0]!r}; there are {', '.join(MATRICES)}")
        if not self.matrices:
            raise ValueError("matrices must name at least one matrix")


def init_adapter(key: Key[Array, ""], decoder: Decoder, lora: LoRA) -> Params:
    """A new adapter, which does not change the model yet.

    Raises:
      ValueError: there are fewer layers than `lora.top_layers`, or layers are scanned and only some have adapters.
    """
    checks.key(key)
    found = dict(_kernels(decoder, lora))
    keys = jax.random.split(key, len(found))
    adapter: dict[str, Any] = {}
    for own, ((layer, matrix), leaf) in zip(keys, found.items(), strict=True):
        *stack, inputs, outputs = leaf.shape
        bound = inputs**-0.5  # as PEFT starts
        down = jax.random.uniform(own, (*stack, inputs, lora.rank), leaf.dtype, -bound, bound)
        adapter.setdefault(layer, {})[matrix] = {
            "down": down,
            "up": jnp.zeros((*stack, lora.rank, outputs), leaf.dtype),
        }
    return adapter


def with_adapter(base: Params, adapter: Params, lora: LoRA) -> Params:
    """The variables of a model with an adapter: `{"params": ..., "adapter": ...}`.

    The computation has only one order: the adapter's product is added to that of the matrix, so that without an adapter
    the same numbers come out as with a new one.
    """
    scale = lora.alpha / lora.rank
    scaled = jax.tree.map_with_path(lambda path, leaf: leaf * scale if path[-1].key == "up" else leaf, adapter)
    return {**base, "adapter": scaled}


def adapted(log_prob: LogProbFn, base: Params, lora: LoRA) -> LogProbFn:
    """A scoring function whose parameters are an adapter: `(adapter, prompts, responses) -> log-probabilities`.

    Args:
      log_prob: of the model (`log_prob_fn`).
      base: variables of the model. Under `jit`, pass them in as an argument, or they become constants of the program.
      lora: as the adapter was made.
    """
    return lambda adapter, prompts, responses: log_prob(with_adapter(base, adapter, lora), prompts, responses)


def merge(base: Params, adapter: Params, lora: LoRA) -> Params:
    """The variables of a model whose matrices contain the adapter.

    Raises:
      ValueError: there are several adapters, or it is one of another model.
    """
    scale = lora.alpha / lora.rank
    merged = jax.tree.map(lambda leaf: leaf, base["params"])
    for layer, matrices in adapter.items():
        for matrix, pair in matrices.items():
            kernel = merged[layer][matrix]["kernel"]
            if (*pair["down"].shape[:-1], pair["up"].shape[-1]) != kernel.shape or pair["down"].ndim != kernel.ndim:
                raise ValueError(
                    f"{layer} {matrix}: arrays {pair['down'].shape} and {pair['up'].shape} are no adapter of a matrix "
                    f"{kernel.shape}; of several adapters, take one (`Grid.adapter`)"
                )
            change = scale * jnp.matmul(pair["down"], pair["up"], precision="highest")
            merged[layer][matrix]["kernel"] = (kernel + change).astype(kernel.dtype)
    return {**base, "params": merged}


def save_adapter(folder: str | Path, adapter: Params, lora: LoRA, *, base_name: str = "") -> None:
    """Writes an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      folder: must not exist yet, or be empty.
      adapter: its parameters, of layers that are not scanned, or are.
      lora: as the adapter was made.
      base_name: the name or folder of the model that it belongs to.
    """
    from safetensors.numpy import save as serialize

    tensors = {}
    for layer, matrices in adapter.items():
        for matrix, pair in matrices.items():
            name = LAYER[f"{matrix}/kernel"].removesuffix(".weight")
            for number, down, up in _unstacked(layer, pair):
                place = f"base_model.model.model.layers.{number}.{name}"
                tensors[f"{place}.lora_A.weight"] = np.ascontiguousarray(to_host(down).T)
                tensors[f"{place}.lora_B.weight"] = np.ascontiguousarray(to_host(up).T)
    numbers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(LAYER[f"{m}/kernel"].split(".")[-2] for m in lora.matrices),
        "layers_to_transform": numbers,
        "layers_pattern": "layers",
        "inference_mode": True,
    }
    content = (json.dumps(config, indent=2) + "\n").encode()
    weights = serialize(tensors, metadata={"format": "pt"})
    write_folder(folder, [("adapter_config.json", content), ("adapter_model.safetensors", weights)])


def _kernels(decoder: Decoder, lora: LoRA) -> list[tuple[tuple[str, str], jax.ShapeDtypeStruct]]:
    """Layer, name and shape of each matrix with an adapter."""
    num, top = decoder.config.num_layers, lora.top_layers
    if top is not None and top > num:
        raise ValueError(f"top_layers must be at most {num}, the number of layers, got {top}")
    if decoder.scan and top not in (None, num):
        raise ValueError("scanned layers have adapters on all of them: load the model with scan=False for top_layers")
    names = ["layers"] if decoder.scan else [f"layers_{i}" for i in range(num - (top or num), num)]
    params = shapes(decoder)["params"]
    return [((layer, matrix), params[layer][matrix]["kernel"]) for layer in names for matrix in lora.matrices]


def _unstacked(layer: str, pair: Mapping[str, Any]) -> list[tuple[int, Array, Array]]:
    """The number of a layer, and its adapter; for stacked layers, those of all."""
    if layer != "layers":
        return [(int(layer.removeprefix("layers_")), pair["down"], pair["up"])]
    return [(i, *both) for i, both in enumerate(zip(pair["down"], pair["up"], strict=True))]
