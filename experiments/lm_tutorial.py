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
# # A language model, beside the exact optimum
#
# The code that tunes Llama and Qwen, on a language model so small that nothing is unknown: a Llama of two layers learns
# to write strings of letters, then what people prefer. All strings can be listed, so reward, KL and the best policy are
# exact, and so is the error of everything that is estimated from samples.
#
# This page is a script and a notebook in one: `python -m experiments.lm_tutorial`, or `lm_tutorial.ipynb` beside it.

# %%
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if "ipykernel" in sys.modules:
    sys.path.append("..")  # a notebook starts in its own folder, a script in the one above

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import figures, lm, losses, strings, toy, train
from dpo_jax.types import Demonstrations, Pair, Params, Preferences
from experiments.lab import commands, console, devices, files
from experiments.lab.language import within_prompts
from experiments.lab.string_worlds import demonstrator


@dataclass(frozen=True)
class Options:
    """A language model beside the exact optimum: pretraining, DPO, several betas as adapters, sampled estimates."""

    seed: int = 0
    """Decides everything random: the world, the data, the model and the training."""
    out: Path = Path("results/lm_tutorial")
    """Folder for summary.json and the figures."""


options = commands.parse(Options)
commands.check_seed(options.seed)
out, clock = files.output_folder(options.out), time.perf_counter()
devices.enable_compilation_cache()
keys = jax.random.split(jax.random.key(options.seed), 12)
BETA = 0.5

# %% [markdown]
# ## 1. The world
#
# Responses are all strings of up to five letters out of three, 364 of them. Two letters make a prompt, and the same
# token ends a string everywhere, so the model's vocabulary has four tokens, and whatever it writes is a string.

# %%
every = strings.Strings(num_letters=3, horizon=5)
world = strings.make_world(keys[0], every, num_prompts=4)
prompts = jnp.array([[0, 1], [1, 2], [2, 0], [2, 2]], jnp.int32)  # the letters of each prompt
responses = jnp.asarray(every.tokens, jnp.int32)  # -1 where a string has ended
config = lm.Config(
    vocab_size=every.num_choices,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    init_std=0.1,
)
model = lm.init(keys[1], config)
num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
console.say(f"{every.num_responses} strings; a Llama of {num_params:,} parameters.")

# %% [markdown]
# ## 2. Pretraining
#
# Demonstrators write strings of about three letters, good ones more often. `lm.tune` minimises any objective of `train`
# over tokens; here it is the log-likelihood of what they wrote.

# %%
shown = demonstrator(world, every)
demos = toy.sample_demonstrations(keys[2], world, num=4000, log_probs=shown)
demos = Demonstrations(prompts[demos.prompts], responses[demos.responses])
with console.waiting("Pretraining"):
    pretrained = lm.tune(
        keys[3],
        model,
        demos,
        objective=train.sft_objective,
        optimizer=lambda: optax.adamw(optax.cosine_decay_schedule(3e-3, 630)),
        num_epochs=10,
        batch_size=64,
    )
reference = model._replace(params=pretrained.params)


@jax.jit
def table(params: Params) -> jax.Array:
    """Log-probabilities of all strings after each prompt."""
    score = lm.log_prob_fn(model.decoder)

    def of_prompt(prompt: jax.Array) -> jax.Array:
        return score(params, jnp.broadcast_to(prompt[None], (len(responses), 2)), responses)

    return jax.lax.map(of_prompt, prompts)


log_probs = table(reference.params)
console.say(f"Probabilities of all strings add up to {np.exp(log_probs).sum(axis=1).round(5)}.")

# %% [markdown]
# ## 3. DPO
#
# People compare strings of the pretrained model. Its log-probabilities, those of the reference, are computed once. Then
# the same function that pretrained the model minimises the loss of DPO.

# %%
pairs = toy.sample_preferences(keys[4], world, num=4096, log_probs=log_probs)
pairs = Preferences(prompts[pairs.prompts], Pair(*(responses[side] for side in pairs.responses)))
pairs = lm.with_reference(reference, pairs, batch_size=256)
dpo = partial(train.preference_objective, loss=losses.dpo_loss)
schedule = optax.cosine_decay_schedule(1e-3, 640)
with console.waiting("DPO"):
    tuned = lm.tune(
        keys[5],
        reference,
        pairs,
        objective=partial(dpo, beta=BETA),
        optimizer=lambda: optax.adamw(schedule),
        num_epochs=10,
        batch_size=64,
    )

optimum = toy.optimal_policy(log_probs, world.rewards, beta=BETA)


def measured(policy: jax.Array, beta: float = BETA) -> dict[str, float]:
    """Exact reward, KL and regret; means over prompts."""
    found = toy.evaluate(policy, log_probs, world.rewards)
    regret = jnp.mean(toy.regret(policy, log_probs, world.rewards, beta=beta))
    return {k: float(found[k]) for k in ("expected_reward", "kl_to_reference")} | {"regret": float(regret)}


