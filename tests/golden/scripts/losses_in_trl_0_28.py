"""The preference losses of TRL 0.28.0, with gradients, on the numbers of `loss_inputs`.

The trainers' loss functions are called unbound, with a namespace of the attributes that they read. Needs TRL (with
transformers before 5); the tests do not: they read the JSON file, made by

    python tests/golden/scripts/losses_in_trl_0_28.py
"""

from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from types import SimpleNamespace

import loss_inputs
import torch
from trl import DPOTrainer
from trl.experimental.bco import BCOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.kto import KTOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_config import FDivergenceConstants, FDivergenceType
from trl.trainer.utils import RunningMoments

VERSION = "0.28.0"
BETAS = (0.1, 1.0)
ALPHAS = (0.0, 0.5, 2.0)
ACCELERATOR = SimpleNamespace(device="cpu", use_distributed=False, gather_for_metrics=lambda tensor: tensor)
DIVERGENCES = [{"name": "jensen_shannon"}, *({"name": "alpha", "alpha": alpha} for alpha in ALPHAS)]
DESIRABLE = torch.tensor(loss_inputs.DESIRABLE)
FLOAT32_NOTE = "odds_ratio_loss casts to float32"


def main() -> None:
    assert version("trl") == VERSION, f"this script is for TRL {VERSION}"
    torch.set_default_dtype(torch.float64)
    entries = [*dpo_entries(), *bco_pair_entries(), *divergence_entries(), *reference_free_entries()]
    entries += [*kto_entries(), *bco_entries()]
    loss_inputs.write_golden(__file__, f"TRL {VERSION}", torch.__version__, entries)


def dpo_entries():
    """The loss types of `DPOTrainer`."""
    for beta in BETAS:
        for name, loss_type in {
            "hinge_loss": "hinge",
            "ipo_loss": "ipo",
            "nca_loss": "nca_pair",
            "sppo_loss": "sppo_hard",
            "apo_zero_loss": "apo_zero",
            "apo_down_loss": "apo_down",
        }.items():
            yield pair_entry(name, dpo_loss(loss_type, beta=beta), {"beta": beta}, note=f"loss_type {loss_type}")
        for name, loss_type, label_smoothings in [
            ("dpo_loss", "sigmoid", (0.0, 0.1)),
            ("robust_dpo_loss", "robust", (0.1, 0.3)),
            ("exo_loss", "exo_pair", (0.001, 0.1)),
            ("aot_loss", "aot", (0.0, 0.1)),
            ("aot_unpaired_loss", "aot_unpaired", (0.0, 0.1)),
        ]:
            note = f"loss_type {loss_type}"
            if name.startswith("aot"):
                note += "; entry i of the values belongs to the i-th smallest of the batch, not to row i"
            for label_smoothing in label_smoothings:
                hyperparameters = {"beta": beta, "label_smoothing": label_smoothing}
                yield pair_entry(name, dpo_loss(loss_type, **hyperparameters), hyperparameters, note=note)
        for temperature in (0.05, 0.5):
            loss = dpo_loss("discopop", beta=beta, args=SimpleNamespace(discopop_tau=temperature))
            hyperparameters = {"beta": beta, "temperature": temperature}
            yield pair_entry("discopop_loss", loss, hyperparameters, note="loss_type discopop")


def bco_pair_entries():
    """BCO on pairs, whose shift is the running mean, and that mean after two batches and after three."""
    policy, reference = tensors(loss_inputs.POLICY), tensors(loss_inputs.REFERENCE)
    batches = [(policy, reference), (reference, policy), (rows(policy, 5), rows(reference, 5))]
    for beta in BETAS:
        running = RunningMoments(ACCELERATOR)
        loss = dpo_loss("bco_pair", beta=beta, running=running)
        entry = pair_entry("bco_pair_loss", loss, {"beta": beta, "shift": None}, note="loss_type bco_pair, first batch")
        entry["hyperparameters"]["shift"] = running.mean
        yield entry
        running = RunningMoments(ACCELERATOR)
        loss = dpo_loss("bco_pair", beta=beta, running=running)
        shifts = [(loss(*batch), running.mean)[1] for batch in batches]
        note = "DPOTrainer: each batch counts as one, whatever its size"
        yield from shift_entries(beta, shifts, note)


def divergence_entries():
    """Losses of the margin with other divergences than reverse KL."""
    for beta, divergence in product(BETAS, DIVERGENCES):
        for name, loss_type, label_smoothing in [
            ("dpo_loss", "sigmoid", 0.0),
            ("robust_dpo_loss", "robust", 0.1),
            ("hinge_loss", "hinge", None),
            ("ipo_loss", "ipo", None),
            ("exo_loss", "exo_pair", 0.1),
        ]:
            hyperparameters = {"beta": beta} | ({"label_smoothing": label_smoothing} if label_smoothing else {})
            attributes, note = {"f_divergence_type": FDivergenceType.JS_DIVERGENCE}, f"loss_type {loss_type}"
            if divergence["name"] == "alpha":
                coefficient = 1 - divergence["alpha"]
                attributes = {
                    "f_divergence_type": FDivergenceType.ALPHA_DIVERGENCE,
                    "f_divergence_params": {FDivergenceConstants.ALPHA_DIVERGENCE_COEF_KEY: coefficient},
                }
                note += f"; alpha_divergence_coef {coefficient}, which is 1 - alpha"
            loss = dpo_loss(loss_type, **hyperparameters, **attributes)
            yield pair_entry(name, loss, hyperparameters, divergence=divergence, note=note)


