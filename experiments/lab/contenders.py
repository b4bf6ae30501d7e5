"""RLHF and DPO side by side: every way from the same SFT policy and the same comparisons to a better policy.

All methods take about as many optimizer steps (1,450; PPO 1,440), each on 64 stored comparisons or on 64 fresh
responses, which may be 32 comparisons. They differ in who judges (stored comparisons, a reward model fitted to them,
people asked during training, or the true reward), in what they sample, and in how they learn from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from dpo_jax import losses, rlhf, toy, train
from dpo_jax.types import Metrics, Numeric, Params, Preferences, RespondFn, Responses
from experiments.lab.pipeline import BETA, TUTORIAL, Pipeline, Start

PPO_PASSES, PPO_BATCHES = 4, 4
GROUP_SIZE = 8
OPTIMISM = 0.01  # XPO's alpha
MIX = 0.125  # Nash-MD's share of the reference in the opponent, TRL's
STRENGTHS = (0.01, 0.03, BETA, 0.3, 1.0)
VALUE = toy.ToyLM(num_responses=1)


class Scene(NamedTuple):
    """What every method starts from, in one world.

    Attributes:
      start: the world and its SFT policy.
      key: for training.
      preferences: human comparisons, with their log-probabilities under the reference.
      learned_rewards: the table of a reward model that was fitted to the comparisons.
      reward_model: how well it was fitted.
    """

    start: Start
    key: Key[Array, ""]
    preferences: Preferences
    learned_rewards: Float[Array, "prompts responses"]
    reward_model: Metrics

    @property
    def world(self) -> toy.World:
        """Prompts, responses and true rewards."""
        return self.start.world

    @property
    def true_rewards(self) -> Float[Array, "prompts responses"]:
        """Of the world."""
        return self.start.world.rewards


Rewards = Callable[[Scene], Float[Array, "prompts responses"]]
Trained = tuple[Params, Metrics]


def scene(pipeline: Pipeline, key: Key[Array, ""]) -> Scene:
    """The tutorial's world, SFT policy and comparisons, and a reward model fitted to these."""
    start = pipeline.start(key)
    pairs_key, reward_key, train_key = jax.random.split(start.key, 3)
    preferences = pipeline.comparisons(pairs_key, start)
    rewards, history = train_reward_model(pipeline, reward_key, start.world, preferences)
    true = start.world.rewards
    quality = {
        "error": jnp.mean(toy.reward_error(rewards, true)),
        "ranking_accuracy": jnp.mean(toy.ranking_accuracy(rewards, true)),
        "training_accuracy": history["accuracy"][-1],
        "training_loss": history["loss"][-1],
        "spread_of_true_rewards": jnp.mean(jnp.std(true, axis=-1)),
    }
    return Scene(start, train_key, preferences, rewards, quality)


def train_reward_model(
    pipeline: Pipeline,
    key: Key[Array, ""],
    world: toy.World,
    preferences: Preferences,
) -> tuple[Float[Array, "prompts responses"], Metrics]:
    """Fits a fresh network to the comparisons, as long as DPO trains; returns its table of rewards.

    Its learning rate is the notebook's for DPO, and is not tuned. The network is fresh, because the outputs of the SFT
    policy are no neutral start: its logits already know which responses demonstrators show more often.
    """
    init_key, train_key = jax.random.split(key)
    network, embeddings = pipeline.policy, world.embeddings  # its outputs read as rewards
    score = toy.score_fn(network, embeddings)
    objective = train.reference_free_objective(score, losses.bradley_terry_loss, centring=0.01)
    params, history = pipeline.fit(train_key, network.init(init_key, embeddings), preferences, objective=objective)
    return toy.score_table_fn(network, embeddings)(params), history


