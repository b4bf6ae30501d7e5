"""Times one way of training, and prints what it took as a line of JSON."""

import argparse
import json

import jax
import jax.numpy as jnp

from dpo_jax import lm
from experiments.lab import devices
from experiments.lm_benchmark import ours, workload


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("steps", "pairs", "rank", "top-layers", "adapters", "generate"):
        parser.add_argument(f"--{name}", type=int)
    parser.set_defaults(pairs=4)
    parser.add_argument("--model")
    parser.add_argument("--epoch", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    asked = parser.parse_args()
    devices.enable_compilation_cache()
    dtype = jnp.bfloat16 if asked.bfloat16 else None
    model = (
        lm.load(asked.model, dtype=dtype) if asked.model else lm.init(jax.random.key(0), workload.SMOLLM2, dtype=dtype)
    )
    if asked.generate:
        rate = ours.tokens_per_second(model, num_prompts=asked.generate, max_tokens=32)
        print(
            json.dumps(
                {"tokens_per_second": rate, "seconds": [asked.generate * 32 / rate], "peak_bytes": ours.peak_bytes()}
            )
        )
        return
    lora = lm.LoRA(rank=asked.rank, alpha=2.0 * asked.rank, top_layers=asked.top_layers) if asked.rank else None
    before = ours.peak_flops(dtype or jnp.float32)
    if asked.epoch:
        num, planned = len(workload.LENGTHS), ours.PLANNED_STEPS
        found = ours.step_seconds(
            model, num_steps=asked.steps, num_pairs=num, batch_size=asked.pairs, planned_steps=planned
        )
    else:
        found = ours.step_seconds(
            model, num_steps=asked.steps, num_pairs=asked.pairs, lora=lora, num_adapters=asked.adapters
        )
    peak = max(before, ours.peak_flops(dtype or jnp.float32))
    print(json.dumps({**found, "adapters": asked.adapters, "peak_flops": peak}))


if __name__ == "__main__":
    main()
