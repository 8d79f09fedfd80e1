"""Random scenes of shapes and their captions."""

from __future__ import annotations

import math

import torch
from torch import Generator

from ..chance import between, pick
from ..drawing import COLOURS, GROUNDS, SHAPES, TEXTURES
from ..scene import Scene
from .world import Ground, Thing

WORDS = ("a", "an", "and", "on", "ground", *COLOURS, *SHAPES, *TEXTURES, *GROUNDS[1:])


def caption(scene: Scene) -> str:
    """Return the caption of a scene, front thing first: "a striped red star on a cloudy blue ground"."""
    things = [_named(thing.texture, thing.colour, thing.shape) for thing in reversed(scene.things)]
    return f"{' and '.join(things)} on {_named(scene.ground.kind, scene.ground.colour, 'ground')}"


def _named(texture: str, colour: str, noun: str) -> str:
    words = f"{colour} {noun}" if texture == "plain" else f"{texture} {colour} {noun}"
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def random_scene(generator: Generator, most: int = 2) -> Scene:
    """Draw one thing on a ground of another colour; in a tenth of the scenes, if `most` allows, a second one."""
    several = most > 1 and float(torch.rand((), generator=generator)) < 0.1
    things: list[Thing] = []
    for _ in range(2 if several else 1):
        radius = between(0.32, 0.5, generator) if several else between(0.4, 0.75, generator)
        reach = 0.95 - 0.8 * radius
        things.append(
            Thing(
                shape=pick(SHAPES, generator),
                colour=pick([colour for colour in COLOURS if colour not in {t.colour for t in things}], generator),
                texture=pick(TEXTURES, generator),
                x=between(-reach, reach, generator),
                y=between(-reach, reach, generator),
                radius=radius,
                angle=between(0, 2 * math.pi, generator),
            )
        )
    taken = {thing.colour for thing in things}
    ground = Ground(
        colour=pick([colour for colour in COLOURS if colour not in taken], generator),
        kind=pick(GROUNDS, generator),
        tilt=between(0, 2 * math.pi, generator),
        seed=int(torch.randint(2**31, (), generator=generator)),
        x=between(-1, 1, generator),
        y=between(-1, 1, generator),
    )
    return Scene(ground, tuple(things))
