"""The policy gradients of TRL 1.16.0: losses with gradients, and advantages, on the numbers of `rollout_inputs`.

The trainers' `_compute_loss` is called unbound, with a namespace of the attributes that it reads and with the wanted
log-probabilities of tokens. Advantages are computed in the middle of `_generate_and_score_completions`: its statements
run as they stand in TRL's source (`excerpts`). Needs TRL; the tests do not: they read the JSON file, made by

    python tests/golden/scripts/rollouts_in_trl_1_16.py
"""

from collections import defaultdict
from importlib.metadata import version
from itertools import product
from types import SimpleNamespace

import loss_inputs
import rollout_inputs
import torch
from excerpts import excerpt
from trl import GRPOTrainer, RLOOTrainer

VERSION = "1.16.0"
LEVELS = ("token", "sequence")
BETAS = (0.0, 0.04, 1.0)
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
ALL = slice(None)
MASK = torch.tensor(rollout_inputs.MASK).long()
OLD, REFERENCE = torch.tensor(rollout_inputs.OLD), torch.tensor(rollout_inputs.REFERENCE)
DEFAULTS = {
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "use_bias_correction_kl": False,
}
FROM_SOURCE = "statements of _generate_and_score_completions"
BEGIN, END = "unscorable_mask = ", "advantages = torch.nan_to_num("


def main() -> None:
    assert version("trl") == VERSION, f"this script is for TRL {VERSION}"
    torch.set_default_dtype(torch.float64)
    entries = [*clipped_entries(), *kl_entries(), *other_surrogate_entries(), *accumulation_entries()]
    entries += [*on_policy_entries(), *grpo_advantage_entries(), *rloo_entries(), *rloo_advantage_entries()]
    loss_inputs.write_golden(__file__, f"TRL {VERSION}", torch.__version__, entries)


def clipped_entries():
    """The clipped surrogates of `GRPOTrainer`, by how they average, and by what they clip."""
    for loss_type, beta in product(LOSS_TYPES, BETAS):
        yield grpo_entry(loss_type=loss_type, beta=beta)
    for loss_type in LOSS_TYPES:
        yield grpo_entry(loss_type=loss_type, beta=0.04, importance_sampling_level="sequence")
    for level, epsilon_high, delta in product(LEVELS, (None, 0.28), (None, 1.4)):
        options = {"importance_sampling_level": level, "epsilon_high": epsilon_high, "delta": delta}
        if set(options.values()) != {"token", None}:
            yield grpo_entry(loss_type="grpo", **options)


def kl_entries():
    """The KL estimate with and without the ratio as its weight: the gradient goes through both."""
    for loss_type, beta, level in product(("grpo", "dapo"), (0.04, 1.0), LEVELS):
        options = {"importance_sampling_level": level, "use_bias_correction_kl": True}
        yield grpo_entry(loss_type=loss_type, beta=beta, **options)


def other_surrogate_entries():
    """CISPO, SAPO, LUSPO, VESPO, and GRPO without the responses that the policy has left."""
    note = "epsilon_high is the cap of the ratio itself; epsilon is not read"
    for epsilon_high, level in product((1.2, 5.0), LEVELS):
        yield grpo_entry(note, loss_type="cispo", epsilon_high=epsilon_high, importance_sampling_level=level)
    yield grpo_entry(note, loss_type="cispo", epsilon_high=1.2, beta=0.04)
    for temperatures, level in product(((1.0, 1.05), (2.0, 0.5)), LEVELS):
        options = dict(zip(("sapo_temperature_pos", "sapo_temperature_neg"), temperatures, strict=True))
        yield grpo_entry("epsilon is not read", loss_type="sapo", importance_sampling_level=level, **options)
    for beta, level in product((0.0, 0.04), LEVELS):
        yield grpo_entry(loss_type="luspo", beta=beta, importance_sampling_level=level)
    for constants in ((2.0, 3.0, 3.0, 2.0), (1.0, 1.5, 2.0, 0.5)):
        names = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        yield grpo_entry("epsilon is not read", loss_type="vespo", **dict(zip(names, constants, strict=True)))
    note = "no surrogate where the advantage is negative and the mean of old - policy is above the threshold"
    yield grpo_entry(note, loss_type="grpo", off_policy_mask_threshold=0.1)


def accumulation_entries():
    """The first six responses as a part of a batch: DAPO divides by the tokens of all twelve, the others by theirs."""
    note = "the first num_rows responses, as a part of the batch of all"
    for loss_type in LOSS_TYPES:
        steps = {"accumulation_steps": 2, "steps_per_generation": 2}
        yield grpo_entry(note, loss_type=loss_type, beta=0.04, num_rows=6, **steps)
    steps = {"accumulation_steps": 4, "steps_per_generation": 2}
    yield grpo_entry(note, loss_type="dapo", beta=0.04, num_rows=6, **steps)


def on_policy_entries():
    """Without old log-probabilities TRL takes the policy's, as constants."""
    for loss_type, beta in product(("grpo", "dapo"), (0.0, 0.04)):
        yield grpo_entry("the old policy is the policy, held constant", loss_type=loss_type, beta=beta, on_policy=True)


