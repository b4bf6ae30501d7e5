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
# The [DPO tutorial](tutorial.ipynb) got from comparisons to a better policy in one supervised step. Reinforcement
# learning from human feedback takes two: fit a reward model to the comparisons, then let the policy try responses and
# reinforce those that the reward model scores highly, here by PPO and by GRPO. The world is small, so we know the
# optimum of each method, and the errors of the reward model.
#
# This page is a script and a notebook in one: `python -m experiments.rlhf_tutorial`, or `rlhf_tutorial.ipynb` beside
# it.

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

from dpo_jax import figures, losses, rlhf, sweep, toy, train
from dpo_jax.types import Learner, Metrics, Numeric, Params
from experiments.lab import commands, console, contenders, devices, files
from experiments.lab.pipeline import TUTORIAL


@dataclass(frozen=True)
class Options:
    """RLHF, step by step, in a world whose true rewards are known: reward model, PPO, GRPO."""

    seed: int = 42
    """Decides everything random: the world, the data, the networks and the training."""
    num_seeds: int = 64
    """How many worlds to watch overoptimisation in."""
    out: Path = Path("results/rlhf_tutorial")
    """Folder for summary.json and the figures."""


options = commands.parse(Options)
commands.check_seed(options.seed)
commands.check_sizes(num_seeds=options.num_seeds)
out, clock = files.output_folder(options.out), time.perf_counter()
devices.use_all_cores()
devices.enable_compilation_cache()
BETA, LEARNING_RATE = 0.1, 1e-3

# %% [markdown]
# ## 1. The goal
#
# We want reward without straying from the policy that imitates people:
#
# $$\max_\pi \; \mathbb{E}_{x,\, y \sim \pi}\left[ r(x, y) \right] - \beta\, KL(\pi \,\|\, \pi_{ref})$$
#
# People cannot judge every response that a policy tries. So RLHF first learns to predict their judgements:
#
# 1. **SFT**: imitate demonstrations. That gives $\pi_{ref}$.
# 2. **Reward model**: fit $r_\phi$ to comparisons by the Bradley-Terry model:
#    $-\log \sigma(r_\phi(x, y_w) - r_\phi(x, y_l))$.
# 3. **Reinforcement learning**: sample responses from the policy, score them by $r_\phi$, and make those more likely
#    that scored better than expected.
#
# The world, the SFT policy and the comparisons are made as in the DPO tutorial: five prompts, ten responses to each,
# 500 demonstrations and 1,800 comparisons.

# %%
start = TUTORIAL.start(jax.random.key(options.seed))
pairs_key, reward_key, init_key, value_key, ppo_key, dpo_key, grpo_key, sweep_key = jax.random.split(start.key, 8)
world, sft_params, sft_log_probs = start.world, start.params, start.log_probs
pairs = TUTORIAL.comparisons(pairs_key, start)
policy, table = TUTORIAL.policy, TUTORIAL.table(world)
sft_reward = float(jnp.mean(toy.expected_reward(sft_log_probs, world.rewards)))
console.say(f"SFT: an expected true reward of {sft_reward:.4f}. Then {len(pairs.prompts):,} comparisons.")

# %% [markdown]
# ## 2. The reward model
#
# A second network of the same shape as the policy. Its ten outputs are rewards instead of logits. Comparisons determine
# only differences of rewards, so a small penalty on their sum keeps the level near zero.

# %%
network = toy.ToyLM(num_responses=world.num_responses)
with console.waiting("The reward model"):
    reward_params, reward_history = train.fit(
        reward_key,
        network.init(init_key, world.embeddings),
        pairs,
        objective=train.reference_free_objective(
            toy.score_fn(network, world.embeddings), losses.bradley_terry_loss, centring=0.01
        ),
        optimizer=optax.adam(1e-3),
        num_epochs=50,
        batch_size=64,
    )
learned_rewards = toy.score_table_fn(network, world.embeddings)(reward_params)
bayes = jax.device_get(toy.bayes_prediction(world.rewards))
files.save_figure(figures.training(jax.device_get(reward_history), bayes=bayes), out / "reward_model.png")

