"""The standard run: feedback in a world, training by one method from the SFT policy, and exact evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax import toy
from dpo_jax.types import Metrics, Numeric
from experiments.lab.feedback import Feedback, Setting
from experiments.lab.methods import Method, Setup, method_of
from experiments.lab.pipeline import BETA, TUTORIAL, Pipeline, Start


def run_of(loss: Callable[..., Array], pipeline: Pipeline = TUTORIAL) -> Callable[..., Metrics]:
    """The standard run with a loss of your own, to be swept.

        results = sweep.grid(
            run_of(focal_loss), key, prepare=TUTORIAL.start, num_seeds=64, beta=[0.1, 0.5], gamma=[1, 2]
        )

    Args:
      loss: see `methods.method_of`; its keyword arguments may be axes, and so may `learning_rate` and what `Setting`
        lists.
      pipeline: the sizes.

    Returns:
      `run(start, *, learning_rate=..., judge_temperature=1, flip_probability=0, on_policy=0, **hyperparameters)`,
      which returns what `standard_run` returns.

    Raises:
      TypeError: the loss takes something else, or an argument of the same name as one of `Setting`.
    """
    method = method_of(getattr(loss, "__name__", "loss"), loss)
    if both := {*method.ranges, *method.optional} & {"learning_rate", *Setting._fields}:
        raise TypeError(f"{method.name} has an argument {min(both)!r}, as the run has: rename it")

    def run(start: Start, *, learning_rate: Numeric = pipeline.learning_rate, **values: Numeric) -> Metrics:
        setting = Setting(**{name: values.pop(name) for name in Setting._fields if name in values})
        return standard_run(pipeline, method, start, setting, {"learning_rate": learning_rate, **values})

    return run


def standard_run(
    pipeline: Pipeline, method: Method, start: Start, setting: Setting, hyperparameters: Mapping[str, Numeric]
) -> Metrics:
    """Trains by one method and measures the policy.

    Returns:
      What `measured` returns; NaN if training diverged.
    """
    feedback = feedback_of(pipeline, start, setting)
    log_probs = trained(pipeline, method, start, feedback, hyperparameters)
    finite = ~jnp.any(jnp.isnan(log_probs))
    found = measured(start, feedback, log_probs)
    return {name: jnp.where(finite, value, jnp.nan) for name, value in found.items()}


def trained(
    pipeline: Pipeline, method: Method, start: Start, feedback: Feedback, hyperparameters: Mapping[str, Numeric]
) -> Float[Array, "prompts responses"]:
    """The table of the policy after training by one method; NaN if training diverged."""
    _, train_key, method_key, init_key = jax.random.split(start.key, 4)
    log_prob, table = pipeline.log_prob(start.world), pipeline.table(start.world)
    setup = Setup(method_key, log_prob, table, start.params, start.log_probs)
    tuned = {name: value for name, value in hyperparameters.items() if name != "learning_rate"}
    params, history = pipeline.fit(
        train_key,
        method.initial(init_key, start),
        method.data(feedback),
        objective=method.objective(setup, tuned),
        learning_rate=hyperparameters["learning_rate"],
    )
    return jnp.where(jnp.isfinite(history["loss"][-1]), table(params), jnp.nan)


def feedback_of(pipeline: Pipeline, start: Start, setting: Setting) -> Feedback:
    """What people say in the standard run."""
    feedback_key, *_ = jax.random.split(start.key, 4)
    return Feedback(pipeline, feedback_key, start, setting)


def measured(start: Start, feedback: Feedback, log_probs: Float[Array, "prompts responses"]) -> dict[str, Any]:
    """Exact measures of a policy, and its change of the log-probability of chosen responses, over the training pairs.

    `accuracy` is that of the policy, which also learned from demonstrations; `implicit_accuracy` that of its change.
    """
    rewards, pairs = start.world.rewards, feedback.pairs()
    change = log_probs - start.log_probs
    return {
        **toy.evaluate(log_probs, start.log_probs, rewards),
        "regret": jnp.mean(toy.regret(log_probs, start.log_probs, rewards, beta=BETA)),
        "accuracy": jnp.mean(toy.ranking_accuracy(log_probs, rewards)),
        "implicit_accuracy": jnp.mean(toy.ranking_accuracy(change, rewards)),
        "chosen_logp_change": jnp.mean(toy.lookup(change, pairs.prompts, pairs.responses.chosen)),
        "sft_reward": jnp.mean(toy.expected_reward(start.log_probs, rewards)),
    }
