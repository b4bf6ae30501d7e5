"""The worlds of strings that several experiments share: their pipeline, their judges, and methods that know lengths.

A world has two prompts and all strings of up to six letters over two, 127 of them. Rewards are sums over letters,
neighbours and words, and say nothing about length. The SFT policy imitates demonstrators whose strings have about
three letters, and who show good strings more often.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dpo_jax import losses, strings, toy, train
from dpo_jax.types import Metrics, Numeric, Objective, Pair, Params, Preferences, StatefulObjective
from experiments.lab.feedback import Feedback, Setting
from experiments.lab.methods import BETA as BETA_RANGE
from experiments.lab.methods import METHODS, Hyperparameters, Method, Setup
from experiments.lab.pipeline import Pipeline, Start
from experiments.lab.runs import feedback_of
from experiments.lab.tuning import Range

STRINGS = strings.Strings(num_letters=2, horizon=6)
BETA = 0.5
"""The price of a nat of KL, in units of reward; rewards have a standard deviation of about 1."""


def demonstrator(world: toy.World, every: strings.Strings = STRINGS) -> Float[Array, "prompts responses"]:
    """The table of people who write strings of a typical length, and good ones more often."""
    plain = strings.reference_log_probs(every, expected_length=every.horizon / 2)
    return toy.optimal_policy(jnp.broadcast_to(plain, world.rewards.shape), world.rewards, beta=2.0)


def pipeline_of(every: strings.Strings, hidden_dim: int = 32) -> Pipeline:
    """The steps of an experiment with strings; rewards say nothing about length."""
    return Pipeline(
        make_world=partial(strings.make_world, strings=every),
        policy=strings.CausalMLP(every, hidden_dim),
        demonstrator=partial(demonstrator, every=every),
        num_demonstrations=500,
        num_preferences=1024,
        sft_epochs=30,
        sft_batch_size=32,
        num_epochs=20,
        batch_size=64,
    )


PIPELINE = pipeline_of(STRINGS)


class Judge(NamedTuple):
    """Who compares responses, and of which policy. All numbers may be traced.

    Attributes:
      liking: what a judge adds to the reward of a string of full length; negative for one who dislikes length.
      flip_probability: the probability that a label is flipped.
      on_policy: 1 if responses are those of the SFT policy, 0 if uniform ones.
    """

    liking: Numeric = 0.0
    flip_probability: Numeric = 0.0
    on_policy: Numeric = 1.0


JUDGES = {"indifferent": Judge(), "fond of length": Judge(liking=2.0), "averse to length": Judge(liking=-2.0)}


def heard(pipeline: Pipeline, start: Start, judge: Judge) -> Feedback:
    """What a judge says in a world: the log-probabilities are those of the SFT policy."""
    seen = start._replace(world=strings.judged(start.world, strings_of(pipeline), liking=judge.liking))
    setting = Setting(flip_probability=judge.flip_probability, on_policy=judge.on_policy)
    return feedback_of(pipeline, seen, setting)


def strings_of(pipeline: Pipeline) -> strings.Strings:
    """The strings of a pipeline's worlds."""
    return pipeline.policy.strings


def measured(
    start: Start,
    log_probs: Float[Array, "prompts responses"],
    *,
    every: strings.Strings = STRINGS,
) -> Metrics:
    """Exact measures of a policy, by the truth.

    Returns:
      `expected_reward`, `kl_to_reference`, `regret`, `merit` (reward less beta times KL), `expected_length`,
      `optimal_length` (of the policy of highest reward that is as far from the reference), and `longer`, their
      difference; means over prompts.
    """
    rewards, reference = start.world.rewards, start.log_probs
    found = toy.evaluate(log_probs, reference, rewards)
    best = toy.optimal_policy_at_kl(reference, rewards, kl=jnp.maximum(found["kl_to_reference"], 0))
    lengths = [jnp.mean(strings.expected_length(table, every)) for table in (log_probs, best)]
    return {
        **found,
        "regret": jnp.mean(toy.regret(log_probs, reference, rewards, beta=BETA)),
        "merit": found["expected_reward"] - BETA * found["kl_to_reference"],
        "expected_length": lengths[0],
        "optimal_length": lengths[1],
        "longer": lengths[0] - lengths[1],
    }


