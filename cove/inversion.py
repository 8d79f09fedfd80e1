"""What an inversion leaves behind, so that no clip has to be inverted twice; in memory, and in a file."""

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

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .files import save_tensors, whole_file

FORMAT = "cove.inversion.1"
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
        clip: the latents that were inverted, as the model sees them, float32 [frames, channels, height, width].
        noise: those at sigmas[-1], of the same shape.
        sigmas: ascending from 0, float32 [steps + 1].
        guesses: where the model was asked at sigmas[1:], float32 [steps, frames, channels, height, width]: what the
            source branch runs on. `cove.ddim.invert` says more.
        residuals: of each step, float64 [steps]; NaN without refinements.
        grew: whether the residual grew there, bool [steps].
        conditioning: tensors of the source prompt, by ComfyUI's names for them.
        about: what else decides the result, as JSON can say it: fingerprint of the model, pack, refinements, ...
        features: for some steps, tensors by the name of their site; see `cove.injection.Site`.
    """

    clip: Tensor
    noise: Tensor
    sigmas: Tensor
    guesses: Tensor
    residuals: Tensor
    grew: Tensor
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, object] = field(default_factory=dict)
    features: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        steps = len(self.sigmas) - 1
        if not (
            self.noise.shape == self.clip.shape
            and self.guesses.shape == (steps, *self.clip.shape)
            and self.residuals.shape == self.grew.shape == (steps,)
            and all(0 <= step < steps for step in self.features)
        ):
            shapes = {name: list(getattr(self, name).shape) for name in _TENSORS}
            raise ValueError(f"these tensors are not of one inversion: {shapes}, features of steps {[*self.features]}")

    @property
    def frames(self) -> int:
        return len(self.clip)

    @property
    def bytes(self) -> int:
        """About what a file of it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def step_at(self, sigma: float) -> int | None:
        """The step that ended at `sigma`; None when there is none."""
        return step_at(self.sigmas, sigma)

    @property
    def diverged(self) -> list[int]:
        """The steps at which refining made the residual grow, and not by rounding."""
        return (self.grew & (self.residuals > ROUNDING)).nonzero().flatten().tolist()

    def quality(self) -> str:
        """One line on how exactly sampling will give the clip back."""
        if self.residuals.isnan().all():
            return "no refinements, so nothing is known of how exactly the clip comes back"
        worst = int(self.residuals.argmax())
        line = f"largest residual {float(self.residuals[worst]):.1e}, at step {worst + 1} of {len(self.residuals)}"
        if self.diverged:
            first = self.diverged[0] + 1
            line += f"; refining diverged at {len(self.diverged)} steps, from step {first}, and kept the best of each"
        return line

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, under a temporary name and then renamed: a kill leaves the old file or none."""
        with whole_file(path) as temporary:
            save_tensors(self._tensors(), temporary, {"format": FORMAT, "about": json.dumps(dict(self.about))})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {f"conditioning.{name}": tensor for name, tensor in self.conditioning.items()}
        for step, features in self.features.items():
            tensors |= {f"features.{step}.{site}": tensor for site, tensor in features.items()}
        return tensors

    @classmethod
    def load(cls, path: str | os.PathLike) -> Inversion:
        """Read what `save` wrote; features stay in the file, mapped into memory. ValueError when it is no such file."""
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
                    about = json.loads(metadata["about"])
                    return cls(**tensors, conditioning=conditioning, about=about, features=features)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
        raise ValueError(f"{path} holds no COVE inversion (expected format {FORMAT})")


def step_at(sigmas: Tensor, sigma: float) -> int | None:
    """The step of an inversion through `sigmas`, [steps + 1], that ends at `sigma`; None when there is none."""
    distance = (sigmas[1:] - sigma).abs()
    nearest = int(distance.argmin())
    return nearest if distance[nearest] <= SIGMA_TOLERANCE * sigma else None


_TENSORS = [entry.name for entry in fields(Inversion) if entry.type == "Tensor"]


def on_disk(tensors: Mapping[str, Tensor], folder: str | os.PathLike) -> dict[str, Tensor]:
    """The same tensors, mapped into memory from a file in `folder`: the system drops and rereads them as it needs to.

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
    """The steps of an inversion that is under way, one file each, so that it can be taken up again after a kill.

    All unfinished inversions of one folder together take at most `LIMIT` bytes.
    """

    LIMIT = 4 * 2**30

    def __init__(self, folder: str | os.PathLike, name: str):
        """folder: of all unfinished inversions. name: a fingerprint of all that decides the result."""
        self.folder = Path(folder) / name

    @staticmethod
    def size_of(steps: int, shape: Sequence[int]) -> int:
        """The most bytes that this many steps take, for float32 latents of this shape."""
        return steps * (2 * 4 * math.prod(shape) + _OVERHEAD)

    def steps(self) -> list[dict[str, Tensor]]:
        """Tensors of the finished steps, from the first; a file that cannot be read ends them."""
        found: list[dict[str, Tensor]] = []
        with suppress(SafetensorError, OSError):
            while True:
                found.append({name: tensor.clone() for name, tensor in load_file(self._path(len(found))).items()})
        return found

    def others(self) -> int:
        """Bytes that the other unfinished inversions of the folder take."""
        return sum(self._others().values())

    def make_room(self, size: int) -> bool:
        """Remove other inversions, the oldest first, until all steps of this one fit beside them; whether they do.

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
        """Write a step. OSError when there is no room on the disk or below `LIMIT`, or the step before is missing."""
        # Copies, because two of them may be one: where refining makes the residual grow, x is the guess.
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in copies.values()) + _OVERHEAD
        if _size(self.folder) + self.others() + size > self.LIMIT:
            raise OSError(f"unfinished inversions would take more than {self.LIMIT} bytes")
        if step and not self._path(step - 1).exists():
            raise OSError("the step before is missing")
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path(step)) as temporary:
            save_tensors(copies, temporary)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:04}.safetensors"

    def _others(self) -> dict[Path, int]:
        found = unfinished_in(self.folder.parent)
        found.pop(self.folder, None)
        return found


def unfinished_in(folder: str | os.PathLike) -> dict[Path, int]:
    """The unfinished inversions of a folder, the oldest first, and the bytes of each."""
    found = []
    for path in Path(folder).glob("*"):
        with suppress(OSError):  # another process has just removed it
            state = path.lstat()
            if S_ISDIR(state.st_mode):
                found.append((state.st_mtime, path))
    return {path: _size(path) for _, path in sorted(found)}


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, without those that go meanwhile."""
    size = 0
    for file in folder.glob("*"):
        with suppress(OSError):
            size += file.lstat().st_size
    return size
