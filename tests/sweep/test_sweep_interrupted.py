"""Killed, asked to stop, out of space: a folder keeps what was done and comes to the same end, byte by byte."""

import errno
import random
import shutil
from pathlib import Path

import pytest

from tests.sweep import sweeps


def test_killed_at_twenty_moments_it_comes_to_the_same_end(tmp_path, expected):
    assert sweeps.exit_code(sweeps.make_until_killed, tmp_path / "never" / "out", 0) == 0
    assert sweeps.contents(tmp_path / "never" / "out") == expected
    num_lines = int((tmp_path / "never" / "lines").read_text())
    moments = random.Random(0)
    folder, num_kills = tmp_path / "0" / "out", 0
    while num_kills < 20:
        code = sweeps.exit_code(sweeps.make_until_killed, folder, moments.randint(1, num_lines // 3))
        assert code in (0, -9)
        num_kills += code == -9
        if code == 0:
            assert sweeps.contents(folder) == expected
            folder = tmp_path / str(num_kills) / "out"
    sweeps.make(folder)
    assert sweeps.contents(folder) == expected


def test_asked_to_terminate_it_stops_after_a_block_and_goes_on_later(tmp_path, expected):
    assert sweeps.exit_code(sweeps.make_until_terminated, tmp_path / "out", 20) == 128 + 15
    done = len(list((tmp_path / "out" / "done").iterdir()))
    assert 0 < done < sweeps.NUM_BLOCKS / 2
    told = []
    sweeps.make(tmp_path / "out", report=told.append)
    assert len(told) == sweeps.NUM_BLOCKS - done
    assert sweeps.contents(tmp_path / "out") == expected


def test_without_space_it_fails_and_goes_on_later(out, expected):
    done = {path.name for path in (out / "done").iterdir()}
    assert sweeps.exit_code(sweeps.make_with_little_space, out, 300) == errno.EFBIG
    assert done <= {path.name for path in (out / "done").iterdir()}
    sweeps.make(out)
    assert sweeps.contents(out) == expected


class Full:
    """A file on a disk with room for half of what is written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(patch, files):
    """From now on there is no space for files that match."""
    real = Path.open

    def opened(path, mode="r", *args, **options):
        file = real(path, mode, *args, **options)
        return Full(file) if path.match(files) and mode != "rb" else file

    def write_text(path, text, encoding):
        with path.open("w", encoding=encoding) as file:
            return file.write(text)

    patch.setattr(Path, "open", opened)
    patch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize("files", ["total.npy", "part.column.npy", ".*.unfinished"])
def test_a_full_disk_loses_nothing(out, expected, monkeypatch, files):
    done = {path.name for path in (out / "done").iterdir()}
    with monkeypatch.context() as patch:
        fill_disk(patch, files)
        with pytest.raises(OSError, match="No space left") as problem:
            sweeps.make(out)
    assert problem.value.errno == errno.ENOSPC
    assert {path.name for path in (out / "done").iterdir()} == done
    sweeps.make(out)
    assert sweeps.contents(out) == expected


def test_what_a_killed_process_left_behind_is_removed(out, expected):
    for path in (out / ".sweep.json.77.unfinished", out / "done" / ".3.77.unfinished"):
        path.write_text("12")
    sweeps.make(out)
    assert sweeps.contents(out) == expected


def test_a_start_that_ended_before_all_files_were_made_is_no_obstacle(out, expected):
    shutil.rmtree(out / "done")
    (out / "part.column.npy").unlink()
    (out / ".total.npy.77.unfinished").write_bytes(b"")
    sweeps.make(out)
    assert sweeps.contents(out) == expected
