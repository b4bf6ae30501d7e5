"""The one-token world: prompts, responses, true rewards, and the people who demonstrate and compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from dpo_jax import checks
from dpo_jax.fast.compiling import as_one
from dpo_jax.toy.policy import at_least_float32, generate, invert_cumulative, lookup
from dpo_jax.types import Demonstrations, Numeric, Pair, Preferences

Ids: TypeAlias = Sequence[int] | ArrayLike
"""Integers that count from 0: a list, a NumPy array or a JAX array."""

Weights: TypeAlias = Sequence[float] | ArrayLike | None
"""Numbers, zero or positive, relative to 1; or `None` for all equal."""

LARGEST_WEIGHT_RATIO = 1e30
"""By how much a weight may differ from others: float32 ends at 1e-38, and means of weights have to be above that."""


class World(NamedTuple):
    """A contextual bandit whose rewards are known.

    Attributes:
      embeddings: a policy's input for each prompt.
      rewards: the true reward of each response to each prompt, any finite numbers; `sample_demonstrations` uses them as
        unnormalised probabilities, so they must not be negative there.
    """

    embeddings: Float[Array, "prompts features"]
    rewards: Float[Array, "prompts responses"]

    @property
    def num_prompts(self) -> int:
        return self.rewards.shape[0]

    @property
    def num_responses(self) -> int:
        return self.rewards.shape[1]


def make_world(
    key: Key[Array, ""],
    *,
    num_prompts: int = 5,
    num_responses: int = 10,
    embedding_dim: int = 8,
    sharpness: Numeric = 2.0,
) -> World:
    """A random world: embeddings N(0, 1), and for each prompt rewards `softmax(sharpness * N(0, 1))` that sum to 1.

    Args:
      key: typed PRNG key.
      num_prompts, num_responses, embedding_dim: sizes; static.
      sharpness: how unequal the rewards are; 0 makes all responses equally good.

    Raises:
      TypeError, ValueError: a size is not a whole number or too small, or sharpness is negative.
    """
    checks.key(key)
    checks.size("num_prompts", num_prompts)
    checks.size("num_responses", num_responses, at_least=2)
    checks.size("embedding_dim", embedding_dim)
    checks.interval("sharpness", sharpness, "[0, inf)")
    embedding_key, reward_key = jax.random.split(key)
    return World(
        embeddings=jax.random.normal(embedding_key, (num_prompts, embedding_dim)),
        rewards=jax.nn.softmax(sharpness * jax.random.normal(reward_key, (num_prompts, num_responses))),
    )


def demonstrations(world: World, prompts: Ids, responses: Ids, weights: Weights = None) -> Demonstrations:
    """Demonstrations from given ids, validated: of equal length, not empty, integers, in the range of the world.

    Args:
      world: the ids count its prompts and responses.
      prompts: ids of the prompts.
      responses: ids of the responses.
      weights: how much each demonstration counts, zero or positive; `None` means equally.

    Raises:
      TypeError, ValueError: naming the argument, the value and the row.
    """
    prompts, responses = _checked_ids(world, prompts=prompts, responses=responses)
    return Demonstrations(prompts, responses, _checked_weights(prompts, weights))


def preferences(world: World, prompts: Ids, chosen: Ids, rejected: Ids, weights: Weights = None) -> Preferences:
    """Comparisons from given ids, validated like `demonstrations`; chosen and rejected must also differ.

    Args:
      world: the ids count its prompts and responses.
      prompts: ids of the prompts.
      chosen: ids of the preferred responses.
      rejected: ids of the others.
      weights: how much each comparison counts, zero or positive; `None` means equally.

    Raises:
      TypeError, ValueError: naming the argument, the value and the row.
    """
    prompts, chosen, rejected = _checked_ids(world, prompts=prompts, chosen=chosen, rejected=rejected)
    checks.distinct("preferences", chosen, rejected)
    return Preferences(prompts, Pair(chosen, rejected), _checked_weights(prompts, weights))


def sample_demonstrations(
    key: Key[Array, ""], world: World, *, num: int, log_probs: Float[Array, "prompts responses"] | None = None
) -> Demonstrations:
    """Demonstrations for uniform prompts.

    Args:
      key: typed PRNG key.
      world: its rewards are the (unnormalised) probabilities of responses, unless a table is given.
      num: how many; static.
      log_probs: table of the policy that demonstrates (nats); `None` samples each response with a probability
        proportional to its reward.

    Raises:
      TypeError, ValueError: the key is not a key, or a prompt has negative or no positive rewards or probabilities
        (checked unless they are traced).
    """
    checks.key(key)
    checks.size("num", num)
    _check_world(world)
    if log_probs is None:
        checks.choices("world.rewards", world.rewards)
        log_probs = jnp.log(at_least_float32(world.rewards))
    checks.same_shape(log_probs=log_probs, rewards=world.rewards)
    prompt_key, response_key = jax.random.split(key)
    prompts = jax.random.randint(prompt_key, (num,), 0, world.num_prompts)
    return Demonstrations(prompts, generate(response_key, log_probs, prompts))


def preference_probability(
    reward: Float[Array, "*#n"],
    other_reward: Float[Array, "*#n"],
    *,
    temperature: Numeric = 1.0,
    flip_probability: Numeric = 0.0,
) -> Float[Array, "*#n"]:
    r"""The probability that people prefer a response to another one, under the Bradley-Terry model.

    .. math:: (1 - f)\, \sigma(\Delta / T) + f\, \sigma(-\Delta / T), \qquad \Delta = r - r'

    Args:
      reward: the response's true reward.
      other_reward: that of the response it is compared with.
      temperature: :math:`T`, noise of the comparisons: 1 is Bradley-Terry, 0 always prefers the better response (ties
        are random), and large values make preferences random.
      flip_probability: :math:`f`, the probability that a label is flipped afterwards.

    Source: Bradley and Terry 1952; Rafailov et al. 2023, arXiv 2305.18290, Eq. 1.

    Raises:
      ValueError: temperature is negative, or the flip probability is not a probability (checked unless traced).
    """
    checks.interval("temperature", temperature, "[0, inf)")
    checks.interval("flip_probability", flip_probability, "[0, 1]")
    return _preferred(reward, other_reward, temperature, flip_probability)


@as_one
def _preferred(
    reward: Float[Array, "*#n"], other_reward: Float[Array, "*#n"], temperature: Numeric, flip_probability: Numeric
) -> Float[Array, "*#n"]:
    both_infinite = (reward == other_reward) & jnp.isinf(reward)
    difference = jnp.where(both_infinite, 0, reward) - jnp.where(both_infinite, 0, other_reward)
    rational = jnp.asarray(temperature) == 0
    preferred = jnp.where(
        rational,
        jnp.heaviside(difference, 0.5),
        jax.nn.sigmoid(difference / jnp.where(rational, 1.0, temperature)),
    )
    return preferred + flip_probability * (1 - 2 * preferred)


def sample_preferences(
    key: Key[Array, ""],
    world: World,
    *,
    num: int,
    log_probs: Float[Array, "prompts responses"] | None = None,
    temperature: Numeric = 1.0,
    flip_probability: Numeric = 0.0,
) -> Preferences:
    """Human comparisons of two distinct responses to uniform prompts.

    Args:
      key: typed PRNG key.
      world: whose rewards people compare by.
      num: how many comparisons; static.
      log_probs: table of the policy that proposes the responses (`sample_policy_pairs`); `None` proposes uniformly.
      temperature: noise of the comparisons: 1 is Bradley-Terry, 0 is noiseless.
      flip_probability: the probability that a label is flipped afterwards.

    Raises:
      TypeError, ValueError: an argument is not as described.
    """
    checks.key(key)
    _check_world(world)
    pair_key, label_key = jax.random.split(key)
    if log_probs is None:
        prompts, pair = sample_uniform_pairs(pair_key, world, num=num)
    else:
        checks.same_shape(log_probs=log_probs, rewards=world.rewards)
        prompts, pair = sample_policy_pairs(pair_key, log_probs, num=num)
    return label_pairs(label_key, world, prompts, pair, temperature=temperature, flip_probability=flip_probability)


def sample_uniform_pairs(
    key: Key[Array, ""], world: World, *, num: int
) -> tuple[Int[Array, " num"], tuple[Int[Array, " num"], Int[Array, " num"]]]:
    """Uniform prompts, each with a uniform pair of distinct responses."""
    checks.key(key)
    checks.size("num", num)
    checks.size("world.num_responses", world.num_responses, at_least=2)
    limits = jnp.array([world.num_prompts, world.num_responses, world.num_responses - 1])
    prompts, first, shift = jax.random.randint(key, (3, num), 0, limits[:, None])
    return prompts, (first, (first + 1 + shift) % world.num_responses)


def sample_policy_pairs(
    key: Key[Array, ""], log_probs: Float[Array, "prompts responses"], *, num: int
) -> tuple[Int[Array, " num"], tuple[Int[Array, " num"], Int[Array, " num"]]]:
    """Uniform prompts, each with two independent samples of a policy, given that they differ.

    The first of the two has probability proportional to `p (1 - p)`, and the second is any other one in proportion to
    `p`. The policy must give at least two responses of each prompt a positive probability.

    Args:
      key: typed PRNG key.
      log_probs: the policy's table (nats).
      num: how many pairs; static.

    Raises:
      TypeError, ValueError: the key is not a key, or a prompt has fewer than two possible responses. Where the table is
        traced its values are unknown; there, the ids of such a prompt are -1, which is no response.
    """
    checks.key(key)
    checks.size("num", num)
    log_probs = at_least_float32(log_probs)
    checks.choices("exp(log_probs)", jnp.exp(log_probs), at_least=2)
    prompt_key, pair_key = jax.random.split(key)
    num_prompts, num_responses = log_probs.shape
    prompts = jax.random.randint(prompt_key, (num,), 0, num_prompts)
    probs = jax.nn.softmax(log_probs)[prompts]
    first_uniform, second_uniform = jax.random.uniform(pair_key, (2, num))
    first = invert_cumulative(first_uniform, probs * (1 - probs))
    is_first = jax.nn.one_hot(first, num_responses, dtype=bool)
    return prompts, (first, invert_cumulative(second_uniform, jnp.where(is_first, 0.0, probs)))


def label_pairs(
    key: Key[Array, ""],
    world: World,
    prompts: Int[Array, " n"],
    pair: tuple[Int[Array, " n"], Int[Array, " n"]],
    *,
    temperature: Numeric = 1.0,
    flip_probability: Numeric = 0.0,
) -> Preferences:
    """Samples which response of each pair people prefer (`preference_probability`).

    Args:
      key: typed PRNG key.
      world: whose rewards people compare by.
      prompts: ids of the prompts.
      pair: ids of the two responses to each prompt, in any order.
      temperature, flip_probability: see `preference_probability`.

    Raises:
      TypeError, ValueError: an id is out of range, the two responses of a pair are the same, or a reward is not finite,
        among others. Where rewards are traced their values are unknown; there, the ids are -1, which is no response, if
        a reward is NaN.
    """
    checks.key(key)
    _check_world(world)
    first, second = pair
    checks.distinct("pair", first, second)
    first_reward, second_reward = lookup(at_least_float32(world.rewards), prompts, pair)
    probability = preference_probability(
        first_reward, second_reward, temperature=temperature, flip_probability=flip_probability
    )
    first_wins: Bool[Array, " n"] = jax.random.bernoulli(key, probability)
    chosen, rejected = jnp.where(first_wins, first, second), jnp.where(first_wins, second, first)
    return Preferences(prompts, Pair(*(jnp.where(jnp.isnan(probability), -1, ids) for ids in (chosen, rejected))))


def all_preferences(world: World, *, temperature: Numeric = 1.0, flip_probability: Numeric = 0.0) -> Preferences:
    """Every ordered pair of distinct responses, weighted by its true probability: the limit of many labels.

    The weights average 1, so that losses on this data and on sampled comparisons are comparable.

    Args:
      world: whose rewards people compare by.
      temperature, flip_probability: see `preference_probability`.
    """
    prompts, chosen, rejected = np.indices((world.num_prompts, world.num_responses, world.num_responses)).reshape(3, -1)
    prompts, chosen, rejected = jnp.asarray([prompts, chosen, rejected])[:, chosen != rejected]
    probability = preference_probability(
        *lookup(world.rewards, prompts, (chosen, rejected)), temperature=temperature, flip_probability=flip_probability
    )
    return Preferences(prompts, Pair(chosen, rejected), weights=2 * probability)


def sampled_reward(
    key: Key[Array, ""], world: World, log_probs: Float[Array, "prompts responses"], *, num: int = 200
) -> Float[Array, " prompts"]:
    """The mean true reward of sampled responses, for each prompt: an estimate of `expected_reward`.

    Args:
      key: typed PRNG key.
      world: its rewards are averaged.
      log_probs: table of the policy that responds.
      num: how many responses to each prompt; static.
    """
    checks.size("num", num)
    prompts = jnp.broadcast_to(jnp.arange(world.num_prompts)[:, None], (world.num_prompts, num))
    return jnp.mean(lookup(world.rewards, prompts, generate(key, log_probs, prompts)), axis=-1)


def _checked_ids(world: World, **columns: Ids) -> list[Int[Array, " n"]]:
    arrays = {name: _as_array(name, ids) for name, ids in columns.items()}
    checks.rows("data", arrays)
    for name, ids in arrays.items():
        if ids.ndim != 1:
            raise ValueError(f"{name} must have one axis, got shape {ids.shape}")
        checks.ids(name, ids, world.num_prompts if name == "prompts" else world.num_responses)
    return [jnp.asarray(ids, jnp.int32) for ids in arrays.values()]


def _checked_weights(prompts: Int[Array, " n"], weights: Weights) -> Float[Array, " n"] | None:
    if weights is None:
        return None
    array = _as_array("weights", weights)
    checks.same_shape(prompts=prompts, weights=array)
    checks.zero_or_within("weights", array, 1 / LARGEST_WEIGHT_RATIO, LARGEST_WEIGHT_RATIO)
    if not array.any():
        raise ValueError("weights must not all be 0")
    return jnp.asarray(array, jnp.float32)


def _as_array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as problem:
        raise ValueError(f"{name} is ragged: {problem}") from problem


def _check_world(world: World) -> None:
    """The tables of a world have matching shapes, and hold finite numbers."""
    checks.floating("world.embeddings", world.embeddings)
    checks.floating("world.rewards", world.rewards)
    if jnp.shape(world.embeddings)[:1] != jnp.shape(world.rewards)[:1]:
        raise ValueError(
            "world.embeddings and world.rewards must have a row for each prompt, got shapes "
            f"{jnp.shape(world.embeddings)} and {jnp.shape(world.rewards)}"
        )
    checks.finite("world.rewards", world.rewards)
