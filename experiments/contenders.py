"""RLHF and DPO side by side: every way from the same SFT policy and the same comparisons to a better policy.

All train their policy for about as many optimizer steps (1,450; PPO 1,440), on 64 comparisons made beforehand or on 64
fresh responses, which may be 32 comparisons. What they differ in is who judges (1,800 comparisons made beforehand, a
reward model fitted to them, people asked during training, or the true reward), what they sample, and how.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from dpo_jax import losses, rlhf, toy, train
from dpo_jax.types import LogProbFn, Metrics, Numeric, Params, Preferences
from experiments import notebook
from experiments.notebook import BETA, NUM_PREFERENCES, POLICY

BATCH_SIZE = 64
STEPS_PER_EPOCH, NUM_EPOCHS = 29, 50
NUM_STEPS = STEPS_PER_EPOCH * NUM_EPOCHS
PPO_PASSES, PPO_BATCHES = 4, 4
PPO_ROUNDS = NUM_STEPS // (PPO_PASSES * PPO_BATCHES)
GROUP_SIZE = 8
OPTIMISM = 0.01  # XPO's alpha
MIX = 0.125  # Nash-MD's share of the reference in the opponent, TRL's
BETAS = (0.01, 0.03, BETA, 0.3, 1.0)
VALUE = toy.ToyLM(num_responses=1)
REWARD_MODEL = POLICY  # its outputs read as rewards


class Scene(NamedTuple):
    """What every method starts from, in one world.

    Attributes:
      key: data of a key, for training.
      world: prompts, responses, true rewards.
      params: of the SFT policy, the reference.
      log_probs: its table.
      preferences: human comparisons, with their log-probabilities under the reference.
      learned_rewards: what a reward model makes of the comparisons, a table.
      reward_model: how well that was learnt.
    """

    key: Any
    world: toy.World
    params: Params
    log_probs: Float[Array, "prompts responses"]
    preferences: Preferences
    learned_rewards: Float[Array, "prompts responses"]
    reward_model: Metrics


class Setup(NamedTuple):
    """A scene, and the functions that learners ask for."""

    key: Key[Array, ""]
    scene: Scene
    log_prob: LogProbFn
    log_probs: Callable[[Params], Float[Array, "prompts responses"]]

    def exchange(self, group_size: int, num: int = BATCH_SIZE) -> dict[str, Any]:
        """How to ask for `num` responses in groups, and how to score them."""
        world = self.scene.world
        respond = toy.respond_fn(POLICY, world.embeddings, group_size=group_size)
        ask = toy.ask_uniformly(world, num=num // group_size)
        return {"ask": ask, "respond": respond, "log_prob": self.log_prob}

    @property
    def true_rewards(self) -> Float[Array, "prompts responses"]:
        return self.scene.world.rewards

    @property
    def learned_rewards(self) -> Float[Array, "prompts responses"]:
        return self.scene.learned_rewards


Rewards = Callable[[Setup], Float[Array, "prompts responses"]]
Trained = tuple[Params, Metrics]


def prepare(seed: Int[Array, ""]) -> Scene:
    """The notebook's world, SFT policy and comparisons, and a reward model fitted to these."""
    start_key, reward_key, key = jax.random.split(jax.random.key(seed), 3)
    start = notebook.prepare(start_key)
    rewards, history = train_reward_model(reward_key, start.world, start.preferences)
    error, accuracy = (measure(rewards, start.world.rewards) for measure in (toy.reward_error, toy.ranking_accuracy))
    quality = {
        "error": jnp.mean(error),
        "ranking_accuracy": jnp.mean(accuracy),
        "training_accuracy": history["accuracy"][-1],
        "training_loss": history["loss"][-1],
        "spread_of_true_rewards": jnp.mean(jnp.std(start.world.rewards, axis=-1)),
    }
    return Scene(
        jax.random.key_data(key),
        start.world,
        start.sft.params,
        start.sft.log_probs,
        start.preferences,
        rewards,
        quality,
    )


