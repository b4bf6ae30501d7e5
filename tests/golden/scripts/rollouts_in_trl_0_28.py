"""The policy gradients of TRL 0.28.0 that later versions lack, on the numbers of `rollout_inputs`: PPO, XPO, Nash-MD.

PPO's computations are in the middle of `PPOTrainer.train`: its statements run as they stand in TRL's source
(`excerpts`). The other two have methods, called unbound. Needs TRL (with transformers before 5); the tests do not: they
read the JSON file, made by

    python tests/golden/scripts/rollouts_in_trl_0_28.py
"""

from importlib.metadata import version
from itertools import product
from types import SimpleNamespace

import loss_inputs
import rollout_inputs
import torch
from excerpts import excerpt
from trl.experimental.nash_md import NashMDTrainer
from trl.experimental.ppo import PPOTrainer
from trl.experimental.ppo.ppo_trainer import masked_whiten
from trl.experimental.xpo import XPOTrainer

VERSION = "0.28.0"
BETAS = (0.1, 1.0)
MASKS = {"mask": torch.tensor(rollout_inputs.MASK), "value_mask": torch.tensor(rollout_inputs.VALUE_MASK)}
OLD, REFERENCE = torch.tensor(rollout_inputs.OLD), torch.tensor(rollout_inputs.REFERENCE)
FROM_SOURCE = "statements of train"


def main() -> None:
    assert version("trl") == VERSION, f"this script is for TRL {VERSION}"
    torch.set_default_dtype(torch.float64)
    entries = [*ppo_loss_entries(), *gae_entries(), *whitening_entries(), *kl_entries(), *ppo_rollout_entries()]
    entries += [*cut_rollout_entries(), *ppo_step_entries(), *xpo_entries(), *nash_md_entries()]
    loss_inputs.write_golden(__file__, f"TRL {VERSION}", torch.__version__, entries)


def ppo_loss_entries():
    """The clipped surrogate, the clipped loss of the values, and their sum."""
    for cliprange in (0.2, 0.5):
        names = ppo_losses(cliprange=cliprange)
        yield new_entry(
            "ppo_policy_loss", {"cliprange": cliprange}, names["pg_loss"], slopes(names["pg_loss"], names, "policy")
        )
    for cliprange_value, mask in product((0.2, 0.5), MASKS):
        names = ppo_losses(cliprange_value=cliprange_value, value_mask=mask)
        note = f"{FROM_SOURCE}; over {mask}; TRL's own is value_mask"
        hyperparameters = {"cliprange_value": cliprange_value, "mask": mask}
        value = names["vf_loss"]
        yield new_entry("ppo_value_loss", hyperparameters, value, slopes(value, names, "values"), note)
    hyperparameters = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
    names = ppo_losses(**hyperparameters)
    value = names["loss"]
    yield new_entry("ppo_loss", hyperparameters, value, slopes(value, names, "policy", "values"))


def gae_entries():
    """Advantages and returns of given rewards, as PPO has them before whitening; both are zero behind the end."""
    estimate = excerpt(PPOTrainer.train, "lastgaelam = 0", "returns = ")
    rewards, values = (
        torch.tensor(array * rollout_inputs.MASK) for array in (rollout_inputs.TOKEN_REWARDS, rollout_inputs.OLD_VALUES)
    )
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)):
        args = SimpleNamespace(gamma=gamma, lam=lam)
        names = estimate(args=args, responses=rewards, rewards=rewards, values=values)
        note = f"{FROM_SOURCE}; of token_rewards and old_values, zero behind the end"
        for name in ("advantages", "returns"):
            yield new_entry(f"gae_{name}", {"gamma": gamma, "lam": lam}, names[name], None, note)


def whitening_entries():
    """`masked_whiten` of the rewards of tokens."""
    for shift_mean in (True, False):
        values = masked_whiten(torch.tensor(rollout_inputs.TOKEN_REWARDS), MASKS["mask"], shift_mean=shift_mean)
        note = "of token_rewards; what stands behind the end is whitened, too"
        yield new_entry("whiten", {"shift_mean": shift_mean}, values, None, note)


