"""Folders that this library writes, for another program to read: `scripts/written_in_transformers.py`.

    python -m tests.golden.written MODEL OUT

loads a model of any size, gives it an adapter that changes it, and writes to OUT the merged model, the adapter as PEFT
has it, and `expected.npz`: tokens, and logits of the model as it was (`base`) and as it became (`merged`).
"""

import sys
from pathlib import Path

import jax
import numpy as np

from dpo_jax import lm
from dpo_jax.lm.model import rows

LORA = lm.LoRA(rank=4, alpha=8.0)
NUM_ROWS, LENGTH = 3, 40


def main(folder: str, out: Path) -> None:
    """Writes the folders."""
    model = lm.load(folder)
    adapter = lm.init_adapter(jax.random.key(0), model.decoder, LORA)
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    adapter = jax.tree.unflatten(structure, [leaf + x for leaf, x in zip(leaves, noise, strict=True)])
    merged = lm.merge(model.params, adapter, LORA)
    tokens = jax.random.randint(jax.random.key(2), (NUM_ROWS, LENGTH), 0, model.decoder.config.vocab_size)
    logits = jax.jit(lambda params: rows(model.decoder, params, tokens), compiler_options=lm.precise_options())
    lm.save(out / "model", model._replace(params=merged))
    lm.save_adapter(out / "adapter", adapter, LORA, base_name=str(Path(folder).resolve()))
    np.savez(out / "expected.npz", tokens=tokens, base=logits(model.params), merged=logits(merged))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
