"""The measurements by which the claims are judged: runs by the thousand, one number for each run.

`gather` returns arrays by name whose last axis is the seed; `statements.py` turns them into claims.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dpo_jax import losses, sweep, toy, train
from dpo_jax.types import Metrics, Numeric, Params, Preferences
from experiments import dpo_vs_rlhf, loss_variants
from experiments.dpo_vs_rlhf import LEARNING_RATES, StrengthTrials
from experiments.lab import console, contenders
from experiments.lab.comparison import chosen_methods
from experiments.lab.contenders import Scene
from experiments.lab.feedback import SETTINGS, Setting
from experiments.lab.methods import METHODS, REFERENCE_FREE, Method, reference_free
from experiments.lab.pipeline import BETA, BETAS, Pipeline, Start
from experiments.lab.runs import standard_run
from experiments.lab.statistics import over_seeds, seed_last
from experiments.lab.studies import Study
from experiments.lab.tuning import Range

MANY_BETAS = (0.003, BETAS[0], 0.03, BETAS[1], BETAS[2], BETAS[3])
RATED = ("DPO", "PPO, reward model", "RLOO, reward model", "GRPO, reward model")
"""Methods whose sensitivity to the learning rate is measured."""
COMPARED = ("DPO", "PPO, reward model")
"""Methods whose seconds are compared."""
NUM_TIMES = 9
"""How often they are timed."""
LONGER = 12
"""How many times longer DPO trains until it has converged."""
HACKED_BETAS = (BETAS[0], BETA)
CLIPS = (0.02, 0.05, 0.2, 0.5, 2.0)
FASTER = (1, 10)
"""Factors on the tutorial's learning rate at which PPO's clip is varied."""
POWERS = (1.0, 0.5, 0.25, 0.0, -0.125, -0.25, -0.5)
"""Factors on the logits of the SFT policy: references that know less (0: uniform) or rank the wrong way."""
EXPLORERS: dict[str, Callable[..., contenders.Trained]] = {
    "offline": contenders.dpo_on_fresh,
    "online": partial(contenders.online_dpo, contenders.TRUE),
    "xpo": contenders.xpo,
}
REGULARISED = ("dpo", "ipo")
"""Losses whose regularisation is watched while the learning rate grows."""
SMOOTHINGS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
SMOOTHED = ("conservative dpo", "robust dpo")


def orpo_from_scratch(pipeline: Pipeline) -> Method:
    """ORPO from a fresh network, on comparisons alone: no demonstrations, no SFT."""

    def fresh(key: Key[Array, ""], start: Start) -> Params:
        return pipeline.policy.init(key, start.world.embeddings)

    orpo = reference_free("orpo from scratch", losses.orpo_loss, odds_weight=Range(0.03, 100.0))
    return dataclasses.replace(orpo, family=REFERENCE_FREE, initial=fresh)


def variants(pipeline: Pipeline) -> list[Method]:
    """The losses that the notebook names."""
    named = chosen_methods(("dpo", "ipo", "kto", "kto on labels", "simpo", "orpo"), METHODS)
    return [*named, orpo_from_scratch(pipeline)]


def gather(pipeline: Pipeline, study: Study, num_candidates: int) -> dict[str, Any]:
    """Runs everything."""
    scenes = study.prepare(partial(contenders.scene, pipeline), "worlds, SFT policies and reward models")
    reported = scenes.sel(study.seeds.reported)
    hacked = StrengthTrials.all_of(HACKED_BETAS, [pipeline.learning_rate])
    with console.progress("Runs") as report:

        def grid(run: Callable[..., Metrics], starts: sweep.Starts = reported, **axes: Any) -> dict[str, np.ndarray]:
            return study.grid(partial(run, pipeline), starts, report, **axes)

        found: dict[str, Any] = {
            "dpo": grid(dpo_by_beta, beta=MANY_BETAS),
            **by_value(["dpo on policy"], grid(dpo_on_policy, beta=[BETA])),
            "dpo to the end": grid(dpo_to_the_end, beta=HACKED_BETAS),
            **by_value(["ppo"], grid(dpo_vs_rlhf.run, method=COMPARED[1:], trial=hacked)),
            "by_rate": by_value(
                RATED, grid(dpo_vs_rlhf.run, method=RATED, trial=StrengthTrials.all_of([BETA], LEARNING_RATES))
            ),
            "by_clip": study.split(
                grid(ppo_by_clip, scenes, faster=sweep.static(FASTER), clip=CLIPS)["expected_reward"]
            ),
            "exploration": by_value(list(EXPLORERS), grid(explore, how=list(EXPLORERS), power=POWERS)),
            "regularisation": by_value(REGULARISED, grid(regularised, loss=REGULARISED, learning_rate=LEARNING_RATES)),
        }
    with console.waiting("Evaluating what needs no training, and timing"):
        found |= {"exact": seed_last(over_seeds(exact, reported)), "cost": cost(pipeline, reported)}
    return found | compare_variants(pipeline, study, num_candidates)


def by_value(names: Sequence[str], found: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Results of each value of the first axis, under these names."""
    return {name: {what: rows[i] for what, rows in found.items()} for i, name in enumerate(names)}


