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
# # Direct Preference Optimization, step by step
#
# Reinforcement learning from human feedback fits a reward model to human comparisons, then runs reinforcement learning
# against it. Direct Preference Optimization (DPO, [Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) needs
# neither: one supervised loss on the comparisons. This tutorial builds a world in which we know the truth, trains a
# policy by DPO, and checks it against the exact optimum.
#
# This page is a script and a notebook in one: `python -m experiments.tutorial`, or `tutorial.ipynb` beside it.

# %%
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if "ipykernel" in sys.modules:
    sys.path.append("..")  # a notebook starts in its own folder, a script in the one above

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import figures, losses, toy, train
from dpo_jax.types import Metrics
from experiments.lab import commands, console, devices, files


@dataclass(frozen=True)
class Options:
    """Direct Preference Optimization, step by step, in a world whose true rewards are known."""

    seed: int = 42
    """Decides everything random: the world, the data, the network and the training."""
    num_seeds: int = 1
    """Repeat the ablation in this many worlds and report means and standard errors."""
    out: Path = Path("results/tutorial")
    """Folder for summary.json and the figures."""


options = commands.parse(Options)
commands.check_seed(options.seed)
commands.check_sizes(num_seeds=options.num_seeds)
out, clock = files.output_folder(options.out), time.perf_counter()
devices.enable_compilation_cache()

# %% [markdown]
# ## 1. The idea
#
# We want a policy $\pi$ that earns reward without straying from a reference policy $\pi_{ref}$:
#
# $$\max_\pi \; \mathbb{E}_{x,\, y \sim \pi}\left[ r(x, y) \right] - \beta\, KL(\pi \,\|\, \pi_{ref})$$
#
# The best one is known in closed form. It tilts the reference towards reward, and $Z$ makes it sum to one:
#
# $$\pi^*(y|x) = \frac{1}{Z(x)}\, \pi_{ref}(y|x)\, \exp\left(\frac{r(x, y)}{\beta}\right)$$
#
# Read backwards, every policy is optimal for *some* reward, its implicit reward:
#
# $$r(x, y) = \beta \log \frac{\pi(y|x)}{\pi_{ref}(y|x)} + \beta \log Z(x)$$
#
# People prefer $y_w$ to $y_l$ with probability $\sigma(r(x, y_w) - r(x, y_l))$, says the Bradley-Terry model. Put the
# implicit reward in: $\log Z$ cancels, and what is left is a likelihood in which the policy itself is the only unknown.
#
# $$\mathcal{L}_{DPO} = -\mathbb{E}\left[ \log \sigma\left( \beta \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}
#   - \beta \log \frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)} \right) \right]$$
#
# In words: make preferred responses more likely than rejected ones, *compared with the reference*.

# %% [markdown]
# ## 2. A world, a first policy, and comparisons
#
# Five prompts (the PyTorch notebook behind this tutorial calls them contexts) with ten possible responses of one token
# each, and a true reward for every response. A small network learns from 500 demonstrations: supervised fine-tuning,
# SFT. Then people compare 1,800 pairs of responses. Every function is pure: what is random takes a key.

# %%
keys = jax.random.split(jax.random.key(options.seed), 8)
world_key, demonstrations_key, init_key, sft_key, pairs_key, dpo_key, sft_sample_key, dpo_sample_key = keys

world = toy.make_world(world_key)  # 5 prompts, 10 responses, embeddings of 8 dimensions
policy = toy.ToyLM(num_responses=world.num_responses)
log_prob = toy.log_prob_fn(policy, world.embeddings)  # (params, prompts, responses) -> log-probabilities
table = toy.table_fn(policy, world.embeddings)  # params -> [prompts, responses]

with console.waiting("SFT"):
    sft_params, sft_history = train.fit(
        sft_key,
        policy.init(init_key, world.embeddings),
        toy.sample_demonstrations(demonstrations_key, world, num=500),
        objective=train.sft_objective(log_prob),
        optimizer=optax.adam(1e-2),
        num_epochs=100,
        batch_size=32,
    )
