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
# # RLHF, step by step
#
# The [walk through DPO](tutorial.ipynb) got from comparisons to a better policy in one supervised step. This is its
# twin: the road that DPO is a short cut of. Fit a reward model to the comparisons, then let the policy try things out
# and reinforce what the reward model likes, first by PPO, then by GRPO. As the world is small, we know what each of
# them should come to, and what the reward model gets wrong.
#
# This page is a script and a notebook in one: `python -m experiments.rlhf_tutorial`, or `rlhf_tutorial.ipynb` beside
# it.

# %%
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if "ipykernel" in sys.modules:
    sys.path.append("..")  # a notebook starts in its own folder, a script in the one above

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import toy
from dpo_jax.types import Metrics
from experiments import contenders, harness
from experiments.contenders import CONTENDERS, Scene
from experiments.notebook import BETA, prepare


@dataclass(frozen=True)
class Options:
    """RLHF, step by step, in a world whose true rewards are known: reward model, PPO, GRPO."""

    seed: int = 42
    """Decides everything: the world, the data, the networks and the training."""
    out: Path = Path("results/rlhf_tutorial")
    """Folder for summary.json and the figures."""


options = harness.parse(Options)
harness.check_seeds(options.seed)
out = harness.output_folder(options.out)
harness.enable_compilation_cache()
watch = harness.Stopwatch()
compiled = partial(watch.compiled, optimise=False)

# %% [markdown]
# ## 1. The goal, and the long way to it
#
# We want reward without straying from the policy that imitates people:
#
# $$\max_\pi \; \mathbb{E}_{x,\, y \sim \pi}\left[ r(x, y) \right] - \beta\, KL(\pi \,\|\, \pi_{ref})$$
#
# Nobody can ask people about every response that a policy tries. So RLHF first learns to guess what they would say:
#
# 1. **SFT**: imitate demonstrations. That gives $\pi_{ref}$.
# 2. **Reward model**: fit $r_\phi$ to comparisons, as Bradley and Terry have it:
#    $-\log \sigma(r_\phi(x, y_w) - r_\phi(x, y_l))$.
# 3. **Reinforcement learning**: sample responses from the policy, score them by $r_\phi$, and make those more likely
#    that scored better than expected.
#
# The world, its demonstrations and its comparisons are those of the other walk: five prompts, ten responses to each,
# 500 demonstrations and 1,800 comparisons.

# %%
start_key, rest = jax.random.split(jax.random.key(options.seed))
reward_key, train_key = jax.random.split(rest)
prepare_program = compiled(prepare, start_key)

from dpo_jax import figures  # Matplotlib loads while XLA compiles

with harness.waiting("Compiling"):
    start = prepare_program(start_key)
world, sft = start.world, start.sft
harness.console.print(
    f"SFT: an expected true reward of {sft.expected_reward.mean():.4f}. "
    f"Then {len(start.preferences.prompts):,} comparisons."
)

# %% [markdown]
# ## 2. The reward model
#
# A second network of the same shape as the policy. Its ten outputs are rewards instead of logits. Comparisons tell
# differences of rewards only, so a small penalty on their sum keeps the level near zero.

# %%
reward_program = compiled(contenders.train_reward_model, reward_key, world, start.preferences)
learned, reward_history = reward_program(reward_key, world, start.preferences)
bayes = compiled(toy.bayes_prediction, world.rewards)(world.rewards)
harness.save_figure(figures.training(reward_history, bayes=bayes), out / "reward_model.png")

# %%
quality = {
    "ranking_accuracy": float(jnp.mean(toy.ranking_accuracy(learned, world.rewards))),
    "error": float(jnp.mean(toy.reward_error(learned, world.rewards))),
    "spread_of_true_rewards": float(np.mean(np.std(world.rewards, axis=-1))),
}
harness.console.print(
    f"It orders {quality['ranking_accuracy']:.1%} of pairs of responses as the true rewards do. Its error is "
    f"{quality['error']:.3f} (root mean square), where the true rewards of a prompt spread by "
    f"{quality['spread_of_true_rewards']:.3f}."
)
harness.save_figure(figures.learned_rewards(world.rewards, learned), out / "learned_rewards.png")

# %% [markdown]
# That is not much: comparisons of responses whose rewards differ by little are nearly coin tosses, and 1,800 of them,
# spread over 225 pairs, leave noise as large as the signal. Whoever maximises this reward model maximises its errors
# too. Keep that in mind.

