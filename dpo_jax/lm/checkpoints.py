"""Checkpoints: the state of training in a folder, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.lm.folder import write_folder
from dpo_jax.lm.processes import agreed, is_first
from dpo_jax.lm.sharding import put, to_host

STATE, ABOUT = "state.safetensors", "about.json"
KEPT = 2
"""How many checkpoints are kept."""


def save_checkpoint(folder: Path, step: int, state: Any, about: Mapping[str, Any]) -> None:
    """Writes the state after so many steps, and removes all but the last few.

    Args:
      folder: of all checkpoints of a run.
      step: number of steps done.
      state: any pytree of arrays.
      about: what it belongs to, as JSON can hold it: only a run of the same content goes on from it.
    """
    from safetensors.flax import save as serialize

    content = json.dumps({"step": step, "about": about}, indent=2).encode()
    target = folder / f"step-{step:08}"
    if not agreed(target.exists()):
        write_folder(target, [(STATE, serialize(_named(state))), (ABOUT, content)])
    for old in _steps(folder)[:-KEPT] if is_first() else ():
        shutil.rmtree(old)


def load_checkpoint(folder: Path, state: Any, about: Mapping[str, Any]) -> tuple[int, Any] | None:
    """The last checkpoint: the number of steps done, and the state; `None` if there is none.

    Args:
      folder: of all checkpoints of a run.
      state: a state of the same structure, shapes and dtypes, on the devices where the loaded one shall be.
      about: as for `save_checkpoint`.

    Raises:
      ValueError: the checkpoint belongs to something else (the message says what differs), or is damaged.
    """
    for leftover in folder.glob(".step-*") if is_first() else ():  # of a process that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    found = _steps(folder)
    return _load(found[-1], state, about) if found else None


def _load(place: Path, state: Any, about: Mapping[str, Any]) -> tuple[int, Any]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    try:
        known = json.loads((place / ABOUT).read_bytes())
        tensors = load_file(place / STATE)
    except (OSError, ValueError, SafetensorError) as problem:
        raise ValueError(f"{place} is damaged: remove it to go on from an earlier one ({problem})") from None
    _refuse_other(place, known["about"], json.loads(json.dumps(about)))
    leaves, structure = jax.tree.flatten_with_path(state)
    wanted = {_name(path): (_bits(leaf).shape, _bits(leaf).dtype) for path, leaf in leaves}
    if wanted != {name: (x.shape, x.dtype) for name, x in tensors.items()}:
        raise ValueError(f"{place} holds parameters of other names, shapes or dtypes: use another folder, or remove it")
    placed = [_like(put(tensors[_name(path)], _bits(leaf).sharding), leaf) for path, leaf in leaves]
    return known["step"], jax.tree.unflatten(structure, placed)


def _refuse_other(place: Path, found: Any, wanted: Any) -> None:
    differ = [
        f"{name} was {found.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if differ:
        raise ValueError(f"{place} belongs to another run: {'; '.join(differ)}. Use another folder, or remove it")


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _named(state: Any) -> dict[str, Any]:
    """The arrays of a state, by their place in it."""
    return {_name(path): jnp.asarray(to_host(_bits(leaf))) for path, leaf in jax.tree.flatten_with_path(state)[0]}


def _bits(leaf: Any) -> Any:
    """An array as a file can hold it: PRNG keys as numbers."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(bits: Any, leaf: Any) -> Any:
    """The inverse: keys of the kind of another."""
    return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else bits


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)


def fingerprint(tree: Any) -> str:
    """A short hash of a pytree: the names, shapes, dtypes and bits of its arrays, and its other leaves as text."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        if not hasattr(leaf, "dtype"):
            digest.update(f"{_name(path)} {leaf!r}".encode())
            continue
        array = np.ascontiguousarray(to_host(leaf))
        digest.update(f"{_name(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