def dpo_by_beta(pipeline: Pipeline, scene: Scene, *, beta: Numeric) -> Metrics:
    """The tutorial's DPO at one beta, with everything that claims are made about."""
    return dpo_measured(pipeline, scene, scene.preferences, beta)


def dpo_to_the_end(pipeline: Pipeline, scene: Scene, *, beta: Numeric) -> Metrics:
    """The same, trained until it has converged."""
    longer = dataclasses.replace(pipeline, num_epochs=LONGER * pipeline.num_epochs)
    return dpo_measured(longer, scene, scene.preferences, beta)


def dpo_on_policy(pipeline: Pipeline, scene: Scene, *, beta: Numeric) -> Metrics:
    """The same on comparisons of responses of the SFT policy."""
    pairs_key, train_key = jax.random.split(scene.key)
    pairs = pipeline.comparisons(pairs_key, scene.start, log_probs=scene.start.log_probs)
    return dpo_measured(pipeline, scene._replace(key=train_key), pairs, beta)


def dpo_measured(pipeline: Pipeline, scene: Scene, pairs: Preferences, beta: Numeric) -> Metrics:
    """DPO on some comparisons, and what became of their responses."""
    params, history = pipeline.dpo(scene.key, scene.start, pairs, beta)
    log_probs = pipeline.table(scene.world)(params)
    rewards, reference = scene.true_rewards, scene.start.log_probs
    ratios = log_probs - reference
    chosen, rejected = toy.lookup(ratios, pairs.prompts, pairs.responses)
    implicit_gain = jnp.sum((jnp.exp(log_probs) - jnp.exp(reference)) * beta * ratios, axis=-1)
    by_model = toy.optimal_policy(reference, scene.learned_rewards, beta=beta)
    gain = toy.expected_reward(log_probs, rewards) - toy.expected_reward(reference, rewards)
    return {
        **toy.evaluate(log_probs, reference, rewards),
        "gain": jnp.mean(gain),
        "overestimate": jnp.mean(implicit_gain - gain),
        "training_accuracy": history["accuracy"][-1],
        "new_accuracy": new_accuracy(ratios, rewards),
        "chosen_change": jnp.mean(chosen),
        "margin_change": jnp.mean(chosen - rejected),
        "share_of_chosen_that_fell": jnp.mean(chosen < 0),
        "share_of_widened_pairs": jnp.mean(chosen > rejected),
        "ranking_accuracy": jnp.mean(toy.ranking_accuracy(ratios, rewards)),
        "rlhf_reward": jnp.mean(toy.expected_reward(by_model, rewards)),
        "distance_to_rlhf": 0.5 * jnp.mean(jnp.sum(jnp.abs(jnp.exp(by_model) - jnp.exp(log_probs)), axis=-1)),
    }


