"""Transformers and PEFT read what this library wrote, and compute the same: see `tests/golden/written.py`.

    python tests/golden/scripts/written_in_transformers.py MODEL OUT

needs torch, transformers and peft. It compares logits of three computations: this library's in float32, PyTorch's in
float32, PyTorch's in float64. For each token the largest difference from float64 counts. It fails if the median over
tokens is here more than twice that of PyTorch, for the model as it was, the merged one, and the one with the adapter;
or the largest of all, for the model as it was. An adapter that moves logits by several nats makes a few tokens
sensitive.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def logits(load: Callable[[torch.dtype], torch.nn.Module], tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Logits of a model that is computed in a type."""
    with torch.no_grad():
        return load(dtype)(torch.tensor(tokens.astype(np.int64))).logits.double().numpy()


def main(folder: str, out: Path) -> None:
    expected = np.load(out / "expected.npz")

    def plain(dtype: torch.dtype) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def merged(dtype: torch.dtype) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(out / "model", dtype=dtype).eval()

    def with_adapter(dtype: torch.dtype) -> torch.nn.Module:
        return PeftModel.from_pretrained(plain(dtype), out / "adapter").to(dtype).eval()

    sides = {"as it was": (plain, "base"), "merged": (merged, "merged"), "with its adapter": (with_adapter, "merged")}
    for name, (load, key) in sides.items():
        narrow, wide = (logits(load, expected["tokens"], dtype) for dtype in (torch.float32, torch.float64))
        ours, theirs = (np.abs(found - wide).max(axis=2) for found in (expected[key], narrow))
        moved = np.abs(wide - expected["base"]).max()
        for what, of_tokens in (("median", np.median), ("largest", np.max)):
            print(f"{name}, {what}: {of_tokens(ours):.2e} here, {of_tokens(theirs):.2e} in torch; moved by {moved:.1e}")
        assert np.median(ours) <= 2 * np.median(theirs), f"{name}: more than twice as far from float64 as torch"
        assert key == "merged" or ours.max() <= 2 * theirs.max(), f"{name}: a token is more than twice as far"
        assert key == "base" or moved > 1e-2, f"{name}: the adapter changes nothing"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
