"""The losses of the DPO paper's own code, with gradients, on the numbers of `loss_inputs`.

The code is that of github.com/eric-mitchell/direct-preference-optimization, at commit 8a4023f. It is no package, and
imports more than its loss needs, so only the function `preference_loss` is taken from a file of it:

    python tests/golden/scripts/losses_in_dpo_repository.py path/to/direct-preference-optimization/trainers.py

The tests do not need it: they read the JSON file that this script makes.
"""

import ast
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import loss_inputs
import torch

BETAS = (0.1, 1.0)


def main(source: Path) -> None:
    torch.set_default_dtype(torch.float64)
    preference_loss = function_from(source, "preference_loss")
    entries = []
    for beta in BETAS:
        for label_smoothing in (0.0, 0.1):
            hyperparameters = {"beta": beta, "label_smoothing": label_smoothing}
            entries.append(entry("dpo_loss", hyperparameters, preference_loss, **hyperparameters))
        entries.append(entry("ipo_loss", {"beta": beta}, preference_loss, beta=beta, ipo=True))
    oracle = "direct-preference-optimization 8a4023f"
    loss_inputs.write_golden(__file__, oracle, torch.__version__, entries)


def function_from(source: Path, name: str) -> Callable:
    """One function of a Python file, without running the rest of it."""
    tree = ast.parse(source.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope = {"torch": torch, "F": torch.nn.functional, **vars(typing)}
    exec(compile(tree, str(source), "exec"), scope)
    return scope[name]


def entry(name: str, hyperparameters: dict, preference_loss: Callable, **arguments) -> dict:
    policy = [torch.tensor(logps, requires_grad=True) for logps in loss_inputs.POLICY]
    values, *_ = preference_loss(*policy, *map(torch.tensor, loss_inputs.REFERENCE), **arguments)
    values.sum().backward()
    return {
        "loss": name,
        "hyperparameters": hyperparameters,
        "takes": "sums",
        "dtype": "float64",
        "divergence": None,
        "reduction": "none",
        "values": values.tolist(),
        "gradients": {"chosen": policy[0].grad.tolist(), "rejected": policy[1].grad.tolist()},
        "note": "preference_loss",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