def on_tokens(setup: Setup, score: Callable[[Any, Any], Any], loss: Any, **h: Numeric) -> Objective:
    """A preference loss whose log-probabilities are made of those of tokens, for the policy and for the reference.

    Args:
      setup: what a method may use.
      score: `(pair of TokenLogps, batch) -> pair of log-probabilities`.
      loss: the loss.
      **h: its hyperparameters.
    """

    def scored(log_probs: Float[Array, "prompts responses"], batch: Preferences) -> Any:
        next_tokens = strings.next_token_log_probs(log_probs, STRINGS)
        pair = (strings.token_lookup(next_tokens, STRINGS, batch.prompts, side) for side in batch.responses)
        return score(Pair(*pair), batch)

    def objective(params: Params, batch: Preferences) -> tuple[Array, Metrics]:
        def log_prob(params: Params, prompts: Array, responses: Any) -> Any:
            return scored(setup.table(params), batch._replace(prompts=prompts, responses=responses))

        reference = jax.lax.stop_gradient(scored(setup.reference_log_probs, batch))
        return train.preference_objective(log_prob, loss, **h)(params, batch._replace(reference_logps=reference))

    return objective


def ld_dpo(setup: Setup, h: Hyperparameters) -> Objective:
    """LD-DPO: tokens beyond the length of the shorter response count less."""

    def score(tokens: Any, batch: Preferences) -> Pair:
        nums = strings.num_tokens_of(STRINGS, batch.responses)
        common = jnp.minimum(*nums)
        sums = (
            losses.length_desensitized_logps(side.values, num, common, alpha=h["alpha"])
            for side, num in zip(tokens, nums, strict=True)
        )
        return Pair(*sums)

    return on_tokens(setup, score, losses.dpo_loss, beta=h["beta"])


def sampo(setup: Setup, h: Hyperparameters) -> Objective:
    """SamPO: as many tokens of each response as the shorter one has, drawn anew in each step."""

    def apply(params: Params, batch: Preferences, key: Key[Array, ""]) -> tuple[Array, Metrics, Any]:
        key, chosen_key, rejected_key = jax.random.split(key, 3)
        chosen, rejected = strings.num_tokens_of(STRINGS, batch.responses)
        common = jnp.minimum(chosen, rejected)
        masks = (
            losses.down_sampling_mask(chosen_key, chosen, common, num_tokens=STRINGS.horizon),
            losses.down_sampling_mask(rejected_key, rejected, common, num_tokens=STRINGS.horizon),
        )

        def score(tokens: Any, _: Preferences) -> Pair:
            return Pair(*(jnp.sum(side.values * mask, axis=-1) for side, mask in zip(tokens, masks, strict=True)))

        return *on_tokens(setup, score, losses.dpo_loss, beta=h["beta"])(params, batch), key

    return StatefulObjective(setup.key, apply)


def told_lengths(
    loss: Any, lengths: Callable[[strings.Strings, Any], Any]
) -> Callable[[Setup, Hyperparameters], Objective]:
    """The objective of a loss that is told how long responses are."""

    def objective(setup: Setup, h: Hyperparameters) -> Objective:
        return train.preference_objective(
            setup.log_prob, loss, lengths=lambda _, batch, __: lengths(STRINGS, batch.responses), **h
        )

    return objective


R_DPO = told_lengths(losses.length_regularized_dpo_loss, strings.lengths_of)
LN_DPO = told_lengths(losses.length_normalized_dpo_loss, strings.num_tokens_of)


def on_means(method: Method, name: str | None = None) -> Method:
    """A method that sees means over tokens in place of sums, of the policy and of the reference."""

    def objective(setup: Setup, h: Hyperparameters) -> Objective:
        inner = method.objective(setup._replace(log_prob=strings.on_means(setup.log_prob, STRINGS)), h)

        def of_means(params: Params, batch: Any) -> Any:
            nums = strings.num_tokens_of(STRINGS, batch.responses)
            means = jax.tree.map(lambda total, num: total / num, batch.reference_logps, nums)
            return inner(params, batch._replace(reference_logps=means))

        return of_means

    return replace(method, name=name or method.name, objective=objective)


LENGTH_AWARE = "length-aware"
KNOWN = {method.name: method for method in METHODS}
OWN = (
    Method("r-dpo", LENGTH_AWARE, R_DPO, {"beta": BETA_RANGE, "alpha": Range(0.003, 1.0)}),
    Method("ln-dpo", LENGTH_AWARE, LN_DPO, {"beta": Range(0.01, 100.0)}),
    Method("ld-dpo", LENGTH_AWARE, ld_dpo, {"beta": BETA_RANGE, "alpha": Range(0.0, 1.0, linear=True)}),
    Method("sampo", LENGTH_AWARE, sampo, {"beta": BETA_RANGE}),
    on_means(KNOWN["ipo"], "ipo on means"),
    replace(KNOWN["orpo"], name="orpo on sums"),
)
MEANS = ("simpo", "alphapo", "orpo")
"""Methods whose papers take means over tokens."""
STRING_METHODS = (
    *(on_means(method) if method.name in MEANS else method for method in METHODS),
    *OWN,
)
"""All methods, each on what its paper takes: sums over tokens, or means."""