reference_log_probs = table(sft_params)
pairs = train.with_reference(log_prob, sft_params, toy.sample_preferences(pairs_key, world, num=1800))
console.say(
    f"SFT: loss {sft_history['loss'][0]:.3f} nats in the first epoch, {sft_history['loss'][-1]:.3f} in the last. "
    f"Then {len(pairs.prompts):,} comparisons."
)

# %% [markdown]
# ## 3. The loss
#
# A loss takes two pairs of log-probabilities, those of the policy and those of the reference, and returns one number
# for each comparison. Before training, policy and reference are the same: the implicit reward is zero everywhere, a
# comparison is a coin toss, and the loss is log 2.

# %%
three = jax.tree.map(lambda leaf: leaf[:3], pairs)
logps = log_prob(sft_params, three.prompts, three.responses)
console.say(f"Three losses where policy = reference: {losses.dpo_loss(logps, three.reference_logps, beta=0.1)}")

# %% [markdown]
# Now train. An objective takes the mean of the loss over a batch, and adds metrics. beta is an ordinary argument, and
# may be traced, so `vmap` trains one policy for each beta in a single compiled program. All of them see the same
# batches.

# %%
BETAS = (0.01, 0.1, 0.5, 2.0)
SHOWN = 1  # the place of beta 0.1, the usual one


def dpo(beta: float) -> tuple[jax.Array, Metrics]:
    """The table of a policy that was trained by DPO, and its history."""
    params, history = train.fit(
        dpo_key,
        sft_params,
        pairs,
        objective=train.preference_objective(log_prob, losses.dpo_loss, beta=beta),
        optimizer=optax.adam(1e-3),
        num_epochs=50,
        batch_size=64,
        evaluate=lambda params: toy.evaluate(table(params), reference_log_probs, world.rewards),
    )
    return table(params), history


with console.waiting("DPO for four values of beta"):
    dpo_log_probs, histories = jax.device_get(jax.jit(jax.vmap(dpo))(jnp.array(BETAS)))
history = {name: metric[SHOWN] for name, metric in histories.items()}
PROGRESS = ("epoch", "loss", "accuracy", "reward_margin", "expected_reward", "kl_to_reference")


def progress(history: Metrics) -> list[list[str]]:
    """Every tenth epoch of a history, as rows of a table."""
    return [[f"{epoch}", *(f"{history[name][epoch - 1]:.4f}" for name in PROGRESS[1:])] for epoch in range(10, 51, 10)]


console.print_table(f"DPO with β = {BETAS[SHOWN]}", PROGRESS, progress(history))

# %%
bayes = jax.device_get(toy.bayes_prediction(world.rewards))
files.save_figure(figures.training(history, bayes=bayes), out / "dpo_training.png")

# %% [markdown]
# These are training metrics, and comparisons in this world are noisy: rewards lie between 0 and 1, so people are only
# slightly more likely to prefer the better response. The dotted lines show how well the true rewards themselves predict
# new comparisons. Training does better than that on the comparisons it has seen: the difference is memorised noise.
# What counts is the true reward. We know it exactly; estimates from 200 sampled responses to each prompt stand beside
# it.

# %%
rewards = {
    name: {
        "sampled": np.asarray(toy.sampled_reward(key, world, log_probs)),
        "exact": np.asarray(toy.expected_reward(log_probs, world.rewards)),
    }
    for name, key, log_probs in (
        ("SFT", sft_sample_key, reference_log_probs),
        ("DPO", dpo_sample_key, dpo_log_probs[SHOWN]),
    )
}
columns = [(name, how) for how in ("sampled", "exact") for name in rewards]
table_of_rewards = np.array([[*rewards[name][how], rewards[name][how].mean()] for name, how in columns]).T
rows = [
    [prompt, *(f"{value:.4f}" for value in row)]
    for prompt, row in zip([*map(str, range(world.num_prompts)), "all"], table_of_rewards, strict=True)
]
console.print_table("True reward", ["prompt", *(f"{name}, {how}" for name, how in columns)], rows)