def train_reward_model(
    key: Key[Array, ""], world: toy.World, preferences: Preferences, *, margin: Numeric = 0.0, centring: Numeric = 0.01
) -> tuple[Float[Array, "prompts responses"], Metrics]:
    """Fits a fresh network to the comparisons, as long as DPO trains; returns its table of rewards.

    Its learning rate is the notebook's for DPO, and is not tuned.
    Fresh, because the outputs of the SFT policy are no neutral start: its logits already know which responses
    demonstrators show more often.
    """
    init_key, train_key = jax.random.split(key)
    embeddings = world.embeddings
    objective = train.reference_free_objective(
        toy.score_fn(REWARD_MODEL, embeddings), losses.bradley_terry_loss, margin=margin, centring=centring
    )
    params, history = train.fit(
        train_key,
        REWARD_MODEL.init(init_key, embeddings),
        preferences,
        objective=objective,
        optimizer=optax.adam(1e-3),
        num_epochs=NUM_EPOCHS,
        batch_size=BATCH_SIZE,
    )
    return toy.score_table_fn(REWARD_MODEL, embeddings)(params), history


@dataclass(frozen=True)
class Contender:
    """A way from the SFT policy to a better one.

    Attributes:
      name: of the method, and who judges.
      stages: what is trained, one after the other.
      train: `(setup, strength, learning rate) -> (parameters, history)`.
      judge: who says what is good.
      samples: how many responses are sampled during training.
      labels: how many judgements of people it takes.
      steps: how many optimizer steps the policy takes.
      strength: what is swept: beta, mostly.
      strengths: its values.
      usual: the one of these at which methods are compared.
    """

    name: str
    stages: tuple[str, ...]
    train: Callable[[Setup, Numeric, Numeric], Trained]
    judge: str
    samples: int = 0
    labels: int = NUM_PREFERENCES
    steps: int = NUM_STEPS
    strength: str = "beta"
    strengths: tuple[float, ...] = BETAS
    usual: float = BETA

    def trained(self, scene: Scene, strength: Numeric, learning_rate: Numeric) -> tuple[Array, Metrics]:
        """The trained policy's table, and the history."""
        table = toy.table_fn(POLICY, scene.world.embeddings)
        setup = Setup(
            jax.random.wrap_key_data(scene.key), scene, toy.log_prob_fn(POLICY, scene.world.embeddings), table
        )
        params, history = self.train(setup, strength, learning_rate)
        return table(policy_of(params)), history


def policy_of(params: Params) -> Params:
    """The policy's parameters, also where a value function was trained beside it."""
    return params.policy if isinstance(params, rlhf.ActorCritic) else params


def fit(setup: Setup, objective: Any, learning_rate: Numeric, *, num_epochs: int | None = None) -> Trained:
    """Trains on the comparisons that there are; for `NUM_EPOCHS` unless told otherwise."""
    return train.fit(
        setup.key,
        setup.scene.params,
        setup.scene.preferences,
        objective=objective,
        optimizer=optax.adam(learning_rate),
        num_epochs=num_epochs or NUM_EPOCHS,
        batch_size=BATCH_SIZE,
        evaluate=partial(evaluate, setup),
    )


def fit_online(setup: Setup, learner: Any, learning_rate: Numeric, **options: Any) -> Trained:
    """Trains on what the policy does: one step on each batch, unless told otherwise."""
    options = {"params": setup.scene.params, "num_epochs": NUM_EPOCHS, "rounds_per_epoch": STEPS_PER_EPOCH, **options}
    return train.fit_online(
        setup.key, learner=learner, optimizer=optax.adam(learning_rate), evaluate=partial(evaluate, setup), **options
    )


def evaluate(setup: Setup, params: Params) -> Metrics:
    """Exact true reward, KL, and the score that the reward model gives."""
    log_probs, scene = setup.log_probs(policy_of(params)), setup.scene
    return {
        **toy.evaluate(log_probs, scene.log_probs, scene.world.rewards),
        "learned_reward": jnp.mean(toy.expected_reward(log_probs, scene.learned_rewards)),
    }


