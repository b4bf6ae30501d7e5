"""Stores: where results go, block by block; in memory, or in a folder that outlives the process.

A folder holds `sweep.json`, which comes first and says what makes the results, and in `blocks/` one `.npz` file for
each block that is complete, an array for each result. Files are written beside their place, synced and renamed, so a
block counts if its file is there. `sweep.json` lists *boxes*: products of combinations, points and seeds, each cut into
blocks. A sweep that is asked for more appends boxes that hold what is missing, so nothing is computed twice.
"""

import errno
import json
import os
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from dpo_jax.sweep.programs import BlockShape

FORMAT = 2

SECONDS_TO_WRITE = 3600.0
"""After how long an unfinished file is taken for one of a process that was killed."""

Arrays = Mapping[str, np.ndarray]
"""Results by name; those of a block have axes (point, seed) before their own."""


class DamagedStoreError(ValueError):
    """A store does not hold what it says it holds."""


class Box(NamedTuple):
    """A product of combinations, points and seeds that is computed as one.

    Attributes:
      combinations, points: numbers of combinations of static values, and of traced ones.
      seeds: the seeds.
    """

    combinations: Sequence[int]
    points: Sequence[int]
    seeds: Sequence[int]

    @property
    def num_runs(self) -> int:
        """How many runs it holds."""
        return len(self.combinations) * len(self.points) * len(self.seeds)

    def num_blocks(self, shape: BlockShape) -> int:
        """How many blocks it is cut into."""
        return len(self.combinations) * -(-len(self.points) // shape.points) * -(-len(self.seeds) // shape.seeds)


class Block(NamedTuple):
    """A part of a box that is computed and stored as one.

    Attributes:
      number: its place among all blocks.
      box: the number of its box.
      combination: the combination of static values.
      points: the combinations of traced values.
      seeds: the seeds.
    """

    number: int
    box: int
    combination: int
    points: Sequence[int]
    seeds: Sequence[int]

    @property
    def num_runs(self) -> int:
        """How many runs it holds."""
        return len(self.points) * len(self.seeds)


def blocks_of(boxes: Sequence[Box], shape: BlockShape) -> Iterator[Block]:
    """All blocks, in the order in which they are computed: by box, then by seeds."""
    number = 0
    for place, box in enumerate(boxes):
        for seeds in _parts(box.seeds, shape.seeds):
            for combination in box.combinations:
                for points in _parts(box.points, shape.points):
                    yield Block(number, place, combination, points, seeds)
                    number += 1


def missing_boxes(covered: np.ndarray, seeds: Sequence[int]) -> list[Box]:
    """Boxes that hold what is not covered.

    Args:
      covered: Booleans `[combinations, points, seeds]`.
      seeds: the seed of each place on the last axis.
    """
    groups: dict[tuple[Any, Any], list[int]] = {}
    for combination, of_points in enumerate(covered):
        points_by_seeds: dict[tuple[int, ...], list[int]] = {}
        for point, of_seeds in enumerate(of_points):
            points_by_seeds.setdefault(tuple(np.flatnonzero(~of_seeds).tolist()), []).append(point)
        for places, points in points_by_seeds.items():
            if places:
                groups.setdefault((tuple(points), places), []).append(combination)
    return [Box(who, points, [seeds[i] for i in places]) for (points, places), who in groups.items()]


class Folder:
    """A sweep in a folder.

    Attributes:
      path: the folder.
      manifest: what `sweep.json` says; `None` if there is no sweep yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Makes the folder, if there is none, and says what it holds."""
        (self.path / "blocks").mkdir(parents=True, exist_ok=True)
        self.manifest = manifest
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        _write_whole(self.path / "sweep.json", lambda file: file.write(text.encode()))

    @property
    def shape(self) -> BlockShape:
        """The size of its blocks, which it keeps: blocks of another size would have other last bits."""
        assert self.manifest is not None
        return BlockShape(**self.manifest["block"])

    def boxes(self, combinations: Sequence[Any], points: Sequence[Any]) -> list[Box]:
        """Its boxes, in places of lists of combinations and points; -1 stands for what the lists do not hold."""
        assert self.manifest is not None
        places = [{_key(name): i for i, name in enumerate(names)} for names in (combinations, points)]
        return [
            Box(
                [places[0].get(_key(name), -1) for name in box["combinations"]],
                [places[1].get(_key(name), -1) for name in box["points"]],
                _unpacked(box["seeds"]),
            )
            for box in self.manifest["boxes"]
        ]

    def done(self) -> set[int]:
        """The numbers of the blocks that are complete."""
        names = (path.name for path in (self.path / "blocks").glob("*.npz"))
        return {int(name[:-4]) for name in names if name[:-4].isdecimal()}

    def write(self, block: Block, arrays: Arrays) -> None:
        """Stores a block; it counts as soon as its file has its name."""
        file = self._file(block.number)
        file.parent.mkdir(exist_ok=True)
        _write_whole(file, lambda opened: _write_arrays(opened, arrays))

    def read(self, block: Block, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Arrays:
        """A block that is complete.

        Raises:
          DamagedStoreError: the file is not what was written.
        """
        try:
            with self._file(block.number).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[f"_{name}"] for name in shapes}
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as problem:
            raise DamagedStoreError(f"{self._file(block.number)} cannot be read ({problem})") from problem
        for name, (own, dtype) in shapes.items():
            wanted = (len(block.points), len(block.seeds), *own)
            if (arrays[name].shape, arrays[name].dtype) != (wanted, dtype):
                raise DamagedStoreError(f"{self._file(block.number)} holds something else as {name}")
        return arrays

    def forget(self, blocks: Sequence[Block]) -> None:
        """Removes blocks, so that they are made again."""
        for block in blocks:
            self._file(block.number).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes what processes that were killed some time ago left behind."""
        for left_behind in [*self.path.glob(".*.unfinished"), *self.path.glob("blocks/.*.unfinished")]:
            with suppress(OSError):
                if time.time() - left_behind.stat().st_mtime > SECONDS_TO_WRITE:
                    left_behind.unlink()

    def _file(self, number: int) -> Path:
        return self.path / "blocks" / f"{number}.npz"


def packed(seeds: Sequence[int]) -> Any:
    """Seeds as a manifest lists them: two numbers for all from the one to below the other."""
    if (
        list(seeds[:1])
        and len(seeds) == seeds[-1] - seeds[0] + 1
        and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    ):
        return {"from": int(seeds[0]), "below": int(seeds[-1]) + 1}
    return [int(seed) for seed in seeds]


def _unpacked(seeds: Any) -> Sequence[int]:
    return range(seeds["from"], seeds["below"]) if isinstance(seeds, dict) else seeds


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
            if others != ["blocks"] or any((path / "blocks").iterdir()):
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
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    size = manifest.get("block")
    if (
        not isinstance(size, dict)
        or size.keys() != set(BlockShape._fields)
        or not all(isinstance(number, int) and number > 0 for number in size.values())
    ):
        raise DamagedStoreError(f"{path} is damaged: sweep.json gives the size of blocks as {size}")
    kinds = {"axes": dict, "results": dict, "programs": dict, "boxes": list, "key": list, "versions": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise DamagedStoreError(f"{path} is damaged: sweep.json gives {name} as {manifest.get(name)}")


def refuse_other(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> None:
    """Raises an error that names what differs, unless a store was made by what wants to go on with it."""
    for name in {**wanted, **stored}:
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_other(path, old, new, f"{within}{name}.")
        elif json.dumps(old) != json.dumps(new):  # 0.0 is not -0.0, and 1 not True
            change = f"{within}{name} was {_shortened(old)} and is now {_shortened(new)}"
            raise ValueError(f"{path} holds another sweep: {change}; choose another folder")


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


@contextmanager
def locked(path: Path, name: str = "lock", *, wait: bool = False) -> Iterator[None]:
    """Holds a folder, made if there is none, against other processes; the lock ends with the process, however it ends.

    Raises:
      BlockingIOError: another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path / f".{name}", blocking=wait))
        except Timeout:
            raise BlockingIOError(f"{path} is in use by another process that writes its sweep there") from None
        yield


def _write_arrays(file: Any, arrays: Arrays) -> None:
    """Writes what `np.load` reads; unlike `np.savez`, without the time, so that equal results are equal files."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"_{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file whole or not at all, and to the disk before it counts."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _parts(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _key(name: Any) -> str:
    return json.dumps(name, sort_keys=True)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ..."
