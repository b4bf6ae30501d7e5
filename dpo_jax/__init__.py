"""Direct Preference Optimization in JAX: pure functions, a world with an exact ground truth, vectorised experiments.

Subpackages are imported on first use: `import dpo_jax; dpo_jax.losses.dpo_loss(...)`.
"""

import importlib
from typing import Any

_SUBMODULES = (
    "checks",
    "fast",
    "figures",
    "intervals",
    "lm",
    "losses",
    "records",
    "rlhf",
    "strings",
    "sweep",
    "toy",
    "train",
    "types",
    "votes",
)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom needed

        return version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, "__version__"})