# %% [markdown]
# ## 3. PPO
#
# A round of Proximal Policy Optimization: the policy gives 256 responses, the reward model scores them, and the price
# of straying is subtracted. What remains is compared with what a value network expected:
#
# $$A = r_\phi(x, y) - \beta \log \frac{\pi_{old}(y|x)}{\pi_{ref}(y|x)} - V(x)$$
#
# Then four passes over these responses in batches of 64. Since the policy moves meanwhile, probabilities are taken
# relative to those at which the responses were sampled, and clipped, so that no batch can carry it far:
#
# $$\mathcal{L}_{PPO} = -\mathbb{E} \left[ \min(\rho A,\; \mathrm{clip}(\rho, 0.8, 1.2)\, A) \right], \qquad
# \rho = \frac{\pi(y|x)}{\pi_{old}(y|x)}$$
#
# Ninety rounds make as many optimizer steps as DPO takes. All of it is one compiled scan.

# %%
METHODS = {"DPO": "DPO", "PPO": "PPO, reward model", "GRPO": "GRPO, reward model", "Dr. GRPO": "Dr. GRPO, reward model"}
LEARNING_RATE = 1e-3
scene = Scene(jax.random.key_data(train_key), world, sft.params, sft.log_probs, start.preferences, learned, quality)
by_name = {contender.name: contender for contender in CONTENDERS}
programs = {label: compiled(by_name[name].trained, scene, BETA, LEARNING_RATE) for label, name in METHODS.items()}
ppo_log_probs, ppo = programs["PPO"](scene, BETA, LEARNING_RATE)
PROGRESS = ("sampled_reward", "sampled_kl", "learned_reward", "expected_reward", "kl_to_reference")


def progress(history: Metrics) -> list[list[str]]:
    """Six moments of a training, as rows of a table."""
    num = len(history["loss"])
    moments = np.linspace(0, num - 1, 6).astype(int)
    return [[f"{history['step'][i]}", *(f"{history[name][i]:.4f}" for name in PROGRESS)] for i in moments]


harness.print_table(
    f"PPO with β = {BETA}",
    ["step", "score, sampled", "KL, sampled", "score", "true reward", "KL"],
    progress(ppo),
)
harness.save_figure(figures.reinforcement(ppo), out / "ppo_training.png")

# %% [markdown]
# The score, which is all that PPO sees, rises steadily. So does the true reward, but by much less: part of the score is
# error. For comparison, the policies that need no sampling at all. The maximum of reward minus β times KL is known in
# closed form, for the reward model as for the truth: $\pi_{ref}\, e^{r / \beta} / Z$.

# %%
policies = {
    "SFT": sft.log_probs,
    "PPO": ppo_log_probs,
    "what PPO is after": toy.optimal_policy(sft.log_probs, learned, beta=BETA),
    "DPO": programs["DPO"](scene, BETA, LEARNING_RATE)[0],
    "the true optimum": toy.optimal_policy(sft.log_probs, world.rewards, beta=BETA),
}


def measured(log_probs: np.ndarray) -> dict[str, float]:
    """Exact means over prompts."""
    found = toy.evaluate(jnp.asarray(log_probs), sft.log_probs, world.rewards)
    score = jnp.mean(toy.expected_reward(jnp.asarray(log_probs), learned))
    return {**{name: float(value) for name, value in found.items()}, "learned_reward": float(score)}


results = {name: measured(log_probs) for name, log_probs in policies.items()}
COLUMNS = {"expected_reward": "true reward", "learned_reward": "score", "kl_to_reference": "KL to SFT (nats)"}


def print_policies(title: str, names: list[str]) -> None:
    """Prints what became of some policies."""
    rows = [[name, *(f"{results[name][column]:.4f}" for column in COLUMNS)] for name in names]
    harness.print_table(title, ["policy", *COLUMNS.values()], rows)


print_policies(f"After PPO, β = {BETA}", list(results))

# %% [markdown]
# PPO arrives at what it was after. DPO, from the same comparisons and without reward model, sampling or value network,
# arrives at nearly the same place: its loss *is* that of the reward model, with the policy that would maximise it put
# in. Neither comes to the true optimum. Both were told the same noisy things.

# %% [markdown]
# ## 4. What too much reward does
#
# Now let PPO go without a leash: β = 0, and in small steps, to see the way.

# %%
SLOWLY = 1e-4
leashed, unleashed = (programs["PPO"](scene, beta, SLOWLY)[1] for beta in (BETA, 0.0))
betas = np.geomspace(0.003, 20.0, 200, dtype=np.float32)
frontiers = {
    name: compiled(toy.frontier, sft.log_probs, rewards, betas)(sft.log_probs, rewards, betas)
    for name, rewards in (("true", world.rewards), ("learned", learned))
}
learned_maximum = jax.vmap(lambda beta: toy.optimal_policy(sft.log_probs, learned, beta=beta))(betas)
truth_of_maximum = jax.vmap(lambda table: toy.evaluate(table, sft.log_probs, world.rewards))(learned_maximum)
sft_score = float(jnp.mean(toy.expected_reward(sft.log_probs, learned)))


