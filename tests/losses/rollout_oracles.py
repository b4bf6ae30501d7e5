"""TRL's policy gradients (`tests/golden/scripts/rollouts_in_*.py`): composed of our functions, or named as not ours."""

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import losses
from tests.losses import oracles
from tests.losses.oracles import GOLDEN

INPUTS = json.loads((GOLDEN / "rollout_inputs.json").read_text())
ENTRIES = [
    {"oracle": content["oracle"], **entry}
    for content in (json.loads(path.read_text()) for path in sorted(GOLDEN.glob("rollouts_in_*.json")))
    for entry in content["entries"]
]
GROUP_SIZE, MAX_LENGTH = INPUTS["group_size"], len(INPUTS["policy"][0])
NUM_TOKENS = sum(INPUTS["lengths"])
MASK, VALUE_MASK = np.array(INPUTS["mask"]), np.array(INPUTS["value_mask"])
KL = {"k1": losses.k1_estimate, "k3": losses.k3_estimate}


PAIRS = {  # as XPO sees the pairs of `loss_inputs`
    f"{prefix}{name}": oracles.INPUTS[model][side]
    for prefix, model in (("", "policy"), ("reference_", "reference"))
    for name, side in (("by_policy", "chosen"), ("by_reference", "rejected"))
}
ARRAYS = {name: np.array(value) for name, value in (INPUTS | PAIRS).items()}
ARRAYS["policy_won"] = np.array(oracles.INPUTS["desirable"])


def inputs(dtype: Any, num_rows: int | None = None) -> dict[str, jax.Array]:
    """What TRL was asked."""
    return {
        name: jnp.asarray(array[:num_rows], dtype if array.dtype == np.float64 else None)
        for name, array in ARRAYS.items()
        if array.shape
    }


def grpo(
    x,
    *,
    loss_type,
    beta,
    epsilon,
    epsilon_high,
    delta,
    importance_sampling_level,
    use_bias_correction_kl,
    off_policy_mask_threshold=None,
    on_policy=False,
    max_completion_length=None,
    accumulation_steps=1,
    steps_per_generation=1,
    num_rows=None,
):
    logps, old = x.policy, jax.lax.stop_gradient(x.policy) if on_policy else x.old
    advantages = _to_tokens(x.advantages)
    if off_policy_mask_threshold is not None:
        is_left = _to_tokens(_means(old - logps, x.mask)) > off_policy_mask_threshold
        advantages = jnp.where(is_left & (advantages < 0), 0, advantages)
    if importance_sampling_level == "sequence":
        logps, old = (_to_tokens(_means(tokens, x.mask)) for tokens in (logps, old))
    if delta is not None:
        logps = jnp.minimum(logps, old + np.log(delta))
    if loss_type == "cispo":
        ratios = -losses.ppo_loss(logps, old, jnp.ones_like(logps), clip=jnp.inf, clip_high=epsilon_high - 1)
        surrogate = losses.reinforce_loss(x.policy, jax.lax.stop_gradient(ratios) * advantages)
        tokens = surrogate + beta * losses.k3_estimate(x.policy, x.reference)
    else:
        kl = None if logps is x.policy and not use_bias_correction_kl else _kl(x, logps, old, use_bias_correction_kl)
        options = {"reference": x.reference, "beta": beta, "clip": epsilon, "clip_high": epsilon_high, "kl": kl}
        tokens = losses.grpo_loss(logps, old, advantages, **options)
    aggregate = {
        "grpo": losses.mean_of_responses,
        "dr_grpo": partial(losses.mean_per_length, max_length=max_completion_length),
        "luspo": partial(losses.mean_per_length, max_length=1),
    }.get(loss_type, losses.mean_of_tokens)
    if loss_type in ("dapo", "cispo"):  # divided by the tokens of all parts of a batch
        tokens *= jnp.sum(x.mask) / NUM_TOKENS * steps_per_generation
    return aggregate(tokens, x.mask) / accumulation_steps


def _kl(x, logps, old, weighted):
    """Of tokens whatever is clipped, and perhaps multiplied by the ratio: the surrogate for it without a clip."""
    kl = losses.k3_estimate(x.policy, x.reference)
    return lambda *_: -losses.ppo_loss(logps, old, kl, clip=jnp.inf) if weighted else kl