def reference_free_entries():
    """The losses of `CPOTrainer` and `ORPOTrainer`: CPO on sums, the others on means."""
    for beta in BETAS:
        note = "loss_type sigmoid: the preference part, without the NLL"
        yield pair_entry("cpo_loss", cpo_loss("sigmoid", beta=beta), {"beta": beta, "sft_weight": 0.0}, note=note)
        for gamma in (0.5, 1.5):
            loss, hyperparameters = cpo_loss("simpo", beta=beta, simpo_gamma=gamma), {"beta": beta, "gamma": gamma}
            yield pair_entry("simpo_loss", loss, hyperparameters, takes="means", note="loss_type simpo, no NLL")
            for alpha in (0.25, -0.25):
                loss = cpo_loss("simpo", beta=beta, simpo_gamma=gamma, alpha=alpha)
                hyperparameters = {"beta": beta, "gamma": gamma, "alpha": alpha}
                yield pair_entry("alphapo_loss", loss, hyperparameters, takes="means", note="loss_type simpo, no NLL")
        note = f"the odds-ratio part with TRL's sign, beta * log sigmoid(log odds); {FLOAT32_NOTE}"
        yield pair_entry("orpo_odds_ratio", orpo_loss(beta), {"beta": beta}, takes="means", dtype="float32", note=note)


def kto_entries():
    """The losses of `KTOTrainer`, and its reference point: a KL estimate from mismatched responses, clamped at 0."""
    for beta, weights, swapped in product(BETAS, ((1.0, 1.0), (1.5, 0.75)), (False, True)):
        attributes = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
        loss, diagnostics = kto_loss("kto", beta=beta, swapped=swapped, **attributes)
        note = "mismatched set" + swapped * ", swapped: KL below 0"
        entry = single_entry("kto_loss", loss, {"beta": beta}, note=note)
        entry["hyperparameters"] |= {"reference_point": diagnostics["kl"], **attributes}
        yield entry
    for beta in BETAS:
        loss, _ = kto_loss("apo_zero_unpaired", beta=beta, desirable_weight=1.0, undesirable_weight=1.0)
        yield single_entry("apo_zero_unpaired_loss", loss, {"beta": beta}, note="loss_type apo_zero_unpaired")
    for swapped in (False, True):
        loss, diagnostics = kto_loss("kto", beta=1.0, swapped=swapped, desirable_weight=1.0, undesirable_weight=1.0)
        loss(*(torch.tensor(logps[0]) for logps in (loss_inputs.POLICY, loss_inputs.REFERENCE)))
        note = "of MISMATCHED" + swapped * ", policy and reference swapped: negative before the clamp"
        yield new_entry("kto_reference_point", {"swapped": swapped}, "sums", "mean", diagnostics["kl"], None, note=note)


def bco_entries():
    """The loss of `BCOTrainer`, whose shift is the running mean, and that mean after two batches and after three."""
    policy, reference = (torch.tensor(logps[0]) for logps in (loss_inputs.POLICY, loss_inputs.REFERENCE))
    batches = [(policy, reference), (reference, policy), (policy[:5], reference[:5])]
    for beta in BETAS:
        running = RunningMoments(ACCELERATOR)
        entry = single_entry("bco_loss", bco_loss(beta, running), {"beta": beta, "shift": None}, note="first batch")
        entry["hyperparameters"]["shift"] = running.mean
        yield entry
        running = RunningMoments(ACCELERATOR)
        shifts = [(bco_loss(beta, running)(*batch), running.mean)[1] for batch in batches]
        yield from shift_entries(beta, shifts, "BCOTrainer: each response of the chosen side counts as one")


def shift_entries(beta: float, shifts: list[float], note: str):
    """The running mean of BCO's rewards after each batch; TRL casts it to float32."""
    batches = [{"rows": 16, "swapped": False}, {"rows": 16, "swapped": True}, {"rows": 5, "swapped": False}]
    note += "; swapped: policy for reference; RunningMoments casts to float32"
    for number in (2, 3):
        hyperparameters = {"beta": beta, "batches": batches[:number]}
        yield new_entry("bco_shift", hyperparameters, "sums", "none", shifts[:number], None, dtype="float32", note=note)