def course(history: Metrics) -> figures.Points:
    """Gains over SFT along a training, by truth and by score."""
    gain = history["expected_reward"] - sft.expected_reward.mean()
    return figures.Points(history["kl_to_reference"], gain, history["learned_reward"] - sft_score)


courses = {"PPO, β = 0.1": course(leashed), "PPO, β = 0": course(unleashed)}
harness.save_figure(figures.overoptimisation(courses, largest_kl=0.8), out / "overoptimisation.png")
harness.console.print(
    f"With the leash, a score of {leashed['learned_reward'][-1]:.4f} and a true reward of "
    f"{leashed['expected_reward'][-1]:.4f}; "
    f"without it {unleashed['learned_reward'][-1]:.4f} and {unleashed['expected_reward'][-1]:.4f}."
)

# %% [markdown]
# In this world (seed 42) the score rises and the true reward does not: reward hacking in its purest form. In some
# worlds it falls below SFT. The leash, β, keeps a policy where the reward model can be trusted.

# %% [markdown]
# ## 5. GRPO
#
# Group Relative Policy Optimization does without the value network. The policy responds to each prompt eight times, and
# a response is compared with its own group, in standard deviations. The price of straying moves from the reward into
# the loss:
#
# $$A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}, \qquad
# \mathcal{L}_{GRPO} = \mathcal{L}_{PPO}
# + \beta\, \mathbb{E} \left[ \frac{\pi_{ref}}{\pi} - 1 - \log \frac{\pi_{ref}}{\pi} \right]$$

# %%
for label in ("GRPO", "Dr. GRPO"):
    log_probs, history = programs[label](scene, BETA, LEARNING_RATE)
    results[label] = measured(log_probs)
    if label == "GRPO":
        harness.save_figure(figures.reinforcement(history), out / "grpo_training.png")
print_policies(f"After GRPO, β = {BETA}", ["SFT", "PPO", "GRPO", "Dr. GRPO", "what PPO is after", "the true optimum"])

# %% [markdown]
# GRPO goes farther at the same β. That is not better or worse optimisation: **it maximises something else.** In
# standard deviations, a prompt whose responses differ by little counts as much as any other, and β = 0.1 is then a
# light price. And the *gradient* of its KL term is that of the other divergence, KL(reference ‖ policy). Both can be
# worked out. With large groups it comes to rest where $\pi = \pi_{ref} / (1 - A / \beta)$; for a β as small as this,
# that is close to the response with the best score, where its advantage has fallen below β. Dr. GRPO leaves the
# standard deviation out, but keeps the KL term. With `advantages=losses.rloo_advantages` and `kl=losses.k2_estimate`
# GRPO has the goal of RLHF, and comes to its optimum; the tests hold it so.

# %% [markdown]
# ## 6. All in one picture
#
# Reward against KL. No policy can lie above the black line. The dashed line is what RLHF on this reward model comes to,
# if its reinforcement learning is perfect, for all values of β.

# %%
bounds = {
    "exact frontier": figures.Points(
        frontiers["true"]["kl_to_reference"], frontiers["true"]["expected_reward"] - sft.expected_reward.mean()
    ),
    "reward model, maximised exactly": figures.Points(
        np.asarray(truth_of_maximum["kl_to_reference"]),
        np.asarray(truth_of_maximum["expected_reward"]) - sft.expected_reward.mean(),
    ),
}
ends = {
    name: figures.Points(
        np.array([results[name]["kl_to_reference"]]),
        np.array([results[name]["expected_reward"] - sft.expected_reward.mean()]),
    )
    for name in ("DPO", "PPO", "GRPO", "Dr. GRPO")
}
figure = figures.rlhf_frontier({f"Where they end, β = {BETA}": ends}, bounds, limits=(0.8, 0.0))
harness.save_figure(figure, out / "frontier.png")

# %% [markdown]
# ## 7. One world is an anecdote
#
# `python -m experiments.dpo_vs_rlhf` does all of this in hundreds of worlds, with more methods, tuned learning rates
# and confidence intervals; `python -m experiments.claims` measures what is commonly said about DPO and RLHF.

# %%
summary = {
    "seed": options.seed,
    "beta": BETA,
    "learning_rate": LEARNING_RATE,
    "reward_model": {**quality, **{name: reward_history[name] for name in ("loss", "accuracy", "reward_margin")}},
    "policies": results,
    "ppo": {name: ppo[name] for name in ("loss", *PROGRESS)},
    "unleashed": {name: unleashed[name] for name in ("expected_reward", "learned_reward", "kl_to_reference")},
}
harness.save_summary({**summary, **harness.provenance(compile=watch.compile, run=watch.run)}, out)
harness.console.print(
    f"Compiled in {watch.compile:.1f} s, ran in {watch.run:.2f} s. Figures and summary.json are in {out}."
)
