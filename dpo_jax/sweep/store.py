"""Stores: where results go, block by block; in memory, or in a folder that outlives the process.

A folder holds `sweep.json`, which comes first and says what makes the results; one `.npy` file for each result, at its
full size from the beginning; and in `done/` one file for each block that is complete, with the checksum of its data. A
block counts once that file is there, and it comes last, when the data are on the disk: whatever happens before, a loss
of power too, leaves a block that will be made again.
"""

import errno
import json
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from filelock import FileLock, Timeout

FORMAT = 1

SECONDS_BETWEEN_SYNCS = 0.5
"""Blocks that take less are said to be done together: waiting for the disk takes milliseconds for each file."""


class DamagedStoreError(ValueError):
    """A store does not hold what it says it holds."""


class Block(NamedTuple):
    """A part of the grid that is computed and stored as one.

    Attributes:
      number: its place in the grid.
      combination: which combination of discrete values.
      points: which combinations of traced values.
      seeds: which seeds.
    """

    number: int
    combination: int
    points: slice
    seeds: slice


Arrays = Mapping[str, np.ndarray]
"""Results by name, with axes (combination, point, seed) before their own; those of a block lack the first."""


class Memory:
    """Results in memory."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        self.results = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def done(self) -> set[int]:
        """The numbers of the blocks that were complete at the start."""
        return set()

    def is_done(self, num_blocks: int) -> bool:  # noqa: ARG002
        """Whether all blocks are complete."""
        return False

    def write(self, block: Block, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self.results[name][block.combination, block.points, block.seeds] = array

    def sync(self) -> None:
        """Nothing has to be done."""

    def arrays(self) -> Arrays:
        return self.results


class Folder:
    """Results in a folder.

    Args:
      path: the folder.
      manifest: what made the results; `results` holds the shape and dtype of each.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.unmarked: dict[int, str] = {}
        self.last_sync = 0.0
        self.shapes = {
            name: (tuple(result["shape"]), np.dtype(result["dtype"])) for name, result in manifest["results"].items()
        }

    def create(self) -> None:
        """Makes all files, results full of zeros that take no space yet; goes on where an earlier start stopped.

        Raises:
          ValueError: the folder holds another sweep.
          FileExistsError: it holds other files.
        """
        if read_manifest(self.path) is not None:
            self.check()
        for left_behind in [*self.path.glob(".*.unfinished"), *self.path.glob("done/.*.unfinished")]:
            left_behind.unlink()
        if not (self.path / "sweep.json").exists():
            write_whole(self.path / "sweep.json", json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")
        if (self.path / "done").exists():  # so are all results, made before
            return
        for name in self.shapes:
            self._make_file(name)
        (self.path / "done").mkdir()
        _sync(self.path)

    def check(self) -> None:
        """Raises `ValueError` unless the folder holds this sweep."""
        refuse_other(self.path, read_manifest(self.path) or {}, self.manifest)

    def done(self) -> set[int]:
        """The numbers of the blocks that are complete."""
        return {int(path.name) for path in (self.path / "done").iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)}

    def is_done(self, num_blocks: int) -> bool:
        """Whether all blocks are complete."""
        return (self.path / "done").is_dir() and self.done() >= set(range(num_blocks))

    def write(self, block: Block, arrays: Arrays) -> None:
        """Writes a block, which counts after the next `sync`: this one, unless the last one was just before."""
        for name, array in arrays.items():
            self._write_array(name, block, np.ascontiguousarray(array))
        self.unmarked[block.number] = _checksum(arrays)
        if time.monotonic() - self.last_sync > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Waits until all that was written is on the disk, and then says that it is done."""
        if not self.unmarked:
            return
        for name in self.shapes:
            _sync(self._file(name))
        for number, checksum in self.unmarked.items():
            write_whole(self.path / "done" / str(number), checksum)
        _sync(self.path / "done")
        self.unmarked, self.last_sync = {}, time.monotonic()

    def arrays(self) -> Arrays:
        return {name: np.load(self._file(name), mmap_mode="r") for name in self.shapes}

    def verify(self, blocks: Sequence[Block]) -> None:
        """Reads what is complete, and raises `DamagedStoreError` unless it is as it was written."""
        broken, damaged = self._damage(blocks)
        found = list(broken.values())
        if damaged:
            numbers = ", ".join(str(block.number) for block in damaged[:10])
            more = f", ... ({len(damaged)} in all)" if len(damaged) > 10 else ""
            which = f"blocks {numbers}{more} are" if len(damaged) > 1 else f"block {numbers} is"
            found.append(f"{which} not what was written")
        if found:
            raise DamagedStoreError(
                f"{self.path} is damaged: {'; '.join(found)}. With repair=True (--repair) it is made again"
            )

    def repair(self, blocks: Sequence[Block]) -> None:
        """Forgets blocks that are damaged, so that they are made again: all of them if a file of results is broken."""
        broken, damaged = self._damage(blocks)
        for block in blocks if broken else damaged:
            (self.path / "done" / str(block.number)).unlink(missing_ok=True)
        _sync(self.path / "done")
        for name in broken:
            self._make_file(name)
        _sync(self.path)

    def _damage(self, blocks: Sequence[Block]) -> tuple[dict[str, str], list[Block]]:
        """What is wrong with each file of results that is broken; and damaged blocks, as far as files can be read."""
        problems = {name: self._problem(name, shape, dtype) for name, (shape, dtype) in self.shapes.items()}
        broken = {name: problem for name, problem in problems.items() if problem}
        if broken:
            return broken, []
        arrays = self.arrays()

        def is_damaged(block: Block) -> bool:
            part = {name: array[block.combination, block.points, block.seeds] for name, array in arrays.items()}
            return (self.path / "done" / str(block.number)).read_bytes() != _checksum(part).encode()

        return {}, list(filter(is_damaged, blocks))

    def _make_file(self, name: str) -> None:
        shape, dtype = self.shapes[name]
        with unfinished(self._file(name)) as file:
            np.lib.format.open_memmap(file, "w+", dtype, shape)

    def _file(self, name: str) -> Path:
        return self.path / f"{name.replace('%', '%25').replace('/', '%2F')}.npy"

    def _problem(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> str:
        """What is wrong with a file of results; nothing if it is as it was made."""
        try:
            array = np.load(self._file(name), mmap_mode="r")
        except Exception as problem:  # whatever a parser of headers raises
            return f"{name}.npy cannot be read ({problem})"
        if array.shape != shape or array.dtype != dtype:
            return f"{name}.npy holds {array.dtype}{list(array.shape)} and not {dtype}{list(shape)}"
        if self._file(name).stat().st_size != array.offset + array.nbytes or not array.flags.c_contiguous:
            return f"{name}.npy is not as it was made"
        return ""

    def _write_array(self, name: str, block: Block, array: np.ndarray) -> None:
        """Writes by ordinary calls, which raise when the disk is full; through a memory map the process would die."""
        (_, num_points, num_seeds, *rest), dtype = self.shapes[name]
        row_bytes = int(np.prod(rest, dtype=int)) * dtype.itemsize
        with self._file(name).open("r+b") as file:
            header = os.fstat(file.fileno()).st_size - int(np.prod(self.shapes[name][0], dtype=int)) * dtype.itemsize
            for i, point in enumerate(range(block.points.start, block.points.stop)):
                first = (block.combination * num_points + point) * num_seeds + block.seeds.start
                file.seek(header + first * row_bytes)
                file.write(array[i].tobytes())


Store: TypeAlias = Memory | Folder
"""Where results go."""


def _checksum(arrays: Arrays) -> str:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), checksum)
    return f"{checksum:08x}\n"


def write_whole(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    with unfinished(path) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A neighbour of a file, which takes the file's place once it is complete and on the disk."""
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield neighbour
        _sync(neighbour)
        neighbour.replace(path)
    finally:
        neighbour.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raises an OSError that says why, if a path is not a folder and cannot become one."""
    for place in (path, *path.absolute().parents):
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise FileNotFoundError(f"{place} is a link to {place.readlink()}, which does not exist") from None
            continue
        except OSError as problem:
            if problem.errno == errno.ELOOP:
                raise OSError(f"{place} is in a loop of symbolic links: choose another folder") from None
            raise
        if not is_folder:
            raise NotADirectoryError(f"{place} is a file: choose another folder")
        return


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a folder's `sweep.json` says; `None` if it holds no sweep yet, or there is no folder.

    Raises:
      DamagedStoreError: the file cannot be read.
      FileExistsError: the folder holds other files.
    """
    file = path / "sweep.json"
    if not file.exists():
        entries = sorted(path.iterdir()) if path.exists() else []
        if others := [entry.name for entry in entries if not entry.name.startswith(".")]:
            if file.exists():  # by now
                return read_manifest(path)
            raise FileExistsError(f"{path} holds other files ({others[0]}) and no sweep: choose a new folder")
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise DamagedStoreError(
            f"{path} is damaged: sweep.json cannot be read ({problem}); without it nothing can be repaired: choose "
            "another folder"
        ) from problem
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedStoreError(f"{path} is of a format that this version of dpo_jax does not read")
    return manifest


def refuse_other(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> None:
    """Raises an error that names what differs, unless a store was made by what wants to go on with it."""
    for name in {**wanted, **stored}:
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_other(path, old, new, f"{within}{name}.")
        elif json.dumps(old) != json.dumps(new):  # 0.0 is not -0.0, and 1 not True
            change = f"{within}{name} was {_shortened(old)} and is now {_shortened(new)}"
            raise ValueError(f"{path} holds another sweep: {change}; choose another folder")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a folder, made if there is none, against other processes; the lock ends with the process, however it ends.

    Raises:
      BlockingIOError: somebody else holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path / ".lock", blocking=False))
        except Timeout:
            raise BlockingIOError(f"{path} is in use by another process that writes its sweep there") from None
        yield


def _sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk, where the system can tell."""
    with suppress(PermissionError):  # Windows does not open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ..."
