"""One decoder for Llama, Qwen2 and Qwen3, as a Flax module whose layers do not know how tokens are laid out.

All layers but attention act on single tokens, so these may be rows, or one long stream. Attention is a function that is
handed in: it knows which tokens see which (`scoring`, `generation`). Parameters are a plain dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpo_jax.lm.config import Config, Rope

Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""Attention: `attend(queries, keys, values, cache) -> (outputs, cache)`. Queries `[*tokens, heads, head_dim]`, keys and
values `[*tokens, kv_heads, head_dim]`; outputs as queries."""


WORTH_HALVING = 256
"""Rows of so many tokens are attended in two halves; for shorter ones, compiling that takes longer than it saves."""


def at_least_float32(dtype: Any) -> Any:
    """A dtype, or float32 if it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)


Turns = tuple[Array, Array]
"""Cosines and sines of rotary positions, `[*tokens, 1, head_dim / 2]`."""


class Linear(nn.Module):
    """A dense layer, to which a low-rank adapter may be added (`adapters`).

    Attributes:
      features: width of the output.
      use_bias: whether it has a bias.
      std: standard deviation of initial weights.
      dtype: of the computation; `None` means that of inputs and parameters.
      param_dtype: of initial parameters.
    """

    features: int
    use_bias: bool
    std: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*tokens inputs"]) -> Float[Array, "*tokens outputs"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], self.param_dtype) if self.use_bias else None
        adapter: list[Any] = [self.get_variable("adapter", name) for name in ("down", "up")]
        x, kernel, bias, down, up = nn.dtypes.promote_dtype(x, kernel, bias, *adapter, dtype=self.dtype)
        y = x @ kernel
        if bias is not None:
            y += jnp.expand_dims(bias, range(y.ndim - 1))
        return y if down is None else y + (x @ down) @ up


class Block(nn.Module):
    """One layer: attention, then a gated feed-forward network, each behind a norm and added to the stream.

    Attributes:
      config: sizes.
      attend: see `Attend`.
      dtype: of the computation.
      param_dtype: of initial parameters.
    """

    config: Config
    attend: Attend
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "*tokens hidden"], turns: Turns, cache: Any
    ) -> tuple[Float[Array, "*tokens hidden"], Any]:
        c = self.config

        def linear(name: str, features: int, use_bias: bool) -> Linear:
            return Linear(features, use_bias, c.init_std, self.dtype, self.param_dtype, name=name)

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=c.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        def heads(name: str, num: int) -> Array:
            return linear(name, num * c.head_dim, c.qkv_bias)(y).reshape(*y.shape[:-1], num, c.head_dim)

        y = norm("attention_norm")(x)
        q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
        if c.qk_norm:
            q, k = norm("q_norm")(q), norm("k_norm")(k)
        y, cache = self.attend(rotate(q, turns), rotate(k, turns), v, cache)
        x += linear("out", c.hidden_size, c.out_bias)(y.reshape(*x.shape[:-1], -1))
        y = norm("mlp_norm")(x)
        gate, up = (linear(name, c.intermediate_size, c.mlp_bias)(y) for name in ("gate", "up"))
        x += linear("down", c.hidden_size, c.mlp_bias)(nn.silu(gate) * up)
        return x, cache


class Decoder(nn.Module):
    """A causal language model.

    Attributes:
      config: sizes and options.
      dtype: of the computation, such as `jnp.bfloat16` on accelerators; `None` means that of the parameters. Norms'
        moments, rotary angles and softmax are computed in float32 at least.
      param_dtype: of initial parameters.
      scan: one compiled layer that is run for all (their parameters are stacked under `layers`), instead of one after
        the other (`layers_0`, `layers_1`, ...): compiles faster, runs slower on a CPU.
      remat: activations inside layers are not kept but computed again for the gradient: less memory, more time.
    """

    config: Config
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        self.embedding = self.param("embedding", normal, (c.vocab_size, c.hidden_size), self.param_dtype)
        self.norm = nn.RMSNorm(epsilon=c.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)
        if not c.tied:
            self.head = self.param("head", normal, (c.vocab_size, c.hidden_size), self.param_dtype)

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "*tokens"], positions: Int[Array, "*tokens"], attend: Attend, cache: Any = None
    ) -> tuple[Float[Array, "*tokens hidden"], Any]:
        """The stream behind the last layer and norm, from which `logits` are made, and the new cache.

        Args:
          tokens: ids, in range.
          positions: of each token in its own sequence, from 0.
          attend: attention.
          cache: what attention remembers: one for each layer, in a list, or stacked if layers are scanned.
        """
        x = self.embedding[tokens].astype(self.dtype or self.embedding.dtype)
        turns = turns_at(positions, self.config, at_least_float32(x.dtype))
        block: Any = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            block = nn.scan(
                block,
                variable_axes={"params": 0, "adapter": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=self.config.num_layers,
            )
            x, cache = block(self.config, attend, self.dtype, self.param_dtype, name="layers")(x, turns, cache)
            return self.norm(x), cache
        if not self.is_initializing():
            block = nn.jit(block)  # traced once for all layers
        caches = [None] * self.config.num_layers if cache is None else list(cache)
        for i in range(self.config.num_layers):
            layer = block(self.config, attend, self.dtype, self.param_dtype, name=f"layers_{i}")
            x, caches[i] = layer(x, turns, caches[i])
        return self.norm(x), caches

    def logits(self, hidden: Float[Array, "*tokens hidden"]) -> Float[Array, "*tokens vocabulary"]:
        """Logits of the next token, in float32 at least."""
        head = self.embedding if self.config.tied else self.head
        head = head.astype(self.dtype or head.dtype)
        return jnp.einsum("...h,vh->...v", hidden, head, preferred_element_type=at_least_float32(hidden.dtype))


def turns_at(positions: Int[Array, "*tokens"], config: Config, dtype: Any) -> Turns:
    """Cosines and sines by which the pairs of entries of a head are rotated, the same in all layers."""
    angles = jnp.einsum("...,h->...h", positions.astype(dtype), jnp.asarray(inverse_wavelengths(config), dtype))
    return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: Float[Array, "*tokens heads dim"], turns: Turns) -> Float[Array, "*tokens heads dim"]:
    """Rotates pairs of entries of each head; the two parts of a pair stand half a head apart."""
    cos, sin = turns
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def inverse_wavelengths(config: Config) -> np.ndarray:
    """Radians per position of each pair of entries of a head, `[head_dim / 2]`."""
    rope: Rope = config.rope
    plain = rope.theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    turns = rope.original_length * plain / (2 * np.pi)  # in the original context
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return kept * plain + (1 - kept) * plain / rope.factor


def attention(
    queries: Float[Array, "rows length heads dim"],
    keys: Float[Array, "rows others kv_heads dim"],
    values: Float[Array, "rows others kv_heads dim"],
    visible: Bool[Array, "rows length others"],
) -> Float[Array, "rows length heads dim"]:
    """Attention of rows of tokens: each sees the tokens that `visible` names. Softmax is in float32 at least."""
    (num, length, heads, dim), shared_by = queries.shape, queries.shape[2] // keys.shape[2]
    grouped = queries.reshape(num, length, -1, shared_by, dim) * dim**-0.5
    dtype = at_least_float32(queries.dtype)
    scores = jnp.einsum("rlhgd,rmhd->rhglm", grouped, keys, preferred_element_type=dtype)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(dtype).min))
    outputs = jnp.einsum("rhglm,rmhd->rlhgd", weights.astype(values.dtype), values)
    return outputs.reshape(num, length, heads, dim)


def causal_attention(
    queries: Float[Array, "rows length heads dim"],
    keys: Float[Array, "rows length kv_heads dim"],
    values: Float[Array, "rows length kv_heads dim"],
    visible: Bool[Array, "rows length length"],
) -> Float[Array, "rows length heads dim"]:
    """`attention` where no token sees a later one: half of the queries need no more than half of the keys."""
    length = queries.shape[1]
    if length < WORTH_HALVING:
        return attention(queries, keys, values, visible)
    half = length // 2
    first = attention(queries[:, :half], keys[:, :half], values[:, :half], visible[:, :half, :half])
    second = attention(queries[:, half:], keys, values, visible[:, half:])
    return jnp.concatenate([first, second], axis=1)


def rows(decoder: Decoder, params: Any, tokens: Int[Array, "rows length"]) -> Float[Array, "rows length vocabulary"]:
    """Logits of the next token at each place of rows of tokens.

    Args:
      decoder: the network.
      params: its variables, `{"params": ...}`.
      tokens: ids.
    """
    length = tokens.shape[1]
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool))[None], (len(tokens), length, length))
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)

    def attend(q: Array, k: Array, v: Array, cache: Any) -> tuple[Array, Any]:
        return causal_attention(q, k, v, visible), cache

    hidden, _ = decoder.apply(params, tokens, positions, attend)
    return decoder.apply(params, hidden, method="logits")  # type: ignore[return-value]
