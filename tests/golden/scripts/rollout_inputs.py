"""What the oracles of the policy gradients are asked: the same numbers for every library, in float64.

Twelve responses, four to each of three prompts. Arrays have one entry per response, or are (response, token);
log-probabilities are in nats. Behind the end of a response there are numbers like the others: `MASK` says which count.
"""

import json
from pathlib import Path

import numpy as np

NUM_PROMPTS, GROUP_SIZE, MAX_LENGTH = 3, 4, 7
NUM_RESPONSES = NUM_PROMPTS * GROUP_SIZE
SHAPE = NUM_RESPONSES, MAX_LENGTH
_rng = np.random.default_rng(2)  # some ratios, and some of their means, on either side of 0.8, 1.2, 1.28 and 1.4


def _rounded(numbers: np.ndarray) -> np.ndarray:
    """Multiples of 1/4096, so that single precision holds them and their differences exactly."""
    return np.round(4096 * numbers) / 4096


LENGTHS = _rng.permuted([1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 7])
"""Tokens of each response, 1 to 7."""

MASK = np.arange(MAX_LENGTH) < LENGTHS[:, None]
"""Which tokens belong to a response."""

VALUE_MASK = np.arange(MAX_LENGTH) < LENGTHS[:, None] + 1
"""The tokens of a response and the one behind its end, if there is room: TRL's PPO counts values that way."""

# Log-ratios within +-0.6: most tokens of a response lie on the same side, so that its mean is clipped, too.
# The advantages of responses with similar ratios have both signs.
_order = _rng.permutation(NUM_RESPONSES)
_sides = np.linspace(-0.45, 0.45, NUM_RESPONSES)[_order]
_log_ratios = np.clip(_sides[:, None] + _rng.uniform(-0.35, 0.35, SHAPE), -0.6, 0.6)
_gaps = np.stack([np.zeros(SHAPE), _log_ratios, _rng.uniform(-3, 3, SHAPE)])
_likeliest = -_rng.permuted(np.geomspace(0.02, 8, NUM_RESPONSES * MAX_LENGTH)).reshape(SHAPE)

POLICY, OLD, REFERENCE = _rounded(_likeliest - _gaps + _gaps.min(0))
"""Log-probabilities of tokens under the policy, the policy that sampled them, and the reference.

The likeliest of the three has -0.02 to -8. Policy minus old is within +-0.6, policy minus reference within +-3.
"""

REWARDS = _rounded(_rng.normal(size=NUM_RESPONSES))
REWARDS[GROUP_SIZE : 2 * GROUP_SIZE] = 0.5
"""Of each response. Those of the second prompt are all the same."""

ADVANTAGES = _rounded(np.where(_order % 2, 1, -1) * _rng.uniform(0.2, 2, NUM_RESPONSES))
"""Of each response; they have nothing to do with the rewards."""

PREFERENCES = _rounded(_rng.uniform(0.05, 0.95, NUM_RESPONSES))
"""The probability that a judge prefers each response to another one."""

TOKEN_REWARDS = _rounded(_rng.normal(size=SHAPE))
"""Of each token, for advantage estimation."""

OLD_VALUES = _rounded(_rng.normal(size=SHAPE))
"""What the critic that saw the sampling expected at each token."""

VALUES = OLD_VALUES + _rounded(_rng.uniform(-0.6, 0.6, SHAPE))
"""What the critic expects now."""

RETURNS = OLD_VALUES + _rounded(_rng.normal(size=SHAPE))
"""What the critic should expect."""

TOKEN_ADVANTAGES = RETURNS - OLD_VALUES
"""Of each token."""


if __name__ == "__main__":
    inputs = {
        "lengths": LENGTHS,
        "mask": MASK,
        "value_mask": VALUE_MASK,
        "policy": POLICY,
        "old": OLD,
        "reference": REFERENCE,
        "rewards": REWARDS,
        "advantages": ADVANTAGES,
        "preferences": PREFERENCES,
        "token_rewards": TOKEN_REWARDS,
        "old_values": OLD_VALUES,
        "values": VALUES,
        "returns": RETURNS,
        "token_advantages": TOKEN_ADVANTAGES,
    }
    lists = {"group_size": GROUP_SIZE} | {name: array.tolist() for name, array in inputs.items()}
    (Path(__file__).parents[1] / "rollout_inputs.json").write_text(json.dumps(lists) + "\n")
