"""A finished inversion, in memory and in a file, so that a clip is inverted once."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from stat import S_ISDIR

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .files import atomic_write, save_tensors
from .schedule import Schedule

FORMAT = "cove.inversion.2"
# Sigmas that differ by less are the same: grids come from float32 schedules.
SIGMA_TOLERANCE = 1e-4
# A residual below this may grow by rounding, in half precision.
ROUNDING = 1e-3
# The most bytes in the file of an unfinished step beside its latents.
_OVERHEAD = 1024


@dataclass(frozen=True, eq=False)
class Inversion:
    """A finished inversion.

    Attributes:
        schedule: timesteps of sampling and inversion.
        clip: the latents that were inverted, as the model sees them, float32 [frames, channels, height, width].
        latents: at sigmas[1:], float32 [schedule.steps, frames, channels, height, width]. Feature Injection and
            TokenFlow evaluate the source there.
        sigmas: those of sampling, ascending from 0, float32 [schedule.steps + 1].
        residuals: of each step of the inversion, float64; see `cove.ddim.InversionStep`.
        stopped: at which of these steps refining stopped, bool.
        conditioning: tensors of the source prompt, by ComfyUI's names for them.
        about: other facts that decide the result, as JSON: fingerprint of the model, pack, refinements, ...
        features: by the number of a sampling step, ascending as `latents`: tensors by the name of their site; see
            `cove.injection.Site`.
    """

    schedule: Schedule
    clip: Tensor
    latents: Tensor
    sigmas: Tensor
    residuals: Tensor
    stopped: Tensor
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, object] = field(default_factory=dict)
    features: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        steps = self.schedule.steps
        if not (
            self.latents.shape == (steps, *self.clip.shape)
            and self.sigmas.shape == (steps + 1,)
            and self.residuals.shape == self.stopped.shape == (len(self.schedule.inversion),)
            and all(0 <= step < steps for step in self.features)
        ):
            shapes = {name: list(getattr(self, name).shape) for name in _TENSORS}
            raise ValueError(
                f"these tensors do not belong to one inversion of {self.schedule}: {shapes}, features of steps "
                f"{[*self.features]}"
            )

    @classmethod
    def of_steps(
        cls, schedule: Schedule, clip: Tensor, latents: Sequence[Tensor], sigmas: Tensor, **others
    ) -> Inversion:
        """Build it from latents and sigmas of every step of inversion, of which those of sampling are kept."""
        every = slice(None, None, schedule.multiple)
        sigmas = torch.cat([sigmas[:1], sigmas[1:][every]])
        return cls(schedule, clip, torch.stack([*latents[every]]), sigmas, **others)

    @property
    def frames(self) -> int:
        return len(self.clip)

    @property
    def noise(self) -> Tensor:
        """The latents at which sampling starts."""
        return self.latents[-1]

    @property
    def bytes(self) -> int:
        """About the size of its file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def step_at(self, sigma: float) -> int | None:
        """Return the step at `sigma`, or None."""
        distance = (self.sigmas[1:] - sigma).abs()
        nearest = int(distance.argmin())
        return nearest if distance[nearest] <= SIGMA_TOLERANCE * sigma else None

    @property
    def diverged(self) -> list[int]:
        """The steps of inversion at which refining increased the residual, other than by rounding."""
        return (self.stopped & (self.residuals > ROUNDING)).nonzero().flatten().tolist()

    def quality(self) -> str:
        """Describe how exactly sampling will return the clip, in one line."""
        worst = int(self.residuals.argmax())
        line = f"largest residual {float(self.residuals[worst]):.1e}, at step {worst + 1} of {len(self.residuals)}"
        if self.diverged:
            first = self.diverged[0] + 1
            line += f"; refining diverged in {len(self.diverged)} steps, first in step {first}, and was undone there"
        return line

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, under a temporary name and then renamed: a kill leaves the old file or none."""
        numbers = {"steps": self.schedule.steps, "multiple": self.schedule.multiple}
        metadata = {"format": FORMAT, "schedule": json.dumps(numbers), "about": json.dumps(dict(self.about))}
        with atomic_write(path) as temporary:
            save_tensors(self._tensors(), temporary, metadata)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {f"conditioning.{name}": tensor for name, tensor in self.conditioning.items()}
        for step, features in self.features.items():
            tensors |= {f"features.{step}.{site}": tensor for site, tensor in features.items()}
        return tensors

    @classmethod
    def load(cls, path: str | os.PathLike) -> Inversion:
        """Read what `save` wrote. Features stay in the file, mapped into memory.

        Raises:
            ValueError: the file is no inversion, or damaged.
        """
        conditioning: dict[str, Tensor] = {}
        features: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") == FORMAT:
                    for name in file.keys():  # noqa: SIM118  (not a mapping)
                        kind, _, rest = name.partition(".")
                        if kind == "conditioning":
                            conditioning[rest] = file.get_tensor(name)
                        elif kind == "features":
                            step, _, site = rest.partition(".")
                            features.setdefault(int(step), {})[site] = file.get_tensor(name)
                    tensors = {name: file.get_tensor(name) for name in _TENSORS}
                    schedule, about = Schedule(**json.loads(metadata["schedule"])), json.loads(metadata["about"])
                    return cls(schedule, **tensors, conditioning=conditioning, about=about, features=features)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
        raise ValueError(f"{path} holds no COVE inversion (expected format {FORMAT})")


_TENSORS = [entry.name for entry in fields(Inversion) if entry.type == "Tensor"]


def on_disk(tensors: Mapping[str, Tensor], folder: str | os.PathLike) -> dict[str, Tensor]:
    """Return copies of tensors that are mapped into memory from a file in `folder`.

    The file has lost its name by the time this returns and is gone with the tensors, even after a kill; on Windows,
    where a mapped file cannot lose its name, it stays until somebody clears the folder.
    """
    path = Path(folder) / f"{uuid.uuid4().hex}.safetensors"
    try:
        save_tensors(tensors, path)
        return load_file(path)
    finally:
        with suppress(OSError):
            path.unlink()


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
