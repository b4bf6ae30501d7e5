"""What a decoder is made of: sizes and options of Llama, Qwen2 and Qwen3, from and to `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Kinds of models, as `model_type` names them, and their class in Transformers."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".

    Attributes:
      theta: base of the wavelengths.
      kind: `default`; `linear`, which divides positions by `factor`; or `llama3`, which does so for long wavelengths
        alone (Grattafiori et al. 2024, "The Llama 3 Herd of Models").
      factor: by how much the context was extended.
      low_freq_factor, high_freq_factor: of `llama3`: wavelengths longer than the original context divided by the first
        are stretched, and those shorter than it divided by the second are kept.
      original_length: of `llama3`: tokens of the context before it was extended.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class Config:
    """Sizes and options of a decoder.

    Attributes:
      family: a key of `FAMILIES`.
      vocab_size: rows of the embedding.
      hidden_size: width of the stream between layers.
      intermediate_size: width inside the feed-forward layers.
      num_layers, num_heads, num_kv_heads: query heads share the heads of keys and values in equal groups.
      head_dim: width of a head.
      norm_eps: added to the mean square in norms.
      rope: rotary positions.
      tied: the embedding serves as output layer, too.
      qkv_bias, out_bias, mlp_bias: which projections have biases.
      qk_norm: queries and keys are normalised, head by head.
      max_length: tokens of the longest context.
      init_std: standard deviation of initial weights.
      special: ids of special tokens and what else `config.json` holds that does not change the computation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "llama"
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_length: int = 2048
    init_std: float = 0.02
    special: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} heads of keys and values equally"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary positions, got {self.head_dim}")


def from_json(content: Mapping[str, Any]) -> Config:
    """The configuration that a `config.json` describes.

    Raises:
      ValueError: it names something that is not implemented here, or lacks a size.
    """
    family = content.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"models of type {family!r} are not implemented; there are {', '.join(FAMILIES)}")
    _refuse(content)
    try:
        hidden, heads = int(content["hidden_size"]), int(content["num_attention_heads"])
        bias = family == "qwen2" or bool(content.get("attention_bias", False))
        config = Config(
            family=family,
            vocab_size=int(content["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(content["intermediate_size"]),
            num_layers=int(content["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(content.get("num_key_value_heads") or heads),
            head_dim=int(content.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
            norm_eps=float(content.get("rms_norm_eps", 1e-6)),
            rope=_rope(content),
            tied=bool(content.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            out_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and bool(content.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            max_length=int(content.get("max_position_embeddings", 2048)),
            init_std=float(content.get("initializer_range", 0.02)),
            special={name: value for name, value in content.items() if name.endswith("_token_id")},
        )
    except KeyError as problem:
        raise ValueError(f"it has no {problem.args[0]}") from None
    except TypeError as problem:
        raise ValueError(f"a size is of a wrong type ({problem})") from None
    return config


def to_json(config: Config, dtype: str) -> dict[str, Any]:
    """The content of a `config.json` that Transformers reads.

    Args:
      config: of the model.
      dtype: of the weights, such as `float32`.
    """
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
        rope["original_max_position_embeddings"] = config.rope.original_length
    content = {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "dtype": dtype,
        **config.special,
    }
    if config.family != "qwen2":
        content["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        content["mlp_bias"] = config.mlp_bias
    return content


def _refuse(content: Mapping[str, Any]) -> None:
    """Rejects options that change the computation and are not implemented."""
    kinds = content.get("layer_types") or []
    reasons = {
        f"the activation {content.get('hidden_act')!r}": content.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention in sliding windows": content.get("use_sliding_window") or any(k != "full_attention" for k in kinds),
        "quantised weights": content.get("quantization_config"),
        "dropout": content.get("attention_dropout"),
        "weights split for tensor parallelism (pretraining_tp)": content.get("pretraining_tp", 1) not in (1, None),
    }
    if wrong := [name for name, found in reasons.items() if found]:
        raise ValueError(f"not implemented: {', '.join(wrong)}")


def _rope(content: Mapping[str, Any]) -> Rope:
    """Rotary positions, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`."""
    options = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    theta = float(options.get("rope_theta", content.get("rope_theta", 10_000.0)))
    kind = options.get("rope_type", options.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rotary positions of type {kind!r} are not implemented; there are default, linear and llama3")
    if options.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("rotary positions in a part of each head are not implemented")
    if kind == "default":
        return Rope(theta)
    factor = float(options["factor"])
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"the factor of rotary positions must be positive, got {factor}")
    if kind == "linear":
        return Rope(theta, kind, factor)
    low, high = float(options["low_freq_factor"]), float(options["high_freq_factor"])
    return Rope(theta, kind, factor, low, high, int(options["original_max_position_embeddings"]))
