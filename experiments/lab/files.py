"""Files of results: written whole or not at all, and with their provenance."""

import json
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.lab.commands import clear_errors, in_jupyter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def provenance(**seconds: float) -> dict[str, Any]:
    """What belongs to every result: how long each part took, on which device, with which versions."""
    packages = ("dpo_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "seconds": seconds,
        "device": f"{jax.device_count()} x {device.platform} ({device.device_kind})",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }


def output_folder(path: Path) -> Path:
    """Makes the folder for results; fails before any work is done if it cannot be written to."""
    with clear_errors():
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return path


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: `write` fills a temporary neighbour, which then replaces the file."""
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_summary(summary: dict[str, Any], folder: Path) -> None:
    """Writes `summary.json`: arrays as lists, and NaN and infinity, which JSON lacks, as null.

    A lone surrogate, which a file's name may contain, becomes its JSON escape.
    """
    text = json.dumps(_as_json(summary), indent=2, ensure_ascii=False, allow_nan=False)
    save(folder / "summary.json", lambda path: path.write_text(text + "\n", "utf-8", "backslashreplace"))


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, and shows it in a Jupyter notebook."""
    save(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=110))
    if in_jupyter():
        from IPython.display import Image, display

        display(Image(filename=str(path)))


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _as_json(np.asarray(value).tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
