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
# against it. Direct Preference Optimization (DPO, [Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) gets by
# without either: one supervised loss on the comparisons. This walk builds a world in which we know the truth, trains a
# policy by DPO, and checks it against the exact optimum.
#
# This page is a script and a notebook in one: `python -m experiments.tutorial`, or `tutorial.ipynb` beside it.

# %%
import sys
from dataclasses import dataclass
from pathlib import Path

if "ipykernel" in sys.modules:
    sys.path.append("..")  # a notebook starts in its own folder, a script in the one above

import jax
import numpy as np

from dpo_jax import losses, toy, train
from dpo_jax.types import Metrics
from experiments import harness
from experiments.notebook import BETA, BETAS, POLICY, prepare, train_dpo


@dataclass(frozen=True)
class Options:
    """Direct Preference Optimization, step by step, in a world whose true rewards are known."""

    seed: int = 42
    """Decides everything: the world, the data, the network and the training."""
    num_seeds: int = 1
    """Repeat the walk's headline in this many worlds (seed, seed + 1, ...) and report mean and standard error."""
    out: Path = Path("results/tutorial")
    """Folder for summary.json and the figures."""


options = harness.parse(Options)
harness.check_seeds(options.seed, options.num_seeds)
out = harness.output_folder(options.out)
harness.enable_compilation_cache()
watch = harness.Stopwatch()

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
# Five prompts (the notebook that this walk retells calls them contexts) with ten possible responses of one token each,
# and a true reward for every response. A small network learns from 500 demonstrations: supervised fine-tuning, SFT.
# Then people compare 1,800 pairs of responses. All of this is one pure function of a key, `prepare`, and DPO is another
# one, `train_dpo`. Both are in `experiments/notebook.py`, and XLA compiles them in the background while we go on.

# %%
start_key, dpo_key = jax.random.split(jax.random.key(options.seed))
prepare_program = watch.compiled(prepare, start_key, optimise=False)
dpo_program = watch.compiled(train_dpo, dpo_key, prepare_program.output, BETA, optimise=False)

from dpo_jax import figures  # Matplotlib loads while XLA compiles

with harness.waiting("Compiling"):
    start = prepare_program(start_key)
world, sft = start.world, start.sft
harness.console.print(
    f"SFT: loss {sft.history['loss'][0]:.3f} nats in the first epoch, {sft.history['loss'][-1]:.3f} in the last. "
    f"Then {len(start.preferences.prompts):,} comparisons."
)

# %% [markdown]
# ## 3. The loss
#
# A loss takes two pairs of log-probabilities, those of the policy and those of the reference, and returns one number
# for each comparison. Before training, policy and reference are the same: the implicit reward is zero everywhere, a
# comparison is a coin toss, and the loss is log 2.

# %%
objective = train.preference_objective(toy.log_prob_fn(POLICY, world.embeddings), losses.dpo_loss, beta=BETA)
three = jax.tree.map(lambda leaf: leaf[:3], start.preferences)
loss, metrics = watch.compiled(objective, sft.params, three, optimise=False)(sft.params, three)
harness.print_table(
    "Quick test of the loss on three comparisons, policy = reference",
    ["loss", *metrics],
    [[f"{loss:.4f}", *(f"{value:.4f}" for value in metrics.values())]],
)

# %% [markdown]
# Now train. beta is a traced argument, so the one compiled program serves every value of beta later on.

# %%
dpo = dpo_program(dpo_key, start, BETA)
PROGRESS = ("epoch", "loss", "accuracy", "reward_margin", "expected_reward", "kl_to_reference")


def progress(history: Metrics) -> list[list[str]]:
    """Every tenth epoch of a history, as rows of a table."""
    return [[f"{epoch}", *(f"{history[name][epoch - 1]:.4f}" for name in PROGRESS[1:])] for epoch in range(10, 51, 10)]


harness.print_table(f"DPO with β = {BETA}", PROGRESS, progress(dpo.history))

# %%
bayes = watch.compiled(toy.bayes_prediction, world.rewards, optimise=False)(world.rewards)
harness.save_figure(figures.training(dpo.history, bayes=bayes), out / "dpo_training.png")

# %% [markdown]
# These are training figures, and comparisons in this world are noisy: rewards lie between 0 and 1, so people toss a
# coin that is hardly loaded. The dotted lines say how well the true rewards themselves would foretell new comparisons.
# Training does better than that on the comparisons it has seen: the rest is noise learnt by heart. What counts is the
# true reward. We know it exactly; the sampled figures, from 200 responses to each prompt, stand beside it.

