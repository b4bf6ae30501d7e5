"""The measurements by which the claims about tokens are judged: runs by the thousand, one number for each run.

`gather` returns arrays by name whose last axis is the world; `statements.py` turns them into claims. Runs are those of
`lab/string_worlds.py`, with a learning rate that suits all losses (`LEARNING_RATE`); what is best of several values is
chosen in other worlds.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dpo_jax import losses, rlhf, strings, sweep, toy, train
from dpo_jax.types import Metrics, Numeric, Params, Preferences
from experiments.lab import console, string_worlds
from experiments.lab.methods import Method
from experiments.lab.pipeline import Pipeline, Start
from experiments.lab.runs import trained
from experiments.lab.statistics import over_seeds, seed_last
from experiments.lab.string_worlds import (
    BETA,
    KNOWN,
    STRING_METHODS,
    STRINGS,
    Judge,
    heard,
    measured,
    strings_of,
)
from experiments.lab.studies import Study
from experiments.token_claims.measures import (
    accuracy,
    bad,
    compared,
    correlation,
    entanglement,
    entropy,
    mean_where,
    token_log_probs,
)
from experiments.token_claims.population import ON_ALL_PAIRS, SMALL_BETAS, gradient_noise, on_all_pairs

STRING = {method.name: method for method in STRING_METHODS}
LEARNING_RATE = 3e-3
BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)
LIKING = 2.0
"""What a judge who is fond of length adds to a string of full length."""
PRICE = LIKING / STRINGS.horizon
"""The price of a letter at which R-DPO undoes that."""
TRUTHFUL, FOND = Judge(), Judge(liking=LIKING)
UNIFORM = Judge(on_policy=0.0)
AFTER_LENGTH = {name: STRING[name] for name in ("dpo", "r-dpo", "ld-dpo", "sampo", "ln-dpo", "simpo")}
"""Losses that should undo a judge's liking of length."""
AFTER_BETAS = (0.25, 0.5, 1.0)
PER_TOKEN = 4.0
"""How much larger the beta of a loss of means is: about the number of tokens of a string."""
KEEPERS = {"dpo": KNOWN["dpo"], "rpo": KNOWN["rpo"], "dpo-positive": KNOWN["dpo-positive"]}
"""Losses that keep chosen responses probable."""
KEPT = {"rpo": ("sft_weight", 0.1), "dpo-positive": ("penalty", 1.0)}
"""What keeps them so, and how strong it is at a strength of 1."""
STRENGTHS = (0.03, 0.1, 0.3, 1.0)
KEPT_BETAS = (0.5, 1.0)
DISTANCES = (1, 2, 3, 4)
AGGREGATIONS = {
    "GRPO": losses.mean_of_responses,
    "DAPO": losses.mean_of_tokens,
    "Dr. GRPO": partial(losses.mean_per_length, max_length=STRINGS.horizon),
}
MANY_LABELS, PASSES = 4096, 5
"""How many labels offline and online DPO get, and how often they see each."""
RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of which the best is chosen in other worlds."""
SAMPLES_PER_STEP = 32
NUM_NOISE, NUM_ELSEWHERE = 128, 128
"""How many worlds the variance of gradients is computed in, and how many each of the other conditions gets."""
NUM_STEPS = 240
"""Optimizer steps of learners that sample."""
CHI_BETAS = (0.003, 0.03, 0.3, 1.0)
FLIPPED = Judge(flip_probability=0.35)


def gather(pipeline: Pipeline, study: Study) -> dict[str, Any]:
    """Runs everything."""
    starts = study.prepare(pipeline.start, "worlds and SFT policies")
    hidden = replace(pipeline, demonstrator=contrarian)
    far = study.prepare(hidden.start, "the same worlds with other demonstrators", study.seeds.reported)
    reported = starts.sel(study.seeds.reported)
    reported_first = reported.sel(study.seeds.reported[:NUM_NOISE])
    both = _rows(TRUTHFUL, UNIFORM)
    with console.progress("Runs") as report:

        def grid(run: Callable[..., Metrics], starts: sweep.Starts = reported, **axes: Any) -> dict[str, np.ndarray]:
            return study.grid(partial(run, pipeline), starts, report, **axes)

        found: dict[str, Any] = {
            "dpo": grid(dpo, judge=_rows(TRUTHFUL, FOND, UNIFORM), beta=BETAS),
            "after length": study.split(grid(after_length, starts, method=list(AFTER_LENGTH), beta=AFTER_BETAS)),
            "keepers": study.split(
                grid(keeper, starts, method=list(KEPT), judge=both, strength=STRENGTHS, beta=KEPT_BETAS)
            ),
            "kept by nothing": study.split(
                grid(keeper, starts, method=["dpo"], judge=both, strength=[0.0], beta=KEPT_BETAS)
            ),
            "chi-po": grid(against_overoptimisation, method=["dpo", "chi-po"], beta=CHI_BETAS),
            "alike": grid(alike, distance=DISTANCES),
            "models": study.split(grid(reward_models, starts, model=["implicit", "explicit"], rate=RATES)),
            "online": {
                name: grid(offline_and_online, where, how=["offline", "online"])
                for name, where in {"near": reported, "far": far}.items()
            },
            "aggregation": grid(by_aggregation, aggregation=list(AGGREGATIONS)),
            "learners": study.split(grid(by_learner, starts, learner=["token PPO", "RLOO"], rate=RATES)),
            "noise": grid(gradient_noise, reported_first),
            "population": study.split(grid(on_all_pairs, starts, loss=list(ON_ALL_PAIRS), beta=SMALL_BETAS)),
        }
        found["elsewhere"] = {
            name: grid_elsewhere(variation, study, report, **options)
            for name, (variation, options) in elsewhere(pipeline).items()
        }
    with console.waiting("Evaluating what needs no training"):
        return {**found, "exact": seed_last(over_seeds(exact, reported)), "far": seed_last(over_seeds(exact, far))}


def elsewhere(pipeline: Pipeline) -> dict[str, tuple[Pipeline, dict[str, Any]]]:
    """Other conditions in which DPO runs: verdicts that differ there hold for some conditions only."""
    return {
        "as elsewhere": (pipeline, {}),
        "learning rate / 3": (pipeline, {"learning_rate": [LEARNING_RATE / 3]}),
        "learning rate x 3": (pipeline, {"learning_rate": [LEARNING_RATE * 3]}),
        "a fifth of labels flipped": (pipeline, {"judge": _rows(Judge(flip_probability=0.2))}),
        "a quarter of the pairs": (replace(pipeline, num_preferences=256, num_epochs=4 * pipeline.num_epochs), {}),
        "four times as long": (replace(pipeline, num_epochs=4 * pipeline.num_epochs), {}),
        "8 hidden units": (string_worlds.pipeline_of(STRINGS, 8), {}),
        "3 letters, 4 at most": (string_worlds.pipeline_of(strings.Strings(num_letters=3, horizon=4)), {}),
        "2 letters, 8 at most": (string_worlds.pipeline_of(strings.Strings(num_letters=2, horizon=8)), {}),
    }


def grid_elsewhere(pipeline: Pipeline, study: Study, report: Any, **options: Any) -> dict[str, np.ndarray]:
    """DPO at the usual beta in the first worlds, as this pipeline makes them, and everything that claims are about."""
    starts = sweep.prepare(pipeline.start, study.key, seeds=study.seeds.reported[:NUM_ELSEWHERE])
    axes = {"judge": _rows(TRUTHFUL), "beta": [BETA], **options}
    return {name: values.ravel() for name, values in study.grid(partial(dpo, pipeline), starts, report, **axes).items()}


def contrarian(world: toy.World) -> Float[Array, "prompts responses"]:
    """The table of demonstrators who show good strings less often."""
    return string_worlds.demonstrator(world._replace(rewards=-world.rewards))


def policy_after(
    pipeline: Pipeline, method: Method, start: Start, judge: Judge, **chosen: Numeric
) -> tuple[Float[Array, "prompts responses"], Preferences]:
    """The table after training by a method on what a judge says, and the comparisons."""
    feedback = heard(pipeline, start, judge)
    table = trained(pipeline, method, start, feedback, {"learning_rate": LEARNING_RATE, **chosen})
    return table, feedback.pairs()


def dpo(
    pipeline: Pipeline, start: Start, *, judge: Judge, beta: Numeric, learning_rate: Numeric = LEARNING_RATE
) -> Metrics:
    """DPO, with everything that claims are made about."""
    table, pairs = policy_after(pipeline, KNOWN["dpo"], start, judge, beta=beta, learning_rate=learning_rate)
    rewards, reference = start.world.rewards, start.log_probs
    change = table - reference
    chosen, rejected = toy.lookup(change, pairs.prompts, pairs.responses)
    seen = compared(pairs, table.shape)
    mode = jnp.argmax(reference, axis=-1, keepdims=True)
    every = strings_of(pipeline)
    found = measured(start, table, every=every)
    best = toy.optimal_policy_at_kl(reference, rewards, kl=jnp.maximum(found["kl_to_reference"], 0))
    asked = strings.judged(start.world, every, liking=judge.liking).rewards
    asked_for = toy.optimal_policy_at_kl(reference, asked, kl=jnp.maximum(found["kl_to_reference"], 0))
    advantages = strings.soft_advantages(reference, rewards, every, beta=beta)
    credit = beta * strings.token_log_ratios(table, reference, every)
    won, lost = toy.lookup(table, pairs.prompts, pairs.responses)
    true_won, true_lost = toy.lookup(rewards, pairs.prompts, pairs.responses)
    best_won, best_lost = toy.lookup(best, pairs.prompts, pairs.responses)
    alone, with_all = entanglement(pipeline, start, pairs, chosen)
    return {
        **found,
        "longer_than_asked": found["expected_length"] - jnp.mean(strings.expected_length(asked_for, every)),
        "chosen_change": jnp.mean(chosen),
        "rejected_change": jnp.mean(rejected),
        "fell": jnp.mean(chosen < 0),
        "mode_change": jnp.mean(jnp.take_along_axis(jnp.exp(table) - jnp.exp(reference), mode, -1)),
        "mode_change_of_best": jnp.mean(jnp.take_along_axis(jnp.exp(best) - jnp.exp(reference), mode, -1)),
        "entropy_change": jnp.mean(entropy(table) - entropy(reference)),
        "unseen": jnp.mean(jnp.sum(jnp.where(seen, 0, jnp.exp(table)), -1)),
        "unseen_before": jnp.mean(jnp.sum(jnp.where(seen, 0, jnp.exp(reference)), -1)),
        "unseen_reward": mean_where(table, rewards, ~seen),
        "seen_reward": mean_where(table, rewards, seen),
        "unseen_of_best": jnp.mean(jnp.sum(jnp.where(seen, 0, jnp.exp(best)), -1)),
        "credit": correlation(credit, advantages, jnp.exp(token_log_probs(reference, every))),
        "ranked": jnp.mean((won > lost) * 1.0),
        "ranked_by_best": jnp.mean((best_won > best_lost) * 1.0),
        "told_alone": alone,
        "told_by_all": with_all,
        "ranked_by_truth": jnp.mean((true_won > true_lost) * 1.0),
    }


def after_length(pipeline: Pipeline, start: Start, *, method: str, beta: Numeric) -> Metrics:
    """A loss that should undo a judge's liking of length, told how strong that is where it can be told."""
    told = {"r-dpo": {"alpha": PRICE}, "ld-dpo": {"alpha": 0.5}, "simpo": {"gamma": 0.5}}.get(method, {})
    beta = PER_TOKEN * beta if method in ("ln-dpo", "simpo") else beta
    table, _ = policy_after(pipeline, AFTER_LENGTH[method], start, FOND, beta=beta, **told)
    return measured(start, table)