# %%
quality = {
    "ranking_accuracy": float(jnp.mean(toy.ranking_accuracy(learned_rewards, world.rewards))),
    "error": float(jnp.mean(toy.reward_error(learned_rewards, world.rewards))),
    "spread_of_true_rewards": float(np.mean(np.std(world.rewards, axis=-1))),
}
console.say(
    f"It orders {quality['ranking_accuracy']:.1%} of pairs of responses as the true rewards do. Its root mean square "
    f"error is {quality['error']:.3f}; the true rewards of a prompt have a standard deviation of "
    f"{quality['spread_of_true_rewards']:.3f}."
)
files.save_figure(
    figures.learned_rewards(np.asarray(world.rewards), np.asarray(learned_rewards)), out / "learned_rewards.png"
)

# %% [markdown]
# That is not much. Comparisons of responses with similar rewards are nearly coin tosses, and 1,800 of them, spread over
# 225 pairs, leave noise as large as the signal. Maximising this reward model maximises its errors too.

# %% [markdown]
# ## 3. PPO
#
# A round of Proximal Policy Optimization: the policy gives 256 responses, the reward model scores them, and the KL term
# is subtracted. The result is compared with the prediction of a value network:
#
# $$A = r_\phi(x, y) - \beta \log \frac{\pi_{old}(y|x)}{\pi_{ref}(y|x)} - V(x)$$
#
# Then four passes over these responses in batches of 64. The policy changes meanwhile, so probabilities are taken
# relative to those at which the responses were sampled, and clipped, so that no batch changes it much:
#
# $$\mathcal{L}_{PPO} = -\mathbb{E} \left[ \min(\rho A,\; \mathrm{clip}(\rho, 0.8, 1.2)\, A) \right], \qquad
# \rho = \frac{\pi(y|x)}{\pi_{old}(y|x)}$$
#
# Ninety rounds make as many optimizer steps as DPO takes. All of it is one compiled scan.

# %%
log_prob = toy.log_prob_fn(policy, world.embeddings)
learned_reward = toy.reward_fn(learned_rewards)
value_network = toy.ToyLM(num_responses=1)


def evaluate(params: Params) -> Metrics:
    """Exact true reward and KL, and the reward model's score."""
    log_probs = table(contenders.policy_of(params))
    score = jnp.mean(toy.expected_reward(log_probs, learned_rewards))
    return {**toy.evaluate(log_probs, sft_log_probs, world.rewards), "learned_reward": score}


