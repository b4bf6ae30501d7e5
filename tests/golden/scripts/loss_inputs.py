"""What the oracles of the preference losses are asked: the same numbers for every library, in float64.

Pairs are tuples (chosen, rejected) of arrays with one entry per comparison. Log-probabilities are in nats, summed over
the tokens of a response. Losses of single responses take the chosen side of the pairs, with `DESIRABLE`.
"""

import json
import math
from pathlib import Path

import numpy as np

NUM_COMPARISONS, MAX_LENGTH = 16, 7
_rng = np.random.default_rng(0)


def _pair_of_policies(log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-probabilities of a policy and a reference with these log-ratios; the likelier one has 0.02 to 40.

    They are multiples of 1/4096, so that single precision holds them and their differences exactly.
    """
    likelier = _rng.permuted(np.geomspace(0.02, 40, log_ratios.size)).reshape(log_ratios.shape)
    policy, reference = -likelier - np.maximum(-log_ratios, 0), -likelier - np.maximum(log_ratios, 0)
    return np.round(4096 * policy) / 4096, np.round(4096 * reference) / 4096


# Log-ratios of chosen and rejected: four rows reach far, four are close to zero, the others are within +-4.
_far = [[17.0, 12.0, -18.0, -6.0], [-13.0, 5.0, 8.0, -19.0]]
_near = _rng.uniform(-0.01, 0.01, (2, 4))
_policy, _reference = _pair_of_policies(np.concatenate([_far, _near, _rng.uniform(-4, 4, (2, 8))], axis=1))
POLICY, REFERENCE = tuple(_policy), tuple(_reference)

LENGTHS = tuple(_rng.integers(1, MAX_LENGTH + 1, (2, NUM_COMPARISONS)))
"""Tokens of each response, 1 to 7."""

DESIRABLE = _rng.permuted(np.arange(NUM_COMPARISONS) < 9)
"""Labels of the chosen responses, where a loss takes single responses."""

MISMATCHED = _pair_of_policies(_rng.uniform(-2, 4, NUM_COMPARISONS))
"""Log-probabilities (policy, reference) of responses to other prompts; their mean log-ratio is positive."""

ALIGNMENT = tuple(_rng.uniform(-3, -0.1, (2, NUM_COMPARISONS)))
"""Logarithms of sums of squared probabilities, means over the tokens of each response, for WPO."""

_shares = _rng.uniform(0.5, 1.5, (2, NUM_COMPARISONS, MAX_LENGTH))
_shares *= np.arange(MAX_LENGTH) < np.stack(LENGTHS)[..., None]
TOKEN_SHARES = tuple(_shares / _shares.sum(-1, keepdims=True))
"""Which part of its sum each token of a response has, as arrays (comparison, token); zero behind the end."""


def means(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities per token: sums divided by `LENGTHS`."""
    return pair[0] / LENGTHS[0], pair[1] / LENGTHS[1]


def tokens(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each token, arrays (comparison, token): sums spread by `TOKEN_SHARES`."""
    return pair[0][:, None] * TOKEN_SHARES[0], pair[1][:, None] * TOKEN_SHARES[1]


def as_lists(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, list]:
    """A pair, as the JSON files have it."""
    return {"chosen": pair[0].tolist(), "rejected": pair[1].tolist()}


def write_golden(script: str, oracle: str, torch_version: str, entries: list[dict]) -> None:
    """Writes the JSON file of a script, one entry per line. Numbers that are not finite become null."""
    path = Path(script).parents[1] / f"{Path(script).stem}.json"
    lines = ",\n".join(json.dumps(_finite_or_null(entry), allow_nan=False) for entry in entries)
    path.write_text(f'{{"oracle": "{oracle}", "torch": "{torch_version}", "entries": [\n{lines}\n]}}\n')


def _finite_or_null(node):
    if isinstance(node, dict):
        return {key: _finite_or_null(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_finite_or_null(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


if __name__ == "__main__":
    inputs = {
        "policy": as_lists(POLICY),
        "reference": as_lists(REFERENCE),
        "lengths": as_lists(LENGTHS),
        "desirable": DESIRABLE.tolist(),
        "mismatched": {"policy": MISMATCHED[0].tolist(), "reference": MISMATCHED[1].tolist()},
        "alignment": as_lists(ALIGNMENT),
        "policy_tokens": as_lists(tokens(POLICY)),
        "reference_tokens": as_lists(tokens(REFERENCE)),
    }
    (Path(__file__).parents[1] / "loss_inputs.json").write_text(json.dumps(inputs) + "\n")
