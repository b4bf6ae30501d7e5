"""The measurements by which the claims about tokens are judged: runs by the thousand, one number for each run.

`gather` returns arrays by name whose last axis is the world; `statements.py` turns them into claims. Runs are those of
`lab/string_worlds.py`, with a learning rate that suits all losses (`LEARNING_RATE`); what is best of several values is
chosen in other worlds.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dpo_jax import losses, rlhf, strings, sweep, toy, train
from dpo_jax.types import Metrics, Numeric, Objective, Params, Preferences
from experiments.lab import console, string_worlds
from experiments.lab.methods import Method
from experiments.lab.pipeline import Pipeline, Start
from experiments.lab.runs import trained
from experiments.lab.statistics import Seconds, over_seeds
from experiments.lab.string_worlds import BETA, KNOWN, PIPELINE, STRINGS, Judge, heard, measured
from experiments.lab.tuning import Seeds

LEARNING_RATE = 3e-3
BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)
LIKING = 2.0
"""What a judge who is fond of length adds to a string of full length."""
PRICE = LIKING / STRINGS.horizon
"""The price of a letter at which R-DPO undoes that."""
TRUTHFUL, FOND = Judge(), Judge(liking=LIKING)
UNIFORM = Judge(on_policy=0.0)
AFTER_LENGTH = {
    "dpo": KNOWN["dpo"],
    "r-dpo": next(m for m in string_worlds.OWN if m.name == "r-dpo"),
    "ld-dpo": next(m for m in string_worlds.OWN if m.name == "ld-dpo"),
    "sampo": next(m for m in string_worlds.OWN if m.name == "sampo"),
}
"""Losses that are told to undo the judge's liking of length."""
KEEPERS = {"dpo": KNOWN["dpo"], "rpo": KNOWN["rpo"], "dpo-positive": KNOWN["dpo-positive"]}
"""Losses that keep chosen responses probable."""
KEPT = {"rpo": {"sft_weight": 0.1}, "dpo-positive": {"penalty": 1.0}}
DISTANCES = (1, 2, 3, 4)
SMALL = strings.Strings(num_letters=2, horizon=4)
"""The strings whose population losses are minimised exactly, by a table."""
SMALL_BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
ON_ALL_PAIRS = ("dpo", "ipo on sums", "ipo on means", "ln-dpo", "simpo", "simpo with a margin", "orpo on sums", "orpo")
AGGREGATIONS = {
    "mean of responses (GRPO)": losses.mean_of_responses,
    "mean of tokens (DAPO)": losses.mean_of_tokens,
    "mean per length (Dr. GRPO)": partial(losses.mean_per_length, max_length=STRINGS.horizon),
}
RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of which the best is chosen in other worlds."""
SAMPLES_PER_STEP = 32
NUM_STEPS = 240
"""Optimizer steps of learners that sample."""
CHI_BETAS = (0.05, *BETAS)


def gather(seed: int, seeds: Seeds, seconds: Seconds, pipeline: Pipeline = PIPELINE) -> dict[str, Any]:
    """Runs everything."""
    key = jax.random.key(seed)
    with console.waiting("Preparing worlds and SFT policies"):
        starts = sweep.prepare(pipeline.start, key, seeds=seeds.all)
        hidden = replace(pipeline, demonstrator=contrarian)
        far = sweep.prepare(hidden.start, key, seeds=seeds.reported)
    reported = starts.sel(seeds.reported)
    with console.progress("Runs") as report:

        def grid(run: Callable[..., Metrics], starts: sweep.Starts = reported, **axes: Any) -> dict[str, np.ndarray]:
            found = seconds.count(sweep.grid(partial(run, pipeline), starts, report=report, **axes))
            return {str(name): found[name].transpose(..., "seed").values for name in found.data_vars}

        found: dict[str, Any] = {
            "dpo": grid(dpo, judge=_rows(TRUTHFUL, FOND, UNIFORM), beta=BETAS),
            "after length": _split(grid(after_length, starts, method=list(AFTER_LENGTH), beta=BETAS), seeds),
            "keepers": _split(
                grid(keeper, starts, method=list(KEEPERS), judge=_rows(TRUTHFUL, UNIFORM), beta=BETAS), seeds
            ),
            "chi-po": grid(against_overoptimisation, method=["dpo", "chi-po"], beta=CHI_BETAS),
            "alike": grid(alike, distance=DISTANCES),
            "models": _split(grid(reward_models, starts, model=["implicit", "explicit"], rate=RATES), seeds),
            "online": {
                name: grid(offline_and_online, where, how=["offline", "online"])
                for name, where in {"near": reported, "far": far}.items()
            },
            "aggregation": grid(by_aggregation, aggregation=list(AGGREGATIONS)),
            "learners": _split(grid(by_learner, starts, learner=["token PPO", "RLOO"], rate=RATES), seeds),
            "population": _split(grid(on_all_pairs, starts, loss=list(ON_ALL_PAIRS), beta=SMALL_BETAS), seeds),
        }
    with console.waiting("Evaluating what needs no training"):
        found["exact"] = _last(over_seeds(exact, reported))
        found["far"] = _last(over_seeds(exact, far))
    return found


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


def dpo(pipeline: Pipeline, start: Start, *, judge: Judge, beta: Numeric) -> Metrics:
    """DPO, with everything that claims are made about."""
    table, pairs = policy_after(pipeline, KNOWN["dpo"], start, judge, beta=beta)
    rewards, reference = start.world.rewards, start.log_probs
    change = table - reference
    chosen, rejected = toy.lookup(change, pairs.prompts, pairs.responses)
    seen = _seen(pairs, table.shape)
    mode = jnp.argmax(reference, axis=-1, keepdims=True)
    found = measured(start, table)
    best = toy.optimal_policy_at_kl(reference, rewards, kl=jnp.maximum(found["kl_to_reference"], 0))
    advantages = strings.soft_advantages(reference, rewards, STRINGS, beta=beta)
    credit = beta * strings.token_log_ratios(table, reference, STRINGS)
    won, lost = toy.lookup(table, pairs.prompts, pairs.responses)
    best_won, best_lost = toy.lookup(best, pairs.prompts, pairs.responses)
    return {
        **found,
        "chosen_change": jnp.mean(chosen),
        "rejected_change": jnp.mean(rejected),
        "fell": jnp.mean(chosen < 0),
        "mode_change": jnp.mean(jnp.take_along_axis(jnp.exp(table) - jnp.exp(reference), mode, -1)),
        "mode_change_of_best": jnp.mean(jnp.take_along_axis(jnp.exp(best) - jnp.exp(reference), mode, -1)),
        "entropy_change": jnp.mean(_entropy(table) - _entropy(reference)),
        "unseen": jnp.mean(jnp.sum(jnp.where(seen, 0, jnp.exp(table)), -1)),
        "unseen_before": jnp.mean(jnp.sum(jnp.where(seen, 0, jnp.exp(reference)), -1)),
        "unseen_reward": _mean_where(table, rewards, ~seen),
        "seen_reward": _mean_where(table, rewards, seen),
        "unseen_of_best": jnp.mean(jnp.sum(jnp.where(seen, 0, jnp.exp(best)), -1)),
        "credit": _correlation(credit, advantages, jnp.exp(_token_log_probs(reference))),
        "ranked": jnp.mean((won > lost) * 1.0),
        "ranked_by_best": jnp.mean((best_won > best_lost) * 1.0),
        "entangled": entanglement(pipeline, start, pairs, chosen),
    }


def after_length(pipeline: Pipeline, start: Start, *, method: str, beta: Numeric) -> Metrics:
    """A loss that should undo a judge's liking of length, told how strong that is where it can be told."""
    told = {"r-dpo": {"alpha": PRICE}, "ld-dpo": {"alpha": 0.5}}.get(method, {})
    table, _ = policy_after(pipeline, AFTER_LENGTH[method], start, FOND, beta=beta, **told)
    return measured(start, table)


