"""One epoch of SFT and one of DPO in PyTorch, in float64, step by step.

Needs PyTorch; the tests do not: they read `torch_epochs.npz`, which was made by

    python tests/golden/scripts/torch_epochs.py
"""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SEED, BETA = 2026, 0.1


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float64)
    embeddings = torch.randn(5, 8)
    demos = torch.stack([torch.randint(5, (500,)), torch.randint(10, (500,))])
    chosen = torch.randint(10, (1800,))
    rejected = (chosen + 1 + torch.randint(9, (1800,))) % 10
    preferences = torch.stack([torch.randint(5, (1800,)), chosen, rejected])
    sft_order, dpo_order = torch.randperm(500), torch.randperm(1800)

    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))
    arrays = {f"start_{name}": array for name, array in parameters(network).items()}

    def sft_loss(batch):
        prompts, responses = batch
        return functional.cross_entropy(network(embeddings[prompts]), responses)

    arrays |= run_epoch("sft", network, sft_loss, demos[:, sft_order], batch_size=32, learning_rate=1e-2)
    reference = copy.deepcopy(network)

    def dpo_loss(batch):
        prompts, chosen, rejected = batch
        rows = torch.arange(len(prompts))
        policy = functional.log_softmax(network(embeddings[prompts]), dim=-1)
        with torch.no_grad():
            frozen = functional.log_softmax(reference(embeddings[prompts]), dim=-1)
        ratios = policy - frozen
        return -functional.logsigmoid(BETA * (ratios[rows, chosen] - ratios[rows, rejected])).mean()

    arrays |= run_epoch("dpo", network, dpo_loss, preferences[:, dpo_order], batch_size=64, learning_rate=1e-3)
    arrays |= {"embeddings": embeddings, "demos": demos, "preferences": preferences, "beta": torch.tensor(BETA)}
    arrays |= {"sft_order": sft_order, "dpo_order": dpo_order}
    path = Path(__file__).parents[1] / "torch_epochs.npz"
    np.savez_compressed(path, torch=torch.__version__, **{name: np.asarray(array) for name, array in arrays.items()})


def run_epoch(name, network, loss_of, data, *, batch_size, learning_rate):
    """The losses and gradients of each step, and the parameters after the last."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    losses, gradients = [], []
    for batch in data.split(batch_size, dim=1):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.t().flatten() for p in network.parameters()]).numpy())
        optimizer.step()
    end = {f"{name}_{parameter}": array for parameter, array in parameters(network).items()}
    return {f"{name}_losses": np.array(losses), f"{name}_gradients": np.array(gradients), **end}


def parameters(network):
    """Copies of the parameters, by the names and in the layout of Flax: kernels are [inputs, outputs]."""
    first, _, second = network
    return {
        f"{layer}_{name}": parameter.detach().t().contiguous().clone()
        for layer, linear in (("Dense_0", first), ("Dense_1", second))
        for name, parameter in (("kernel", linear.weight), ("bias", linear.bias))
    }


if __name__ == "__main__":
    main()
