"""The preference losses of TRL 1.16.0, with gradients, on the numbers of `loss_inputs`.

The trainers' methods are called unbound, with a namespace of the attributes that they read and with models that return
the wanted log-probabilities of tokens. They return means over the batch: elementwise losses are asked for one row at a
time. Needs TRL; the tests do not: they read the JSON file, made by

    python tests/golden/scripts/losses_in_trl_1_16.py
"""

from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from types import MethodType, SimpleNamespace

import loss_inputs
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

VERSION = "1.16.0"
BETAS = (0.1, 1.0)
ROWS = range(loss_inputs.NUM_COMPARISONS)
SHARES = tuple(torch.tensor(shares) for shares in loss_inputs.TOKEN_SHARES)
ONE_TOKEN = (torch.ones(loss_inputs.NUM_COMPARISONS, 1, dtype=torch.float64),) * 2
READ_BY_TRAINER = ("beta", "label_smoothing", "temperature")
ACCELERATOR = SimpleNamespace(device="cpu", gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor)
SUM_OF_LOGPS = "gradient with respect to the sums"


def main() -> None:
    assert version("trl") == VERSION, f"this script is for TRL {VERSION}"
    torch.set_default_dtype(torch.float64)
    entries = [*dpo_entries(), *batch_entries(), *divergence_entries(), *composed_entries(), *ld_dpo_entries()]
    entries += [*reference_free_entries(), *kto_entries()]
    loss_inputs.write_golden(__file__, f"TRL {VERSION}", torch.__version__, entries)


def dpo_entries():
    """The elementwise loss types of `DPOTrainer`."""
    for beta in BETAS:
        for name, loss_type in {
            "dpo_loss": "sigmoid",
            "hinge_loss": "hinge",
            "nca_loss": "nca_pair",
            "bco_pair_loss": "bco_pair",
            "sppo_loss": "sppo_hard",
            "apo_zero_loss": "apo_zero",
            "apo_down_loss": "apo_down",
        }.items():
            hyperparameters = {"beta": beta} | ({"shift": 0.0} if loss_type == "bco_pair" else {})
            yield dpo_entry(name, hyperparameters, f"loss_type {loss_type}", loss_types=[loss_type])
        note = "loss_type ipo, which divides sums by LENGTHS; inputs and gradient are of the means"
        yield dpo_entry("ipo_loss", {"beta": beta}, note, takes="means", loss_types=["ipo"])
        note = f"loss_type sigmoid_norm, which divides by LENGTHS; {SUM_OF_LOGPS}"
        yield dpo_entry("length_normalized_dpo_loss", {"beta": beta}, note, loss_types=["sigmoid_norm"])
        for name, loss_type, label_smoothings in [
            ("robust_dpo_loss", "robust", (0.1, 0.3)),
            ("exo_loss", "exo_pair", (0.001, 0.1)),
        ]:
            for label_smoothing in label_smoothings:
                hyperparameters = {"beta": beta, "label_smoothing": label_smoothing}
                yield dpo_entry(name, hyperparameters, f"loss_type {loss_type}", loss_types=[loss_type])
        for temperature in (0.05, 0.5):
            hyperparameters = {"beta": beta, "temperature": temperature}
            yield dpo_entry("discopop_loss", hyperparameters, "loss_type discopop", loss_types=["discopop"])


def batch_entries():
    """The loss types that sort the batch."""
    for beta, label_smoothing, loss_type in product(BETAS, (0.0, 0.1), ("aot", "aot_unpaired")):
        hyperparameters = {"beta": beta, "label_smoothing": label_smoothing}
        note = f"loss_type {loss_type}"
        yield dpo_entry(f"{loss_type}_loss", hyperparameters, note, reduction="mean", loss_types=[loss_type])


