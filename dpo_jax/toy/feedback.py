"""Other feedback than comparisons of two: labels (good or bad) and rankings, from the same rewards."""

from __future__ import annotations

import math
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dpo_jax import checks
from dpo_jax.toy.policy import at_least_float32, generate, lookup
from dpo_jax.toy.world import World, preference_probability
from dpo_jax.types import Labels, Numeric, Preferences


def label_probability(
    rewards: Float[Array, "prompts responses"], *, temperature: Numeric = 1.0, flip_probability: Numeric = 0.0
) -> Float[Array, "prompts responses"]:
    r"""The probability that people call a response good: that it is preferred to a response of mean reward.

    .. math:: (1 - f)\, \sigma(\Delta / T) + f\, \sigma(-\Delta / T), \qquad \Delta = r(x, y) - \text{mean}_{y'}\, r(x,
    y')

    Args:
      rewards: the true rewards.
      temperature, flip_probability: :math:`T` and :math:`f`, see `preference_probability`.
    """
    mean = jnp.mean(rewards, axis=-1, keepdims=True)
    return preference_probability(rewards, mean, temperature=temperature, flip_probability=flip_probability)


def sample_labels(
    key: Key[Array, ""],
    world: World,
    *,
    num: int,
    log_probs: Float[Array, "prompts responses"] | None = None,
    temperature: Numeric = 1.0,
    flip_probability: Numeric = 0.0,
) -> Labels:
    """Samples labels, good or bad, of responses to uniform prompts (`label_probability`).

    Args:
      key: typed PRNG key.
      world: whose rewards people judge by.
      num: how many labels; static.
      log_probs: table of the policy that responds; `None` responds uniformly.
      temperature, flip_probability: see `label_probability`.

    Raises:
      TypeError, ValueError: an argument is not as described. Where rewards are traced their values are unknown; there,
        the response is -1, which is none, if a reward of the prompt is NaN.
    """
    checks.key(key)
    checks.size("num", num)
    checks.finite("world.rewards", world.rewards)
    prompt_key, response_key, label_key = jax.random.split(key, 3)
    prompts = jax.random.randint(prompt_key, (num,), 0, world.num_prompts)
    responses = generate(response_key, _proposal(world, log_probs), prompts)
    rewards = at_least_float32(world.rewards)
    good = label_probability(rewards, temperature=temperature, flip_probability=flip_probability)
    probability = lookup(good, prompts, responses)
    responses = jnp.where(jnp.isnan(probability), -1, responses)
    return Labels(prompts, responses, jax.random.bernoulli(label_key, probability))


def all_labels(world: World, *, temperature: Numeric = 1.0, flip_probability: Numeric = 0.0) -> Labels:
    """Every response with both labels, weighted by their probabilities: the limit of many labels.

    The weights average 1, so that losses on this data and on sampled labels are comparable.

    Args:
      world: whose rewards people judge by.
      temperature, flip_probability: see `label_probability`.
    """
    prompts, responses = (jnp.asarray(ids.ravel()) for ids in np.indices((world.num_prompts, world.num_responses)))
    good = label_probability(world.rewards, temperature=temperature, flip_probability=flip_probability).ravel()
    desirable = jnp.arange(2 * good.size) < good.size
    weights = 2 * jnp.concatenate([good, 1 - good])
    return Labels(jnp.tile(prompts, 2), jnp.tile(responses, 2), desirable, weights)


def split_pairs(preferences: Preferences) -> Labels:
    """Comparisons as labels: chosen is good, rejected is bad, and the pairing is dropped.

    Args:
      preferences: comparisons of two; weights and reference are kept, columns are not.

    Returns:
      Twice as many labels: first all good ones, then all bad ones.
    """
    if len(preferences.responses) != 2:
        raise ValueError(f"split_pairs takes comparisons of two, got rankings of {len(preferences.responses)}")
    num = len(preferences.prompts)
    weights, reference_logps = preferences.weights, preferences.reference_logps
    return Labels(
        prompts=jnp.tile(preferences.prompts, 2),
        responses=jnp.concatenate(preferences.responses),
        desirable=jnp.arange(2 * num) < num,
        weights=None if weights is None else jnp.tile(weights, 2),
        reference_logps=None if reference_logps is None else jnp.concatenate(reference_logps),
    )


