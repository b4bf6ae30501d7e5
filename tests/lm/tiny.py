"""Small models and texts that several files of tests share."""

import json
from functools import cache

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dpo_jax import lm
from dpo_jax.types import Pair, Preferences

CONFIG = lm.Config(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    init_std=0.3,
)

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}


@cache
def model(**options):
    return lm.init(jax.random.key(3), CONFIG, **options)


@cache
def text(template=TEMPLATE, merges=(("a", "b"), ("Ġ", "a"))):
    """A tokenizer of bytes, with two merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return lm.Text(tokenizer, SPECIAL, template)


def tokens(rng, num, shortest, longest, vocab_size=CONFIG.vocab_size):
    """Rows of random tokens of random lengths, -1 behind them."""
    lengths = rng.integers(shortest, longest + 1, num)
    rows = rng.integers(0, vocab_size, (num, longest)).astype(np.int32)
    return np.where(np.arange(longest) < lengths[:, None], rows, np.int32(-1))


def pairs(num=10, seed=0):
    rng = np.random.default_rng(seed)
    return Preferences(tokens(rng, num, 1, 5), Pair(tokens(rng, num, 1, 4), tokens(rng, num, 1, 6)))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