def divergence_entries():
    """Losses of the margin with other divergences than reverse KL."""
    divergences = [{"name": "forward_kl"}, {"name": "jensen_shannon"}]
    divergences += [{"name": "alpha", "alpha": alpha} for alpha in (0.5, 2.0)]
    type_of = {"forward_kl": "forward_kl", "jensen_shannon": "js_divergence", "alpha": "alpha_divergence"}
    for beta, divergence in product(BETAS, divergences):
        attributes = {"f_divergence_type": type_of[divergence["name"]]}
        dtype, reason = torch.float64, ""
        if divergence["name"] == "alpha":
            attributes["f_alpha_divergence_coef"] = divergence["alpha"]
            dtype, reason = torch.float32, "; float32, since the table of clamps for alpha_divergence has no float64"
        for name, loss_type, hyperparameters in [
            ("dpo_loss", "sigmoid", {}),
            ("robust_dpo_loss", "robust", {"label_smoothing": 0.1}),
            ("hinge_loss", "hinge", {}),
            ("ipo_loss", "ipo", {}),
            ("exo_loss", "exo_pair", {"label_smoothing": 0.1}),
            ("discopop_loss", "discopop", {"temperature": 0.5}),
        ]:
            note, shares = f"loss_type {loss_type}{reason}", SHARES
            if loss_type == "ipo":
                note += "; with one token in each response, since TRL divides the divergence's scores by lengths"
                shares = ONE_TOKEN
            hyperparameters = {"beta": beta, **hyperparameters}
            options = {"loss_types": [loss_type], "dtype": dtype, "shares": shares}
            yield dpo_entry(name, hyperparameters, note, **options, **attributes) | {"divergence": divergence}


def composed_entries():
    """MPO's weighted sum, and WPO's weights."""
    for beta, reduction in product(BETAS, ("none", "mean")):
        loss_types, loss_weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
        hyperparameters = {"beta": beta, "loss_types": loss_types, "loss_weights": loss_weights}
        over = "of the row's chosen response" if reduction == "none" else "of all chosen responses of the batch"
        note = f"sft is the NLL, averaged over the tokens {over} (LENGTHS); the shift of bco_pair is 0; {SUM_OF_LOGPS}"
        yield dpo_entry(
            "mpo", hyperparameters, note, reduction=reduction, loss_types=loss_types, loss_weights=loss_weights
        )
    for beta in BETAS:
        hyperparameters = {"beta": beta, "log_sum_sq_probs_means": loss_inputs.as_lists(loss_inputs.ALIGNMENT)}
        note = f"sigmoid with use_weighting; weights have means over LENGTHS, loss has sums; {SUM_OF_LOGPS}"
        yield dpo_entry("wpo", hyperparameters, note, loss_types=["sigmoid"], use_weighting=True)


def ld_dpo_entries():
    """LD-DPO, with the gradient of every token's log-probability."""
    inputs = {"policy": loss_inputs.tokens(loss_inputs.POLICY), "reference": loss_inputs.tokens(loss_inputs.REFERENCE)}
    for beta, ld_alpha in product(BETAS, (0.5, 0.25)):
        policy, reference = (tensors(pair) for pair in inputs.values())
        policy = [logps.requires_grad_() for logps in policy]
        loss = dpo_loss(beta=beta, ld_alpha=ld_alpha, loss_types=["sigmoid"])
        policy_tokens = [logps * (share > 0) for logps, share in zip(policy, SHARES, strict=True)]
        values = torch.stack([loss(policy_tokens, reference, SHARES, [row]) for row in ROWS])
        hyperparameters = {"beta": beta, "ld_alpha": ld_alpha}
        hyperparameters["token_logps"] = {name: loss_inputs.as_lists(pair) for name, pair in inputs.items()}
        note = "arrays (comparison, token), zero behind the end (LENGTHS); gradients of each token's log-probability"
        yield new_entry("ld_dpo", hyperparameters, "sums", values, pair_gradients(values, policy), note)


def reference_free_entries():
    """The losses of `CPOTrainer` and `ORPOTrainer`: CPO on sums, the others on means."""
    for beta in BETAS:
        note = "loss_type sigmoid: the preference part, without the NLL"
        loss = cpo_loss("sigmoid", beta=beta)
        yield reference_free_entry("cpo_loss", loss, {"beta": beta, "sft_weight": 0.0}, "sums", note)
        note = "loss_type simpo, no NLL"
        for gamma in (0.5, 1.5):
            loss, hyperparameters = cpo_loss("simpo", beta=beta, simpo_gamma=gamma), {"beta": beta, "gamma": gamma}
            yield reference_free_entry("simpo_loss", loss, hyperparameters, "means", note)
            for alpha in (0.25, -0.25):
                loss = cpo_loss("simpo", beta=beta, simpo_gamma=gamma, alpha=alpha)
                hyperparameters = {"beta": beta, "gamma": gamma, "alpha": alpha}
                yield reference_free_entry("alphapo_loss", loss, hyperparameters, "means", note)
        note = "the odds-ratio part with TRL's sign, beta * log sigmoid(log odds); odds_ratio_loss casts to float32"
        yield reference_free_entry("orpo_odds_ratio", orpo_loss(beta), {"beta": beta}, "means", note)


