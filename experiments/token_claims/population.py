"""Losses on infinite data, and gradients without noise: in a world of 15 strings, by a table that can be any policy."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dpo_jax import losses, rlhf, strings, toy, train
from dpo_jax.types import LogProbFn, Metrics, Numeric, Objective, Params, Preferences, Responses
from experiments.lab.pipeline import Pipeline, Start
from experiments.lab.string_worlds import BETA

SMALL = strings.Strings(num_letters=2, horizon=3)
"""The strings whose population losses are minimised exactly, by a table."""
SMALL_BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
ON_ALL_PAIRS = ("dpo", "ipo on sums", "ipo on means", "ln-dpo", "simpo", "simpo with a margin", "orpo on sums", "orpo")
NUM_STEPS = 300


def small_world(start: Start) -> tuple[toy.World, Float[Array, "prompts responses"]]:
    """A world of short strings with one prompt, and its reference, which knows a little of the rewards."""
    world = strings.make_world(start.key, SMALL, num_prompts=1, letters_per_word=2)
    plain = strings.reference_log_probs(SMALL, expected_length=1.5)[None]
    return world, toy.optimal_policy(plain, world.rewards, beta=2.0)


def on_all_pairs(__: Pipeline, start: Start, *, loss: str, beta: Numeric) -> Metrics:
    """The minimum of a loss over all pairs of strings, weighted by how often the reference shows them.

    Returns:
      `expected_reward`, `kl_to_reference`, `merit` (reward less beta times KL) and that of the optimum, `longer`
      (letters beyond the policy of highest reward at the same KL), and how much reward that policy has more.
    """
    world, reference = small_world(start)
    table = toy.TablePolicy(SMALL.num_responses)
    log_prob, objective = _objective(loss, toy.log_prob_fn(table, world.embeddings), beta)
    params = {"params": {"logits": reference}}
    params, _ = train.fit(
        start.key,
        params,
        train.with_reference(log_prob, params, _all_pairs(world, reference)),
        objective=objective,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, NUM_STEPS)),
        num_epochs=NUM_STEPS,
        batch_size=SMALL.num_responses**2,
    )
    log_probs = toy.table_fn(table, world.embeddings)(params)
    found = toy.evaluate(log_probs, reference, world.rewards)
    best = toy.optimal_policy_at_kl(reference, world.rewards, kl=jnp.maximum(found["kl_to_reference"], 0))
    lengths = [strings.expected_length(policy, SMALL)[0] for policy in (log_probs, best)]
    return {
        **found,
        "merit": found["expected_reward"] - BETA * found["kl_to_reference"],
        "optimal_merit": BETA * toy.log_partition(reference, world.rewards, beta=BETA)[0],
        "short_of_frontier": jnp.mean(toy.expected_reward(best, world.rewards)) - found["expected_reward"],
        "longer": lengths[0] - lengths[1],
    }


def gradient_noise(__: Pipeline, start: Start) -> Metrics:
    """Exact variance of the first gradient, over the square of its mean, of groups of two strings.

    `rloo`, and PPO with the true value of every prefix (`ppo`) or with zeros (`ppo_without_values`).
    """
    world, reference = small_world(start)
    policy, values = strings.PrefixTable(SMALL), strings.PrefixTable(SMALL, num_outputs=1)
    params = {"params": {"logits": strings.next_token_log_probs(reference, SMALL)}}
    true_values = {"params": {"logits": strings.values(reference, world.rewards, SMALL)[..., None]}}
    zeros = jax.tree.map(jnp.zeros_like, true_values)
    embeddings = world.embeddings
    common: dict[str, Any] = {
        "ask": toy.ask_everything(world),
        "reward": toy.reward_fn(world.rewards),
        "reference_params": params,
        "beta": BETA,
    }

    def noise(params: Params, make: Any) -> Array:
        def estimate(group: Array) -> Any:
            learner = make(respond=lambda *_: Responses(group[None]), **common)
            gradient = rlhf.learner_gradient(start.key, params, learner)
            return gradient.policy if isinstance(gradient, rlhf.ActorCritic) else gradient

        mean, variance = rlhf.group_moments(reference[0], estimate, group_size=2)
        return _total(variance) / _total(jax.tree.map(jnp.square, mean))

    def ppo(**options: Any) -> Any:
        return rlhf.token_ppo(
            token_log_prob=strings.token_log_prob_fn(policy, embeddings),
            token_value=strings.token_value_fn(values, embeddings),
            advantages=lambda advantages, _: advantages,
            aggregate=_sum_of_tokens,
            **options,
        )

    def rloo(**options: Any) -> Any:
        return rlhf.rloo(log_prob=strings.log_prob_fn(policy, embeddings), **options)

    return {
        "rloo": noise(params, rloo),
        "ppo": noise(rlhf.ActorCritic(params, true_values), ppo),
        "ppo_without_values": noise(rlhf.ActorCritic(params, zeros), ppo),
    }


def _objective(loss: str, sums: LogProbFn, beta: Numeric) -> tuple[LogProbFn, Objective]:
    """What scores responses, and the objective."""
    means = strings.on_means(sums, SMALL)

    def nums(_: Params, batch: Preferences, __: Any) -> Any:
        return strings.num_tokens_of(SMALL, batch.responses)

    pairwise, alone = train.preference_objective, train.reference_free_objective
    return {
        "dpo": (sums, pairwise(sums, losses.dpo_loss, beta=beta)),
        "ipo on sums": (sums, pairwise(sums, losses.ipo_loss, beta=beta)),
        "ipo on means": (means, pairwise(means, losses.ipo_loss, beta=beta)),
        "ln-dpo": (sums, pairwise(sums, losses.length_normalized_dpo_loss, beta=beta, lengths=nums)),
        "simpo": (means, alone(means, losses.simpo_loss, beta=beta, gamma=0.0)),
        "simpo with a margin": (means, alone(means, losses.simpo_loss, beta=beta, gamma=0.5)),
        "orpo on sums": (sums, alone(sums, losses.orpo_loss, odds_weight=beta)),
        "orpo": (means, alone(means, losses.orpo_loss, odds_weight=beta)),
    }[loss]


def _all_pairs(world: toy.World, reference: Float[Array, "prompts responses"]) -> Preferences:
    """Every ordered pair, weighted by how often the reference shows it and people prefer it so."""
    pairs = toy.all_preferences(world)
    assert pairs.weights is not None
    chosen, rejected = toy.lookup(jnp.exp(reference), pairs.prompts, pairs.responses)
    weights = pairs.weights * chosen * rejected
    return pairs._replace(weights=weights / jnp.mean(weights))


def _sum_of_tokens(values: Array, mask: Array, weights: Array | None = None) -> Array:
    """Sums over tokens, means over responses: as RLOO on whole responses has it."""
    return losses.mean_per_length(values, mask, weights, max_length=1)


def _total(tree: Any) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(tree)]))
