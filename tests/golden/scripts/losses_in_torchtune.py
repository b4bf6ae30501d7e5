"""The preference losses of torchtune, with gradients, on the numbers of `loss_inputs`.

Needs torchtune (with a torchao that it can import); the tests do not: they read the JSON file, made by

    python tests/golden/scripts/losses_in_torchtune.py
"""

from importlib.metadata import version
from itertools import product

import loss_inputs
import torch
from torchtune.rlhf.loss import DPOLoss, RSOLoss

VERSION = "0.6.1"
BETAS = (0.1, 1.0)


def main() -> None:
    assert version("torchtune") == VERSION, f"this script is for torchtune {VERSION}"
    entries = [
        entry("dpo_loss", DPOLoss(beta, label_smoothing), {"beta": beta, "label_smoothing": label_smoothing}, "DPOLoss")
        for beta, label_smoothing in product(BETAS, (0.0, 0.1))
    ]
    entries += [entry("hinge_loss", RSOLoss(gamma=beta), {"beta": beta}, "RSOLoss") for beta in BETAS]
    loss_inputs.write_golden(__file__, f"torchtune {VERSION}", torch.__version__, entries)


def entry(name: str, loss: torch.nn.Module, hyperparameters: dict, note: str) -> dict:
    """The values of a loss and the gradients of their sum with respect to the policy's log-probabilities."""
    policy = [torch.tensor(logps, requires_grad=True) for logps in loss_inputs.POLICY]
    reference = [torch.tensor(logps) for logps in loss_inputs.REFERENCE]
    values, _, _ = loss(*policy, *reference)
    chosen, rejected = torch.autograd.grad(values.sum(), policy)
    return {
        "loss": name,
        "hyperparameters": hyperparameters,
        "takes": "sums",
        "dtype": str(values.dtype).removeprefix("torch."),
        "divergence": None,
        "reduction": "none",
        "values": values.tolist(),
        "gradients": {"chosen": chosen.tolist(), "rejected": rejected.tolist()},
        "note": note,
    }


if __name__ == "__main__":
    main()
