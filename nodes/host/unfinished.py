"""The finished steps of inversions that were interrupted, in ComfyUI's user folder."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...cove.files import atomic_write, save_tensors

# The most bytes in the file of a step beside its latents.
_OVERHEAD = 1024


class UnfinishedInversion:
    """The finished steps of a running inversion, one file each, so that it can be resumed after a kill.

    All unfinished inversions of one folder together take at most `LIMIT` bytes.
    """

    LIMIT = 4 * 2**30

    def __init__(self, folder: str | os.PathLike, name: str):
        """folder: of all unfinished inversions. name: a fingerprint of everything that decides the result."""
        self.folder = Path(folder) / name

    @staticmethod
    def size_of(steps: int, shape: Sequence[int]) -> int:
        """Return an upper bound of the bytes of this many steps of float32 latents of this shape."""
        return steps * (4 * math.prod(shape) + _OVERHEAD)

    def steps(self) -> list[dict[str, Tensor]]:
        """Return the tensors of the finished steps, up to the first file that cannot be read."""
        found: list[dict[str, Tensor]] = []
        with suppress(SafetensorError, OSError):
            while True:
                found.append({name: tensor.clone() for name, tensor in load_file(self._path(len(found))).items()})
        return found

    def others(self) -> int:
        """Return the bytes of the other unfinished inversions of the folder."""
        return sum(self._others().values())

    def make_room(self, size: int) -> bool:
        """Remove other inversions, oldest first, until this one fits beside the rest. Return whether it fits.

        Args:
            size: of all its steps, as `size_of` gives it. Above `LIMIT`, its own steps are removed as well.
        """
        if size > self.LIMIT:
            self.discard()
        room, others = self.LIMIT - size if size <= self.LIMIT else self.LIMIT, self._others()
        while sum(others.values()) > room:
            oldest = next(iter(others))
            del others[oldest]
            shutil.rmtree(oldest, ignore_errors=True)
        return self.others() + size <= self.LIMIT

    def add(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a step; OSError if the disk or `LIMIT` has no room, or the previous step is missing."""
        size = sum(tensor.nbytes for tensor in tensors.values()) + _OVERHEAD
        if _size(self.folder) + self.others() + size > self.LIMIT:
            raise OSError(f"unfinished inversions would take more than {self.LIMIT} bytes")
        if step and not self._path(step - 1).exists():
            raise OSError("the step before is missing")
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path(step)) as temporary:
            save_tensors(tensors, temporary)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:04}.safetensors"

    def _others(self) -> dict[Path, int]:
        found = unfinished_in(self.folder.parent)
        found.pop(self.folder, None)
        return found


def unfinished_in(folder: str | os.PathLike) -> dict[Path, int]:
    """Return the unfinished inversions of a folder, oldest first, with their sizes in bytes."""
    found = []
    for path in Path(folder).glob("*"):
        with suppress(OSError):  # another process has just removed it
            state = path.lstat()
            if S_ISDIR(state.st_mode):
                found.append((state.st_mtime, path))
    return {path: _size(path) for _, path in sorted(found)}


def _size(folder: Path) -> int:
    """Return the size of a folder's files in bytes, ignoring those that vanish meanwhile."""
    size = 0
    for file in folder.glob("*"):
        with suppress(OSError):
            size += file.lstat().st_size
    return size