@dataclass(frozen=True)
class Contender:
    """A way from the SFT policy to a better one.

    Attributes:
      name: of the method, and who judges.
      stages: what is trained, one after the other.
      train: `(pipeline, scene, strength, learning rate) -> (parameters, history)`.
      judge: who says what is good.
      samples_per_step: how many responses are sampled for each optimizer step.
      labels_per_step: how many judgements people make for each optimizer step; if 0, the stored comparisons are used.
      steps_per_round: how many optimizer steps belong together.
      strength: the name of what is swept, mostly beta.
      strengths: its values.
      usual: the one of these at which methods are compared.
    """

    name: str
    stages: tuple[str, ...]
    train: Callable[[Pipeline, Scene, Numeric, Numeric], Trained]
    judge: str
    samples_per_step: int = 0
    labels_per_step: int = 0
    steps_per_round: int = 1
    strength: str = "beta"
    strengths: tuple[float, ...] = STRENGTHS
    usual: float = BETA

    def trained(
        self, scene: Scene, strength: Numeric, learning_rate: Numeric, *, pipeline: Pipeline = TUTORIAL
    ) -> tuple[Array, Metrics]:
        """The trained policy's table, and the history."""
        params, history = self.train(pipeline, scene, strength, learning_rate)
        return pipeline.table(scene.world)(policy_of(params)), history

    def steps(self, pipeline: Pipeline) -> int:
        """How many optimizer steps the policy takes."""
        return pipeline.num_steps // self.steps_per_round * self.steps_per_round

    def samples(self, pipeline: Pipeline) -> int:
        """How many responses are sampled during training."""
        return self.samples_per_step * self.steps(pipeline)

    def labels(self, pipeline: Pipeline) -> int:
        """How many judgements of people it takes."""
        return self.labels_per_step * self.steps(pipeline) or pipeline.num_preferences


def policy_of(params: Params) -> Params:
    """The policy's parameters, also where a value function was trained beside it."""
    return params.policy if isinstance(params, rlhf.ActorCritic) else params


def fit(pipeline: Pipeline, scene: Scene, objective: Any, learning_rate: Numeric) -> Trained:
    """Trains on the stored comparisons."""
    return pipeline.fit(
        scene.key,
        scene.start.params,
        scene.preferences,
        objective=objective,
        learning_rate=learning_rate,
        evaluate=partial(evaluate, pipeline, scene),
    )


def fit_online(pipeline: Pipeline, scene: Scene, learner: Any, learning_rate: Numeric, **options: Any) -> Trained:
    """Trains on what the policy does: one step on each batch, unless told otherwise."""
    schedule = {"num_epochs": pipeline.num_epochs, "rounds_per_epoch": pipeline.steps_per_epoch}
    options = {"key": scene.key, "params": scene.start.params, **schedule, **options}
    return train.fit_online(
        learner=learner, optimizer=optax.adam(learning_rate), evaluate=partial(evaluate, pipeline, scene), **options
    )


def evaluate(pipeline: Pipeline, scene: Scene, params: Params) -> Metrics:
    """Exact true reward, KL, and the reward model's score."""
    log_probs = pipeline.table(scene.world)(policy_of(params))
    return {
        **toy.evaluate(log_probs, scene.start.log_probs, scene.true_rewards),
        "learned_reward": jnp.mean(toy.expected_reward(log_probs, scene.learned_rewards)),
    }


