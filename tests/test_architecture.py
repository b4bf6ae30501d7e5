"""Arrows run one way: no module imports from a floor above its own."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import dpo_jax

ROOT = Path(dpo_jax.__file__).parent
FLOORS = {
    "types": 0,
    "checks": 0,
    "fast": 1,
    "intervals": 1,
    "records": 1,
    "toy": 2,
    "losses": 2,
    "votes": 2,
    "strings": 3,
    "train": 3,
    "rlhf": 4,
    "lm": 5,
    "sweep": 5,
    "figures": 6,
}
MODULES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    here = room(path)
    rooms = [name.split(".")[1] for name in imported(path) if name.startswith("dpo_jax.")]
    assert all(other == here or FLOORS[other] < FLOORS[here] or FLOORS[other] == 0 for other in rooms), rooms


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_files_of_a_folder_import_in_one_direction(folder):
    name = ".".join(["dpo_jax", *folder.relative_to(ROOT).parts])
    files = {f"{name}.{path.stem}": path for path in folder.glob("*.py") if path.name != "__init__.py"}
    graph = {
        own: {each for each in files if any(f"{used}.".startswith(f"{each}.") for used in imported(path))} - {own}
        for own, path in files.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(files)  # raises CycleError


def test_the_readme_lists_all_folders_from_the_ground_up():
    tree = (ROOT.parent / "README.md").read_text(encoding="utf-8").split("```\ndpo_jax/")[1].split("experiments/")[0]
    listed = re.findall(r"(\w+)(?:\.py|/)", tree)
    assert sorted(listed) == sorted(FLOORS)
    assert [FLOORS[name] for name in listed if name != "intervals"] == sorted(
        FLOORS[name] for name in listed if name != "intervals"
    )


def test_the_lab_knows_no_experiment():
    lab = ROOT.parent / "experiments" / "lab"
    used = {name for path in lab.glob("*.py") for name in imported(path) if name.startswith("experiments.")}
    assert used
    assert all(name.startswith("experiments.lab.") for name in used), used


def test_every_room_has_a_floor():
    assert {room(path) for path in MODULES} == FLOORS.keys()


@pytest.mark.parametrize(
    ("where", "stranger"), [("losses", "flax"), ("losses", "optax"), ("train", "flax"), ("rlhf", "flax")]
)
def test_some_rooms_have_never_heard_of_some_libraries(where, stranger):
    names = [name.split(".")[0] for path in MODULES if room(path) == where for name in imported(path)]
    assert names
    assert stranger not in names


def test_subpackages_and_version_come_with_the_package():
    names = (
        "print(dpo_jax.losses.dpo_loss.__name__, dpo_jax.__version__, 'train' in dir(dpo_jax), hasattr(dpo_jax, 'x'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import dpo_jax; {names}"], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["dpo_loss", version("dpo_jax"), "True", "False"]


def test_the_package_imports_fast():
    loaded = "import sys, dpo_jax; sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'matplotlib', 'pyarrow')))"
    subprocess.run([sys.executable, "-c", loaded], check=True)
