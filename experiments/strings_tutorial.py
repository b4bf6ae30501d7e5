# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Responses with tokens, step by step
#
# In the [DPO tutorial](tutorial.ipynb) a response is one token. Here it is a string of letters, and people argue about
# questions that one token cannot have: do answers get longer? Which token earned the reward? Sums or means over tokens?
# The world stays small enough to list all strings, so every answer is exact.
#
# This page is a script and a notebook in one: `python -m experiments.strings_tutorial`, or `strings_tutorial.ipynb`
# beside it.

# %%
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if "ipykernel" in sys.modules:
    sys.path.append("..")  # a notebook starts in its own folder, a script in the one above

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import figures, losses, rlhf, strings, toy, train
from dpo_jax.types import Metrics, Params, TokenLogps
from experiments.lab import commands, console, devices, files


@dataclass(frozen=True)
class Options:
    """Responses with tokens, step by step: strings, a causal network, DPO, lengths, credit of tokens, GRPO."""

    seed: int = 42
    """Decides everything random: the world, the data, the networks and the training."""
    out: Path = Path("results/strings_tutorial")
    """Folder for summary.json and the figures."""


options = commands.parse(Options)
commands.check_seed(options.seed)
out, clock = files.output_folder(options.out), time.perf_counter()
devices.enable_compilation_cache()
keys = jax.random.split(jax.random.key(options.seed), 12)
BETA, LEARNING_RATE = 0.5, 3e-3

# %% [markdown]
# ## 1. All strings
#
# Two letters, and up to three of them in a string: 15 strings. A string is a response, and has an id, so a policy is
# still a table `[prompts, responses]`. Shorter strings have an end token; the longest need none.

# %%
few = strings.Strings(num_letters=2, horizon=3)
console.say(f"{few.num_responses} strings: {', '.join(few.text(range(few.num_responses)))}")
console.say(f"The tokens of {few.text([4])[0]!r} are {few.tokens[4].tolist()}: letters 0 and 1, then the end, 2.")

# %% [markdown]
# ## 2. Rewards, a reference, the optimum
#
# Rewards add up along a string: for letters, for neighbours, and for words. The reference draws letters at random and
# stops so that strings have 1.5 letters on average. The optimum of RLHF is a formula, as in the one-token world:
# $\pi^* \propto \pi_{ref} \exp(r / \beta)$.
#
# Read token by token, the optimum says what each token is worth. $\beta \log (\pi^* / \pi_{ref})$ of a token is its
# *soft advantage*: how much the best that can still be reached rises or falls by it.

# %%
small = strings.make_world(keys[0], few, num_prompts=1, letters_per_word=2)
plain = strings.reference_log_probs(few, expected_length=1.5)[None]
best = toy.optimal_policy(plain, small.rewards, beta=BETA)
advantages = strings.soft_advantages(plain, small.rewards, few, beta=BETA)
console.print_table(
    "Rewards and probabilities",
    ["string", "reward", "reference", "optimum"],
    [
        [
            few.text([i])[0] or "(empty)",
            f"{small.rewards[0, i]:+.2f}",
            f"{jnp.exp(plain[0, i]):.3f}",
            f"{jnp.exp(best[0, i]):.3f}",
        ]
        for i in range(few.num_responses)
    ],
)
tree = figures.prefix_tree(
    few,
    {"reference": np.exp(plain[0]), f"optimum, β = {BETA}": np.exp(best[0])},
    np.asarray(advantages[0]),
)
files.save_figure(tree, out / "tree.png")

# %% [markdown]
# Wide branches are probable. The optimum widens the blue ones. A token can be good for what comes after it, not for
# itself: that is what credit of tokens means.
#
# ## 3. A network that reads prefixes
#
# Now a larger world: strings of up to six letters, 127 of them, and two prompts. `CausalMLP` is the tutorial's network
# with one more input: the tokens so far. Each token adds a row of weights to the hidden layer, so all prefixes cost
# little more than one layer. `policy(embeddings)` is the table of all strings; `strings.log_prob_fn` scores given
# strings on their own paths; `strings.sample_fn` writes strings token by token. All three agree.