def keeper(pipeline: Pipeline, start: Start, *, method: str, judge: Judge, beta: Numeric) -> Metrics:
    """A loss that should keep chosen responses probable."""
    table, pairs = policy_after(pipeline, KEEPERS[method], start, judge, beta=beta, **KEPT.get(method, {}))
    chosen = toy.lookup(table - start.log_probs, pairs.prompts, pairs.responses.chosen)
    return {**measured(start, table), "chosen_change": jnp.mean(chosen)}


def against_overoptimisation(pipeline: Pipeline, start: Start, *, method: str, beta: Numeric) -> Metrics:
    """A loss with few comparisons and a beta that may be too small."""
    few = replace(pipeline, num_preferences=pipeline.num_preferences // 8, batch_size=pipeline.batch_size // 8)
    table, _ = policy_after(few, KNOWN[method], start, TRUTHFUL, beta=beta)
    return measured(start, table)


def alike(pipeline: Pipeline, start: Start, *, distance: Numeric) -> Metrics:
    """DPO on pairs of strings at one edit distance."""
    feedback_key, train_key = jax.random.split(start.key)
    pair_key, label_key = jax.random.split(feedback_key)
    allowed = jnp.asarray(strings.edit_distances(STRINGS)) == distance
    prompts, pair = strings.sample_pairs(pair_key, start.log_probs, allowed, num=pipeline.num_preferences)
    pairs = toy.label_pairs(label_key, start.world, prompts, pair)
    pairs = train.with_reference(pipeline.log_prob(start.world), start.params, pairs)
    params, _ = pipeline.fit(
        train_key,
        start.params,
        pairs,
        objective=train.preference_objective(pipeline.log_prob(start.world), losses.dpo_loss, beta=BETA),
        learning_rate=LEARNING_RATE,
    )
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
    seen = _seen(pairs, reference.shape)
    return {
        "accuracy": _accuracy(scores, rewards, jnp.exp(reference)),
        "shifted_accuracy": _accuracy(scores, rewards, jnp.exp(uniform)),
        "unseen_accuracy": _accuracy(scores, rewards, jnp.exp(reference) * ~seen),
        "possible": _accuracy(rewards, rewards, jnp.exp(reference)),
    }


def offline_and_online(pipeline: Pipeline, start: Start, *, how: str) -> Metrics:
    """DPO on as many labels and in as many steps, of pairs of the SFT policy or of the policy as it is by then."""
    if how == "offline":
        table, _ = policy_after(pipeline, KNOWN["dpo"], start, TRUTHFUL, beta=BETA)
        return measured(start, table)
    embeddings = start.world.embeddings
    learner = rlhf.online_dpo(
        ask=toy.ask_uniformly(start.world, num=pipeline.batch_size),
        respond=toy.respond_fn(pipeline.policy, embeddings, group_size=2),
        log_prob=pipeline.log_prob(start.world),
        prefer=toy.preference_fn(start.world.rewards),
        reference_params=start.params,
        beta=BETA,
    )
    params, _ = train.fit_online(
        start.key,
        start.params,
        learner,
        optimizer=optax.adam(LEARNING_RATE),
        num_epochs=pipeline.steps_per_epoch,
        passes_per_round=pipeline.num_epochs,
    )
    return measured(start, pipeline.table(start.world)(params))


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
    log_probs = table(params)
    return {
        "longer_per_reward": longer / better,
        "length_of_bad": _mean_where(log_probs, STRINGS.lengths * jnp.ones_like(rewards), _bad(start)),
        "length_of_bad_before": _mean_where(start.log_probs, STRINGS.lengths * jnp.ones_like(rewards), _bad(start)),
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


def on_all_pairs(_: Pipeline, start: Start, *, loss: str, beta: Numeric) -> Metrics:
    """The minimum of a loss over all pairs of short strings, weighted by how often they occur: a table, no samples."""
    world = strings.make_world(start.key, SMALL, num_prompts=1)
    reference = toy.optimal_policy(
        strings.reference_log_probs(SMALL, expected_length=2.0)[None], world.rewards, beta=2.0
    )
    pairs = toy.all_preferences(world)
    probs = jnp.exp(reference[0])
    weights = pairs.weights * probs[pairs.responses.chosen] * probs[pairs.responses.rejected]
    pairs = pairs._replace(weights=weights / jnp.mean(weights))
    table = toy.TablePolicy(SMALL.num_responses)
    sums = toy.log_prob_fn(table, world.embeddings)
    means = strings.on_means(sums, SMALL)
    params = {"params": {"logits": reference}}
    nums = lambda _, batch, __: strings.num_tokens_of(SMALL, batch.responses)  # noqa: E731
    objectives: dict[str, tuple[Any, Objective]] = {
        "dpo": (sums, train.preference_objective(sums, losses.dpo_loss, beta=beta)),
        "ipo on sums": (sums, train.preference_objective(sums, losses.ipo_loss, beta=beta)),
        "ipo on means": (means, train.preference_objective(means, losses.ipo_loss, beta=beta)),
        "ln-dpo": (sums, train.preference_objective(sums, losses.length_normalized_dpo_loss, beta=beta, lengths=nums)),
        "simpo": (means, train.reference_free_objective(means, losses.simpo_loss, beta=beta, gamma=0.0)),
        "simpo with a margin": (means, train.reference_free_objective(means, losses.simpo_loss, beta=beta, gamma=0.5)),
        "orpo on sums": (sums, train.reference_free_objective(sums, losses.orpo_loss, odds_weight=beta)),
        "orpo": (means, train.reference_free_objective(means, losses.orpo_loss, odds_weight=beta)),
    }
    log_prob, objective = objectives[loss]
    params, _ = train.fit(
        start.key,
        params,
        train.with_reference(log_prob, params, pairs),
        objective=objective,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, 600)),
        num_epochs=600,
        batch_size=len(pairs.prompts),
    )
    log_probs = toy.table_fn(table, world.embeddings)(params)
    found = toy.evaluate(log_probs, reference, world.rewards)
    best = toy.optimal_policy_at_kl(reference, world.rewards, kl=jnp.maximum(found["kl_to_reference"], 0))
    lengths = [strings.expected_length(table, SMALL)[0] for table in (log_probs, best)]
    return {
        **found,
        "merit": found["expected_reward"] - BETA * found["kl_to_reference"],
        "optimal_merit": BETA * toy.log_partition(reference, world.rewards, beta=BETA)[0],
        "short_of_frontier": jnp.mean(toy.expected_reward(best, world.rewards)) - found["expected_reward"],
        "longer": lengths[0] - lengths[1],
    }