def sample_rankings(
    key: Key[Array, ""],
    world: World,
    *,
    num: int,
    num_ranked: int,
    log_probs: Float[Array, "prompts responses"] | None = None,
    temperature: Numeric = 1.0,
    flip_probability: Numeric = 0.0,
) -> Preferences:
    """Samples rankings of several distinct responses to uniform prompts, under the Plackett-Luce model.

    Each next response is chosen from the remaining ones with probability proportional to `exp(reward / temperature)`.
    With two responses this is `sample_preferences`.

    Args:
      key: typed PRNG key.
      world: whose rewards people rank by.
      num: how many rankings; static.
      num_ranked: how many responses each ranks, two at least; static.
      log_probs: table of the policy that responds, without replacement; `None` responds uniformly.
      temperature: noise of the rankings: 0 ranks by reward, with ties in random order.
      flip_probability: the probability that a ranking is reversed afterwards.

    Returns:
      `Preferences` whose responses are a tuple of `num_ranked` arrays, from best to worst.

    Raises:
      TypeError, ValueError: an argument is not as described, or a prompt has fewer possible responses than are ranked.
        Where tables are traced their values are unknown; there, the ids of such a prompt are -1, which is no response,
        and so they are if a reward is NaN.
    """
    checks.key(key)
    checks.size("num", num)
    _check_num_ranked(world, num_ranked)
    checks.finite("world.rewards", world.rewards)
    checks.interval("temperature", temperature, "[0, inf)")
    checks.interval("flip_probability", flip_probability, "[0, 1]")
    prompt_key, response_key, noise_key, tie_key, flip_key = jax.random.split(key, 5)
    prompts = jax.random.randint(prompt_key, (num,), 0, world.num_prompts)
    proposal = _proposal(world, log_probs)
    checks.choices("exp(log_probs)", jnp.exp(at_least_float32(proposal)), at_least=num_ranked)
    noise = jax.random.gumbel(response_key, (num, world.num_responses))
    proposed, responses = jax.lax.top_k(proposal[prompts] + noise, num_ranked)
    rewards = lookup(at_least_float32(world.rewards), jnp.broadcast_to(prompts[:, None], responses.shape), responses)
    utilities = rewards + temperature * jax.random.gumbel(noise_key, rewards.shape)
    order = jnp.lexsort((jax.random.uniform(tie_key, rewards.shape), -utilities), axis=-1)
    flipped = jax.random.bernoulli(flip_key, at_least_float32(flip_probability), (num, 1))
    ranked = jnp.take_along_axis(responses, jnp.where(flipped, order[:, ::-1], order), axis=-1)
    possible = jnp.all((proposed > -jnp.inf) & ~jnp.isnan(rewards), axis=-1, keepdims=True)
    ranked = jnp.where(possible, ranked, -1)
    return Preferences(prompts, tuple(ranked.T))


def _proposal(world: World, log_probs: Float[Array, "prompts responses"] | None) -> Float[Array, "prompts responses"]:
    """The policy that responds."""
    if log_probs is None:
        return jnp.full(world.rewards.shape, -math.log(world.num_responses))
    checks.same_shape(log_probs=log_probs, rewards=world.rewards)
    return log_probs


def all_rankings(world: World, *, num_ranked: int, temperature: Numeric = 1.0) -> Preferences:
    """Every ranking of distinct responses, weighted by its true probability: the limit of many rankings.

    Their number grows quickly with the number of ranked responses. The weights average 1.

    Args:
      world: whose rewards people rank by.
      num_ranked: how many responses each ranks, two at least; static.
      temperature: noise of the rankings; positive.
    """
    _check_num_ranked(world, num_ranked)
    checks.interval("temperature", temperature, "(0, inf)")
    orders = np.array(list(permutations(range(world.num_responses), num_ranked)))
    utilities = world.rewards[:, orders] / temperature
    left = [jax.nn.logsumexp(utilities[..., place:], axis=-1) for place in range(num_ranked)]
    probability = jnp.exp(jnp.sum(utilities - jnp.stack(left, axis=-1), axis=-1))
    prompts = jnp.repeat(jnp.arange(world.num_prompts), len(orders))
    responses = tuple(jnp.asarray(np.tile(orders, (world.num_prompts, 1))).T)
    return Preferences(prompts, responses, weights=probability.ravel() * np.prod(np.arange(2, num_ranked + 1)))


def _check_num_ranked(world: World, num_ranked: int) -> None:
    checks.size("num_ranked", num_ranked, at_least=2)
    if num_ranked > world.num_responses:
        raise ValueError(f"num_ranked must be at most {world.num_responses}, the number of responses, got {num_ranked}")
