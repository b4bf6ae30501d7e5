"""Log-probabilities of responses under a decoder, as objectives take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dpo_jax.lm.model import Decoder, causal_attention
from dpo_jax.lm.sharding import spread
from dpo_jax.lm.stream import Capacity, Stream, into_rows, into_stream, make_stream
from dpo_jax.types import LogProbFn, Params, TokenLogProbFn, TokenLogps

MOST_LOGITS = 2**26
"""How many logits are in memory at once, unless told otherwise: 256 MiB in float32."""


def log_prob_fn(
    decoder: Decoder,
    *,
    capacity: Capacity | None = None,
    mean: bool = False,
    scored_at_once: int | None = None,
    mesh: Mesh | None = None,
) -> LogProbFn:
    """The function `(params, prompts, responses) -> log-probabilities` (nats) that objectives take.

    `prompts` are tokens `[n, P]`, `responses` tokens `[n, R]` or any pytree of such arrays (a `Pair`, a ranking), -1
    where there is no token. A prompt is computed once for all responses of its row. A row that does not fit the
    capacity, has no prompt, or has ids out of range has log-probabilities of NaN.

    Args:
      decoder: the network.
      capacity: sizes of the compiled program (`capacity_of`); `None` means as much as the arrays can hold.
      mean: divide by the number of tokens, as SimPO, ORPO and others want it. No loss can detect the wrong choice.
      scored_at_once: how many tokens of responses meet the vocabulary at once; `None` means at most `MOST_LOGITS`
        logits. More of them are computed in parts, and again for the gradient.
      mesh: of devices between which tokens are divided, if the capacity's numbers are multiples of its size.
    """

    def log_prob(params: Params, prompts: Array, responses: Any) -> Any:
        leaves, structure = jax.tree.flatten(responses)
        found = _scores(decoder, params, prompts, leaves, capacity, scored_at_once, mesh)
        return jax.tree.unflatten(structure, [_total(logps, mean) for logps in found])

    return log_prob


def token_log_prob_fn(
    decoder: Decoder, *, capacity: Capacity | None = None, scored_at_once: int | None = None
) -> TokenLogProbFn:
    """The function `(params, prompts, responses) -> TokenLogps` of one array of responses. See `log_prob_fn`."""

    def score(params: Params, prompts: Int[Array, "n _"], responses: Int[Array, "n _"]) -> TokenLogps:
        return _scores(decoder, params, prompts, [responses], capacity, scored_at_once)[0]

    return score


def kl_fn(
    decoder: Decoder, *, capacity: Capacity | None = None, scored_at_once: int | None = None
) -> Callable[[Params, Params, Array, Array], Float[Array, " n"]]:
    """The function `(params, reference_params, prompts, responses) -> KL` (nats) along given responses.

    At each token of a response it sums over the whole vocabulary, and adds up over tokens. For responses that were
    drawn from the policy this estimates the KL of whole responses, with less noise than their log-ratios.
    """

    def kl(params: Params, reference_params: Params, prompts: Array, responses: Array) -> Float[Array, " n"]:
        stream = make_stream(prompts, [responses], capacity, decoder.config.vocab_size)
        both = [(own, hidden_of(decoder, own, stream)[stream.predictors]) for own in (params, reference_params)]

        def of_tokens(*hidden: Array) -> Array:
            found: Any = [decoder.apply(own, x, method="logits") for (own, _), x in zip(both, hidden, strict=True)]
            log_probs, reference = (jax.nn.log_softmax(logits) for logits in found)
            return jnp.sum(jnp.exp(log_probs) * (log_probs - reference), axis=-1)

        at_once = scored_at_once or _usual_number(decoder)
        values = _in_parts(of_tokens, tuple(hidden for _, hidden in both), at_once)
        return jnp.sum(_by_entry(values, stream), axis=1)

    return kl


def hidden_of(decoder: Decoder, params: Params, stream: Stream) -> Float[Array, "tokens hidden"]:
    """Runs the decoder on a stream."""

    def attend(queries: Array, keys: Array, values: Array, cache: Any) -> tuple[Array, Any]:
        groups = zip(*(into_rows(x, stream) for x in (queries, keys, values)), stream.visible, strict=True)
        return into_stream([causal_attention(*group) for group in groups], stream), cache

    return decoder.apply(params, stream.tokens, stream.positions, attend)[0]


def target_logps(
    decoder: Decoder,
    params: Params,
    hidden: Float[Array, "scored hidden"],
    targets: Int[Array, " scored"],
    *,
    at_once: int | None = None,
) -> Float[Array, " scored"]:
    """Log-probabilities of tokens, each given the stream at the token before it."""

    def some(hidden: Array, targets: Array) -> Array:
        logits: Any = decoder.apply(params, hidden, method="logits")
        is_target = jnp.arange(logits.shape[-1])[None] == targets[:, None]
        return jnp.sum(jnp.where(is_target, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    return _in_parts(some, (hidden, targets), at_once or _usual_number(decoder))


def _usual_number(decoder: Decoder) -> int:
    """How many tokens meet the vocabulary at once."""
    return max(1, MOST_LOGITS // decoder.config.vocab_size)


def _in_parts(function: Callable[..., Array], rows: tuple[Array, ...], at_once: int) -> Array:
    """Maps over rows, so many at once, and computes them again for the gradient if they are more."""
    num = len(rows[0])
    if num <= at_once:
        return function(*rows)
    parts = -(-num // at_once)
    size = -(-num // parts)
    padded = [jnp.pad(x, [(0, parts * size - num)] + [(0, 0)] * (x.ndim - 1)) for x in rows]
    split = tuple(x.reshape(parts, size, *x.shape[1:]) for x in padded)
    return jax.lax.map(jax.checkpoint(lambda part: function(*part)), split).ravel()[:num]


def _by_entry(values: Float[Array, " scored"], stream: Stream) -> Float[Array, "n entries"]:
    """Values of tokens in the place of these; 0 where there is none, NaN in rows that do not fit."""
    found = values.at[stream.found].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(stream.fits[:, None], jnp.where(stream.present, found, 0), jnp.nan)


def _scores(
    decoder: Decoder,
    params: Params,
    prompts: Int[Array, "n _"],
    responses: list[Int[Array, "n _"]],
    capacity: Capacity | None,
    at_once: int | None,
    mesh: Mesh | None = None,
) -> list[TokenLogps]:
    """Log-probabilities of the tokens of all responses."""
    for name, tokens in [("prompts", prompts), *((f"responses {i}", leaf) for i, leaf in enumerate(responses))]:
        if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.asarray(tokens).dtype, jnp.integer):
            raise TypeError(f"{name} must be an array of tokens [n, length], got {jnp.shape(tokens)}")
        if len(tokens) != len(prompts):
            raise ValueError(f"{name} must have as many rows as prompts, {len(prompts)}, got {len(tokens)}")
    stream = spread(make_stream(prompts, responses, capacity, decoder.config.vocab_size), mesh)
    hidden = hidden_of(decoder, params, stream)[stream.predictors]
    logps = target_logps(decoder, params, hidden, stream.targets, at_once=at_once)
    values = _by_entry(logps, stream)
    ends = np.cumsum([leaf.shape[1] for leaf in responses])[:-1]
    parts = zip(jnp.split(values, ends, axis=1), jnp.split(stream.present, ends, axis=1), strict=True)
    return [TokenLogps(*part) for part in parts]


def _total(logps: TokenLogps, mean: bool) -> Float[Array, " n"]:
    total = jnp.sum(logps.values, axis=1)
    return total / jnp.maximum(jnp.sum(logps.mask, axis=1), 1) if mean else total
