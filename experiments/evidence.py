"""What is measured to judge the notebook's claims: runs by the thousand, one number for each run.

`gather` returns arrays by name whose last axis is the seed; `experiments/claims.py` makes statements of them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dpo_jax import losses, rlhf, toy, train
from dpo_jax.types import LogProbFn, Numeric, Params, RespondFn, Responses
from experiments import contenders, dpo_vs_rlhf, harness, loss_variants
from experiments.contenders import BATCH_SIZE, CONTENDERS, NUM_EPOCHS, NUM_STEPS, Contender, Scene
from experiments.dpo_vs_rlhf import LEARNING_RATES, point
from experiments.loss_variants import SETTINGS, Start
from experiments.notebook import BETA, BETAS, POLICY
from experiments.tuning import Counter, Hyperparameters, Plan, Range, Runner, Task, candidates, tune

THREADS = 2
NOTEBOOK_RATE = 1e-3
MANY_BETAS = (0.003, BETAS[0], 0.03, BETAS[1], BETAS[2], BETAS[3])
RATED = ("DPO", "PPO, reward model", "RLOO, reward model", "GRPO, reward model")
"""Methods whose sensitivity to the learning rate is measured."""
COMPARED = ("DPO", "PPO, reward model")
NUM_TIMES = 9
"""Methods whose seconds are compared, and how often."""
LONG = 600
"""Epochs after which DPO has come to rest."""
HACKED_BETAS = (BETAS[0], BETA)
CLIP_RATES = (NOTEBOOK_RATE, 10 * NOTEBOOK_RATE)
CLIPS = (0.02, 0.05, 0.2, 0.5, 2.0)
VARIANTS = ("dpo", "ipo", "kto", "kto, labels", "simpo", "orpo")
"""Losses that the notebook speaks of, compared by `loss_variants`."""
POWERS = (1.0, 0.5, 0.25, 0.0, -0.125, -0.25, -0.5)
"""Factors on the logits of the SFT policy that make references which know less (0 knows nothing), or the contrary."""
EXPLORERS = ("offline", "online", "xpo")
ORPO_RANGES = {"learning_rate": Range(1e-4, 3e-2), "odds_weight": Range(0.03, 100.0)}


def gather(seeds: np.ndarray, tuning: np.ndarray, num_candidates: int, watch: harness.Stopwatch) -> dict[str, Any]:
    """Runs everything.

    Args:
      seeds: of the worlds to report.
      tuning: of other worlds, to choose hyperparameters in.
      num_candidates: how many sets of hyperparameters to try for each loss.
      watch: compiles, and counts the seconds.
    """
    scenes = dpo_vs_rlhf.prepare_all(seeds, watch)
    num, rows = len(seeds), np.arange(len(seeds))
    parts = {
        "dpo": (dpo_by_beta, betas_of(MANY_BETAS)),
        "dpo to the end": (partial(dpo_by_beta, num_epochs=LONG), betas_of(HACKED_BETAS)),
        "ppo": (partial(dpo_vs_rlhf.run, contender(COMPARED[1])), [point(b, NOTEBOOK_RATE) for b in HACKED_BETAS]),
        **{
            name: (partial(dpo_vs_rlhf.run, contender(name)), [point(BETA, rate) for rate in LEARNING_RATES])
            for name in RATED
        },
        "clip": (ppo_by_clip, [point(clip, rate) for rate in CLIP_RATES for clip in CLIPS]),
        **{name: (partial(explore, name), [point(power, NOTEBOOK_RATE) for power in POWERS]) for name in EXPLORERS},
    }
    num_runs = num * sum(len(points) for _, points in parts.values())
    with harness.progress("runs", num_runs, watch) as show_done, harness.threads(THREADS) as threads:
        runner = Runner({"worlds": scenes}, watch, Counter(show_done))
        everywhere = partial(run_everywhere, runner, rows)
        found = dict(zip(parts, threads.map(lambda part: everywhere(*part), parts.values()), strict=True))
    with harness.waiting("What needs no training, and the time that a run takes"):
        untrained, times = jax.device_get(jax.jit(partial(jax.lax.map, exact))(scenes)), cost(scenes, watch)
    return {
        **{name: found[name] for name in ("dpo", "dpo to the end", "ppo")},
        "by_rate": {name: found[name] for name in RATED},
        "by_clip": found["clip"]["expected_reward"].reshape(len(CLIP_RATES), len(CLIPS), num),
        "exploration": {name: found[name] for name in EXPLORERS},
        "exact": untrained,
        "cost": times,
        **variants(seeds, tuning, num_candidates, watch),
    }


def contender(name: str) -> Contender:
    """The contender of this name."""
    return next(each for each in CONTENDERS if each.name == name)


def run_everywhere(
    runner: Runner, rows: np.ndarray, run: Callable[..., Any], points: Sequence[Hyperparameters]
) -> dict[str, np.ndarray]:
    """Arrays `[points, worlds]`."""
    program = runner.compiled(run, points[0])
    task = Task("worlds", np.tile(rows, len(points)), [h for h in points for _ in rows])
    return {name: values.reshape(len(points), -1) for name, values in runner(program, task).items()}


def betas_of(betas: Sequence[float]) -> list[Hyperparameters]:
    """Each beta with the notebook's learning rate."""
    return [{"beta": np.float32(beta), "learning_rate": np.float32(NOTEBOOK_RATE)} for beta in betas]