def exchange(pipeline: Pipeline, scene: Scene, group_size: int, num: int) -> dict[str, Any]:
    """Learners' functions to ask for `num` responses in groups, and to score them."""
    return {
        "ask": toy.ask_uniformly(scene.world, num=num // group_size),
        "respond": toy.respond_fn(pipeline.policy, scene.world.embeddings, group_size=group_size),
        "log_prob": pipeline.log_prob(scene.world),
        "reference_params": scene.start.params,
    }


def dpo(pipeline: Pipeline, scene: Scene, beta: Numeric, learning_rate: Numeric) -> Trained:
    """The notebook's."""
    objective = train.preference_objective(pipeline.log_prob(scene.world), losses.dpo_loss, beta=beta)
    return fit(pipeline, scene, objective, learning_rate)


def preferred_fine_tuning(pipeline: Pipeline, scene: Scene, _: Numeric, learning_rate: Numeric) -> Trained:
    """A baseline of the DPO paper: imitate the chosen responses."""
    objective = train.reference_free_objective(pipeline.log_prob(scene.world), losses.sft_loss)
    return fit(pipeline, scene, objective, learning_rate)


def unlikelihood(pipeline: Pipeline, scene: Scene, alpha: Numeric, learning_rate: Numeric) -> Trained:
    """A baseline of the DPO paper: imitate the chosen responses, and unlearn the rejected ones."""
    log_prob = pipeline.log_prob(scene.world)
    objective = train.reference_free_objective(log_prob, losses.unlikelihood_loss, alpha=alpha)
    return fit(pipeline, scene, objective, learning_rate)


def ppo(
    rewards: Rewards, pipeline: Pipeline, scene: Scene, beta: Any, learning_rate: Numeric, *, clip: Numeric = 0.2
) -> Trained:
    """Four passes over four batches of each round."""
    embeddings = scene.world.embeddings
    init_key, train_key = jax.random.split(scene.key)
    learner = rlhf.ppo(
        **exchange(pipeline, scene, 1, PPO_BATCHES * pipeline.batch_size),
        reward=toy.reward_fn(rewards(scene)),
        value=toy.value_fn(VALUE, embeddings),
        beta=beta,
        clip=clip,
    )
    num_rounds = pipeline.num_steps // (PPO_PASSES * PPO_BATCHES)
    rounds_per_epoch = 3 if num_rounds % 3 == 0 else 1
    return fit_online(
        pipeline,
        scene,
        learner,
        learning_rate,
        key=train_key,
        params=rlhf.ActorCritic(scene.start.params, VALUE.init(init_key, embeddings)),
        num_epochs=num_rounds // rounds_per_epoch,
        rounds_per_epoch=rounds_per_epoch,
        passes_per_round=PPO_PASSES,
        batch_size=pipeline.batch_size,
    )


def adaptive_ppo(
    rewards: Rewards, pipeline: Pipeline, scene: Scene, target: Numeric, learning_rate: Numeric
) -> Trained:
    """PPO whose KL coefficient is adapted so that the KL stays on target."""
    return ppo(rewards, pipeline, scene, rlhf.AdaptiveKL(initial=BETA, target=target, gain=1.0), learning_rate)


def reinforced(
    make: Any,
    group_size: int,
    rewards: Rewards,
    pipeline: Pipeline,
    scene: Scene,
    beta: Numeric,
    learning_rate: Numeric,
) -> Trained:
    """A policy-gradient learner with one step on each batch."""
    asked = exchange(pipeline, scene, group_size, pipeline.batch_size)
    learner = make(**asked, reward=toy.reward_fn(rewards(scene)), beta=beta)
    return fit_online(pipeline, scene, learner, learning_rate)


def online_dpo(
    rewards: Rewards, pipeline: Pipeline, scene: Scene, beta: Numeric, learning_rate: Numeric, **options: Any
) -> Trained:
    """Fresh pairs of the policy, judged by rewards."""
    asked = exchange(pipeline, scene, 2, pipeline.batch_size)
    learner = rlhf.online_dpo(**asked, prefer=toy.preference_fn(rewards(scene)), beta=beta)
    return fit_online(pipeline, scene, learner, learning_rate, **options)


def answered_by(params: Params, respond: RespondFn) -> RespondFn:
    """Responses of a policy that never changes."""

    def always(key: Key[Array, ""], _: Params, prompts: Array) -> Responses:
        return respond(key, params, prompts)

    return always


def dpo_on_fresh(pipeline: Pipeline, scene: Scene, beta: Numeric, learning_rate: Numeric, **options: Any) -> Trained:
    """DPO, offline, with as many labels as online DPO: each comparison is of two SFT responses and is used once."""
    asked = exchange(pipeline, scene, 2, pipeline.batch_size)
    asked["respond"] = answered_by(scene.start.params, asked["respond"])
    learner = rlhf.online_dpo(**asked, prefer=toy.preference_fn(scene.true_rewards), beta=beta)
    return fit_online(pipeline, scene, learner, learning_rate, **options)


def xpo(pipeline: Pipeline, scene: Scene, beta: Numeric, learning_rate: Numeric, **options: Any) -> Trained:
    """The policy's answer against the reference's, judged by people."""
    asked = exchange(pipeline, scene, 1, pipeline.batch_size // 2)
    learner = rlhf.xpo(**asked, prefer=toy.preference_fn(scene.true_rewards), beta=beta, alpha=OPTIMISM)
    return fit_online(pipeline, scene, learner, learning_rate, **options)


def nash_md(pipeline: Pipeline, scene: Scene, tau: Numeric, learning_rate: Numeric) -> Trained:
    """The policy's answers against those of a mixture of itself and the reference.

    It is told how probable a preference is, which is more than the one answer that online DPO and XPO get.
    """
    opponent = toy.respond_fn(
        pipeline.policy, scene.world.embeddings, group_size=1, reference_log_probs=scene.start.log_probs, mix=MIX
    )
    learner = rlhf.nash_md(
        **exchange(pipeline, scene, 1, pipeline.batch_size),
        opponent=opponent,
        prefer=toy.preference_fn(scene.true_rewards),
        tau=tau,
    )
    return fit_online(pipeline, scene, learner, learning_rate)


LEARNED: Rewards = lambda scene: scene.learned_rewards  # noqa: E731
TRUE: Rewards = lambda scene: scene.true_rewards  # noqa: E731
COMPARISONS, MODEL, PEOPLE, TRUTH = "comparisons", "reward model", "people, asked on", "true reward"
SFT, FIT_REWARDS = "SFT", "reward model"
BATCH_SIZE = TUTORIAL.batch_size
PPO_NEEDS = {"samples_per_step": BATCH_SIZE // PPO_PASSES, "steps_per_round": PPO_PASSES * PPO_BATCHES}


def by_model(name: str, method: Any, *, samples_per_step: int = BATCH_SIZE, **options: Any) -> Contender:
    """A method that is judged by the reward model."""
    stages = (SFT, FIT_REWARDS, name)
    return Contender(f"{name}, reward model", stages, partial(method, LEARNED), MODEL, samples_per_step, **options)


def by_truth(name: str, method: Any, *, samples_per_step: int = BATCH_SIZE, **options: Any) -> Contender:
    """A method that sees the true reward of each response: what is possible without errors of judgement."""
    train = partial(method, TRUE)
    return Contender(
        f"{name}, true reward", (SFT, name), train, TRUTH, samples_per_step, labels_per_step=samples_per_step, **options
    )


def by_people(name: str, method: Any, *, labels_per_step: int = BATCH_SIZE // 2, **options: Any) -> Contender:
    """A method that asks people during training."""
    options = {"samples_per_step": BATCH_SIZE, **options}
    return Contender(f"{name}, people", (SFT, name), method, PEOPLE, labels_per_step=labels_per_step, **options)


def drgrpo(**options: Any) -> Any:
    """GRPO with Dr. GRPO's advantages."""
    return rlhf.grpo(**options, advantages=losses.centred_advantages)


CONTENDERS = (
    Contender("DPO", (SFT, "DPO"), dpo, COMPARISONS),
    Contender(
        "DPO, 46,400 comparisons",
        (SFT, "DPO"),
        dpo_on_fresh,
        COMPARISONS,
        samples_per_step=BATCH_SIZE,
        labels_per_step=BATCH_SIZE // 2,
    ),
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
    by_people("online DPO", partial(online_dpo, TRUE)),
    by_people("XPO", xpo),
    by_people(
        "Nash-MD",
        nash_md,
        samples_per_step=2 * BATCH_SIZE,
        labels_per_step=BATCH_SIZE,
        strength="tau",
        strengths=tuple(beta / 4 for beta in STRENGTHS),
        usual=BETA / 4,
    ),
    by_truth("PPO", ppo, **PPO_NEEDS),
    by_truth("RLOO", partial(reinforced, rlhf.rloo, 4)),
)
"""All of them. Tau is a quarter of beta, since a difference in reward moves a preference by at most a quarter of it."""


def contender(name: str) -> Contender:
    """The contender of this name."""
    return next(each for each in CONTENDERS if each.name == name)