def kto_entries():
    """The losses of `KTOTrainer`, and its reference point: a KL estimate from mismatched responses, clamped at 0."""
    for beta, weights, swapped in product(BETAS, ((1.0, 1.0), (1.5, 0.75)), (False, True)):
        attributes = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
        values, gradients, reference_point = kto_loss("kto", swapped=swapped, **attributes)
        note = "reference point of MISMATCHED" + swapped * ", swapped: negative before the clamp"
        hyperparameters = {**attributes, "reference_point": reference_point}
        yield new_entry("kto_loss", hyperparameters, "sums", values, gradients, note)
    for beta in BETAS:
        weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        values, gradients, _ = kto_loss("apo_zero_unpaired", beta=beta, **weights)
        note = "loss_type apo_zero_unpaired"
        yield new_entry("apo_zero_unpaired_loss", {"beta": beta}, "sums", values, gradients, note)
    for swapped in (False, True):
        _, _, value = kto_loss("kto", swapped=swapped, beta=1.0, desirable_weight=1.0, undesirable_weight=1.0)
        note = "of MISMATCHED" + swapped * ", policy and reference swapped: negative before the clamp"
        value = torch.tensor(value)
        yield new_entry("kto_reference_point", {"swapped": swapped}, "sums", value, None, note, reduction="mean")


def dpo_entry(
    name, hyperparameters, note, *, takes="sums", reduction="none", dtype=torch.float64, shares=SHARES, **attributes
) -> dict:
    """A loss of `DPOTrainer`: a value for each row, or one for the batch; and the gradients of the sum of values."""
    lengths = [(share > 0).sum(-1) for share in shares]

    def sums(pair):
        return [logps * length for logps, length in zip(pair, lengths, strict=True)] if takes == "means" else pair

    pairs = loss_inputs.POLICY, loss_inputs.REFERENCE
    policy, reference = (tensors(loss_inputs.means(pair) if takes == "means" else pair, dtype) for pair in pairs)
    policy = [logps.requires_grad_() for logps in policy]
    policy_tokens = [logps[:, None] * share.to(dtype) for logps, share in zip(sums(policy), shares, strict=True)]
    loss = dpo_loss(**attributes, **{key: value for key, value in hyperparameters.items() if key in READ_BY_TRAINER})
    batches = [[row] for row in ROWS] if reduction == "none" else [list(ROWS)]
    values = torch.stack([loss(policy_tokens, sums(reference), shares, batch) for batch in batches])
    values = values if reduction == "none" else values[0]
    note += "" if values.isfinite().all() else "; null: not a number in TRL, where an exponential overflows, times zero"
    gradients = pair_gradients(values, policy)
    return new_entry(name, hyperparameters, takes, values.to(dtype), gradients, note, reduction=reduction)


def dpo_loss(*, loss_types: list[str], temperature: float = 0.05, **attributes) -> Callable:
    """`DPOTrainer._compute_loss`, as a function of the policy's tokens, the reference's sums, shares and rows.

    With `ld_alpha` it takes the reference's tokens instead.
    """
    defaults = {
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "ld_alpha": None,
        "loss_weights": [1.0] * len(loss_types),
    }
    attributes = {**defaults, **attributes, "args": fake_arguments(discopop_tau=temperature)}

    def loss(policy_tokens, reference, shares, rows):
        is_token = torch.cat([share[rows] > 0 for share in shares]).long()
        alignment = [
            mean[:, None] * (share > 0).sum(-1, keepdim=True) * share
            for mean, share in zip(tensors(loss_inputs.ALIGNMENT), shares, strict=True)
        ]
        trainer = fake_trainer(loss_types=loss_types, **attributes)
        inputs = completions(is_token)
        if attributes["ld_alpha"] is None:
            inputs |= {"ref_chosen_logps": reference[0][rows], "ref_rejected_logps": reference[1][rows]}
        else:
            trainer.precompute_ref_logps = False
            trainer.ref_model = fake_model(torch.cat([logps[rows] for logps in reference]))
        policy_model = fake_model(
            torch.cat([logps[rows] for logps in policy_tokens]), torch.cat([side[rows] for side in alignment])
        )
        return DPOTrainer._compute_loss(trainer, policy_model, inputs, return_outputs=False)

    return loss