def _means(tokens, mask):
    return _sums(tokens, mask) / np.sum(mask, axis=1)


def _sums(tokens, mask):
    return jnp.sum(tokens * mask, axis=1)


def _to_tokens(values):
    return jnp.broadcast_to(values[:, None], (len(values), MAX_LENGTH))


def grpo_advantages(x, *, scale_rewards):
    if scale_rewards == "batch":
        scaled = losses.grpo_advantages(x.rewards[None], epsilon=1e-4)
        return losses.centred_advantages(_groups(scaled)).ravel()
    advantages = {"group": partial(losses.grpo_advantages, epsilon=1e-4), "none": losses.centred_advantages}
    return advantages[scale_rewards](_groups(x.rewards)).ravel()


def _groups(values):
    return values.reshape(-1, GROUP_SIZE)


def rloo(x, *, epsilon, epsilon_high):
    sums = _sums(x.policy, x.mask), _sums(x.old, x.mask)
    return jnp.mean(losses.ppo_loss(*sums, x.advantages, clip=epsilon, clip_high=epsilon_high))


def rloo_advantages(x, *, beta, normalize_advantages, reward_clip_range):
    rewards = jnp.clip(x.rewards, *reward_clip_range) if reward_clip_range else x.rewards
    rewards -= beta * _sums(losses.k1_estimate(x.old, x.reference), x.mask)
    advantages = losses.rloo_advantages(_groups(rewards)).ravel()
    return losses.grpo_advantages(advantages[None], epsilon=1e-4)[0] if normalize_advantages else advantages


def ppo_policy(x, *, cliprange):
    return losses.mean_of_tokens(losses.ppo_loss(x.policy, x.old, x.token_advantages, clip=cliprange), x.mask)


def ppo_value(x, *, cliprange_value, mask):
    loss = losses.value_loss(x.values, x.old_values, x.returns, clip=cliprange_value)
    return losses.mean_of_tokens(loss, getattr(x, mask))


def ppo(x, *, cliprange, cliprange_value, vf_coef):
    values = ppo_value(x, cliprange_value=cliprange_value, mask="value_mask")
    return ppo_policy(x, cliprange=cliprange) + vf_coef * values


def whiten(x, *, shift_mean):
    return _whitened(x.token_rewards, MASK, shift_mean)


def _whitened(values, mask, shift_mean=True):
    """Zero where TRL has numbers that it does not use: behind the mask."""
    masked, everywhere = jnp.asarray(np.asarray(values)[mask]), np.zeros_like(values)
    everywhere[mask] = losses.whitened(masked) + (0 if shift_mean else jnp.mean(masked))
    return jnp.asarray(everywhere)


def ppo_kl(x, *, kl_estimator):
    return KL[kl_estimator](x.old, x.reference)


def gae(x, *, gamma, lam):
    return losses.generalized_advantages(x.token_rewards, x.old_values, x.mask, decay=lam, discount=gamma)


def ppo_rewards(x, *, kl_coef, kl_estimator, whiten_rewards, gamma, lam):
    """TRL's score is at the place behind the end, where neither policy has a log-probability to compare."""
    logps, reference = (jnp.where(x.mask, array, 0) for array in (x.old, x.reference))
    rewards = losses.token_rewards(x.rewards, logps, reference, x.value_mask, beta=kl_coef)
    if kl_estimator != "k1":
        rewards += kl_coef * (losses.k1_estimate(logps, reference) - KL[kl_estimator](logps, reference))
    return _whitened(rewards, VALUE_MASK, shift_mean=False) if whiten_rewards else rewards


def ppo_rollout(x, **options):
    """Advantages, white over the tokens of responses, and returns."""
    rewards = ppo_rewards(x, **options)
    of = losses.generalized_advantages
    advantages, returns = of(rewards, x.old_values, x.value_mask, decay=options["lam"], discount=options["gamma"])
    return _whitened(advantages, MASK), returns


