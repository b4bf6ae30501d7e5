"""The same step in PyTorch: written by hand as well as we can, and by TRL. Prints seconds as a line of JSON.

    python rivals.py torch|trl|trl_before MODEL STEPS

By hand: pairs padded to the longest, PyTorch's fused attention, logits of response tokens only, the reference computed
before, fused AdamW. TRL as it is, with its reference in each step (`trl`) or computed before (`trl_before`).
"""

import json
import os
import resource
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

SEED, ROWS, BETA = 0, 4, 0.1
LENGTHS = ((126, 12, 22), (88, 6, 46), (91, 31, 22), (92, 21, 7))
"""Tokens of prompt, chosen and rejected of the pairs of a step, as in `workload`."""


def pairs(vocab_size: int) -> list[dict[str, list[int]]]:
    """The tokens of the pairs."""
    rng = np.random.default_rng(SEED)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [[rng.integers(0, vocab_size, length).tolist() for length in lengths] for lengths in LENGTHS]
    return [dict(zip(names, row, strict=True)) for row in rows]


def by_hand(folder: str, num_steps: int) -> list[float]:
    """Seconds of each step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    rows = pairs(model.config.vocab_size)
    prompts = [row["prompt_ids"] for row in rows] * 2
    sequences = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    longest = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    scored = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        scored[i, len(prompt) : len(sequence)] = True
    owner = torch.arange(len(sequences))[:, None].expand(-1, longest - 1)[scored[:, 1:]]

    def logps() -> tuple[torch.Tensor, ...]:
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]  # padding stands behind
        logits = model.lm_head(hidden[scored[:, 1:]])
        of_tokens = -F.cross_entropy(logits, tokens[:, 1:][scored[:, 1:]], reduction="none")
        return torch.zeros(len(sequences)).index_add(0, owner, of_tokens).chunk(2)

    with torch.no_grad():
        reference = logps()
    seconds = []
    for _ in range(num_steps + 1):
        start = time.perf_counter()
        chosen, rejected = logps()
        loss = -F.logsigmoid(BETA * ((chosen - reference[0]) - (rejected - reference[1]))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def by_trl(folder: str, num_steps: int, *, before: bool) -> list[float]:
    """Seconds of each step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock: list[list[float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append([time.perf_counter()])

        def on_step_end(self, *_, **__):
            clock[-1].append(time.perf_counter())

    class OnTokens(DPOTrainer):
        """Takes tokens as they are, in their order."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        max_length=256,
        beta=BETA,
        learning_rate=1e-6,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        precompute_ref_log_probs=before,
        disable_tqdm=True,
    )
    rows = pairs(model.config.vocab_size)
    trainer = OnTokens(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows * (num_steps + 1)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    trainer.train()
    return [end - start for start, end in clock][1:]


if __name__ == "__main__":
    what, folder, num = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = by_hand(folder, num) if what == "torch" else by_trl(folder, num, before=what == "trl_before")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": found, "peak_bytes": peak}))