def new_accuracy(scores: Array, rewards: Array) -> Array:
    """How often a score predicts a new comparison of two uniform, distinct responses: exact."""
    wins = toy.preference_table(rewards)
    right = jnp.where(scores[..., :, None] > scores[..., None, :], wins, 1 - wins)
    return jnp.mean(right[..., ~np.eye(rewards.shape[-1], dtype=bool)])


def ppo_by_clip(pipeline: Pipeline, scene: Scene, *, clip: Numeric, faster: int) -> Metrics:
    """PPO on the reward model at the usual beta, with another clip."""
    params, history = contenders.ppo(
        contenders.LEARNED, pipeline, scene, BETA, faster * pipeline.learning_rate, clip=clip
    )
    found = contenders.evaluate(pipeline, scene, params)
    return {name: jnp.where(jnp.isfinite(history["loss"][-1]), value, jnp.nan) for name, value in found.items()}


def explore(pipeline: Pipeline, scene: Scene, *, how: str, power: Numeric) -> Metrics:
    """DPO on 32 fresh comparisons a step, from a reference whose logits are those of the SFT policy times a factor.

    Offline, both responses are the reference's; online, both are the policy's; with XPO one of the two is the policy's.
    """
    params, table = sharpened(scene.start.params, power), pipeline.table(scene.world)
    scene = scene._replace(start=scene.start._replace(params=params, log_probs=table(params)))
    tuned, history = EXPLORERS[how](
        pipeline, scene, BETA, pipeline.learning_rate, num_epochs=1, rounds_per_epoch=pipeline.num_steps
    )
    policy, reference, rewards = table(tuned), scene.start.log_probs, scene.true_rewards
    best = toy.optimal_policy(reference, rewards, beta=BETA)
    coverage = jnp.sum(jnp.exp(2 * best - reference), axis=-1)
    measured = {
        **toy.evaluate(policy, reference, rewards),
        "regret": jnp.mean(toy.regret(policy, reference, rewards, beta=BETA)),
        "reference_reward": jnp.mean(toy.expected_reward(reference, rewards)),
        "optimal_reward": jnp.mean(toy.expected_reward(best, rewards)),
        "log_coverage": jnp.mean(jnp.log(coverage)),
    }
    finished = jnp.isfinite(history["loss"][-1])
    return {name: jnp.where(finished, value, jnp.nan) for name, value in measured.items()}


def sharpened(params: Params, power: Numeric) -> Params:
    """The network whose logits are those of another, times a factor."""
    (last,) = (name for name in params["params"] if name.endswith("_1"))
    scaled = jax.tree.map(lambda leaf: power * leaf, params["params"][last])
    return {"params": {**params["params"], last: scaled}}


def regularised(pipeline: Pipeline, scene: Scene, *, loss: str, learning_rate: Numeric) -> Metrics:
    """A loss at the usual beta on labels that are never wrong: does it keep the policy near the reference?

    `margin` is the mean absolute log-ratio (nats) of chosen to rejected; `merit` the expected reward minus beta times
    KL.
    """
    pairs_key, train_key = jax.random.split(scene.key)
    pairs = pipeline.comparisons(pairs_key, scene.start, temperature=0.0)
    objective = train.preference_objective(
        pipeline.log_prob(scene.world), {"dpo": losses.dpo_loss, "ipo": losses.ipo_loss}[loss], beta=BETA
    )
    params, history = pipeline.fit(
        train_key, scene.start.params, pairs, objective=objective, learning_rate=learning_rate
    )
    log_probs = pipeline.table(scene.world)(params)
    chosen, rejected = toy.lookup(log_probs - scene.start.log_probs, pairs.prompts, pairs.responses)
    found = toy.evaluate(log_probs, scene.start.log_probs, scene.true_rewards)
    measured = {
        "margin": jnp.mean(jnp.abs(chosen - rejected)),
        "merit": found["expected_reward"] - BETA * found["kl_to_reference"],
        "expected_reward": found["expected_reward"],
    }
    finished = jnp.isfinite(history["loss"][-1])
    return {name: jnp.where(finished, value, jnp.nan) for name, value in measured.items()}