def kl_entries():
    """The estimates of PPO, for each token: of the policy that sampled, to the reference."""
    estimate = excerpt(PPOTrainer.train, "logr = ", "kl = ")
    for kl_estimator in ("k1", "k3"):
        names = estimate(args=SimpleNamespace(kl_estimator=kl_estimator), logprobs=OLD, ref_logprobs=REFERENCE)
        yield new_entry("ppo_kl", {"kl_estimator": kl_estimator}, names["kl"], None, f"{FROM_SOURCE}; of old")


def ppo_rollout_entries():
    """From the score of a response to rewards, advantages and returns of tokens.

    The score is not the last token's but of the one behind it, which has a value, too; only a response without room for
    it has the score at its last token.
    """
    for kl_estimator, whiten_rewards in product(("k1", "k3"), (False, True)):
        options = {"kl_coef": 0.05, "kl_estimator": kl_estimator, "gamma": 0.98, "lam": 0.95}
        options["whiten_rewards"] = whiten_rewards
        names = ppo_rollout("advantages = torch.masked_fill(", **options)
        note = f"{FROM_SOURCE}; the score is at the token behind the end, if there is room (value_mask)"
        for name in ("rewards", "advantages", "returns"):
            yield new_entry(f"ppo_{name}", options, names[name], None, note)


def cut_rollout_entries():
    """The same of one response at a time, in arrays that end with it, so that the score is at its last token.

    Advantages are whitened over all responses, as TRL does it.
    """
    for kl_coef, (gamma, lam) in product((0.05, 1.0), ((1.0, 0.95), (0.9, 0.5))):
        options = {"kl_coef": kl_coef, "gamma": gamma, "lam": lam}
        arrays = {name: torch.zeros_like(OLD) for name in ("rewards", "advantages", "returns")}
        for row, length in enumerate(rollout_inputs.LENGTHS):
            place = slice(row, row + 1), slice(int(length))
            names = ppo_rollout("returns = ", *place, kl_estimator="k1", whiten_rewards=False, **options)
            for name, array in arrays.items():
                array[place] = names[name]
        arrays["white_advantages"] = masked_whiten(arrays["advantages"], MASKS["mask"]) * MASKS["mask"]
        note = f"{FROM_SOURCE}; of one response at a time, in arrays that end with it; zero behind the end"
        for name, array in arrays.items():
            yield new_entry(f"cut_{name}", options, array, None, note)