def exact(start: Start) -> Metrics:
    """What needs no training: sizes of soft advantages by place, coverage, and measures of SFT policy and optimum."""
    rewards, reference = start.world.rewards, start.log_probs
    optimum = toy.optimal_policy(reference, rewards, beta=BETA)
    advantages = strings.soft_advantages(reference, rewards, STRINGS, beta=BETA)
    visits = jnp.exp(_token_log_probs(reference))
    places = np.repeat(np.arange(STRINGS.horizon), np.diff(STRINGS.offsets))
    weights = visits[None] * (places == np.arange(STRINGS.horizon)[:, None])[:, None, :, None]
    size = jnp.sqrt(jnp.sum(weights * advantages**2, (1, 2, 3)) / jnp.sum(weights, (1, 2, 3)))
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


def entanglement(pipeline: Pipeline, start: Start, pairs: Preferences, change: Float[Array, " n"]) -> Float[Array, ""]:
    """How often the gradients of a pair alone tell whether the chosen response becomes more probable in training.

    They say so where the gradient of its log-probability is larger than its product with that of the rejected one.
    """
    table = pipeline.table(start.world)
    jacobian = jax.jacrev(lambda params: table(params).ravel())(start.params)
    rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)], axis=-1)
    products = rows @ rows.T
    chosen, rejected = (start.world.num_responses * pairs.prompts + ids for ids in pairs.responses)
    rises = products[chosen, chosen] > products[chosen, rejected]
    return jnp.mean((rises == (change > 0)) * 1.0)


