r"""Worlds of strings: rewards with structure, judges who like length, references of a chosen length.

A reward adds up along a string: an *automaton* reads it letter by letter, and each letter is worth something that
depends on the automaton's state. One state rewards letters; a state for each previous letter rewards their order; the
states of a search for a word reward its occurrences.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dpo_jax import checks, toy
from dpo_jax.strings.space import Strings, Transitions, checked, one_state, previous_letter, states_of
from dpo_jax.strings.tree import string_log_probs
from dpo_jax.types import Numeric


def path_rewards(
    strings: Strings,
    transitions: Transitions,
    weights: Float[Array, "*n states letters"],
    final: Float[Array, "*n states"] | None = None,
) -> Float[Array, "*n responses"]:
    r"""Rewards that add up along the path of an automaton.

    .. math:: r(y) = \sum_t w(z_t, y_t) + f(z_{|y|}), \qquad z_0 = 0, \quad z_{t+1} = \delta(z_t, y_t)

    >>> import jax.numpy as jnp
    >>> strings = Strings(num_letters=2, horizon=2)
    >>> print(path_rewards(strings, one_state(strings), jnp.array([[1.0, 10.0]])))
    [ 0.  1. 10.  2. 11. 11. 20.]

    Args:
      strings: which strings there are.
      transitions: the state after each state and letter; it begins in state 0.
      weights: of each letter in each state.
      final: of the state at the end; `None` means zero.

    Raises:
      TypeError, ValueError: a state is out of range, or shapes do not match.
    """
    states = states_of(strings, transitions)
    if weights.shape[-2:] != np.shape(transitions):
        raise ValueError(f"weights must have the shape of transitions, got {weights.shape} and {np.shape(transitions)}")
    if final is not None and final.shape != weights.shape[:-1]:
        raise ValueError(f"final must have a number for each state of weights, got {final.shape} and {weights.shape}")
    at_ends = jnp.zeros(weights.shape[:-1], weights.dtype) if final is None else final
    of_letters = weights[..., states, :]
    if not strings.fixed_length:
        of_letters = jnp.concatenate([of_letters, at_ends[..., states, None]], axis=-1)
    totals = string_log_probs(of_letters, strings)
    if final is None:
        return totals
    ends = np.asarray(transitions)[states[strings.offsets[-2] :]].ravel()  # of the longest strings, which have no end
    return totals.at[..., -len(ends) :].add(final[..., ends])


def word_counts(strings: Strings, word: Sequence[int]) -> Int[np.ndarray, " responses"]:
    """How often a word, given by its letters, occurs in each string; occurrences may overlap."""
    checks.integers("word", np.asarray(word))
    checks.ids("word", np.asarray(word), strings.num_letters)
    windows = [
        np.all(strings.tokens[:, start : start + len(word)] == np.asarray(word), axis=-1)
        for start in range(strings.horizon - len(word) + 1)
    ]
    return np.asarray(np.sum([np.zeros(strings.num_responses, np.int32), *windows], axis=0))


def make_world(
    key: Key[Array, ""],
    strings: Strings,
    *,
    num_prompts: int = 2,
    embedding_dim: int = 8,
    letters: Numeric = 1.0,
    order: Numeric = 1.0,
    words: Numeric = 1.0,
    length: Numeric = 0.0,
    num_words: int = 2,
    letters_per_word: int = 3,
) -> toy.World:
    """A random world of strings, whose rewards have structure; for each prompt another one.

    A reward is a sum of terms. Those for letters, for their order (each pair of neighbours) and for words (each
    occurrence) have random weights N(0, 1), times the given sizes over the square root of the horizon. What they say
    about length by chance is removed: strings of each length have a mean reward of zero, without the term of length.

    Args:
      key: typed PRNG key.
      strings: which strings there are.
      num_prompts, embedding_dim: sizes; static.
      letters, order, words: sizes of the terms, zero or positive.
      length: reward of a string of full length minus that of the empty one, or of any other length in proportion.
      num_words, letters_per_word: how many words are rewarded for each prompt, and their number of letters; static.

    Returns:
      A world like those of one token: `World(embeddings, rewards)`, with a column for each string.
    """
    checks.key(key)
    for name, size in {"letters": letters, "order": order, "words": words}.items():
        checks.interval(name, size, "[0, inf)")
    for name, num in {"num_prompts": num_prompts, "embedding_dim": embedding_dim, "num_words": num_words}.items():
        checks.size(name, num)
    checks.size("letters_per_word", letters_per_word)
    checks.finite("length", length)
    embedding_key, letter_key, order_key, word_key, weight_key = jax.random.split(key, 5)
    shape = (num_prompts, strings.num_letters)
    drawn = letters * path_rewards(
        strings, one_state(strings), jax.random.normal(letter_key, (num_prompts, 1, strings.num_letters))
    )
    pairs = jax.random.normal(order_key, (num_prompts, 1 + strings.num_letters, strings.num_letters))
    drawn += order * path_rewards(strings, previous_letter(strings), pairs.at[:, 0].set(0))
    if letters_per_word <= strings.horizon:
        chosen = jax.random.randint(word_key, (num_prompts, num_words, letters_per_word), 0, shape[1])
        weights = jax.random.normal(weight_key, (num_prompts, num_words))
        drawn += words * jnp.sum(weights[..., None] * jax.vmap(jax.vmap(lambda w: _counts(strings, w)))(chosen), axis=1)
    rewards = _centred_by_length(drawn, strings) / jnp.sqrt(strings.horizon)
    return toy.World(
        embeddings=jax.random.normal(embedding_key, (num_prompts, embedding_dim)),
        rewards=rewards + _in_proportion_to_length(length, strings),
    )


def judged(world: toy.World, strings: Strings, *, liking: Numeric) -> toy.World:
    """The world as judges see it who like length, or dislike it.

    Their comparisons, labels and rankings are those of this world: `toy.sample_preferences(key, judged(...), ...)`.

    Args:
      world: the truth.
      strings: which strings there are.
      liking: what they add to the reward of a string of full length, or of any other length in proportion.
    """
    checked(strings, **{"world.rewards": world.rewards})
    checks.finite("liking", liking)
    return world._replace(rewards=world.rewards + _in_proportion_to_length(liking, strings))


def reference_log_probs(
    strings: Strings, *, expected_length: Numeric, letter_logits: Float[Array, "*n letters"] | None = None
) -> Float[Array, "*n responses"]:
    """The table of a policy that draws each letter on its own, and stops after each with the same probability.

    Args:
      strings: which strings there are; with an end token.
      expected_length: the expected number of letters; above 0, below the horizon.
      letter_logits: preferences for letters, up to a constant; `None` means none.

    Raises:
      ValueError: strings have a fixed length, or the expected length is out of range. Where it is traced its value is
        unknown; there, all log-probabilities are NaN.
    """
    if strings.fixed_length:
        raise ValueError("strings of a fixed length have no expected length to choose")
    checks.interval("expected_length", expected_length, f"(0, {strings.horizon})")
    logits = jnp.zeros(strings.num_letters) if letter_logits is None else letter_logits
    going_on = _probability_of_going_on(jnp.asarray(expected_length, logits.dtype), strings.horizon)
    letters = jax.nn.log_softmax(logits) + jnp.log(going_on)
    stop = jnp.broadcast_to(jnp.log1p(-going_on), (*letters.shape[:-1], 1))
    choices = jnp.concatenate([letters, stop], axis=-1)
    every = jnp.broadcast_to(choices[..., None, :], (*choices.shape[:-1], strings.num_prefixes, strings.num_choices))
    return string_log_probs(every, strings)


def _probability_of_going_on(expected_length: Float[Array, ""], horizon: int) -> Float[Array, ""]:
    """Solves `sum(p**k for k in 1 .. horizon) = expected_length` by bisection; NaN if there is no solution."""
    powers = jnp.arange(1, horizon + 1)

    def halve(_: Int[Array, ""], ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        short = jnp.sum(middle**powers) < expected_length
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    zero = jnp.zeros_like(expected_length)
    low, high = jax.lax.fori_loop(0, 50, halve, (zero, zero + 1))
    return jnp.where((expected_length > 0) & (expected_length < horizon), (low + high) / 2, jnp.nan)


def _counts(strings: Strings, word: Int[Array, " letters"]) -> Int[Array, " responses"]:
    """`word_counts` of a traced word."""
    starts = range(strings.horizon - len(word) + 1)
    matches = [jnp.all(strings.tokens[:, start : start + len(word)] == word[None], axis=-1) for start in starts]
    return jnp.sum(jnp.stack(matches), axis=0)


def _in_proportion_to_length(size: Numeric, strings: Strings) -> Float[Array, "1 responses"]:
    """The given size for strings of full length, zero for the empty one."""
    return size * jnp.asarray(strings.lengths / strings.horizon)[None]


def _centred_by_length(rewards: Float[Array, "*n responses"], strings: Strings) -> Float[Array, "*n responses"]:
    """Rewards minus their mean over the strings of the same length."""
    members = np.eye(strings.horizon + 1, dtype=rewards.dtype)[strings.lengths]
    means = jnp.matmul(rewards, members / np.maximum(members.sum(axis=0), 1), precision="highest")
    return rewards - means[..., strings.lengths]
