"""What scripts that are notebooks too have in common, and how a user runs them."""

import subprocess
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)


def cells_of(path):
    """Kinds and sources of the cells of a script or of a notebook."""
    document = jupytext.read(path) if path.suffix == ".py" else nbformat.read(path, as_version=4)
    return [(cell.cell_type, cell.source) for cell in document.cells]


def outputs_of(notebook):
    """The outputs of all cells of a notebook that have code."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def run_notebook(path, folder):
    """Runs a notebook from a folder of its own, beside the experiments; returns the folder of its results."""
    notebook = nbformat.read(path, as_version=4)
    (folder / "experiments").symlink_to(ROOT / "experiments")
    (own := folder / "notebooks").mkdir()
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(own)}}).execute()
    return own / "results" / path.stem
