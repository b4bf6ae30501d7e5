"""The notebook's experiment in PyTorch, over many seeds, evaluated exactly.

An independent implementation to compare `experiments/beta_ablation.py` with. It draws from the global generators of
PyTorch and NumPy in the notebook's order, so that a seed here is a seed there. Needs PyTorch; the tests do not: they
read `notebook_in_torch.jsonl`, a line for each seed, which was made by the command below. It takes some seconds a seed,
and goes on where it stopped.

    python tests/golden/scripts/notebook_in_torch.py --num-seeds 500
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

BETAS = (0.01, 0.1, 0.5, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seeds", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(__file__).parents[1] / "notebook_in_torch.jsonl"
    path.touch()
    for seed in range(len(path.read_text().splitlines()), arguments.num_seeds):
        run = {name: np.round(figures, 6).tolist() for name, figures in run_notebook(seed).items()}
        with path.open("a") as file:
            file.write(json.dumps({"seed": seed, **run}) + "\n")


def run_notebook(seed: int) -> dict[str, float | list[float]]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    embeddings = torch.randn(5, 8)
    rewards = torch.softmax(2 * torch.randn(5, 10), dim=-1)

    sft = make_network()
    demos = []
    for _ in range(500):
        prompt = np.random.randint(5)
        demos.append((prompt, torch.multinomial(rewards[prompt], 1).item()))
    prompts, responses = torch.tensor(demos).T
    optimizer = torch.optim.Adam(sft.parameters(), lr=1e-2)
    for _ in range(100):
        order = np.random.permutation(len(prompts))
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            loss = functional.cross_entropy(sft(embeddings[prompts[batch]]), responses[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    comparisons = []
    for _ in range(2000):
        prompt, first, second = np.random.randint(5), np.random.randint(10), np.random.randint(10)
        if first == second:
            continue
        odds = np.exp(rewards[prompt, first].item()), np.exp(rewards[prompt, second].item())
        first_wins = np.random.random() < odds[0] / (odds[0] + odds[1])
        comparisons.append((prompt, first, second) if first_wins else (prompt, second, first))
    data = torch.tensor(comparisons)

    reference = log_prob_table(sft, embeddings).detach()
    train_dpo(sft, reference, embeddings, data, beta=0.1)  # the notebook's first run, which moves the generator on
    dpo = [train_dpo(sft, reference, embeddings, data, beta=beta) for beta in BETAS]
    return {
        "demonstrator_reward": (rewards**2).sum(-1).mean().item(),
        "sft_reward": expected_reward(reference, rewards),
        "expected_reward": [expected_reward(table, rewards) for table, _ in dpo],
        "kl_to_reference": [(table.exp() * (table - reference)).sum(-1).mean().item() for table, _ in dpo],
        **{name: [history[name] for _, history in dpo] for name in ("loss", "accuracy", "reward_margin")},
    }


def train_dpo(sft, reference, embeddings, data, *, beta):
    """Returns the trained policy's table, and the means over the batches of the last epoch."""
    policy = copy.deepcopy(sft)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(50):
        batches = []
        order = np.random.permutation(len(data))
        for start in range(0, len(order), 64):
            prompts, chosen, rejected = data[order[start : start + 64]].T
            table = functional.log_softmax(policy(embeddings[prompts]), dim=-1)
            rows = torch.arange(len(prompts))
            margin = beta * (
                (table[rows, chosen] - reference[prompts, chosen])
                - (table[rows, rejected] - reference[prompts, rejected])
            )
            loss = -functional.logsigmoid(margin).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            batches.append((loss.item(), (margin > 0).float().mean().item(), margin.mean().item()))
    loss, accuracy, reward_margin = np.mean(batches, axis=0)
    history = {"loss": loss, "accuracy": accuracy, "reward_margin": reward_margin}
    return log_prob_table(policy, embeddings).detach(), history


def make_network():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))


def log_prob_table(network, embeddings):
    return functional.log_softmax(network(embeddings), dim=-1)


def expected_reward(table, rewards):
    return (table.exp() * rewards).sum(-1).mean().item()


if __name__ == "__main__":
    main()