def respond_to(num: int, group_size: int) -> dict[str, Any]:
    """What every learner needs: how to ask, how to respond, how to score, and the reference."""
    return {
        "ask": toy.ask_uniformly(world, num=num // group_size),
        "respond": toy.respond_fn(policy, world.embeddings, group_size=group_size),
        "log_prob": log_prob,
        "reward": learned_reward,
        "reference_params": sft_params,
    }


ppo_learner = rlhf.ppo(**respond_to(256, group_size=1), value=toy.value_fn(value_network, world.embeddings), beta=BETA)
with console.waiting("PPO"):
    ppo_params, ppo = train.fit_online(
        ppo_key,
        rlhf.ActorCritic(sft_params, value_network.init(value_key, world.embeddings)),
        learner=ppo_learner,
        optimizer=optax.adam(LEARNING_RATE),
        num_epochs=30,
        rounds_per_epoch=3,
        passes_per_round=4,
        batch_size=64,
        evaluate=evaluate,
    )
PROGRESS = ("sampled_reward", "sampled_kl", "learned_reward", "expected_reward", "kl_to_reference")


def progress(history: Metrics) -> list[list[str]]:
    """Six moments of a training, as rows of a table."""
    num = len(history["loss"])
    moments = np.linspace(0, num - 1, 6).astype(int)
    return [[f"{history['step'][i]}", *(f"{history[name][i]:.4f}" for name in PROGRESS)] for i in moments]


console.print_table(
    f"PPO with β = {BETA}",
    ["step", "score, sampled", "KL, sampled", "score", "true reward", "KL"],
    progress(ppo),
)
files.save_figure(figures.reinforcement(jax.device_get(ppo)), out / "ppo_training.png")

# %% [markdown]
# The score, which is all that PPO sees, rises steadily. The true reward rises too, but by much less: part of the score
# is error. For comparison, we add DPO, and the optima that need no sampling at all. The maximum of reward minus β times
# KL is known in closed form, for the reward model and for the true reward: $\pi_{ref}\, e^{r / \beta} / Z$.

# %%
with console.waiting("DPO"):
    dpo_params, _ = train.fit(
        dpo_key,
        sft_params,
        pairs,
        objective=train.preference_objective(log_prob, losses.dpo_loss, beta=BETA),
        optimizer=optax.adam(LEARNING_RATE),
        num_epochs=50,
        batch_size=64,
    )
policies = {
    "SFT": sft_log_probs,
    "PPO": table(ppo_params.policy),
    "optimum of the reward model": toy.optimal_policy(sft_log_probs, learned_rewards, beta=BETA),
    "DPO": table(dpo_params),
    "true optimum": toy.optimal_policy(sft_log_probs, world.rewards, beta=BETA),
}


def measured(log_probs: jax.Array) -> dict[str, float]:
    """Exact means over prompts."""
    found = toy.evaluate(log_probs, sft_log_probs, world.rewards)
    score = jnp.mean(toy.expected_reward(log_probs, learned_rewards))
    return {name: float(value) for name, value in {**found, "learned_reward": score}.items()}


results = {name: measured(log_probs) for name, log_probs in policies.items()}
COLUMNS = {"expected_reward": "true reward", "learned_reward": "score", "kl_to_reference": "KL to SFT (nats)"}


def print_policies(title: str, names: list[str]) -> None:
    """Prints the measures of some policies."""
    rows = [[name, *(f"{results[name][column]:.4f}" for column in COLUMNS)] for name in names]
    console.print_table(title, ["policy", *COLUMNS.values()], rows)


print_policies(f"After PPO, β = {BETA}", list(results))

# %% [markdown]
# PPO reaches the optimum of its reward model. DPO, from the same comparisons and without reward model, sampling or
# value network, ends close to it: its loss *is* that of the reward model, written in terms of the policy that maximises
# it. Neither reaches the true optimum, because both learned from the same noisy comparisons.

# %% [markdown]
# ## 4. Overoptimisation
#
# Now train PPO with β = 0, in small steps, and beside it with β = 0.1. One world proves little, so we do it in many: a
# sweep over β and seeds, in which each seed makes its own world, SFT policy and reward model.

# %%
SLOWLY = 3e-4
ppo_contender = contenders.contender("PPO, reward model")


def watch(scene: contenders.Scene, *, beta: Numeric) -> Metrics:
    """The course of PPO in one world, as gains over SFT."""
    sft = contenders.evaluate(TUTORIAL, scene, scene.start.params)
    _, history = ppo_contender.trained(scene, beta, SLOWLY)
    gains = {name: history[name] - sft[name] for name in ("expected_reward", "learned_reward")}
    return {**gains, "kl_to_reference": history["kl_to_reference"]}


with console.progress("Runs") as report:
    courses = sweep.grid(
        watch,
        sweep_key,
        num_seeds=options.num_seeds,
        prepare=partial(contenders.scene, TUTORIAL),
        report=report,
        beta=[0.0, BETA],
    ).mean("seed")
course = {
    f"PPO, β = {beta:g}": figures.Points(
        courses.kl_to_reference.sel(beta=beta).values,
        courses.expected_reward.sel(beta=beta).values,
        courses.learned_reward.sel(beta=beta).values,
    )
    for beta in (BETA, 0.0)
}
files.save_figure(figures.overoptimisation(course), out / "overoptimisation.png")
for beta in (BETA, 0.0):
    true, score = (courses[name].sel(beta=beta).values for name in ("expected_reward", "learned_reward"))
    console.say(
        f"PPO, β = {beta:g}, mean of {options.num_seeds} worlds: the score ends {score[-1]:+.4f} above SFT, the true "
        f"reward {true[-1]:+.4f}; its highest was {true.max():+.4f}."
    )

# %% [markdown]
# With β = 0 the score keeps rising, while the true reward reaches its highest value early and then falls: reward
# hacking. The KL term keeps a policy where the reward model can be trusted.

# %% [markdown]
# ## 5. GRPO
#
# Group Relative Policy Optimization has no value network. The policy responds to each prompt eight times, and a
# response is compared with its own group, in standard deviations. The KL term moves from the reward into the loss:
#
# $$A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}, \qquad
# \mathcal{L}_{GRPO} = \mathcal{L}_{PPO}
# + \beta\, \mathbb{E} \left[ \frac{\pi_{ref}}{\pi} - 1 - \log \frac{\pi_{ref}}{\pi} \right]$$


# %%
def reinforce(learner: Learner) -> tuple[Params, Metrics]:
    """One optimizer step on each batch of 64 fresh responses, as many steps as DPO takes."""
    return train.fit_online(
        grpo_key,
        sft_params,
        learner=learner,
        optimizer=optax.adam(LEARNING_RATE),
        num_epochs=50,
        rounds_per_epoch=29,
        evaluate=evaluate,
    )


for name, advantages in {"GRPO": losses.grpo_advantages, "Dr. GRPO": losses.centred_advantages}.items():
    with console.waiting(name):
        grpo_params, grpo = reinforce(rlhf.grpo(**respond_to(64, group_size=8), beta=BETA, advantages=advantages))
    results[name] = measured(table(grpo_params))
    if name == "GRPO":
        files.save_figure(figures.reinforcement(jax.device_get(grpo)), out / "grpo_training.png")
print_policies(
    f"After GRPO, β = {BETA}", ["SFT", "PPO", "GRPO", "Dr. GRPO", "optimum of the reward model", "true optimum"]
)

# %% [markdown]
# GRPO goes farther at the same β. That is not better or worse optimisation: **it maximises another objective.** In
# standard deviations, a prompt whose responses differ by little counts as much as any other, and β = 0.1 is then a
# small weight. And the *gradient* of its KL term is that of the other divergence, KL(reference ‖ policy). Both can be
# derived: with large groups it converges to $\pi = \pi_{ref} / (1 - A / \beta)$; for a β as small as this, nearly all
# probability goes to the response with the best score, whose advantage has fallen below β. Dr. GRPO leaves the standard
# deviation out, but keeps the KL term. With `advantages=losses.rloo_advantages` and `kl=losses.k2_estimate` GRPO has
# the objective of RLHF, and converges to its optimum; a test verifies it.

# %% [markdown]
# ## 6. All in one picture
#
# Reward against KL. No policy can lie above the black line. The dashed line is RLHF on this reward model with perfect
# reinforcement learning, for all values of β.

# %%
betas = jnp.geomspace(0.003, 20.0, 200)


def line(rewards: jax.Array) -> figures.Points:
    """True gain and KL of the policies that maximise some rewards, for each beta."""
    best = jax.vmap(lambda beta: toy.optimal_policy(sft_log_probs, rewards, beta=beta))(betas)
    found = jax.vmap(lambda log_probs: toy.evaluate(log_probs, sft_log_probs, world.rewards))(best)
    return figures.Points(np.asarray(found["kl_to_reference"]), np.asarray(found["expected_reward"]) - sft_reward)


bounds = {"exact frontier": line(world.rewards), "reward model, maximised exactly": line(learned_rewards)}
ends = {
    name: figures.Points(
        np.array([results[name]["kl_to_reference"]]), np.array([results[name]["expected_reward"] - sft_reward])
    )
    for name in ("DPO", "PPO", "GRPO", "Dr. GRPO")
}
kls, gains = ([getattr(end, name).item() for end in ends.values()] for name in ("kl", "gain"))
limits = (1.1 * max(kls), min(0.0, *gains) - 0.01)
figure = figures.rlhf_frontier({f"After training, β = {BETA}": ends}, bounds, limits=limits)
files.save_figure(figure, out / "frontier.png")

# %% [markdown]
# ## 7. More worlds
#
# `python -m experiments.dpo_vs_rlhf` does all of this in hundreds of worlds, with more methods, tuned learning rates
# and confidence intervals; `python -m experiments.claims` measures what is commonly said about DPO and RLHF.

# %%
summary = {
    "seed": options.seed,
    "num_seeds": options.num_seeds,
    "beta": BETA,
    "learning_rate": LEARNING_RATE,
    "reward_model": {**quality, **{name: reward_history[name] for name in ("loss", "accuracy", "reward_margin")}},
    "policies": results,
    "ppo": {name: ppo[name] for name in ("loss", *PROGRESS)},
    "overoptimisation": {name: points._asdict() for name, points in course.items()},
}
files.save_summary({**summary, **files.provenance(total=time.perf_counter() - clock)}, out)
console.say(f"{time.perf_counter() - clock:.1f} s in all. Figures and summary.json are in {out}.")
