"""Clips of scenes in motion, with the exact position and visibility of every point in every frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .drawing import pixels
from .scene import Scene, Thing


@dataclass(frozen=True)
class Clip:
    """Scenes with the same ground and things, one per frame, at different positions."""

    scenes: tuple[Scene, ...]

    def draw(self, height: int, width: int | None = None) -> Tensor:
        """Return the frames as ComfyUI's IMAGE, [frames, height, width, 3] from 0 to 1; square without `width`."""
        return torch.stack([scene.draw(height, width) for scene in self.scenes]).permute(0, 2, 3, 1).contiguous()

    def tracks(self, frame: int, height: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Follow the point visible at each token of one frame through the clip.

        Args:
            frame: the frame whose tokens are followed.
            height, width: the grid of tokens; square without `width`.

        Returns:
            places: [frames, height, width, 2], (x, y) in tokens with the centre of the first token at 0; also where
                the point is outside the picture or occluded.
            visible: [frames, height, width] bool.
        """
        width = height if width is None else width
        points, here = pixels(height, width), self.scenes[frame]
        seen = here.on_top(points)
        size = torch.tensor([width, height])
        half = size / size.min()  # half of the picture, in its units
        places, visible = [], []
        for there in self.scenes:
            place = there.ground.outside(here.ground.inside(points))
            for number, (one, moved) in enumerate(zip(here.things, there.things, strict=True)):
                place = torch.where((seen == number)[..., None], moved.outside(one.inside(points)), place)
            places.append((place + half) * size.min() / 2 - 0.5)
            visible.append((place.abs() < half).all(-1) & (there.on_top(place) == seen))
        return torch.stack(places), torch.stack(visible)

    def with_things(self, change: Callable[[Thing], Thing]) -> Clip:
        """Return the clip with `change` applied to every thing: the target of an edit."""
        return Clip(tuple(replace(scene, things=tuple(map(change, scene.things))) for scene in self.scenes))

    def with_ground(self, **changes) -> Clip:
        """Return the clip with fields of its ground changed."""
        return Clip(tuple(replace(scene, ground=replace(scene.ground, **changes)) for scene in self.scenes))


def moved(thing: Thing, pace: tuple[float, float], turn: float, growth: float, frames: float) -> Thing:
    """Return a thing as it is `frames` later.

    Args:
        pace: motion per frame, (x, y).
        turn: radians per frame.
        growth: growth per frame, as a share of the radius.
    """
    return replace(
        thing,
        x=thing.x + pace[0] * frames,
        y=thing.y + pace[1] * frames,
        angle=thing.angle + turn * frames,
        radius=thing.radius * (1 + growth * frames),
    )