def exact(scene: Scene) -> dict[str, Any]:
    """What needs no training: how far a reward model misleads if it is maximised exactly, and how well it ranks."""
    reference, learned, rewards = scene.start.log_probs, scene.learned_rewards, scene.true_rewards

    def maximised(beta: Array) -> Metrics:
        best = toy.optimal_policy(reference, learned, beta=beta)
        change = jnp.exp(best) - jnp.exp(reference)
        true, by_model = (jnp.mean(jnp.sum(change * r, axis=-1)) for r in (rewards, learned))
        return {"gain": true, "overestimate": by_model - true, **toy.evaluate(best, reference, rewards)}

    return {
        "sft_reward": jnp.mean(toy.expected_reward(reference, rewards)),
        "ranking_accuracy": jnp.mean(toy.ranking_accuracy(learned, rewards)),
        "maximised": jax.vmap(maximised)(jnp.asarray(MANY_BETAS)),
        "optimal_reward": jax.vmap(
            lambda beta: jnp.mean(toy.expected_reward(toy.optimal_policy(reference, rewards, beta=beta), rewards))
        )(jnp.asarray(MANY_BETAS)),
    }


def cost(pipeline: Pipeline, scenes: sweep.Starts) -> dict[str, np.ndarray]:
    """Seconds per run of DPO, and of reward model and PPO, in turn."""
    run, trial = partial(dpo_vs_rlhf.run, pipeline), StrengthTrials.of([(BETA, pipeline.learning_rate)])
    dpo, ppo = (dpo_vs_rlhf.timed(run, scenes, method=[name], trial=trial) for name in COMPARED)
    model = dpo_vs_rlhf.timed(partial(dpo_vs_rlhf.fit_rewards, pipeline=pipeline), scenes)
    for warm_up in (dpo, ppo, model):
        warm_up()
    times = np.array([[dpo()["run"], model()["run"] + ppo()["run"]] for _ in range(NUM_TIMES)])
    return {"dpo": times[:, 0], "rlhf": times[:, 1]}


def compare_variants(pipeline: Pipeline, study: Study, num_candidates: int) -> dict[str, Any]:
    """The losses that the notebook names, tuned, on feedback of every kind; and DPO's label smoothing, varied alone."""
    methods = variants(pipeline)
    starts = study.prepare(pipeline.start, "worlds and SFT policies")
    found = loss_variants.compare(methods, starts, study.seeds, num_candidates, pipeline, study.seconds)
    places = {method.name: i for i, method in enumerate(methods)}
    tuned = found["noisy"][places["dpo"]]["hyperparameters"]
    return {
        "variants": {
            name: {setting: found[setting][i]["results"] for setting in SETTINGS} for name, i in places.items()
        },
        "variants_sft_reward": found["clean"][0]["results"]["sft_reward"],
        "smoothing": smoothing(pipeline, study, starts.sel(study.seeds.reported), tuned),
    }


def smoothing(pipeline: Pipeline, study: Study, starts: sweep.Starts, tuned: dict[str, Any]) -> dict[str, np.ndarray]:
    """True reward `[methods, training, smoothings, seeds]` with a fifth of the labels flipped.

    Learning rate and beta are those tuned for DPO, then with a learning rate ten times as high (`training`).
    """
    known = {method.name: method for method in chosen_methods(SMOOTHED, METHODS)}
    rate, beta = float(tuned["learning_rate"]), float(tuned["beta"])

    def run(start: Start, *, method: str, learning_rate: Numeric, label_smoothing: Numeric) -> Metrics:
        chosen = {"learning_rate": learning_rate, "beta": beta, "label_smoothing": label_smoothing}
        return standard_run(pipeline, known[method], start, Setting(flip_probability=0.2), chosen)

    axes: dict[str, Any] = {"method": SMOOTHED, "learning_rate": [rate, 10 * rate], "label_smoothing": SMOOTHINGS}
    with console.progress("Label smoothing") as report:
        return {"expected_reward": study.grid(run, starts, report, **axes)["expected_reward"]}
