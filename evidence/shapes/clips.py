"""Random clips of shapes, and the demo clip of the pack.

`python -m evidence.shapes.clips` writes demo/clip.mp4.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from torch import Generator

from cove.encode import write_frames

from ..chance import between, random_sign, random_step
from ..clip import Clip, moved
from ..scene import Scene
from .scenes import random_scene
from .world import Ground, Thing

MOTIONS = ("move", "scale", "rotate", "all", "occlude")


def random_clip(generator: Generator, frames: int, motion: str = "all") -> Clip:
    """Draw a clip of one thing over a moving ground.

    From frame to frame the thing moves by 0.06 to 0.14 of half the picture, one or two tokens of 32, and the ground by
    half of that; it turns by 3 to 8 degrees, and over the whole clip it grows or shrinks by up to a third.

    Args:
        motion: "move", "scale", "rotate", "all" of them, or "occlude", in which a second thing crosses the first.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {motion!r}")
    still = random_scene(generator, most=1)
    middle = (frames - 1) / 2
    thing, pace = _centred(still.things[0], generator), random_step(generator, 0.06, 0.14)
    turn, growth = 0.0, 0.0
    if motion in ("rotate", "all"):
        turn = math.radians(between(3, 8, generator)) * random_sign(generator)
    if motion in ("scale", "all"):
        growth = between(0.15, 0.33, generator) * random_sign(generator) / max(1, frames - 1)
    if motion not in ("move", "all"):
        pace = (pace[0] / 4, pace[1] / 4)
    paths = [(thing, pace, turn, growth)]
    if motion == "occlude":
        other = replace(_centred(random_scene(generator, most=1).things[0], generator), radius=0.35)
        paths.append((other, random_step(generator, 0.12, 0.16), turn, growth))
    drift = random_step(generator, 0.03, 0.07)
    scenes = []
    for away in (frame - middle for frame in range(frames)):
        ground = replace(
            still.ground, x=still.ground.x + drift[0] * away, y=still.ground.y + drift[1] * away, zoom=1 + growth * away
        )
        scenes.append(Scene(ground, tuple(moved(*path, away) for path in paths)))
    return Clip(tuple(scenes))


def _centred(thing: Thing, generator: Generator) -> Thing:
    return replace(thing, x=between(-0.2, 0.2, generator), y=between(-0.2, 0.2, generator), radius=0.55)


def demo_clip() -> Clip:
    """Return the demo clip: a striped red star on a cloudy blue ground, turning and moving by a token per frame."""
    thing = Thing("star", "red", "striped", x=0.0, y=0.0, radius=0.6, angle=0.3)
    ground = Ground("blue", "cloudy", tilt=0.8, seed=5)
    away = [frame - 3.5 for frame in range(8)]
    return Clip(
        tuple(
            Scene(replace(ground, x=-0.03 * a), (moved(thing, (0.06, -0.03), math.radians(5), 0.0, a),)) for a in away
        )
    )


if __name__ == "__main__":
    write_frames(Path(__file__).parents[2] / "demo" / "clip.mp4", demo_clip().draw(128), fps=8)