def dpo(setup: Setup, beta: Numeric, learning_rate: Numeric) -> Trained:
    """The notebook's."""
    return fit(setup, train.preference_objective(setup.log_prob, losses.dpo_loss, beta=beta), learning_rate)


def preferred_fine_tuning(setup: Setup, _: Numeric, learning_rate: Numeric) -> Trained:
    """A baseline of the DPO paper: imitate what was chosen."""
    return fit(setup, train.reference_free_objective(setup.log_prob, losses.sft_loss), learning_rate)


def unlikelihood(setup: Setup, alpha: Numeric, learning_rate: Numeric) -> Trained:
    """A baseline of the DPO paper: imitate what was chosen, and unlearn what was rejected."""
    objective = train.reference_free_objective(setup.log_prob, losses.unlikelihood_loss, alpha=alpha)
    return fit(setup, objective, learning_rate)


def ppo(rewards: Rewards, setup: Setup, beta: Any, learning_rate: Numeric, *, clip: Numeric = 0.2) -> Trained:
    """Four passes over four batches of each round."""
    embeddings = setup.scene.world.embeddings
    init_key, train_key = jax.random.split(setup.key)
    learner = rlhf.ppo(
        **setup.exchange(1, PPO_BATCHES * BATCH_SIZE),
        reward=toy.reward_fn(rewards(setup)),
        value=toy.value_fn(VALUE, embeddings),
        reference_params=setup.scene.params,
        beta=beta,
        clip=clip,
    )
    return fit_online(
        setup._replace(key=train_key),
        learner,
        learning_rate,
        params=rlhf.ActorCritic(setup.scene.params, VALUE.init(init_key, embeddings)),
        num_epochs=PPO_ROUNDS // 3,
        rounds_per_epoch=3,
        passes_per_round=PPO_PASSES,
        batch_size=BATCH_SIZE,
    )


def adaptive_ppo(rewards: Rewards, setup: Setup, target: Numeric, learning_rate: Numeric) -> Trained:
    """PPO whose price of KL is controlled so that the KL stays on target."""
    return ppo(rewards, setup, rlhf.AdaptiveKL(initial=BETA, target=target, gain=1.0), learning_rate)


def reinforced(
    make: Any, group_size: int, rewards: Rewards, setup: Setup, beta: Numeric, learning_rate: Numeric
) -> Trained:
    """A policy-gradient learner with one step on each batch."""
    reward = toy.reward_fn(rewards(setup))
    learner = make(**setup.exchange(group_size), reward=reward, reference_params=setup.scene.params, beta=beta)
    return fit_online(setup, learner, learning_rate)


def online_dpo(rewards: Rewards, setup: Setup, beta: Numeric, learning_rate: Numeric) -> Trained:
    """Fresh pairs of the policy, judged by rewards."""
    prefer = toy.preference_fn(rewards(setup))
    learner = rlhf.online_dpo(**setup.exchange(2), prefer=prefer, reference_params=setup.scene.params, beta=beta)
    return fit_online(setup, learner, learning_rate)


