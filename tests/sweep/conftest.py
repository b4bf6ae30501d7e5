import shutil
from pathlib import Path

import pytest

from tests.sweep import sweeps


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    assert sweeps.make(folder)["total"].size == sweeps.NUM_RUNS
    return folder


@pytest.fixture(scope="session")
def expected(whole):
    contents = sweeps.contents(whole)
    names = {"sweep.json", *(f"blocks/{number}.npz" for number in range(sweeps.NUM_BLOCKS))}
    assert contents.keys() == names
    return contents


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "sweep"
    with pytest.raises(sweeps.StoppedError):
        sweeps.make(folder, report=sweeps.stop_at_half)
    assert 10 < len(list((folder / "blocks").iterdir())) < 30
    return folder


@pytest.fixture
def out(tmp_path, half):
    """A folder that holds about half of the sweep."""
    return Path(shutil.copytree(half, tmp_path / "out"))