# %%
every = strings.Strings(num_letters=2, horizon=6)
world = strings.make_world(keys[1], every)
policy = strings.CausalMLP(every)
table = toy.table_fn(policy, world.embeddings)
by_table = toy.log_prob_fn(policy, world.embeddings)
by_path = strings.log_prob_fn(policy, world.embeddings)
params = policy.init(keys[2], world.embeddings)

shown = toy.optimal_policy(
    jnp.broadcast_to(strings.reference_log_probs(every, expected_length=3.0), world.rewards.shape),
    world.rewards,
    beta=2.0,
)
demos = toy.sample_demonstrations(keys[3], world, num=500, log_probs=shown)
sft, _ = jax.jit(
    partial(
        train.fit,
        objective=train.sft_objective(by_table),
        optimizer=optax.adam(1e-2),
        num_epochs=30,
        batch_size=32,
    )
)(keys[4], params, demos)
reference = table(sft)

ids = jnp.array([0, 5, 126])
console.say(f"by the table: {np.round(by_table(sft, jnp.zeros(3, int), ids), 3)}")
console.say(f"on paths:     {np.round(by_path(sft, jnp.zeros(3, int), ids), 3)}")
written = strings.sample_fn(policy, world.embeddings)(keys[5], sft, jnp.zeros(8, int))
console.say(f"the SFT policy writes: {', '.join(every.text(every.ids(written)))}")

# %% [markdown]
# ## 4. DPO, and what it does to length
#
# People compare strings of the SFT policy. The rewards say nothing about length. One judge goes by the reward alone,
# another adds up to 2 for a string of full length. How long should strings become? Not as long as before: good strings
# may well be longer. The right yardstick is the policy of highest *true* reward that is as far from the reference,
# which we can compute.

# %%


def measured(log_probs: jax.Array) -> Metrics:
    """Exact reward, KL and length, and the length of the best policy at this KL."""
    found = toy.evaluate(log_probs, reference, world.rewards)
    rival = toy.optimal_policy_at_kl(reference, world.rewards, kl=jnp.maximum(found["kl_to_reference"], 0))
    lengths = [jnp.mean(strings.expected_length(rows, every)) for rows in (log_probs, rival)]
    return {**found, "expected_length": lengths[0], "optimal_length": lengths[1]}


@partial(jax.jit, static_argnames="priced")
def tuned(liking: jax.Array, *, priced: bool = False) -> jax.Array:
    """The table after DPO, or R-DPO with the judge's price of a letter, on what a judge says."""
    seen = strings.judged(world, every, liking=liking)
    pairs = train.with_reference(by_table, sft, toy.sample_preferences(keys[6], seen, num=1024, log_probs=reference))
    objective = train.preference_objective(by_table, losses.dpo_loss, beta=BETA)
    if priced:
        objective = train.preference_objective(
            by_table,
            losses.length_regularized_dpo_loss,
            beta=BETA,
            alpha=liking / every.horizon,
            lengths=lambda _, batch, __: strings.lengths_of(every, batch.responses),
        )
    # same key: both losses see the same batches
    done, _ = train.fit(
        keys[7], sft, pairs, objective=objective, optimizer=optax.adam(LEARNING_RATE), num_epochs=30, batch_size=64
    )
    return table(done)


