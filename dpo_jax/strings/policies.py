"""Policies that read a string token by token, and the functions that learners need of them.

Each policy is a Flax module with two ways in:

- `policy(embeddings)`: the table of log-probabilities of all strings, `[prompts, responses]`, as a policy of the
  one-token world has it. So `toy.table_fn`, `toy.log_prob_fn`, `toy.respond_fn` and `toy.enumerate_fn` work with it.
- `policy.outputs(embeddings, prompts, tokens)`: logits of the next token at each place of given strings, from the
  tokens before it alone; `[horizon, choices, n]`. The strings stand last: when runs are stacked, they fill the vectors
  of the processor, and a few choices would not.

The first costs as much as there are prefixes, the second as much as the strings have tokens: few strings at a time are
scored on their own paths (`log_prob_fn`), and a table is made where a policy is evaluated. `CausalMLP` never
does more than both: at the first places, where a batch has more strings than there are prefixes, it runs once for each
prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from dpo_jax import checks
from dpo_jax.fast.layers import DenseByRows, dense, uniform_fan_in
from dpo_jax.fast.rows import take
from dpo_jax.strings.space import PADDING, Strings, path_of, previous_letter, states_of
from dpo_jax.strings.tree import string_log_probs
from dpo_jax.toy.policy import at_least_float32
from dpo_jax.types import LogProbFn, Params, RespondFn, Responses, TokenLogProbFn, TokenLogps, TokenValueFn


class CausalMLP(nn.Module):
    r"""`toy.ToyLM`, which also reads the tokens so far: a neural autoregressive estimator.

    .. math:: h_t = \mathrm{relu} \Big( W x + b + \sum_{s < t} U_s[y_s] \Big), \qquad z_t = V h_t + c

    Of causal networks it is the one with the least work: a token adds one row to the hidden layer, so strings that
    share a prefix share all work on it, and the whole tree costs one layer for each prefix. With enough hidden units it
    can be any policy. At a horizon of 1 it is `ToyLM`. Source: Larochelle and Murray 2011, "The Neural Autoregressive
    Distribution Estimator", with weights of the output that are shared by all places, and a prompt.

    Attributes:
      strings: which strings there are.
      hidden_dim: width of the hidden layer.
      num_outputs: outputs after each prefix; `None` means a logit for each token. With 1 it is a value function
        (`token_value_fn`), and has no table: called, it gives its outputs.
    """

    strings: Strings
    hidden_dim: int = 32
    num_outputs: int | None = None

    def __call__(self, embeddings: Float[Array, "prompts features"]) -> Float[Array, "prompts ..."]:
        outputs = self.outputs(embeddings)
        return outputs if self.num_outputs else string_log_probs(jax.nn.log_softmax(outputs), self.strings)

    @nn.compact
    def outputs(
        self,
        embeddings: Float[Array, "prompts features"],
        prompts: Int[Array, " n"] | None = None,
        tokens: Int[Array, "n horizon"] | None = None,
    ) -> Float[Array, "..."]:
        """Outputs at each place of given strings, or, without strings, after every prefix of every prompt."""
        hidden = dense(self.hidden_dim, embeddings)(embeddings)
        shape = (self.strings.horizon - 1, self.strings.num_letters, self.hidden_dim)
        letters = self.param("letters", _as_one_layer, shape, embeddings.dtype)
        last = DenseByRows(self.num_outputs or self.strings.num_choices, name="Dense_1")
        if tokens is None or prompts is None:
            return last(nn.relu(_after_every_prefix(hidden, letters)))
        num = _places_to_share(self.strings, len(embeddings), len(prompts))
        places = [last.of_columns(nn.relu(sums)) for sums in _along(hidden, letters, prompts, tokens, first=num)]
        if num == 0:
            return jnp.stack(places)
        shared = last(nn.relu(_after_every_prefix(hidden, letters[: num - 1])))
        found = _by_prefix(shared, prompts, path_of(self.strings, tokens)[:, :num])
        return jnp.concatenate([found, jnp.stack(places)]) if places else found


class PrefixTable(nn.Module):
    """One logit for each prompt, prefix and next token: can be any policy. It starts with uniform next tokens.

    Attributes:
      strings: which strings there are.
      num_outputs: see `CausalMLP`.
    """

    strings: Strings
    num_outputs: int | None = None

    def __call__(self, embeddings: Float[Array, "prompts features"]) -> Float[Array, "prompts ..."]:
        outputs = self.outputs(embeddings)
        return outputs if self.num_outputs else string_log_probs(jax.nn.log_softmax(outputs), self.strings)

    @nn.compact
    def outputs(
        self,
        embeddings: Float[Array, "prompts features"],
        prompts: Int[Array, " n"] | None = None,
        tokens: Int[Array, "n horizon"] | None = None,
    ) -> Float[Array, "..."]:
        """See `CausalMLP.outputs`."""
        states = np.arange(self.strings.num_prefixes)
        shape = (len(embeddings), len(states), self.num_outputs or self.strings.num_choices)
        logits = self.param("logits", nn.initializers.zeros, shape, embeddings.dtype)
        return _by_state(self.strings, states, logits, prompts, tokens)


class Markov(nn.Module):
    """One logit for each prompt, previous letter and next token: most policies are out of its reach.

    Attributes:
      strings: which strings there are.
    """

    strings: Strings

    def __call__(self, embeddings: Float[Array, "prompts features"]) -> Float[Array, "prompts responses"]:
        return string_log_probs(jax.nn.log_softmax(self.outputs(embeddings)), self.strings)

    @nn.compact
    def outputs(
        self,
        embeddings: Float[Array, "prompts features"],
        prompts: Int[Array, " n"] | None = None,
        tokens: Int[Array, "n horizon"] | None = None,
    ) -> Float[Array, "..."]:
        """See `CausalMLP.outputs`."""
        states = states_of(self.strings, previous_letter(self.strings))
        shape = (len(embeddings), 1 + self.strings.num_letters, self.strings.num_choices)
        logits = self.param("logits", nn.initializers.zeros, shape, embeddings.dtype)
        return _by_state(self.strings, states, logits, prompts, tokens)


def log_prob_fn(policy: nn.Module, embeddings: Float[Array, "prompts features"], *, mean: bool = False) -> LogProbFn:
    """The function `(params, prompts, responses) -> log-probabilities` (nats) that objectives take.

    Strings are scored on their own paths, whose number of tokens is the work, or less where they share prefixes
    (`CausalMLP`). `toy.log_prob_fn` makes the whole table instead.

    Args:
      policy: a policy of this module, or any other with the same two ways in.
      embeddings: its input for each prompt.
      mean: divide by the number of tokens, as SimPO, ORPO and others want it. No loss can detect the wrong choice.

    Raises:
      TypeError, ValueError: ids are not integers, out of range, or of another shape than the prompts. Where they are
        traced their values are unknown; there, such a string has a log-probability of NaN.
    """
    score, num_responses = token_log_prob_fn(policy, embeddings), cast(Any, policy).strings.num_responses

    def log_prob(params: Params, prompts: Array, responses: Any) -> Any:
        for path, leaf in jax.tree_util.tree_leaves_with_path(responses):
            name = f"responses{jax.tree_util.keystr(path)}"
            checks.ids(name, leaf, num_responses)
            checks.same_shape(**{"prompts": prompts, name: leaf})
        leaves, structure = jax.tree.flatten(responses)
        every = jnp.tile(jnp.ravel(prompts), len(leaves))
        token_logps, mask = score(params, every, jnp.concatenate([leaf.ravel() for leaf in leaves]))
        logps = jnp.sum(token_logps, axis=-1)
        if mean:
            logps /= jnp.maximum(jnp.sum(mask, axis=-1), 1)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = zip(jnp.split(logps, ends), leaves, strict=True)
        return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in parts])

    return log_prob


def token_log_prob_fn(policy: nn.Module, embeddings: Float[Array, "prompts features"]) -> TokenLogProbFn:
    """The function `(params, prompts, responses) -> TokenLogps` of one array of ids: log-probabilities of each token.

    Raises:
      TypeError, ValueError: ids are not integers, or out of range. Where they are traced their values are unknown;
        there, the first token of such a string has a log-probability of NaN.
    """
    strings = cast(Any, policy).strings

    def score(params: Params, prompts: Int[Array, "*n"], responses: Int[Array, "*n"]) -> TokenLogps:
        tokens, mask, known = _tokens_of(strings, len(embeddings), prompts, responses)
        shape = jnp.shape(responses)
        rows = jnp.where(known, prompts, 0).ravel()
        logits = policy.apply(params, embeddings, rows, tokens.reshape(-1, strings.horizon), method="outputs")
        log_probs = jax.nn.log_softmax(cast(Array, logits), axis=1)
        chosen = tokens.reshape(-1, strings.horizon).T[:, None] == jnp.arange(strings.num_choices)[None, :, None]
        values = jnp.sum(jnp.where(chosen, log_probs, 0), axis=1)  # padding is no token
        return TokenLogps(jnp.where(known[..., None], values.T.reshape(*shape, -1), jnp.nan), mask)

    return score


def token_value_fn(network: nn.Module, embeddings: Float[Array, "prompts features"]) -> TokenValueFn:
    """The function `(params, prompts, responses) -> values` `[*n, horizon]` of a network with one output.

    A value belongs to the prefix before the token of its place; those behind the end of a string are meaningless.
    """
    strings = cast(Any, network).strings

    def value(params: Params, prompts: Int[Array, "*n"], responses: Int[Array, "*n"]) -> Array:
        tokens, _, known = _tokens_of(strings, len(embeddings), prompts, responses)
        rows = jnp.where(known, prompts, 0).ravel()
        found = network.apply(params, embeddings, rows, tokens.reshape(-1, strings.horizon), method="outputs")
        return jnp.where(known[..., None], cast(Array, found)[:, 0].T.reshape(tokens.shape), jnp.nan)

    return value


def sample_fn(policy: nn.Module, embeddings: Float[Array, "prompts features"]) -> Callable[..., Int[Array, "..."]]:
    """The function `(key, params, prompts) -> tokens` `[n, horizon]` that samples strings token by token.

    Behind the end of a string is `PADDING`; `Strings.ids` makes ids of the tokens. A prompt out of range gets padding
    alone, and a string stops without an end where a log-probability is NaN; neither is a string.
    """

    def draw(key: Key[Array, ""], log_probs: Float[Array, "n choices"]) -> Int[Array, " n"]:
        return jax.random.categorical(key, log_probs)

    write = _write_fn(policy, embeddings, draw)
    horizon = cast(Any, policy).strings.horizon

    def sample(key: Key[Array, ""], params: Params, prompts: Int[Array, " n"]) -> Int[Array, "n horizon"]:
        checks.key(key)
        return write(jax.random.split(key, horizon), params, prompts)

    return sample


def greedy_fn(policy: nn.Module, embeddings: Float[Array, "prompts features"]) -> Callable[..., Int[Array, "..."]]:
    """The function `(params, prompts) -> tokens` `[n, horizon]` that takes the most probable token each time.

    The string is not always the most probable one, which `toy.greedy` finds.
    """
    write = _write_fn(policy, embeddings, lambda _, log_probs: jnp.argmax(log_probs, axis=-1))
    horizon = cast(Any, policy).strings.horizon
    return lambda params, prompts: write([None] * horizon, params, prompts)


def respond_fn(policy: nn.Module, embeddings: Float[Array, "prompts features"], *, group_size: int) -> RespondFn:
    """The function `(key, params, prompts) -> Responses` that samples groups token by token, without a table.

    `toy.respond_fn` samples from the table, and can mix in a reference.
    """
    checks.size("group_size", group_size)
    sample, strings = sample_fn(policy, embeddings), cast(Any, policy).strings

    def respond(key: Key[Array, ""], params: Params, prompts: Int[Array, " n"]) -> Responses:
        tokens = sample(key, params, jnp.repeat(prompts, group_size))
        return Responses(strings.ids(tokens).reshape(*prompts.shape, group_size))

    return respond


def outputs_by_paths(
    policy: nn.Module, params: Params, embeddings: Float[Array, "prompts features"]
) -> Float[Array, "prompts prefixes outputs"]:
    """Outputs after every prefix, by running a causal policy on all strings: for networks that only know paths."""
    strings = cast(Any, policy).strings
    first = np.zeros((strings.num_prefixes, 2), int)  # a string and a place where each prefix is followed by a token
    for place in range(strings.horizon)[::-1]:
        inside = strings.mask[:, place]
        first[strings.prefixes[inside, place]] = np.stack([np.flatnonzero(inside), np.full(inside.sum(), place)], -1)

    def of_prompt(prompt: Int[Array, ""]) -> Array:
        rows = jnp.full(strings.num_responses, prompt)
        return cast(Array, policy.apply(params, embeddings, rows, jnp.asarray(strings.tokens), method="outputs"))

    return jax.lax.map(of_prompt, jnp.arange(len(embeddings)))[:, first[:, 1], :, first[:, 0]].swapaxes(0, 1)


def _write_fn(
    policy: nn.Module,
    embeddings: Float[Array, "prompts features"],
    choose: Callable[[Any, Float[Array, "n choices"]], Int[Array, " n"]],
) -> Callable[[Any, Params, Array], Int[Array, "n horizon"]]:
    """The function `(keys, params, prompts) -> tokens`, which chooses each token given those before it."""
    strings = cast(Any, policy).strings

    def write(keys: Any, params: Params, prompts: Int[Array, " n"]) -> Int[Array, "n horizon"]:
        checks.ids("prompts", prompts, len(embeddings))
        known = (prompts >= 0) & (prompts < len(embeddings))
        tokens, going_on = jnp.full((len(prompts), strings.horizon), PADDING, jnp.int32), known
        for place in range(strings.horizon):
            logits = policy.apply(params, embeddings, jnp.where(known, prompts, 0), tokens, method="outputs")
            log_probs = jax.nn.log_softmax(at_least_float32(cast(Array, logits)[place].T))
            going_on &= ~jnp.any(jnp.isnan(log_probs), axis=-1)
            chosen = choose(keys[place], log_probs)
            tokens = tokens.at[:, place].set(jnp.where(going_on, chosen, PADDING))
            going_on &= chosen < strings.num_letters
        return tokens

    return write


def _tokens_of(
    strings: Strings, num_prompts: int, prompts: Int[Array, "*n"], responses: Int[Array, "*n"]
) -> tuple[Int[Array, "*n horizon"], Bool[Array, "*n horizon"], Bool[Array, "*n"]]:
    """The tokens of strings, which of them count, and whether prompt and response are in range."""
    checks.ids("prompts", prompts, num_prompts)
    checks.ids("responses", responses, strings.num_responses)
    checks.same_shape(prompts=prompts, responses=responses)
    known = (prompts >= 0) & (prompts < num_prompts) & (responses >= 0) & (responses < strings.num_responses)
    tokens = take(jnp.asarray(strings.tokens), jnp.where(known, responses, 0))
    return tokens, tokens >= 0, known


def _as_one_layer(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    """Initialises the letters of all places as the weights of one dense layer."""
    places, letters, features = shape
    return uniform_fan_in(key, (max(1, places * letters), features), dtype)[: places * letters].reshape(shape)


def _after_every_prefix(
    hidden: Float[Array, "prompts hidden"], letters: Float[Array, "places letters hidden"]
) -> Float[Array, "prompts prefixes hidden"]:
    """Sums along the tree: each prefix adds the row of its last letter to the sum of its parent."""
    levels = [hidden[:, None]]
    for rows in letters:
        children = levels[-1][:, :, None] + rows[None, None]
        levels.append(children.reshape(len(hidden), -1, hidden.shape[-1]))
    return jnp.concatenate(levels, axis=1)


def _places_to_share(strings: Strings, num_prompts: int, num: int) -> int:
    """At how many places, from the first, there are no more prefixes than given strings: there, each runs once."""
    return sum(num_prompts * strings.num_letters**place <= num for place in range(strings.horizon))


def _along(
    hidden: Float[Array, "prompts hidden"],
    letters: Float[Array, "places letters hidden"],
    prompts: Int[Array, " n"],
    tokens: Int[Array, "n horizon"],
    *,
    first: int,
) -> list[Float[Array, "hidden n"]]:
    """Sums along given strings, a column for each, at each place from the first on; end and padding add nothing.

    Rows are found by a product, since there are few of them.
    """
    if first > len(letters):
        return []
    before = [_one_hot(token, letters.shape[1], letters.dtype) for token in tokens.T[: len(letters)]]
    which = jnp.concatenate([_one_hot(prompts, len(hidden), letters.dtype), *before[:first]])
    sums = [jnp.matmul(jnp.concatenate([hidden, *letters[:first]]).T, which, precision="highest")]
    for rows, which in zip(letters[first:], before[first:], strict=True):
        sums.append(sums[-1] + jnp.matmul(rows.T, which, precision="highest"))
    return sums


def _one_hot(index: Int[Array, " n"], num: int, dtype: Any) -> Float[Array, "num n"]:
    """A column for each index, zero where it is out of range."""
    return jax.nn.one_hot(index, num, dtype=dtype, axis=0)


def _by_state(
    strings: Strings,
    states: Int[np.ndarray, " prefixes"],
    logits: Float[Array, "prompts states outputs"],
    prompts: Int[Array, " n"] | None,
    tokens: Int[Array, "n horizon"] | None,
) -> Float[Array, "..."]:
    """Outputs that depend on the prompt and on the state that a prefix leads to."""
    if tokens is None or prompts is None:
        return logits[:, states]
    return _by_prefix(logits, prompts, jnp.asarray(states)[path_of(strings, tokens)])


def _by_prefix(
    outputs: Float[Array, "prompts prefixes outputs"], prompts: Int[Array, " n"], prefixes: Int[Array, "n places"]
) -> Float[Array, "places outputs n"]:
    """Outputs looked up at each place of given strings."""
    found = take(outputs.reshape(-1, outputs.shape[-1]), outputs.shape[1] * prompts[:, None] + prefixes)
    return jnp.moveaxis(found, 0, -1)