def ppo_step(x, *, cliprange, cliprange_value, vf_coef, **options):
    advantages, returns = ppo_rollout(x, **options)
    x = SimpleNamespace(**{**vars(x), "token_advantages": advantages, "returns": returns})
    return ppo(x, cliprange=cliprange, cliprange_value=cliprange_value, vf_coef=vf_coef)


def cut_rewards(x, *, kl_coef, gamma, lam):
    return losses.token_rewards(x.rewards, x.old, x.reference, x.mask, beta=kl_coef)


def cut_rollout(x, **options):
    rewards = cut_rewards(x, **options)
    of = losses.generalized_advantages
    return of(rewards, x.old_values, x.mask, decay=options["lam"], discount=options["gamma"])


def xpo(x, *, beta, alpha, loss_type):
    def in_order(by_policy, by_reference):
        return jnp.where(x.policy_won, by_policy, by_reference), jnp.where(x.policy_won, by_reference, by_policy)

    pairs = in_order(x.by_policy, x.by_reference), in_order(x.reference_by_policy, x.reference_by_reference)
    loss = losses.xpo_loss(*pairs, beta=beta, alpha=alpha, reference_won=~x.policy_won)
    if loss_type == "ipo":
        loss += losses.ipo_loss(*pairs, beta=beta) - losses.dpo_loss(*pairs, beta=beta)
    return loss


def nash_md(x, *, beta):
    costs = losses.k1_estimate(jax.lax.stop_gradient(x.policy), x.reference)
    return _sums(losses.reinforce_loss(x.policy, _to_tokens(x.preferences) - 0.5 - beta * costs), x.mask)


OURS = {
    **{f"grpo_loss, {loss_type}": grpo for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")},
    "grpo_advantages": grpo_advantages,
    "rloo_loss": rloo,
    "rloo_advantages": rloo_advantages,
    "ppo_policy_loss": ppo_policy,
    "ppo_value_loss": ppo_value,
    "ppo_loss": ppo,
    "whiten": whiten,
    "ppo_kl": ppo_kl,
    "gae_advantages": lambda x, **options: gae(x, **options)[0],
    "gae_returns": lambda x, **options: gae(x, **options)[1],
    "ppo_rewards": ppo_rewards,
    "ppo_advantages": lambda x, **options: ppo_rollout(x, **options)[0],
    "ppo_returns": lambda x, **options: ppo_rollout(x, **options)[1],
    "ppo_step": ppo_step,
    "cut_rewards": cut_rewards,
    "cut_advantages": lambda x, **options: cut_rollout(x, **options)[0],
    "cut_returns": lambda x, **options: cut_rollout(x, **options)[1],
    "cut_white_advantages": lambda x, **options: _whitened(cut_rollout(x, **options)[0], MASK),
    "xpo_loss": xpo,
    "nash_md_loss": nash_md,
}
NOT_OURS = {
    "grpo_loss, sapo": "a sigmoid of the ratio instead of a clip",
    "grpo_loss, vespo": "a gamma density of the ratio instead of a clip",
}


def kind(entry: dict[str, Any]) -> str:
    """What an entry is of: the name of its loss, and which one where TRL has many of that name."""
    loss_type = entry["hyperparameters"].get("loss_type")
    return f"grpo_loss, {loss_type}" if entry["loss"] == "grpo_loss" else entry["loss"]


def compare(entry: dict[str, Any], dtype: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (ours, theirs) of values and of gradients."""
    arrays = inputs(dtype, entry["hyperparameters"].get("num_rows"))
    theirs = entry["gradients"] or {}

    def ours(leaves):
        return OURS[kind(entry)](SimpleNamespace(**arrays | leaves), **entry["hyperparameters"])

    leaves = {name: arrays[name] for name in theirs}
    values, pull_back = jax.vjp(ours, leaves)
    assert values.dtype == dtype
    expected = np.where(MASK, entry["values"], 0) if entry["loss"] == "whiten" else entry["values"]
    (slopes,) = pull_back(jnp.ones_like(values))
    pairs = [(values, expected), *((slopes[name], slope) for name, slope in theirs.items())]
    pairs = [tuple(np.asarray(numbers, np.float64) for numbers in pair) for pair in pairs]
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return pairs