optimum = toy.optimal_policy(reference, world.rewards, beta=BETA)
tables = {
    "SFT": reference,
    "DPO, truthful judge": tuned(0.0),
    "DPO, judge fond of length": tuned(2.0),
    "R-DPO, judge fond of length": tuned(2.0, priced=True),
    "optimum": optimum,
}
COLUMNS = {
    "expected_reward": "reward",
    "kl_to_reference": "KL",
    "expected_length": "letters",
    "optimal_length": "letters of the best policy at this KL",
}
results = {name: jax.device_get(measured(log_probs)) for name, log_probs in tables.items()}
console.print_table(
    f"After training, β = {BETA}",
    ["policy", *COLUMNS.values()],
    [[name, *(f"{float(found[column]):.3f}" for column in COLUMNS)] for name, found in results.items()],
)

# %% [markdown]
# With truthful labels DPO is about as long as it should be. With labels that favour length it is too long, and a price
# for each letter (R-DPO) takes that back. `python -m experiments.length` asks the same of every loss.
#
# ## 5. Credit of tokens
#
# DPO sees labels of whole strings. Do its log-ratios of single tokens come near to the soft advantages? For the optimum
# they are the same. For the trained network we can look.

# %%
truth = strings.soft_advantages(reference, world.rewards, every, beta=BETA)
learned = BETA * strings.token_log_ratios(tables["DPO, truthful judge"], reference, every)
visits = np.exp(strings.prefix_log_probs(reference, every))[..., None] * np.exp(
    strings.next_token_log_probs(reference, every)
)
weights = (visits / visits.sum()).ravel()


def correlation(x: jax.Array, y: jax.Array) -> float:
    """Of two numbers for each token, over the tokens that the SFT policy writes."""
    (own, both), (_, other) = np.cov(np.ravel(x), np.ravel(y), aweights=weights)
    return float(both / np.sqrt(own * other))


credit = correlation(learned, truth)
console.say(f"correlation of DPO's token log-ratios with the soft advantages: {credit:.2f}")

# %% [markdown]
# ## 6. GRPO by token
#
# Learners that sample work as before; PPO and GRPO can also work token by token. GRPO's papers differ in how they add
# up the tokens of a batch: a mean over each response first (GRPO), all tokens alike (DAPO), or sums over a fixed length
# (Dr. GRPO).

# %%


def token_log_prob(params: Params, prompts: jax.Array, responses: jax.Array) -> TokenLogps:
    """Scores tokens by the table of next tokens."""
    return strings.token_lookup(strings.next_token_log_probs(table(params), every), every, prompts, responses)


AGGREGATES: dict[str, Any] = {
    "GRPO": losses.mean_of_responses,
    "DAPO": losses.mean_of_tokens,
    "Dr. GRPO": partial(losses.mean_per_length, max_length=every.horizon),
}
for name, aggregate in AGGREGATES.items():
    learner = rlhf.token_grpo(
        ask=toy.ask_everything(world),
        respond=toy.respond_fn(policy, world.embeddings, group_size=16),
        token_log_prob=token_log_prob,
        reward=toy.reward_fn(world.rewards),
        reference_params=sft,
        beta=0.0,
        advantages=losses.centred_advantages,
        aggregate=aggregate,
    )
    with console.waiting(name):
        # same key: all three see the same numbers
        done, _ = train.fit_online(
            keys[8], sft, learner, optimizer=optax.adam(LEARNING_RATE), num_epochs=1, rounds_per_epoch=150
        )
    results[name] = jax.device_get(measured(table(done)))
console.print_table(
    "After 150 steps without KL",
    ["learner", *COLUMNS.values()],
    [[name, *(f"{float(results[name][column]):.3f}" for column in COLUMNS)] for name in AGGREGATES],
)

# %% [markdown]
# ## 7. More worlds
#
# One world proves nothing. `python -m experiments.length` compares every loss in many worlds, with tuned
# hyperparameters; `python -m experiments.token_claims` measures what papers say about tokens.

# %%
summary = {"seed": options.seed, "beta": BETA, "policies": results, "credit": credit}
files.save_summary({**summary, **files.provenance(total=time.perf_counter() - clock)}, out)
console.say(f"{time.perf_counter() - clock:.1f} s in all. Figures and summary.json are in {out}.")
