"""Clips of scenes in motion, with the exact position and visibility of every point in every frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from training.world import between

from .scenes import random_scene
from .world import Look, Scene, Thing, draw, pixels

MOTIONS = ("move", "scale", "rotate", "all")
WINDOW = 9  # tokens a side of the window of matches; tiles of a clip's ground are larger


@dataclass(frozen=True)
class Clip:
    """The same ground and things in every frame, at other positions."""

    scenes: tuple[Scene, ...]

    def draw(self, height: int, width: int) -> Tensor:
        """Return the frames as ComfyUI's IMAGE: [frames, height, width, 3] from 0 to 1."""
        return torch.stack([draw(scene, height, width) for scene in self.scenes]).permute(0, 2, 3, 1).contiguous()

    def tracks(self, frame: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Follow what is visible at each token of one frame.

        Args:
            frame: the frame whose tokens are followed.
            height, width: the grid of tokens.

        Returns:
            places: [frames, height, width, 2], (x, y) in tokens with the centre of the first token at 0; also outside
                the picture and where something hides the point.
            visible: [frames, height, width] bool.
        """
        points, here = pixels(height, width), self.scenes[frame]
        seen = here.on_top(points)
        size = torch.tensor([width, height])
        half = size / size.min()  # the picture from its middle to its edges
        places, visible = [], []
        for there in self.scenes:
            place = there.ground.outside(here.ground.inside(points))
            for number, (one, moved) in enumerate(zip(here.things, there.things, strict=True)):
                place = torch.where((seen == number)[..., None], moved.outside(one.inside(points)), place)
            places.append((place + half) * size.min() / 2 - 0.5)
            visible.append((place.abs() < half).all(-1) & (there.on_top(place) == seen))
        return torch.stack(places), torch.stack(visible)

    def with_looks(self, change: Callable[[Look], Look]) -> Clip:
        """Return the clip with another look of its things, the target of an edit."""
        return Clip(
            tuple(
                replace(scene, things=tuple(replace(thing, look=change(thing.look)) for thing in scene.things))
                for scene in self.scenes
            )
        )

    def with_ground(self, **changes) -> Clip:
        """Return the clip with fields of its ground changed."""
        return Clip(tuple(replace(scene, ground=replace(scene.ground, **changes)) for scene in self.scenes))


def random_clip(
    generator: Generator, frames: int, motion: str = "all", height: int = 48, width: int = 48, things: int = 2
) -> Clip:
    """Draw a clip for a grid of height x width tokens.

    From frame to frame, a thing moves by one to two tokens and the ground by half of that; things turn by 3 to 8
    degrees, and grow or shrink by up to a third over the clip. All things turn and grow alike, each moves its own way.

    Args:
        motion: "move", "scale", "rotate" or "all" of them.
        things: how many things at most. Their tiles and motifs follow the grid; a tile is larger than `WINDOW`.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {motion!r}")
    token = 2 / min(height, width)
    still = random_scene(generator, height, width, most=things, period=(WINDOW + 1, WINDOW + 4))
    turn = _sign(generator) * math.radians(between(3, 8, generator)) if motion in ("rotate", "all") else 0.0
    growth = _sign(generator) * between(0.15, 0.33, generator) / max(1, frames - 1)
    growth = growth if motion in ("scale", "all") else 0.0
    slow = 1.0 if motion in ("move", "all") else 0.25
    paces = [_pace(generator, slow * token, 2 * slow * token) for _ in still.things]
    drift = _pace(generator, 0.5 * token, token)
    scenes = []
    for away in (frame - (frames - 1) / 2 for frame in range(frames)):
        ground = replace(
            still.ground,
            x=still.ground.x + drift[0] * away,
            y=still.ground.y + drift[1] * away,
            zoom=still.ground.zoom * (1 + growth * away),
        )
        moved = (_moved(thing, pace, turn, growth, away) for thing, pace in zip(still.things, paces, strict=True))
        scenes.append(Scene(ground, tuple(moved)))
    return Clip(tuple(scenes))


def _moved(thing: Thing, pace: tuple[float, float], turn: float, growth: float, frames: float) -> Thing:
    return replace(
        thing,
        x=thing.x + pace[0] * frames,
        y=thing.y + pace[1] * frames,
        angle=thing.angle + turn * frames,
        radius=thing.radius * (1 + growth * frames),
    )


def _sign(generator: Generator) -> int:
    return 1 if float(torch.rand((), generator=generator)) < 0.5 else -1


def _pace(generator: Generator, slow: float, fast: float) -> tuple[float, float]:
    """Draw a step per frame in any direction."""
    step, angle = between(slow, fast, generator), between(0, 2 * math.pi, generator)
    return step * math.cos(angle), step * math.sin(angle)
