"""Preference optimization in functional JAX: exact losses, an exact world, RLHF, and sweeps of whole experiments.

Submodules are imported when they are first used, so `import dpo_jax` loads nothing else.
"""

from importlib import import_module
from typing import Any

SUBMODULES = ("figures", "losses", "rlhf", "sweep", "toy", "train", "types")

__all__ = ["__version__", *SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in SUBMODULES:
        return import_module(f"dpo_jax.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("dpo_jax")
    raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
