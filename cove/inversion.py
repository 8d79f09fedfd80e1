"""A finished inversion, in memory and in a file, so that a clip is inverted once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import atomic_write, save_tensors
from .schedule import Schedule

INVERSION_FORMAT = "cove.inversion.2"
# Sigmas that differ by less are the same: grids come from float32 schedules.
SIGMA_TOLERANCE = 1e-4
# A residual below this may grow by rounding, in half precision.
ROUNDING = 1e-3


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
        metadata = {"format": INVERSION_FORMAT, "schedule": json.dumps(numbers), "about": json.dumps(dict(self.about))}
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
                if metadata.get("format") == INVERSION_FORMAT:
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
        raise ValueError(f"{path} holds no COVE inversion (expected format {INVERSION_FORMAT})")


_TENSORS = [entry.name for entry in fields(Inversion) if entry.type == "Tensor"]
