"""The tutorial notebook's experiment as pure functions, with the notebook's numbers.

`prepare` is everything up to the comparisons and `train_dpo` is everything after them, so that what does not depend on
beta is computed once however many values of beta are tried. `ablate` puts the two together.
"""

from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Key

from dpo_jax import losses, toy, train
from dpo_jax.types import Metrics, Numeric, Params, Preferences

NUM_DEMONSTRATIONS = 500
NUM_PREFERENCES = 1800  # the notebook draws 2,000 pairs and drops those of a response with itself, a tenth of them
BETA = 0.1
BETAS = (0.01, 0.1, 0.5, 2.0)

POLICY = toy.ToyLM(num_responses=10)


class TrainedPolicy(NamedTuple):
    """What training made, and how good it is.

    Attributes:
      params: the network's parameters.
      history: for each metric an array `[epochs]`.
      log_probs: the policy as a table (nats).
      expected_reward: exact, for each prompt.
      sampled_reward: the mean over 200 sampled responses, for each prompt, as in the notebook.
    """

    params: Params
    history: Metrics
    log_probs: Float[Array, "prompts responses"]
    expected_reward: Float[Array, " prompts"]
    sampled_reward: Float[Array, " prompts"]


class Start(NamedTuple):
    """What every DPO run of one seed starts from.

    Attributes:
      world: prompts, responses and true rewards.
      sft: the policy after supervised fine-tuning; DPO's reference.
      preferences: human comparisons, with their log-probabilities under the reference.
    """

    world: toy.World
    sft: TrainedPolicy
    preferences: Preferences


def prepare(key: Key[Array, ""]) -> Start:
    """Makes a world, fine-tunes a network on demonstrations, and collects human comparisons."""
    world_key, demo_key, init_key, sft_key, sample_key, preference_key = jax.random.split(key, 6)
    world = toy.make_world(world_key)
    log_prob = toy.log_prob_fn(POLICY, world.embeddings)
    params, history = train.fit(
        sft_key,
        POLICY.init(init_key, world.embeddings),
        toy.sample_demonstrations(demo_key, world, num=NUM_DEMONSTRATIONS),
        objective=train.sft_objective(log_prob),
        optimizer=optax.adam(1e-2),
        num_epochs=100,
        batch_size=32,
    )
    preferences = toy.sample_preferences(preference_key, world, num=NUM_PREFERENCES)
    return Start(
        world, _evaluated(sample_key, world, params, history), train.with_reference(log_prob, params, preferences)
    )


def train_dpo(key: Key[Array, ""], start: Start, beta: Numeric) -> TrainedPolicy:
    """Direct Preference Optimization from the SFT policy, which is also the reference."""
    train_key, sample_key = jax.random.split(key)
    world = start.world
    table = toy.table_fn(POLICY, world.embeddings)
    params, history = train.fit(
        train_key,
        start.sft.params,
        start.preferences,
        objective=train.preference_objective(toy.log_prob_fn(POLICY, world.embeddings), losses.dpo_loss, beta=beta),
        optimizer=optax.adam(1e-3),
        num_epochs=50,
        batch_size=64,
        evaluate=lambda params: toy.evaluate(table(params), start.sft.log_probs, world.rewards),
    )
    return _evaluated(sample_key, world, params, history)


def ablate(key: Key[Array, ""], betas: Float[Array, " betas"]) -> tuple[Start, TrainedPolicy]:
    """The whole experiment for one seed: DPO for each beta, all on the same data in the same order."""
    start_key, dpo_key = jax.random.split(key)
    start = prepare(start_key)
    return start, jax.vmap(train_dpo, in_axes=(None, None, 0))(dpo_key, start, betas)


def _evaluated(key: Key[Array, ""], world: toy.World, params: Params, history: Metrics) -> TrainedPolicy:
    log_probs = toy.table_fn(POLICY, world.embeddings)(params)
    return TrainedPolicy(
        params,
        history,
        log_probs,
        toy.expected_reward(log_probs, world.rewards),
        toy.sampled_reward(key, world, log_probs),
    )