def grpo_advantage_entries():
    """Rewards relative to those of the group."""
    advantages = excerpt(GRPOTrainer._generate_and_score_completions, BEGIN, END)
    for scale_rewards in ("group", "batch", "none"):
        attributes = {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": scale_rewards}
        names = advantages(self=scoring_trainer(**attributes), **scores())
        yield new_entry("grpo_advantages", {"scale_rewards": scale_rewards}, names["advantages"], None, FROM_SOURCE)


def rloo_entries():
    """The loss of `RLOOTrainer`: ratios of whole responses."""
    for epsilon, epsilon_high in product((0.2, 0.5), (None, 0.28)):
        trainer = fake_trainer(**clip_range(epsilon, epsilon_high))
        policy = torch.tensor(rollout_inputs.POLICY, requires_grad=True)
        trainer._get_per_token_logps_and_entropies = token_logps(policy)
        inputs = completions(ALL) | {"old_logps": (OLD * MASK).sum(1)}
        value = RLOOTrainer._compute_loss(trainer, None, inputs)
        hyperparameters = {"epsilon": epsilon, "epsilon_high": epsilon_high}
        yield new_entry("rloo_loss", hyperparameters, value, gradient(value, policy), "")


def rloo_advantage_entries():
    """Rewards, less the KL estimate of the response, relative to the others of the group."""
    advantages = excerpt(RLOOTrainer._generate_and_score_completions, BEGIN, END)
    for beta, normalize, clip in product((0.0, 0.05, 1.0), (False, True), (None, (-1.0, 1.0))):
        attributes = {"beta": beta, "normalize_advantages": normalize, "reward_clip_range": clip}
        arrays = {"old_per_token_logps": OLD, "ref_per_token_logps": REFERENCE, "completion_mask": MASK}
        names = advantages(self=scoring_trainer(**attributes), gather=lambda tensor: tensor, **arrays, **scores())
        note = f"{FROM_SOURCE}; KL of the policy that sampled, not of the policy now"
        yield new_entry("rloo_advantages", attributes, names["advantages"], None, note)


def grpo_entry(note: str = "", *, loss_type: str, **options) -> dict:
    """The value of `GRPOTrainer._compute_loss`, and its gradient with respect to the policy's tokens."""
    hyperparameters = {"loss_type": loss_type, **DEFAULTS, **options}
    if loss_type == "dr_grpo":
        hyperparameters["max_completion_length"] = 10
    rows = slice(hyperparameters.get("num_rows"))
    policy = torch.tensor(rollout_inputs.POLICY[rows], requires_grad=True)
    trainer = grpo_trainer(**hyperparameters)
    trainer._get_per_token_logps_and_entropies = token_logps(policy)
    inputs = completions(rows) | {"ref_per_token_logps": REFERENCE[rows], "num_items_in_batch": MASK.sum()}
    inputs["old_per_token_logps"] = None if options.get("on_policy") else OLD[rows]
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    return new_entry("grpo_loss", hyperparameters, value, gradient(value, policy), note)


def grpo_trainer(
    *, epsilon, epsilon_high, accumulation_steps=1, steps_per_generation=1, max_completion_length=None, **options
) -> SimpleNamespace:
    """What `GRPOTrainer._compute_loss` reads; options of the arguments and of the trainer go to both."""
    options = {"off_policy_mask_threshold": None, **options}
    return fake_trainer(
        args=SimpleNamespace(steps_per_generation=steps_per_generation, **options),
        current_gradient_accumulation_steps=accumulation_steps,
        max_completion_length=max_completion_length,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        **clip_range(epsilon, epsilon_high),
        **options,
    )


def fake_trainer(**attributes) -> SimpleNamespace:
    """What both trainers read."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        **attributes,
    )


def clip_range(epsilon: float, epsilon_high: float | None) -> dict[str, float]:
    """As the trainers read it from their arguments."""
    return {"epsilon_low": epsilon, "epsilon_high": epsilon if epsilon_high is None else epsilon_high}


def token_logps(logps: torch.Tensor):
    """A method that gives these log-probabilities to the tokens, no entropies and no further loss."""
    return lambda *_, **__: (logps, torch.zeros_like(logps), None)


def completions(rows: slice) -> dict[str, torch.Tensor]:
    """A batch whose prompts have one token."""
    mask = MASK[rows]
    return {
        "prompt_ids": torch.zeros_like(mask[:, :1]),
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(rollout_inputs.ADVANTAGES[rows]),
    }


def scores() -> dict:
    """The rewards as they come from one function."""
    rewards = torch.tensor(rollout_inputs.REWARDS)[:, None]
    return {"rewards_per_func": rewards, "num_generations": rollout_inputs.GROUP_SIZE, "device": "cpu"}


def scoring_trainer(**attributes) -> SimpleNamespace:
    """What the statements about rewards read."""
    return SimpleNamespace(reward_weights=torch.ones(1), **attributes)


def gradient(value: torch.Tensor, policy: torch.Tensor) -> dict[str, list]:
    (slope,) = torch.autograd.grad(value, policy)
    return {"policy": slope.tolist()}


def new_entry(name: str, hyperparameters: dict, values: torch.Tensor, gradients: dict | None, note: str) -> dict:
    return {
        "loss": name,
        "hyperparameters": hyperparameters,
        "dtype": str(values.dtype).removeprefix("torch."),
        "values": values.tolist(),
        "gradients": gradients,
        "note": note,
    }


if __name__ == "__main__":
    main()