# %% [markdown]
# ## 4. What beta does
#
# A small beta lets the policy go far from the reference, a large one keeps it close. For each beta the optimum is
# known in closed form, so we can tell how much of what could be won was won, and how far the noise misleads.

# %%
curve_betas = np.geomspace(0.005, 20.0, 200, dtype=np.float32)
exact = toy.frontier(reference_log_probs, world.rewards, jnp.array([*curve_betas, *BETAS]))
curve = {name: np.asarray(values[: len(curve_betas)]) for name, values in exact.items()}
optima = {name: np.asarray(values[len(curve_betas) :]) for name, values in exact.items()}
learned = {name: histories[name][:, -1] for name in ("loss", "expected_reward", "kl_to_reference")}
# same key: every policy is sampled with the same random numbers
sampled = [np.mean(toy.sampled_reward(dpo_sample_key, world, log_probs)) for log_probs in dpo_log_probs]
console.print_table(
    "DPO for four values of beta",
    ["β", "loss", "reward, sampled", "reward, exact", "optimum", "KL to reference", "KL of optimum"],
    [
        [f"{beta:g}", *(f"{value:.4f}" for value in values)]
        for beta, *values in zip(
            BETAS,
            learned["loss"],
            sampled,
            learned["expected_reward"],
            optima["expected_reward"],
            learned["kl_to_reference"],
            optima["kl_to_reference"],
            strict=True,
        )
    ],
)

# %%
sft_reward = rewards["SFT"]["exact"].mean()
files.save_figure(
    figures.beta_ablation(
        BETAS,
        histories["loss"],
        learned["expected_reward"],
        optimal_rewards=optima["expected_reward"],
        sft_reward=sft_reward,
    ),
    out / "beta_ablation.png",
)

# %% [markdown]
# The frontier is the highest reward at each distance from the reference: no policy lies above it. Each dotted line
# joins the policy learned from 1,800 noisy comparisons in 50 epochs to the optimum that unlimited data and training
# would give.

# %%
files.save_figure(figures.frontier(curve, learned, BETAS, optima, sft_reward=sft_reward), out / "frontier.png")

# %% [markdown]
# ## 5. One world proves little
#
# `--num-seeds 100` repeats the ablation in a hundred worlds at once, as `python -m experiments.beta_ablation` does. To
# sweep experiments of your own, see `dpo_jax/sweep`.

# %%
summary: dict[str, object] = {
    "seed": options.seed,
    "sft": {
        "loss": sft_history["loss"],
        "expected_reward": rewards["SFT"]["exact"],
        "sampled_reward": rewards["SFT"]["sampled"],
        "mean_expected_reward": sft_reward,
    },
    "dpo": {
        "beta": BETAS[SHOWN],
        **history,
        "bayes": bayes,
        "expected_reward": rewards["DPO"]["exact"],
        "sampled_reward": rewards["DPO"]["sampled"],
        "mean_expected_reward": learned["expected_reward"][SHOWN],
    },
    "ablation": [
        {
            "beta": beta,
            "mean_expected_reward": learned["expected_reward"][i],
            "mean_sampled_reward": sampled[i],
            "kl_to_reference": learned["kl_to_reference"][i],
            "optimal_reward": optima["expected_reward"][i],
            "loss": learned["loss"][i],
            "loss_history": histories["loss"][i],
        }
        for i, beta in enumerate(BETAS)
    ],
}
if options.num_seeds > 1:
    from experiments import beta_ablation

    over_seeds, _ = beta_ablation.ablate(options.seed, options.num_seeds, BETAS)
    beta_ablation.print_results(over_seeds)
    summary["over_seeds"] = over_seeds

files.save_summary({**summary, **files.provenance(total=time.perf_counter() - clock)}, out)
console.say(f"{time.perf_counter() - clock:.1f} s in all. Figures and summary.json are in {out}.")
