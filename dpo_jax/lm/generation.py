"""Responses written token by token, with the keys and values of earlier tokens kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dpo_jax import checks
from dpo_jax.lm.model import Decoder, attention, causal_attention
from dpo_jax.lm.stream import PADDING, entries_at, inverse
from dpo_jax.types import Params, RespondFn, Responses

ChooseFn = Callable[[Key[Array, ""], Float[Array, " vocabulary"]], Int[Array, ""]]
"""Chooses a token: `choose(key, log_probs) -> id`."""


class Generated(NamedTuple):
    """Responses that a model has written.

    Attributes:
      tokens: ids, the end token included; -1 behind it.
      logps: log-probabilities of the tokens under the model itself (nats), whatever chose them; 0 behind the end.
    """

    tokens: Int[Array, "n length"]
    logps: Float[Array, "n length"]


def greedy(key: Key[Array, ""], log_probs: Float[Array, " vocabulary"]) -> Int[Array, ""]:
    """The most probable token."""
    del key
    return jnp.argmax(log_probs)


def sampler(*, temperature: Any = 1.0, top_k: int | None = None, top_p: Any = None) -> ChooseFn:
    """A function that draws tokens.

    Args:
      temperature: logits are divided by it; positive, may be traced. For 0, use `greedy`.
      top_k: only so many of the most probable tokens can be drawn; static.
      top_p: only the fewest most probable tokens whose probabilities add up to this can be drawn ("nucleus sampling",
        Holtzman et al. 2019); in (0, 1], may be traced.

    Raises:
      ValueError: an argument is out of range.
    """
    checks.interval("temperature", temperature, "(0, inf)")
    if top_k is not None:
        checks.size("top_k", top_k)
    if top_p is not None:
        checks.interval("top_p", top_p, "(0, 1]")

    def choose(key: Key[Array, ""], log_probs: Float[Array, " vocabulary"]) -> Int[Array, ""]:
        logits = log_probs / temperature
        if top_k is not None and top_k < len(logits):
            logits = jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][-1], logits, -jnp.inf)
        if top_p is not None:
            ordered = jnp.sort(logits, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
            logits = jnp.where(logits >= jnp.min(jnp.where(before < top_p, ordered, jnp.inf)), logits, -jnp.inf)
        return jax.random.categorical(key, logits)

    return choose


def generate_fn(
    decoder: Decoder,
    *,
    max_tokens: int,
    stops: Collection[int],
    choose: ChooseFn | None = None,
    group_size: int = 1,
    prompt_tokens: int | None = None,
) -> Callable[[Key[Array, ""], Params, Int[Array, "prompts length"]], Generated]:
    """The function `(key, params, prompts) -> Generated` that writes responses to prompts.

    Prompts are tokens `[prompts, length]`, -1 where there is none; they may have different lengths. The responses to
    one prompt are neighbours: `[prompts * group_size, max_tokens]`. What a row gets does not depend on other rows.
    A prompt that is empty or does not fit gets no response.

    Args:
      decoder: the network.
      max_tokens: of a response; static.
      stops: ids that end a response (`Text.stops`).
      choose: `None` means `sampler()`: draws from the model.
      group_size: responses to each prompt.
      prompt_tokens: room for the tokens of all prompts together, so that none are computed for padding; static.
        `None` means as many as the array can hold.
    """
    checks.size("max_tokens", max_tokens)
    checks.size("group_size", group_size)
    if prompt_tokens is not None:
        checks.size("prompt_tokens", prompt_tokens)
    choose = choose or sampler()
    ends = jnp.array(sorted(stops), jnp.int32)

    def generate(key: Key[Array, ""], params: Params, prompts: Int[Array, "prompts length"]) -> Generated:
        checks.key(key)
        hidden, cache, length = _read(decoder, params, prompts, prompt_tokens or prompts.size, max_tokens)
        hidden, length = (jnp.repeat(x, group_size, axis=0) for x in (hidden, length))
        cache = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=x.ndim - 4), cache)
        keys = jax.random.split(key, len(hidden))

        def write(state: _State) -> _State:
            logits: Any = decoder.apply(params, state.hidden, method="logits")
            log_probs = jax.nn.log_softmax(logits, axis=-1)
            chosen = jax.vmap(choose)(jax.vmap(jax.random.fold_in, (0, None))(keys, state.place), log_probs)
            chosen = chosen.astype(jnp.int32)
            logps = jnp.take_along_axis(log_probs, chosen[:, None], axis=1)[:, 0]
            hidden, cache = _go_on(decoder, params, state, chosen, length, prompts.shape[1])
            return _State(
                place=state.place + 1,
                going=state.going & ~jnp.isin(chosen, ends),
                hidden=hidden,
                cache=cache,
                tokens=state.tokens.at[:, state.place].set(jnp.where(state.going, chosen, PADDING)),
                logps=state.logps.at[:, state.place].set(jnp.where(state.going, logps, 0)),
            )

        shape = (len(hidden), max_tokens)
        nothing = jnp.full(shape, PADDING, jnp.int32), jnp.zeros(shape, jnp.promote_types(hidden.dtype, jnp.float32))
        start = _State(jnp.zeros((), jnp.int32), length > 0, hidden, cache, *nothing)
        end = jax.lax.while_loop(lambda state: (state.place < max_tokens) & jnp.any(state.going), write, start)
        return Generated(end.tokens, end.logps)

    return generate


def respond_fn(
    decoder: Decoder, *, max_tokens: int, stops: Collection[int], group_size: int, choose: ChooseFn | None = None
) -> RespondFn:
    """The function `(key, params, prompts) -> Responses` that learners of `rlhf` take. See `generate_fn`."""
    generate = generate_fn(decoder, max_tokens=max_tokens, stops=stops, choose=choose, group_size=group_size)

    def respond(key: Key[Array, ""], params: Params, prompts: Int[Array, "prompts length"]) -> Responses:
        return Responses(generate(key, params, prompts).tokens.reshape(len(prompts), group_size, max_tokens))

    return respond


class _State(NamedTuple):
    """What is known when the token at `place` is to be chosen."""

    place: Int[Array, ""]
    going: Bool[Array, " n"]
    hidden: Float[Array, "n hidden"]
    cache: Any
    tokens: Int[Array, "n length"]
    logps: Float[Array, "n length"]


def _read(
    decoder: Decoder, params: Params, prompts: Int[Array, "n length"], num_tokens: int, room: int
) -> tuple[Float[Array, "n hidden"], Any, Int[Array, " n"]]:
    """Runs prompts as one stream, and keeps keys and values in rows, with room for more.

    Returns the stream at the last token of each prompt, keys and values, and lengths: 0 for a prompt that does not fit.
    """
    (num, width), columns = prompts.shape, jnp.arange(prompts.shape[1])[None]
    length = jnp.sum(prompts >= 0, axis=1)
    end = jnp.cumsum(length)
    length = jnp.where(end <= num_tokens, length, 0)
    start = end - length
    inside = columns < length[:, None]
    compact = jnp.take_along_axis(prompts, jnp.argsort(prompts < 0, axis=1, stable=True), axis=1)
    place_in_stream = jnp.where(inside, start[:, None] + columns, num_tokens)
    place_in_rows = inverse(place_in_stream, num_tokens)
    tokens = entries_at(compact, place_in_rows, 0)
    positions = entries_at(jnp.broadcast_to(columns, prompts.shape), place_in_rows, 0)
    visible = jnp.tril(jnp.ones((width, width), bool))[None] & inside[:, None]

    def attend(queries: Array, keys: Array, values: Array, _: Any) -> tuple[Array, Any]:
        q, k, v = (x.at[place_in_stream].get(mode="fill", fill_value=0) for x in (queries, keys, values))
        outputs = causal_attention(q, k, v, visible).reshape(num * width, *queries.shape[1:])
        kept = [jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))) for x in (k, v)]
        return outputs.at[place_in_rows].get(mode="fill", fill_value=0), tuple(kept)

    hidden, cache = decoder.apply(params, tokens, positions, attend)
    return hidden[jnp.maximum(start + length - 1, 0)], cache, length


def _go_on(
    decoder: Decoder, params: Params, state: _State, chosen: Int[Array, " n"], length: Int[Array, " n"], width: int
) -> tuple[Float[Array, "n hidden"], Any]:
    """Runs one token of each row, and keeps its key and value behind those of the prompts."""
    num_places = width + state.tokens.shape[1]
    places = jnp.arange(num_places)[None]
    visible = (places < length[:, None]) | ((places >= width) & (places <= width + state.place))

    def attend(queries: Array, keys: Array, values: Array, cache: Any) -> tuple[Array, Any]:
        new = zip(cache, (keys, values), strict=True)
        kept = [jax.lax.dynamic_update_slice_in_dim(old, x, width + state.place, axis=1) for old, x in new]
        return attention(queries, kept[0], kept[1], visible[:, None]), tuple(kept)

    hidden, cache = decoder.apply(params, chosen[:, None], (length + state.place)[:, None], attend, state.cache)
    return hidden[:, 0], cache