def dpo_loss(loss_type: str, **attributes) -> Callable:
    """`DPOTrainer.dpo_loss` as a function of the two pairs."""
    defaults = {"label_smoothing": 0.0, "reference_free": False, "f_divergence_type": FDivergenceType.REVERSE_KL}
    trainer = SimpleNamespace(**{"accelerator": ACCELERATOR, "f_divergence_params": None, **defaults, **attributes})
    return lambda policy, reference: DPOTrainer.dpo_loss(trainer, *policy, *reference, loss_type)[0]


def cpo_loss(loss_type: str, **attributes) -> Callable:
    """`CPOTrainer.cpo_loss` as a function of the two pairs; the reference is ignored."""
    trainer = SimpleNamespace(
        **{"accelerator": ACCELERATOR, "loss_type": loss_type, "label_smoothing": 0.0, "alpha": 0.0, **attributes}
    )
    return lambda policy, _: CPOTrainer.cpo_loss(trainer, *policy)[0]


def orpo_loss(beta: float) -> Callable:
    """`ORPOTrainer.odds_ratio_loss` as a function of the two pairs; the reference is ignored."""
    trainer = SimpleNamespace(accelerator=ACCELERATOR, beta=beta)
    return lambda policy, _: ORPOTrainer.odds_ratio_loss(trainer, *policy)[0]


def kto_loss(loss_type: str, *, swapped: bool = False, **attributes) -> tuple[Callable, dict]:
    """`KTOTrainer.kto_loss` as a function of policy and reference, and a dictionary where it leaves its KL."""
    attributes |= {"accelerator": ACCELERATOR, "loss_type": loss_type, "calculate_KL": loss_type == "kto"}
    trainer = SimpleNamespace(**attributes)
    policy_kl, reference_kl = (torch.tensor(logps) for logps in loss_inputs.MISMATCHED[:: -1 if swapped else 1])
    diagnostics = {}

    def loss(policy, reference):
        policies, references = by_label(policy), by_label(reference)
        losses, _, _, kl = KTOTrainer.kto_loss(trainer, *policies, policy_kl, *references, reference_kl)
        diagnostics["kl"] = kl.item()
        return in_row_order(losses, len(policy))

    return loss, diagnostics


def bco_loss(beta: float, running: RunningMoments) -> Callable:
    """`BCOTrainer.bco_loss` as a function of policy and reference."""
    trainer = SimpleNamespace(beta=beta, running=running, match_underlying_distribution=False)

    def loss(policy, reference):
        losses = BCOTrainer.bco_loss(trainer, *by_label(policy), *by_label(reference), None, None)[0]
        return in_row_order(losses, len(policy))

    return loss


def by_label(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The desirable responses, and the others."""
    desirable = DESIRABLE[: len(logps)]
    return logps[desirable], logps[~desirable]


def in_row_order(losses: torch.Tensor, number: int) -> torch.Tensor:
    """Losses as `by_label` orders them, back in the order of the rows."""
    order = torch.cat(by_label(torch.arange(number)))
    return losses[torch.argsort(order)]


def pair_entry(name, loss, hyperparameters, *, takes="sums", **more) -> dict:
    """The values of a loss of pairs, and the gradients of their sum with respect to the policy's pair."""
    pairs = [loss_inputs.POLICY, loss_inputs.REFERENCE]
    policy, reference = (tensors(loss_inputs.means(pair) if takes == "means" else pair) for pair in pairs)
    policy = [logps.requires_grad_() for logps in policy]
    values = loss(policy, reference)
    chosen, rejected = (gradient.tolist() for gradient in torch.autograd.grad(values.sum(), policy))
    gradients = {"chosen": chosen, "rejected": rejected}
    return new_entry(name, hyperparameters, takes, "none", values.tolist(), gradients, **more)


def single_entry(name, loss, hyperparameters, **more) -> dict:
    """The values of a loss of single responses, and the gradient of their sum with respect to the policy's."""
    policy, reference = (torch.tensor(logps[0]) for logps in (loss_inputs.POLICY, loss_inputs.REFERENCE))
    values = loss(policy.requires_grad_(), reference)
    (gradient,) = torch.autograd.grad(values.sum(), policy)
    return new_entry(name, hyperparameters, "sums", "none", values.tolist(), {"policy": gradient.tolist()}, **more)


def new_entry(name, hyperparameters, takes, reduction, values, gradients, *, dtype="float64", divergence=None, note=""):
    return {
        "loss": name,
        "hyperparameters": hyperparameters,
        "takes": takes,
        "dtype": dtype,
        "divergence": divergence,
        "reduction": reduction,
        "values": values,
        "gradients": gradients,
        "note": note,
    }


def tensors(pair) -> list[torch.Tensor]:
    return [torch.tensor(logps) for logps in pair]


def rows(pair: list[torch.Tensor], number: int) -> list[torch.Tensor]:
    """The first comparisons of a batch."""
    return [logps[:number] for logps in pair]


if __name__ == "__main__":
    main()
