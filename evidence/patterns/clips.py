"""Random clips of the world of patterns."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Generator

from ..chance import between, random_sign, random_step
from ..clip import Clip, moved
from ..scene import Scene
from .scenes import random_scene

MOTIONS = ("move", "scale", "rotate", "all")
WINDOW = 9  # side of the search window in tokens; tiles of a clip's ground are larger


def random_clip(
    generator: Generator, frames: int, motion: str = "all", height: int = 48, width: int = 48, things: int = 2
) -> Clip:
    """Draw a clip for a grid of height x width tokens.

    From frame to frame, a thing moves by one to two tokens and the ground by half of that; things turn by 3 to 8
    degrees, and grow or shrink by up to a third over the clip. All things turn and grow equally but move independently.

    Args:
        motion: "move", "scale", "rotate" or "all" of them.
        things: largest number of things. Tiles and motifs scale with the grid; a tile is larger than `WINDOW`.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion must be one of {', '.join(MOTIONS)}, got {motion!r}")
    token = 2 / min(height, width)
    still = random_scene(generator, height, width, most=things, period=(WINDOW + 1, WINDOW + 4))
    turn = random_sign(generator) * math.radians(between(3, 8, generator)) if motion in ("rotate", "all") else 0.0
    growth = random_sign(generator) * between(0.15, 0.33, generator) / max(1, frames - 1)
    growth = growth if motion in ("scale", "all") else 0.0
    slow = 1.0 if motion in ("move", "all") else 0.25
    paces = [random_step(generator, slow * token, 2 * slow * token) for _ in still.things]
    drift = random_step(generator, 0.5 * token, token)
    scenes = []
    for away in (frame - (frames - 1) / 2 for frame in range(frames)):
        ground = replace(
            still.ground,
            x=still.ground.x + drift[0] * away,
            y=still.ground.y + drift[1] * away,
            zoom=still.ground.zoom * (1 + growth * away),
        )
        paths = zip(still.things, paces, strict=True)
        scenes.append(Scene(ground, tuple(moved(thing, pace, turn, growth, away) for thing, pace in paths)))
    return Clip(tuple(scenes))