def dpo_by_beta(
    scene: Scene, hyperparameters: dict[str, Numeric], *, num_epochs: int | None = None
) -> dict[str, Array]:
    """The notebook's DPO at one beta, with everything that claims are made about; perhaps trained for longer."""
    beta = hyperparameters["beta"]

    def train_longer(setup: contenders.Setup, beta: Numeric, learning_rate: Numeric) -> contenders.Trained:
        objective = train.preference_objective(setup.log_prob, losses.dpo_loss, beta=beta)
        return contenders.fit(setup, objective, learning_rate, num_epochs=num_epochs)

    dpo = dataclasses.replace(contender("DPO"), train=train_longer)
    log_probs, history = dpo.trained(scene, beta, hyperparameters["learning_rate"])
    rewards, reference, pairs = scene.world.rewards, scene.log_probs, scene.preferences
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
    """How often a score foretells a new comparison of two uniform, distinct responses: exact."""
    wins = toy.preference_table(rewards)
    right = jnp.where(scores[..., :, None] > scores[..., None, :], wins, 1 - wins)
    return jnp.mean(right[..., ~np.eye(rewards.shape[-1], dtype=bool)])


def ppo_by_clip(scene: Scene, hyperparameters: dict[str, Numeric]) -> dict[str, Array]:
    """PPO at the usual beta, with another clip."""
    clipped = partial(contenders.ppo, contenders.LEARNED, clip=hyperparameters["strength"])

    def with_clip(setup: contenders.Setup, _: Numeric, learning_rate: Numeric) -> contenders.Trained:
        return clipped(setup, BETA, learning_rate)

    ppo = dataclasses.replace(contender("PPO, reward model"), train=with_clip, strength="clip")
    return dpo_vs_rlhf.run(ppo, scene, hyperparameters)


