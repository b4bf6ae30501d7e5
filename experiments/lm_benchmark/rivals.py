"""The same step in PyTorch: written by hand as well as we can, and by TRL. Prints seconds as a line of JSON.

    python rivals.py torch|torch_bf16|trl|trl_before MODEL PAIRS STEPS

PAIRS is a JSON file of pairs of tokens; a step takes four of them, in their order, again and again. By hand: pairs
padded to the longest, PyTorch's fused attention, logits of response tokens only, the reference computed before, fused
AdamW; in float32, or under bfloat16 autocast. TRL as it is, with its reference in each step (`trl`) or computed before
(`trl_before`).
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

ROWS, BETA = 4, 0.1
Pairs = list[dict[str, list[int]]]


class Batch:
    """Pairs, padded: the chosen above the rejected."""

    def __init__(self, rows: Pairs):
        prompts = [row["prompt_ids"] for row in rows] * 2
        sequences = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
        longest = max(map(len, sequences))
        self.num = len(sequences)
        self.tokens = torch.zeros(self.num, longest, dtype=torch.long)
        scored = torch.zeros(self.num, longest, dtype=torch.bool)
        for i, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
            self.tokens[i, : len(sequence)] = torch.tensor(sequence)
            scored[i, len(prompt) : len(sequence)] = True
        self.scored = scored[:, 1:]
        self.owner = torch.arange(self.num)[:, None].expand(-1, longest - 1)[self.scored]


def by_hand(folder: str, rows: Pairs, num_steps: int, *, bfloat16: bool) -> list[float]:
    """Seconds of each step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    batches = [Batch(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]

    def logps(batch: Batch) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            outputs = model.model(input_ids=batch.tokens, use_cache=False)
            logits = model.lm_head(outputs.last_hidden_state[:, :-1][batch.scored])  # padding stands behind
        of_tokens = -F.cross_entropy(logits.float(), batch.tokens[:, 1:][batch.scored], reduction="none")
        return torch.zeros(batch.num).index_add(0, batch.owner, of_tokens).chunk(2)

    with torch.no_grad():
        references = [logps(batch) for batch in batches]
    seconds = []
    for i in range(num_steps + 1):
        batch, (chosen_before, rejected_before) = batches[i % len(batches)], references[i % len(batches)]
        start = time.perf_counter()
        chosen, rejected = logps(batch)
        loss = -F.logsigmoid(BETA * ((chosen - chosen_before) - (rejected - rejected_before))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def by_trl(folder: str, rows: Pairs, num_steps: int, *, before: bool) -> list[float]:
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
    repeated = [rows[i % len(rows)] for i in range(ROWS * (num_steps + 1))]
    trainer = OnTokens(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(repeated),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    trainer.train()
    return [end - start for start, end in clock][1:]


if __name__ == "__main__":
    what, folder, file, num = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pairs: Pairs = json.loads(Path(file).read_text())
    if what.startswith("torch"):
        found = by_hand(folder, pairs, num, bfloat16=what == "torch_bf16")
    else:
        found = by_trl(folder, pairs, num, before=what == "trl_before")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": found, "peak_bytes": peak}))