def _rows(*judges: Judge) -> Judge:
    """An axis of judges."""
    return Judge(*(np.array(column, np.float32) for column in zip(*judges, strict=True)))


def _split(found: Mapping[str, np.ndarray], seeds: Seeds) -> dict[str, dict[str, np.ndarray]]:
    """Results in the worlds to report, and in those to choose in."""
    num = len(seeds.reported)
    return {
        "reported": {name: values[..., :num] for name, values in found.items()},
        "tuning": {name: values[..., num:] for name, values in found.items()},
    }


def _last(found: Any) -> Any:
    """The same with the seed last."""
    return jax.tree.map(lambda values: np.moveaxis(values, 0, -1), found)


def _seen(pairs: Preferences, shape: tuple[int, ...]) -> Array:
    """Which responses to which prompts were compared."""
    seen = jnp.zeros(shape, bool)
    for ids in pairs.responses:
        seen = seen.at[pairs.prompts, ids].set(True)
    return seen


def _bad(start: Start) -> Array:
    """Strings that are worse than the SFT policy's mean."""
    return start.world.rewards < toy.expected_reward(start.log_probs, start.world.rewards)[:, None]


def _token_log_probs(log_probs: Array) -> Array:
    """The log-probability that a string reaches each prefix and has each next token."""
    reached = strings.prefix_log_probs(log_probs, STRINGS)
    return reached[..., None] + strings.next_token_log_probs(log_probs, STRINGS)


def _entropy(log_probs: Array) -> Array:
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def _mean_where(log_probs: Array, values: Array, where: Array) -> Array:
    """The mean of values under a policy, given that a response is among some."""
    weights = jnp.where(where, jnp.exp(log_probs), 0)
    return jnp.mean(jnp.sum(weights * values, -1) / jnp.maximum(jnp.sum(weights, -1), 1e-20))


def _correlation(x: Array, y: Array, weights: Array) -> Array:
    """The correlation of two tables under weights."""
    shares = weights / jnp.sum(weights)
    x, y = (values - jnp.sum(shares * values) for values in (x, y))
    return jnp.sum(shares * x * y) / jnp.sqrt(jnp.sum(shares * x**2) * jnp.sum(shares * y**2))


def _accuracy(scores: Array, rewards: Array, weights: Array) -> Array:
    """How often a score predicts a new comparison of two different responses that are drawn by weights: exact."""
    wins = toy.preference_table(rewards)
    above, below = scores[..., :, None] > scores[..., None, :], scores[..., :, None] < scores[..., None, :]
    right = jnp.where(above, wins, jnp.where(below, 1 - wins, 0.5))
    pairs = weights[..., :, None] * weights[..., None, :] * ~np.eye(rewards.shape[-1], dtype=bool)
    return jnp.mean(jnp.sum(pairs * right, (-1, -2)) / jnp.sum(pairs, (-1, -2)))