def explore(how: str, scene: Scene, hyperparameters: dict[str, Numeric]) -> dict[str, Array]:
    """DPO on 32 fresh comparisons a step, from a reference whose logits are those of the SFT policy times a factor.

    Offline, the reference answers twice; online, the policy does; with XPO one of the two is the policy's.
    """
    power = hyperparameters["strength"]
    params, embeddings = sharpened(scene.params, power), scene.world.embeddings
    log_prob, table = toy.log_prob_fn(POLICY, embeddings), toy.table_fn(POLICY, embeddings)
    ask = toy.ask_uniformly(scene.world, num=BATCH_SIZE // 2)
    prefer = toy.preference_fn(scene.world.rewards)
    respond = toy.respond_fn(POLICY, embeddings, group_size=1 if how == "xpo" else 2)
    if how == "offline":
        respond = answered_by(params, respond)
    if how == "xpo":
        learner = rlhf.xpo(
            ask=ask,
            respond=respond,
            log_prob=log_prob,
            prefer=prefer,
            reference_params=params,
            beta=BETA,
            alpha=contenders.OPTIMISM,
        )
    else:
        learner = rlhf.online_dpo(
            ask=ask, respond=respond, log_prob=log_prob, prefer=prefer, reference_params=params, beta=BETA
        )
    tuned, history = train.fit_online(
        jax.random.wrap_key_data(scene.key),
        params,
        learner,
        optimizer=optax.adam(hyperparameters["learning_rate"]),
        num_epochs=1,
        rounds_per_epoch=NUM_STEPS,
    )
    policy, reference, rewards = table(tuned), table(params), scene.world.rewards
    best = toy.optimal_policy(reference, rewards, beta=BETA)
    coverage = jnp.sum(jnp.exp(2 * best - reference), axis=-1)
    measured = {
        **toy.evaluate(policy, reference, rewards),
        "regret": jnp.mean(toy.regret(policy, reference, rewards, beta=BETA)),
        "reference_reward": jnp.mean(toy.expected_reward(reference, rewards)),
        "log_coverage": jnp.mean(jnp.log(coverage)),
    }
    finished = jnp.isfinite(history["loss"][-1])
    return {name: jnp.where(finished, value, jnp.nan) for name, value in measured.items()}


def sharpened(params: Params, power: Numeric) -> Params:
    """The network whose logits are those of another, times a factor."""
    (last,) = (name for name in params["params"] if name.endswith("_1"))
    scaled = jax.tree.map(lambda leaf: power * leaf, params["params"][last])
    return {"params": {**params["params"], last: scaled}}


def answered_by(params: Params, respond: RespondFn) -> RespondFn:
    """As if a policy never changed."""

    def always(key: Any, _: Params, prompts: Array) -> Responses:
        return respond(key, params, prompts)

    return always


def exact(scene: Scene) -> dict[str, Any]:
    """What needs no training: how far a reward model misleads, if maximised exactly; and how well it ranks."""
    reference, learned, rewards = scene.log_probs, scene.learned_rewards, scene.world.rewards

    def maximised(beta: Array) -> dict[str, Array]:
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


def cost(scenes: Scene, watch: harness.Stopwatch) -> dict[str, np.ndarray]:
    """Seconds per run of DPO, and of reward model and PPO, in turn."""
    dpo, ppo = (dpo_vs_rlhf.timed(partial(dpo_vs_rlhf.run, contender(name)), scenes, watch) for name in COMPARED)
    model = dpo_vs_rlhf.timed(lambda scene, _: dpo_vs_rlhf.fit_rewards(scene), scenes, watch)
    times = np.array([[dpo(), model() + ppo()] for _ in range(NUM_TIMES)])
    return {"dpo": times[:, 0], "rlhf": times[:, 1]}


def variants(seeds: np.ndarray, tuning: np.ndarray, num_candidates: int, watch: harness.Stopwatch) -> dict[str, Any]:
    """The losses that the notebook names, tuned, on feedback of every kind; and ORPO without SFT."""
    starts = loss_variants.prepare_all(np.concatenate([seeds, tuning]), watch)
    plan = Plan(np.arange(len(seeds)), np.arange(len(seeds), len(seeds) + len(tuning)), num_candidates)
    methods = loss_variants.chosen_methods(VARIANTS)
    num_runs = len(SETTINGS) * (
        len(methods) * (plan.num_tuning_runs + 2 * len(seeds)) + plan.num_tuning_runs + len(seeds)
    )
    with harness.progress("runs", num_runs, watch) as show_done, harness.threads(THREADS) as threads:
        runner = Runner(starts, watch, Counter(show_done))
        scratch = threads.submit(orpo_from_scratch, runner, plan)
        learned = list(threads.map(partial(loss_variants.tune_and_run, runner, plan), methods))
    sft = starts["clean"].world.rewards[plan.reported], starts["clean"].log_probs[plan.reported]
    return {
        "variants": dict(zip(VARIANTS, learned, strict=True)),
        "orpo_from_scratch": scratch.result(),
        "variants_sft_reward": np.mean(np.sum(np.exp(sft[1]) * sft[0], axis=-1), axis=-1),
    }


def orpo_from_scratch(runner: Runner, plan: Plan) -> dict[str, dict[str, Any]]:
    """ORPO from a fresh network in every setting, tuned."""
    tried = candidates(ORPO_RANGES, plan.num_candidates)
    program = runner.compiled(run_orpo, tried[0])
    results = {}
    for setting in SETTINGS:
        chosen = tune(runner, program, setting, tried, plan, score="expected_reward")
        task = Task(setting, plan.reported, [chosen] * len(plan.reported))
        results[setting] = {"hyperparameters": chosen, **runner(program, task)}
    return results


def run_orpo(start: Start, hyperparameters: dict[str, Numeric]) -> dict[str, Array]:
    """ORPO on comparisons alone: no demonstrations, no SFT."""
    init_key, train_key = jax.random.split(jax.random.wrap_key_data(start.key))
    embeddings = start.world.embeddings
    log_prob: LogProbFn = toy.log_prob_fn(POLICY, embeddings)
    objective = train.reference_free_objective(log_prob, losses.orpo_loss, odds_weight=hyperparameters["odds_weight"])
    params, _ = train.fit(
        train_key,
        POLICY.init(init_key, embeddings),
        start.feedback.pairs,
        objective=objective,
        optimizer=optax.adam(hyperparameters["learning_rate"]),
        num_epochs=NUM_EPOCHS,
        batch_size=BATCH_SIZE,
    )
    return toy.evaluate(toy.table_fn(POLICY, embeddings)(params), start.log_probs, start.world.rewards)