def keeper(pipeline: Pipeline, start: Start, *, method: str, judge: Judge, strength: Numeric, beta: Numeric) -> Metrics:
    """A loss that should keep chosen responses probable."""
    kept = {name: strength * most for name, most in [KEPT[method]]} if method in KEPT else {}
    table, pairs = policy_after(pipeline, KEEPERS[method], start, judge, beta=beta, **kept)
    chosen = toy.lookup(table - start.log_probs, pairs.prompts, pairs.responses.chosen)
    return {**measured(start, table), "chosen_change": jnp.mean(chosen)}


def against_overoptimisation(pipeline: Pipeline, start: Start, *, method: str, beta: Numeric) -> Metrics:
    """A loss with few comparisons, a third of them flipped, and a beta that may be too small."""
    few = replace(pipeline, num_preferences=pipeline.num_preferences // 8, batch_size=pipeline.batch_size // 8)
    table, _ = policy_after(few, KNOWN[method], start, FLIPPED, beta=beta)
    return measured(start, table)


def alike(pipeline: Pipeline, start: Start, *, distance: Numeric) -> Metrics:
    """DPO on pairs of strings at one edit distance."""
    feedback_key, train_key = jax.random.split(start.key)
    pair_key, label_key = jax.random.split(feedback_key)
    allowed = jnp.asarray(strings.edit_distances(STRINGS)) == distance
    prompts, pair = strings.sample_pairs(pair_key, start.log_probs, allowed, num=pipeline.num_preferences)
    pairs = toy.label_pairs(label_key, start.world, prompts, pair)
    pairs = train.with_reference(pipeline.log_prob(start.world), start.params, pairs)
    params, _ = pipeline.dpo(train_key, start, pairs, BETA, LEARNING_RATE)
    table = pipeline.table(start.world)(params)
    chosen, rejected = toy.lookup(table - start.log_probs, pairs.prompts, pairs.responses)
    return {
        "chosen_change": jnp.mean(chosen),
        "fell": jnp.mean(chosen < 0),
        "margin_change": jnp.mean(chosen - rejected),
        **measured(start, table),
    }


def reward_models(pipeline: Pipeline, start: Start, *, model: str, rate: Numeric) -> Metrics:
    """How well a reward model of the same network, or DPO's implicit reward, predicts comparisons: exact."""
    feedback = heard(pipeline, start, TRUTHFUL)
    pairs, (init_key, train_key) = feedback.pairs(), jax.random.split(start.key)
    if model == "implicit":
        chosen = {"beta": BETA, "learning_rate": rate}
        scores = trained(pipeline, KNOWN["dpo"], start, feedback, chosen) - start.log_probs
    else:
        network, embeddings = pipeline.policy, start.world.embeddings

        def score_table(params: Params) -> Array:
            outputs = network.apply(params, embeddings, method="outputs")
            return strings.string_log_probs(jnp.asarray(outputs), STRINGS)  # a reward for each token, added up

        objective = train.reference_free_objective(
            lambda params, prompts, responses: toy.lookup(score_table(params), prompts, responses),
            losses.bradley_terry_loss,
            centring=0.01,
        )
        params, _ = pipeline.fit(
            train_key, network.init(init_key, embeddings), pairs, objective=objective, learning_rate=rate
        )
        scores = score_table(params)
    rewards, reference = start.world.rewards, start.log_probs
    uniform = jnp.zeros_like(reference) - jnp.log(STRINGS.num_responses)
    return {
        "accuracy": accuracy(scores, rewards, jnp.exp(reference)),
        "shifted_accuracy": accuracy(scores, rewards, jnp.exp(uniform)),
        "possible": accuracy(rewards, rewards, jnp.exp(reference)),
    }


def offline_and_online(pipeline: Pipeline, start: Start, *, how: str) -> Metrics:
    """DPO on as many labels in as many steps, of pairs of the SFT policy or of the policy as it is by then."""
    many = replace(pipeline, num_preferences=MANY_LABELS, num_epochs=PASSES)
    if how == "offline":
        table, _ = policy_after(many, KNOWN["dpo"], start, TRUTHFUL, beta=BETA)
        return measured(start, table)
    learner = rlhf.online_dpo(
        ask=toy.ask_uniformly(start.world, num=many.batch_size),
        respond=toy.respond_fn(many.policy, start.world.embeddings, group_size=2),
        log_prob=many.log_prob(start.world),
        prefer=toy.preference_fn(start.world.rewards),
        reference_params=start.params,
        beta=BETA,
    )
    params, _ = train.fit_online(
        start.key,
        start.params,
        learner,
        optimizer=optax.adam(LEARNING_RATE),
        num_epochs=1,
        rounds_per_epoch=many.steps_per_epoch,
        passes_per_round=PASSES,
    )
    return measured(start, many.table(start.world)(params))


def by_aggregation(pipeline: Pipeline, start: Start, *, aggregation: str) -> Metrics:
    """GRPO without KL, and how it adds up tokens: its exact gradient at the start, and the policy after training."""
    embeddings, rewards = start.world.embeddings, start.world.rewards
    policy, table = pipeline.policy, pipeline.table(start.world)
    common: dict[str, Any] = {
        "token_log_prob": token_log_prob(table),
        "reward": toy.reward_fn(rewards),
        "reference_params": start.params,
        "beta": 0.0,
        "advantages": losses.centred_advantages,
        "aggregate": AGGREGATIONS[aggregation],
    }
    exactly = rlhf.token_grpo(
        ask=toy.ask_everything(start.world), respond=toy.enumerate_fn(policy, embeddings), **common
    )
    exact_key, fit_key = jax.random.split(start.key)
    step = rlhf.learner_gradient(exact_key, start.params, exactly)

    def length(params: Params) -> Array:
        return jnp.mean(strings.expected_length(table(params), STRINGS))

    def reward(params: Params) -> Array:
        return jnp.mean(toy.expected_reward(table(params), rewards))

    longer, better = (jax.jvp(of, (start.params,), (step,))[1] for of in (length, reward))
    sampled = rlhf.token_grpo(
        ask=toy.ask_uniformly(start.world, num=SAMPLES_PER_STEP // 8),
        respond=toy.respond_fn(policy, embeddings, group_size=8),
        **common,
    )
    params, _ = train.fit_online(
        fit_key, start.params, sampled, optimizer=optax.adam(LEARNING_RATE), num_epochs=1, rounds_per_epoch=NUM_STEPS
    )
    log_probs, lengths = table(params), jnp.broadcast_to(STRINGS.lengths, rewards.shape)
    return {
        "longer_per_reward": longer / better,
        "length_of_bad": mean_where(log_probs, lengths, bad(start)),
        "length_of_bad_before": mean_where(start.log_probs, lengths, bad(start)),
        **measured(start, log_probs),
    }


def by_learner(pipeline: Pipeline, start: Start, *, learner: str, rate: Numeric) -> Metrics:
    """PPO with a value for each token, or RLOO on whole strings, on as many samples."""
    embeddings, policy, table = start.world.embeddings, pipeline.policy, pipeline.table(start.world)
    value_key, fit_key = jax.random.split(start.key)
    common: dict[str, Any] = {
        "respond": toy.respond_fn(policy, embeddings, group_size=4),
        "ask": toy.ask_uniformly(start.world, num=SAMPLES_PER_STEP // 4),
        "reward": toy.reward_fn(start.world.rewards),
        "reference_params": start.params,
        "beta": BETA,
    }
    schedule = {"num_epochs": 1, "rounds_per_epoch": NUM_STEPS, "optimizer": optax.adam(rate)}
    if learner == "RLOO":
        rloo = rlhf.rloo(log_prob=pipeline.log_prob(start.world), **common)
        params, _ = train.fit_online(fit_key, start.params, rloo, **schedule)
        return measured(start, table(params))
    values = strings.CausalMLP(STRINGS, num_outputs=1)
    both = rlhf.ActorCritic(start.params, values.init(value_key, embeddings))
    ppo = rlhf.token_ppo(
        token_log_prob=token_log_prob(table), token_value=strings.token_value_fn(values, embeddings), **common
    )
    both, _ = train.fit_online(fit_key, both, ppo, **schedule)
    return measured(start, table(both.policy))


def exact(start: Start) -> Metrics:
    """What needs no training: sizes of soft advantages by place, coverage, and measures of SFT policy and optimum."""
    rewards, reference = start.world.rewards, start.log_probs
    optimum = toy.optimal_policy(reference, rewards, beta=BETA)
    advantages = strings.soft_advantages(reference, rewards, STRINGS, beta=BETA)
    visits = jnp.exp(token_log_probs(reference))
    places = np.repeat(np.arange(STRINGS.horizon), np.diff(STRINGS.offsets))
    weights = visits[None] * (places == np.arange(STRINGS.horizon)[:, None])[:, None, :, None]
    size = jnp.sqrt(jnp.sum(weights * advantages[None] ** 2, (1, 2, 3)) / jnp.sum(weights, (1, 2, 3)))
    return {
        "advantage_by_place": size,
        "coverage": jnp.mean(toy.coverage(optimum, reference)),
        "sft": measured(start, reference),
        "optimum": measured(start, optimum),
    }


def token_log_prob(table: Callable[[Params], Array]) -> Any:
    """Scores tokens by the table of a policy, which costs less than paths where strings are few."""

    def score(params: Params, prompts: Array, responses: Array) -> Any:
        return strings.token_lookup(strings.next_token_log_probs(table(params), STRINGS), STRINGS, prompts, responses)

    return score


def _rows(*judges: Judge) -> Judge:
    """An axis of judges."""
    return Judge(*(jnp.asarray(column, jnp.float32) for column in zip(*judges, strict=True)))