def kto_loss(loss_type: str, *, swapped: bool = False, **attributes) -> tuple[torch.Tensor, dict, float]:
    """Values and gradient of `KTOTrainer._compute_loss`, asked for one row at a time, and its reference point."""
    policy, reference = (torch.tensor(pair[0]) for pair in (loss_inputs.POLICY, loss_inputs.REFERENCE))
    policy_kl, reference_kl = (torch.tensor(logps) for logps in loss_inputs.MISMATCHED[:: -1 if swapped else 1])
    policy_tokens = policy.requires_grad_()[:, None] * SHARES[0]
    trainer = fake_trainer(loss_type=loss_type, calculate_KL=loss_type == "kto", **attributes)
    trainer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trainer)
    values = []
    for row in ROWS:
        inputs = completions((SHARES[0][[row]] > 0).long())
        mismatched = completions(torch.ones(len(policy_kl), 1, dtype=torch.long))
        inputs |= {f"KL_{key}": array for key, array in mismatched.items()}
        inputs |= {"label": torch.tensor(loss_inputs.DESIRABLE[[row]])}
        inputs |= {"ref_logps": reference[[row]], "ref_KL_logps": reference_kl}
        answers = {1: fake_model(policy_tokens[[row]]), len(policy_kl): fake_model(policy_kl[:, None])}
        values.append(KTOTrainer._compute_loss(trainer, model_by_batch_size(answers), inputs, return_outputs=False))
    values = torch.stack(values)
    (gradient,) = torch.autograd.grad(values.sum(), policy)
    return values, {"policy": gradient.tolist()}, trainer._metrics["train"]["kl"][-1]


def cpo_loss(loss_type: str, **attributes) -> Callable:
    """`CPOTrainer.cpo_loss` as a function of the policy's pair."""
    trainer = SimpleNamespace(
        **{"accelerator": ACCELERATOR, "loss_type": loss_type, "label_smoothing": 0.0, "alpha": 0.0, **attributes}
    )
    return lambda policy: CPOTrainer.cpo_loss(trainer, *policy)[0]


def orpo_loss(beta: float) -> Callable:
    """`ORPOTrainer.odds_ratio_loss` as a function of the policy's pair."""
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=beta)
    return lambda policy: ORPOTrainer.odds_ratio_loss(trainer, *policy)[0]


def reference_free_entry(name, loss, hyperparameters, takes, note) -> dict:
    pair = loss_inputs.means(loss_inputs.POLICY) if takes == "means" else loss_inputs.POLICY
    policy = [logps.requires_grad_() for logps in tensors(pair)]
    values = loss(policy)
    return new_entry(name, hyperparameters, takes, values, pair_gradients(values, policy), note)


def fake_trainer(**attributes) -> SimpleNamespace:
    """What `_compute_loss` reads of a trainer, with the reference's log-probabilities computed before."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def fake_arguments(**arguments) -> SimpleNamespace:
    return SimpleNamespace(gradient_checkpointing_kwargs=None, **arguments)


def fake_model(token_logps: torch.Tensor, alignment: torch.Tensor | None = None) -> Callable:
    """A model that gives these log-probabilities to the tokens of its input."""
    zeros = torch.zeros_like(token_logps.detach())
    outputs = SimpleNamespace(
        log_probs=token_logps,
        log_sum_sq_probs=zeros if alignment is None else alignment,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    return lambda input_ids, **_: outputs


def model_by_batch_size(models: dict[int, Callable]) -> Callable:
    """One model for KTO's single responses and another for its batch of mismatched ones."""
    return lambda input_ids, **arguments: models[len(input_ids)](input_ids, **arguments)


def completions(is_token: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch whose prompts have one token, and whose completions have the tokens of the mask (padded on the right)."""
    mask = torch.cat([torch.zeros_like(is_token[:, :1]), is_token], dim=1)
    return {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def pair_gradients(values: torch.Tensor, policy: list[torch.Tensor]) -> dict[str, list]:
    """Gradients of the sum of the values."""
    chosen, rejected = torch.autograd.grad(values.sum(), policy)
    return {"chosen": chosen.tolist(), "rejected": rejected.tolist()}


def new_entry(name, hyperparameters, takes, values, gradients, note, *, reduction="none", divergence=None) -> dict:
    return {
        "loss": name,
        "hyperparameters": hyperparameters,
        "takes": takes,
        "dtype": str(values.dtype).removeprefix("torch."),
        "divergence": divergence,
        "reduction": reduction,
        "values": values.tolist(),
        "gradients": gradients,
        "note": note,
    }


def tensors(pair, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(array, dtype=dtype) for array in pair]


if __name__ == "__main__":
    main()