def ppo_step_entries():
    """From the scores of responses to the loss, through rewards, advantages and returns of tokens."""
    for kl_coef, vf_coef in ((0.05, 0.1), (1.0, 1.0)):
        rollout = {"kl_coef": kl_coef, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.95, "whiten_rewards": False}
        clips = {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": vf_coef}
        names = ppo_rollout("advantages = torch.masked_fill(", **rollout)
        names = ppo_losses(**clips, advantages=names["advantages"], returns=names["returns"])
        gradients = slopes(names["loss"], names, "policy", "values")
        yield new_entry("ppo_step", rollout | clips, names["loss"], gradients)


def xpo_entries():
    """XPO on the pairs of `loss_inputs`: the first response is the policy's, the second one the reference's."""
    for beta, loss_type, alpha in product(BETAS, ("sigmoid", "ipo"), (1e-5, 0.1)):
        policy = [torch.tensor(logps, requires_grad=True) for logps in loss_inputs.POLICY]
        reference = [torch.tensor(logps) for logps in loss_inputs.REFERENCE]
        trainer = SimpleNamespace(beta=beta, alpha=alpha, args=SimpleNamespace(loss_type=loss_type))
        arguments = [logps[:, None] for logps in (*policy, *reversed(reference))]
        mean, *parts = XPOTrainer._compute_losses(trainer, *arguments, torch.tensor(loss_inputs.DESIRABLE))
        values = sum(parts)
        torch.testing.assert_close(values.mean(), mean)
        by_policy, by_reference = (slope.tolist() for slope in torch.autograd.grad(values.sum(), policy))
        gradients = {"by_policy": by_policy, "by_reference": by_reference}
        note = "pairs of loss_inputs: (by the policy, by the reference); desirable: the policy's is preferred; sums"
        hyperparameters = {"beta": beta, "alpha": alpha, "loss_type": loss_type}
        yield new_entry("xpo_loss", hyperparameters, values, gradients, note)


def nash_md_entries():
    """Nash-MD, one response at a time: the judge's preference as a reward, and the KL by REINFORCE."""
    for beta in (0.0, *BETAS):
        policy = torch.tensor(rollout_inputs.POLICY, requires_grad=True)
        arrays = policy.masked_fill(~MASKS["mask"], 0.0), REFERENCE.masked_fill(~MASKS["mask"], 0.0)
        arrays = *arrays, torch.tensor(rollout_inputs.PREFERENCES)
        trainer = SimpleNamespace(beta=beta)
        rows = [[row] for row in range(rollout_inputs.NUM_RESPONSES)]
        losses = [NashMDTrainer._compute_losses(trainer, *(array[row] for array in arrays))[0] for row in rows]
        values = torch.stack(losses)
        (slope,) = torch.autograd.grad(values.sum(), policy)
        yield new_entry("nash_md_loss", {"beta": beta}, values, {"policy": slope.tolist()}, "TRL returns the mean")


def ppo_rollout(last: str, rows=slice(None), tokens=slice(None), **options) -> dict:
    """The names of TRL's statements from the scores to the last one, for some rows and places."""
    place = rows, tokens
    statements = excerpt(PPOTrainer.train, "response_idxs = ", last)
    return statements(
        args=SimpleNamespace(**options),
        responses=torch.zeros_like(OLD[place]),
        sequence_lengths=torch.tensor(rollout_inputs.LENGTHS[rows]) - 1,
        logprobs=OLD[place],
        ref_logprobs=REFERENCE[place],
        values=torch.tensor(rollout_inputs.OLD_VALUES[place]),
        scores=torch.tensor(rollout_inputs.REWARDS[rows]),
    )


def ppo_losses(
    *, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, value_mask="value_mask", advantages=None, returns=None
) -> dict:
    """The names of TRL's statements afterwards, with the leaves `policy` and `values`."""
    policy, values = (
        torch.tensor(array, requires_grad=True) for array in (rollout_inputs.POLICY, rollout_inputs.VALUES)
    )
    statements = excerpt(PPOTrainer.train, "vpredclipped = ", "loss = pg_loss")
    names = statements(
        args=SimpleNamespace(cliprange=cliprange, cliprange_value=cliprange_value, vf_coef=vf_coef),
        micro_batch_inds=slice(None),
        padding_mask=~MASKS["mask"],
        padding_mask_p1=~MASKS[value_mask],
        new_logprobs=policy,
        mb_logprobs=OLD,
        mb_advantage=torch.tensor(rollout_inputs.TOKEN_ADVANTAGES) if advantages is None else advantages,
        vpred=values,
        mb_values=torch.tensor(rollout_inputs.OLD_VALUES),
        mb_return=torch.tensor(rollout_inputs.RETURNS) if returns is None else returns,
    )
    return names | {"policy": policy, "values": values}


def slopes(value: torch.Tensor, names: dict, *leaves: str) -> dict[str, list]:
    gradients = torch.autograd.grad(value, [names[leaf] for leaf in leaves])
    return {leaf: gradient.tolist() for leaf, gradient in zip(leaves, gradients, strict=True)}


def new_entry(name, hyperparameters, values, gradients, note=FROM_SOURCE) -> dict:
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
