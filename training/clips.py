"""Clips of the world in motion, with the exact place and visibility of every point in every frame.

`python -m training.clips` writes demo/clip.mp4, the clip that comes with the pack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from cove.encode import write_frames

from .world import Ground, Scene, Thing, between, draw, pixels, random_scene

MOTIONS = ("move", "scale", "rotate", "all", "occlude")


@dataclass(frozen=True)
class Clip:
    """The same ground and things in every frame, at other places."""

    scenes: tuple[Scene, ...]

    def draw(self, size: int) -> Tensor:
        """Pictures as ComfyUI's IMAGE has them: [frames, size, size, 3] from 0 to 1."""
        return torch.stack([draw(scene, size) for scene in self.scenes]).permute(0, 2, 3, 1).contiguous()

    def tracks(self, frame: int, size: int) -> tuple[Tensor, Tensor]:
        """Where what is seen at each token of one frame is in every frame.

        Args:
            frame: the frame whose tokens are followed.
            size: tokens a side.

        Returns:
            places: [frames, size, size, 2], (x, y) in tokens, the centre of the first token at 0; also outside the
                picture and where something else hides it.
            visible: [frames, size, size] bool.
        """
        points = pixels(size)
        here = self.scenes[frame]
        seen = on_top(here, points)
        places, visible = [], []
        for there in self.scenes:
            place = torch.empty_like(points)
            for number in range(-1, len(here.things)):
                moved = _layer(there, number).outside(_layer(here, number).inside(points))
                place = torch.where((seen == number)[..., None], moved, place)
            places.append((place + 1) / 2 * size - 0.5)
            visible.append((place.abs() < 1).all(-1) & (on_top(there, place) == seen))
        return torch.stack(places), torch.stack(visible)


def _layer(scene: Scene, number: int):
    return scene.things[number] if number >= 0 else scene.ground


def on_top(scene: Scene, points: Tensor) -> Tensor:
    """The thing that is seen at points of the picture, [..., 2] -> [...]: its place in `things`, -1 for the ground."""
    seen = torch.full(points.shape[:-1], -1)
    for number, thing in enumerate(scene.things):
        seen[thing.covers(points)] = number
    return seen


def random_clip(generator: Generator, frames: int, motion: str = "all") -> Clip:
    """A thing that moves, grows or shrinks, turns, does all of it, or is crossed by another, over a moving ground.

    From frame to frame a thing moves by 0.06 to 0.14 of half the picture, one or two tokens of 32, and the ground by
    half of that; it turns by 3 to 8 degrees, and over the whole clip it grows or shrinks by up to a third.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {motion!r}")
    still = random_scene(generator, most=1)
    middle = (frames - 1) / 2
    thing, pace = _centred(still.things[0], generator), _pace(generator)
    turn, growth = 0.0, 0.0
    if motion in ("rotate", "all"):
        turn = math.radians(between(3, 8, generator)) * _sign(generator)
    if motion in ("scale", "all"):
        growth = between(0.15, 0.33, generator) * _sign(generator) / max(1, frames - 1)
    if motion not in ("move", "all"):
        pace = (pace[0] / 4, pace[1] / 4)
    paths = [(thing, pace, turn, growth)]
    if motion == "occlude":
        other = replace(_centred(random_scene(generator, most=1).things[0], generator), radius=0.35)
        paths.append((other, _pace(generator, 0.12, 0.16), turn, growth))
    drift = _pace(generator, 0.03, 0.07)
    scenes = []
    for frame in range(frames):
        away = frame - middle
        ground = replace(
            still.ground, x=still.ground.x + drift[0] * away, y=still.ground.y + drift[1] * away, zoom=1 + growth * away
        )
        scenes.append(Scene(ground, tuple(_moved(*path, away) for path in paths)))
    return Clip(tuple(scenes))


def _centred(thing: Thing, generator: Generator) -> Thing:
    return replace(thing, x=between(-0.2, 0.2, generator), y=between(-0.2, 0.2, generator), radius=0.55)


def demo_clip() -> Clip:
    """A striped red star on a cloudy blue ground, that turns and moves by a token a frame."""
    thing = Thing("star", "red", "striped", x=0.0, y=0.0, radius=0.6, angle=0.3)
    ground = Ground("blue", "cloudy", tilt=0.8, seed=5)
    away = [frame - 3.5 for frame in range(8)]
    return Clip(
        tuple(
            Scene(replace(ground, x=-0.03 * a), (_moved(thing, (0.06, -0.03), math.radians(5), 0.0, a),)) for a in away
        )
    )


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


def _pace(generator: Generator, slow: float = 0.06, fast: float = 0.14) -> tuple[float, float]:
    """A step a frame in any direction."""
    step, angle = between(slow, fast, generator), between(0, 2 * math.pi, generator)
    return step * math.cos(angle), step * math.sin(angle)


if __name__ == "__main__":
    write_frames(Path(__file__).parent.parent / "demo" / "clip.mp4", demo_clip().draw(128), fps=8)