def xpo(setup: Setup, beta: Numeric, learning_rate: Numeric) -> Trained:
    """The policy's answer against the reference's, judged by people."""
    learner = rlhf.xpo(
        **setup.exchange(1, BATCH_SIZE // 2),
        prefer=toy.preference_fn(setup.true_rewards),
        reference_params=setup.scene.params,
        beta=beta,
        alpha=OPTIMISM,
    )
    return fit_online(setup, learner, learning_rate)


def nash_md(setup: Setup, tau: Numeric, learning_rate: Numeric) -> Trained:
    """The policy's answers against those of a mixture of itself and the reference.

    It is told how probable a preference is, which is more than the one answer that online DPO and XPO get.
    """
    scene = setup.scene
    opponent = toy.respond_fn(
        POLICY, scene.world.embeddings, group_size=1, reference_log_probs=scene.log_probs, mix=MIX
    )
    prefer = toy.preference_fn(setup.true_rewards)
    learner = rlhf.nash_md(
        **setup.exchange(1),
        opponent=opponent,
        prefer=prefer,
        reference_params=scene.params,
        tau=tau,
    )
    return fit_online(setup, learner, learning_rate)


LEARNED: Rewards = lambda setup: setup.learned_rewards  # noqa: E731
TRUE: Rewards = lambda setup: setup.true_rewards  # noqa: E731
COMPARISONS, MODEL, PEOPLE, TRUTH = "comparisons", "reward model", "people, asked on", "true reward"
SFT, FIT_REWARDS = "SFT", "reward model"
PPO_SAMPLES = PPO_ROUNDS * PPO_BATCHES * BATCH_SIZE
SAMPLES = NUM_STEPS * BATCH_SIZE
PPO_NEEDS = {"samples": PPO_SAMPLES, "steps": PPO_ROUNDS * PPO_PASSES * PPO_BATCHES}


def by_model(name: str, method: Any, *, samples: int = SAMPLES, **options: Any) -> Contender:
    """A method that is judged by the reward model."""
    stages = (SFT, FIT_REWARDS, name)
    return Contender(f"{name}, reward model", stages, partial(method, LEARNED), MODEL, samples, **options)


def by_truth(name: str, method: Any, *, samples: int = SAMPLES, **options: Any) -> Contender:
    """A method that sees the true reward of each response: what is possible without errors of judgement."""
    stages = (SFT, name)
    return Contender(f"{name}, true reward", stages, partial(method, TRUE), TRUTH, samples, labels=samples, **options)


def drgrpo(*args: Any, **options: Any) -> Any:
    """GRPO with Dr. GRPO's advantages."""
    return rlhf.grpo(*args, **options, advantages=losses.centred_advantages)


CONTENDERS = (
    Contender("DPO", (SFT, "DPO"), dpo, COMPARISONS),
    Contender(
        "preferred fine-tuning",
        (SFT, "preferred fine-tuning"),
        preferred_fine_tuning,
        COMPARISONS,
        strength="none",
        strengths=(BETA,),
    ),
    Contender(
        "unlikelihood",
        (SFT, "unlikelihood"),
        unlikelihood,
        COMPARISONS,
        strength="alpha",
        strengths=(0.05, 0.1, 0.5, 0.9, 1.0),
        usual=0.9,
    ),
    by_model("PPO", ppo, **PPO_NEEDS),
    by_model(
        "PPO, KL held",
        adaptive_ppo,
        **PPO_NEEDS,
        strength="target KL",
        strengths=(0.02, 0.1, 0.4, 0.8, 1.2),
        usual=0.4,
    ),
    by_model("REINFORCE", partial(reinforced, rlhf.reinforce, 1)),
    by_model("RLOO", partial(reinforced, rlhf.rloo, 4)),
    by_model("GRPO", partial(reinforced, rlhf.grpo, GROUP_SIZE)),
    by_model("Dr. GRPO", partial(reinforced, drgrpo, GROUP_SIZE)),
    by_model("online DPO", online_dpo),
    Contender("online DPO, people", (SFT, "online DPO"), partial(online_dpo, TRUE), PEOPLE, SAMPLES, SAMPLES // 2),
    Contender("XPO, people", (SFT, "XPO"), xpo, PEOPLE, SAMPLES, SAMPLES // 2),
    Contender(
        "Nash-MD, people",
        (SFT, "Nash-MD"),
        nash_md,
        PEOPLE,
        2 * SAMPLES,
        SAMPLES,
        strength="tau",
        strengths=tuple(beta / 4 for beta in BETAS),
        usual=BETA / 4,
    ),
    by_truth("PPO", ppo, **PPO_NEEDS),
    by_truth("RLOO", partial(reinforced, rlhf.rloo, 4)),
)
"""All of them. Tau is a quarter of beta, since a difference in reward moves a preference by at most a quarter of it."""
