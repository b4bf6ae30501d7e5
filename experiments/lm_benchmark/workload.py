"""The work that all sides do: pairs of the lengths of real ones, and the least that a step must compute."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dpo_jax import lm
from dpo_jax.lm.preferences import padded
from dpo_jax.types import Pair, Preferences

LENGTHS = (
    (126, 12, 22), (88, 6, 46), (91, 31, 22), (92, 21, 7), (69, 43, 43), (103, 7, 48), (132, 28, 17), (111, 15, 4),
    (37, 12, 16), (121, 19, 31), (87, 9, 18), (90, 88, 113), (50, 57, 114), (43, 18, 6), (47, 85, 74), (92, 26, 27),
    (155, 35, 19), (40, 10, 93), (88, 7, 10), (139, 10, 9), (37, 13, 11), (62, 42, 39), (45, 18, 24), (132, 42, 29),
)  # fmt: skip
"""Tokens of prompt, chosen and rejected response: 24 random pairs of HH-RLHF's harmless ones of at most 250 tokens, as
SmolLM2's tokenizer cuts them."""

SMOLLM2 = lm.Config(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    rope=lm.Rope(theta=100_000.0),
    tied=True,
    max_length=8192,
)
"""The sizes of SmolLM2-135M."""


def pairs(vocab_size: int, num: int, seed: int = 0) -> Preferences:
    """Random tokens of the lengths above, repeated if more are asked for."""
    rng = np.random.default_rng(seed)
    rows = [[rng.integers(0, vocab_size, length).tolist() for length in LENGTHS[i % len(LENGTHS)]] for i in range(num)]
    tokens: list[Any] = [padded(side) for side in zip(*rows, strict=True)]
    return Preferences(tokens[0], Pair(*tokens[1:]))


def as_json(data: Preferences) -> str:
    """Pairs of tokens, as `rivals` reads them."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    sides = [[[t for t in row if t >= 0] for row in np.asarray(x).tolist()] for x in (data.prompts, *data.responses)]
    return json.dumps([dict(zip(names, row, strict=True)) for row in zip(*sides, strict=True)])


def least_work(config: lm.Config, capacity: lm.Capacity, num_rows: int) -> float:
    """FLOP of a step of full training, if nothing is computed twice or in vain.

    Each parameter of a layer costs two FLOP per token forward and four backward, those of the output layer for scored
    tokens only; attention is counted for each token and those before it in its row, on average.
    """
    c = config
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.num_heads * c.head_dim
    of_layer = c.hidden_size * (heads + 3 * c.intermediate_size)
    attention = 4 * c.num_heads * c.head_dim * (capacity.tokens / num_rows) / 2
    forward = capacity.tokens * c.num_layers * (2 * of_layer + attention)
    return 3 * (forward + 2 * capacity.scored * c.vocab_size * c.hidden_size)