# %%
harness.print_table(
    "True reward, SFT against DPO",
    ["prompt", "SFT sampled", "DPO sampled", "SFT exact", "DPO exact", ""],
    [
        [
            name,
            *(f"{value:.4f}" for value in (sft_sampled, dpo_sampled, sft_exact, dpo_exact)),
            "✓" if dpo_exact > sft_exact else "✗",
        ]
        for name, sft_sampled, dpo_sampled, sft_exact, dpo_exact in zip(
            [*map(str, range(world.num_prompts)), "overall"],
            *(
                [*values, values.mean()]
                for values in (sft.sampled_reward, dpo.sampled_reward, sft.expected_reward, dpo.expected_reward)
            ),
            strict=True,
        )
    ],
)

# %% [markdown]
# ## 4. What beta does
#
# A small beta lets the policy go far from the reference, a large one keeps it close. For each beta the optimum is
# known in closed form, so we can tell how much of what could be won was won, and how far the noise misleads.

# %%
# same key: every beta sees the same batches
ablation = [dpo if beta == BETA else dpo_program(dpo_key, start, beta) for beta in BETAS]
curve_betas = np.geomspace(0.005, 20.0, 200, dtype=np.float32)
exact = watch.compiled(
    lambda betas: toy.frontier(sft.log_probs, world.rewards, betas), np.append(curve_betas, BETAS), optimise=False
)(np.append(curve_betas, BETAS))
curve = {name: values[: len(curve_betas)] for name, values in exact.items()}
optima = {name: values[len(curve_betas) :] for name, values in exact.items()}
learned = {
    name: np.array([policy.history[name][-1] for policy in ablation])
    for name in ("expected_reward", "kl_to_reference", "loss")
}
harness.print_table(
    "Training with each β",
    ["β", *PROGRESS],
    [[f"{beta:g}", *row] for beta, policy in zip(BETAS, ablation, strict=True) for row in progress(policy.history)],
)
harness.print_table(
    "DPO for four values of beta",
    ["β", "loss", "reward, sampled", "reward, exact", "optimum", "KL to reference", "KL of optimum"],
    [
        [f"{beta:g}", *(f"{value:.4f}" for value in values)]
        for beta, *values in zip(
            BETAS,
            learned["loss"],
            [policy.sampled_reward.mean() for policy in ablation],
            learned["expected_reward"],
            optima["expected_reward"],
            learned["kl_to_reference"],
            optima["kl_to_reference"],
            strict=True,
        )
    ],
)

# %%
harness.save_figure(
    figures.beta_ablation(
        BETAS,
        np.array([policy.history["loss"] for policy in ablation]),
        learned["expected_reward"],
        optimal_rewards=optima["expected_reward"],
        sft_reward=sft.expected_reward.mean(),
    ),
    out / "beta_ablation.png",
)

# %% [markdown]
# The frontier shows the price of reward: no policy earns more at the same distance from the reference. Each dotted
# line joins what was learnt from 1,800 noisy comparisons in 50 epochs to what an endless supply of both would teach.

# %%
harness.save_figure(
    figures.frontier(curve, learned, BETAS, optima, sft_reward=sft.expected_reward.mean()), out / "frontier.png"
)

# %% [markdown]
# ## 5. One world is an anecdote
#
# `--num-seeds 100` repeats SFT and DPO in a hundred worlds at once, and `python -m experiments.beta_ablation` does the
# whole ablation with standard errors.

# %%
summary: dict[str, object] = {
    "seed": options.seed,
    "sft": {
        "loss": sft.history["loss"],
        "expected_reward": sft.expected_reward,
        "sampled_reward": sft.sampled_reward,
        "mean_expected_reward": sft.expected_reward.mean(),
    },
    "dpo": {
        "beta": BETA,
        **dpo.history,
        "bayes": bayes,
        "expected_reward": dpo.expected_reward,
        "sampled_reward": dpo.sampled_reward,
        "mean_expected_reward": dpo.expected_reward.mean(),
    },
    "ablation": [
        {
            "beta": beta,
            "mean_expected_reward": policy.expected_reward.mean(),
            "mean_sampled_reward": policy.sampled_reward.mean(),
            "kl_to_reference": policy.history["kl_to_reference"][-1],
            "optimal_reward": optimal_reward,
            "loss": policy.history["loss"][-1],
            "loss_history": policy.history["loss"],
        }
        for beta, policy, optimal_reward in zip(BETAS, ablation, optima["expected_reward"], strict=True)
    ],
}
if options.num_seeds > 1:
    from experiments import beta_ablation

    results = beta_ablation.run_all(options.seed, options.num_seeds, BETAS, watch)
    over_seeds = beta_ablation.summarise(results, BETAS)
    beta_ablation.print_results(over_seeds)
    summary["over_seeds"] = over_seeds

harness.save_summary({**summary, **harness.provenance(compile=watch.compile, run=watch.run)}, out)
harness.console.print(
    f"Compiled in {watch.compile:.1f} s, ran in {watch.run:.2f} s. Figures and summary.json are in {out}."
)