results = {
    "reference": measured(log_probs),
    "tuned": measured(table(tuned.params)),
    "optimum": measured(optimum),
}
console.print_table(
    f"Exact, β = {BETA}",
    ["policy", "reward", "KL", "regret"],
    [[name, *(f"{value:.3f}" for value in found.values())] for name, found in results.items()],
)

# %% [markdown]
# What is missing to the optimum is due to the comparisons, which are few and noisy, and to the steps of training.
#
# ## 4. Estimates from samples
#
# A real model has no table: reward and KL are estimated from what it writes. Here both can be compared. An estimate is
# the mean over samples, of the reward and of the log-ratio to the reference, and its error should be about one standard
# error.

# %%
GROUP = 256
generate = jax.jit(lm.generate_fn(model.decoder, max_tokens=every.horizon, stops={every.num_letters}, group_size=GROUP))
written = generate(keys[6], tuned.params, prompts)
asked = jnp.repeat(prompts, GROUP, axis=0)
ratios = jnp.sum(written.logps, axis=1) - jax.jit(lm.log_prob_fn(model.decoder))(
    reference.params, asked, written.tokens
)
rewards = world.rewards[jnp.repeat(jnp.arange(4), GROUP), every.ids(written.tokens)]
console.say(f"It writes {', '.join(every.text(every.ids(written.tokens[:8])))}, ...")

of_prompts = {"reward": rewards.reshape(-1, GROUP), "kl": ratios.reshape(-1, GROUP)}
sampled = {name: within_prompts(np.asarray(values)) for name, values in of_prompts.items()}
exact = {"reward": results["tuned"]["expected_reward"], "kl": results["tuned"]["kl_to_reference"]}
console.print_table(
    f"From {written.tokens.shape[0]:,} samples",
    ["quantity", "estimate", "standard error", "exact", "errors away"],
    [
        [
            name,
            f"{found['mean']:.3f}",
            f"{found['stderr']:.3f}",
            f"{exact[name]:.3f}",
            f"{(found['mean'] - exact[name]) / found['stderr']:+.1f}",
        ]
        for name, found in sampled.items()
    ],
)

# %% [markdown]
# ## 5. Several betas in one program
#
# Adapters of low rank (LoRA) train a few parameters and leave the model as it is. Several adapters, each with its own
# beta, are trained by one program: they share the model, the reference and the batches.

# %%
BETAS = np.geomspace(0.125, 4, 6)
lora = lm.LoRA(rank=8, alpha=16)
with console.waiting("Six adapters"):
    many = lm.tune(
        keys[7],
        reference,
        pairs,
        objective=dpo,
        optimizer=lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 192)),
        num_epochs=3,
        batch_size=64,
        lora=lora,
        points={"beta": BETAS},
    )
tables = jax.vmap(lambda adapter: table(lm.with_adapter(reference.params, adapter, lora)))(many.params)
frontier = [measured(policy, beta) for policy, beta in zip(tables, BETAS, strict=True)]
best = [measured(toy.optimal_policy(log_probs, world.rewards, beta=beta), beta) for beta in BETAS]
console.print_table(
    "Adapters, exact",
    ["beta", "reward", "KL", "regret", "reward of the optimum"],
    [
        [f"{beta:.3g}", *(f"{value:.3f}" for value in found.values()), f"{top['expected_reward']:.3f}"]
        for beta, found, top in zip(BETAS, frontier, best, strict=True)
    ],
)

edge = [measured(toy.optimal_policy(log_probs, world.rewards, beta=beta)) for beta in np.geomspace(0.2, 50, 40)]
figure = figures.language_frontier(
    sorted((found["kl_to_reference"], found["expected_reward"]) for found in edge),
    {
        "reference": [(0.0, results["reference"]["expected_reward"])],
        f"DPO, all parameters, β = {BETA}": [(exact["kl"], exact["reward"])],
        "DPO, adapters": [(found["kl_to_reference"], found["expected_reward"]) for found in frontier],
    },
    sampled=(sampled["kl"], sampled["reward"]),
)
files.save_figure(figure, out / "frontier.png")

# %% [markdown]
# No policy lies above the black curve. The cross of the estimates covers the exact point. Adapters with a large beta
# stay close to the reference; with a small one they go far, and fall behind, since comparisons are few.
#
# ## 6. A folder
#
# `lm.save` writes the folder that Transformers and `lm.load` read; an adapter is merged into the model first, or saved
# on its own as PEFT does it.

# %%
with tempfile.TemporaryDirectory() as place:
    lm.save(Path(place) / "tuned", reference._replace(params=tuned.params))
    again = lm.load(Path(place) / "tuned")
    console.say(f"Saved and loaded: the tables differ by {np.abs(table(again.params) - table(tuned.params)).max()}.")
summary = {
    "seed": options.seed,
    "beta": BETA,
    **results,
    "sampled": sampled,
    "adapters": dict(zip(map(float, BETAS), frontier, strict=True)),
}
files.save_summary({**summary, **files.provenance(total=time.perf_counter() - clock)}, out)
console.say(f"{time.perf_counter() - clock:.1f} s in all. Figures and summary.json are in {out}.")
