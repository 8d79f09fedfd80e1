"""Random scenes of patterns and their captions.

Sizes of cells and tiles depend on the token grid of the scene, so that patterns have the same scale in tokens on every
grid.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Generator

from ..chance import between, pick
from ..drawing import COLOURS, GROUNDS, SHAPES, TEXTURES
from ..scene import Scene
from .world import Colour, Ground, Look, Thing

FREE = "tinted"  # the colour word that leaves the hue open
COLOUR_WORDS = (*COLOURS, FREE)
TEXTURE_WORDS = (*TEXTURES, "patterned")
GROUND_KINDS = (*GROUNDS, "paved")
NUMBERS = ("a", "two", "three")
CELL = (1.25, 2.0)  # side of a mosaic cell in tokens, smallest and largest
PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
WORDS = (
    *("a", "an", "two", "three", "and", "on", "ground", *COLOUR_WORDS),
    *(*SHAPES, *PLURALS.values(), *TEXTURE_WORDS[1:], *GROUND_KINDS[1:]),
)


def caption(scene: Scene) -> str:
    """Return the caption of a scene, front kind first: "two patterned red stars on a paved green ground"."""
    counts = Counter(thing.kind for thing in reversed(scene.things))
    things = [_named(count, look.texture, look.colour, shape) for (shape, look), count in counts.items()]
    return f"{' and '.join(things)} on {_named(1, scene.ground.kind, scene.ground.colour, 'ground')}"


def _named(count: int, texture: str, colour: str, noun: str) -> str:
    words = f"{colour} {noun if count == 1 else PLURALS[noun]}"
    if texture != "plain":
        words = f"{texture} {words}"
    article = "an" if count == 1 and words.startswith("orange") else NUMBERS[count - 1]
    return f"{article} {words}"


def random_scene(
    generator: Generator, height: int, width: int, most: int = 3, period: tuple[int, int] | None = None
) -> Scene:
    """Draw a scene for a grid of height x width tokens.

    Args:
        most: largest number of things.
        period: smallest and largest period of a paved ground, in tokens. By default 5 to 12, at most two fifths of
            the grid. Matches are ambiguous if it is smaller than their window.
    """
    side = min(height, width)
    counts = _random_counts(generator, most)
    radii = {1: (0.4, 0.7), 2: (0.3, 0.42)}.get(sum(counts), (0.26, 0.34))
    snap = float(torch.rand((), generator=generator)) < 0.5
    things: list[Thing] = []
    for count in counts:
        radius = between(*radii, generator)
        look = random_look(generator, radius * side, {thing.look.colour for thing in things})
        things += _place_kind(generator, look, count, radius, (height / side, width / side), things, 2 / side * snap)
    ground = random_ground(generator, side, {thing.look.colour for thing in things}, period)
    return Scene(ground, tuple(things))


def random_look(generator: Generator, diameter: float, taken: Collection[str] = ()) -> Look:
    """Draw a look for things `diameter` tokens across, in a colour that is not taken; half are patterned."""
    colour, paint = _random_paint(generator, taken)
    patterned = float(torch.rand((), generator=generator)) < 0.5
    second = (0.55, 0.55, 0.58) if colour in ("white", "black") else tuple(0.25 * value + 0.75 for value in paint)
    return Look(
        colour=colour,
        texture="patterned" if patterned else pick(TEXTURES, generator),
        paint=paint,
        second=second,
        period=between(0.45, 0.7, generator),
        phase=between(0, 1, generator),
        seed=_random_seed(generator),
        cells=max(2, round(diameter / between(*CELL, generator))),
    )


def random_ground(
    generator: Generator, side: int, taken: Collection[str] = (), period: tuple[int, int] | None = None
) -> Ground:
    """Draw a ground for a shorter side of `side` tokens, in a colour that is not taken; three in five are paved."""
    colour, paint = _random_paint(generator, taken)
    low, high = period or (5, max(5, min(12, 2 * side // 5)))
    sizes = [int(torch.randint(low, high + 1, (), generator=generator)) for _ in range(2)]
    cells = [max(2, round(size / between(*CELL, generator))) for size in sizes]
    return Ground(
        colour=colour,
        kind="paved" if float(torch.rand((), generator=generator)) < 0.6 else pick(GROUNDS, generator),
        paint=paint,
        tilt=between(0, 2 * math.pi, generator),
        seed=_random_seed(generator),
        tile=(cells[0], cells[1]),
        tile_size=(sizes[0] * 2 / side, sizes[1] * 2 / side),
        x=between(-1, 1, generator),
        y=between(-1, 1, generator),
        zoom=between(0.9, 1.1, generator) if float(torch.rand((), generator=generator)) < 0.25 else 1.0,
    )


def _random_counts(generator: Generator, most: int) -> list[int]:
    """Draw the number of things of each kind: one kind in four of five scenes, else two."""
    first = min(most, 1 + int(torch.multinomial(torch.tensor([0.3, 0.45, 0.25]), 1, generator=generator)))
    several = float(torch.rand((), generator=generator)) < 0.2
    return [first, 1] if several and first < most else [first]


def _random_paint(generator: Generator, taken: Collection[str]) -> tuple[str, Colour]:
    """Draw a colour word that is not taken, and a colour for it."""
    word = pick([colour for colour in COLOUR_WORDS if colour not in taken], generator)
    return word, paint_for(word, generator)


def paint_for(word: str, generator: Generator) -> Colour:
    """Draw a colour near the named one, or of any hue for `FREE`."""
    if word == FREE:
        hue = between(0, 6, generator)
        middle = tuple(0.15 + 0.7 * min(1, max(0, abs((hue - shift) % 6 - 3) - 1)) for shift in (0, 2, 4))
    else:
        middle = COLOURS[word]
    red, green, blue = (min(1.0, max(0.0, value + between(-0.07, 0.07, generator))) for value in middle)
    return red, green, blue


def _random_seed(generator: Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def _place_kind(
    generator: Generator,
    look: Look,
    count: int,
    radius: float,
    reach: tuple[float, float],
    others: Sequence[Thing],
    step: float,
) -> list[Thing]:
    """Draw positions for the things of one kind, without overlap if there is room.

    Args:
        reach: half the picture's height and width, in picture units.
        step: distances between the things are multiples of this on each axis; 0 = any distance.
    """
    shape, angle = pick(SHAPES, generator), between(0, 2 * math.pi, generator)
    alike = float(torch.rand((), generator=generator)) < 0.75
    placed: list[Thing] = []
    for _ in range(count):
        size = radius if alike else radius * between(0.85, 1.1, generator)
        turn = angle if alike else angle + between(-0.3, 0.3, generator)
        for _ in range(20):
            y, x = (between(-side, side, generator) * max(0.0, 1 - 0.8 * size / side) for side in reach)
            if step and placed:
                x, y = (at + step * round((to - at) / step) for at, to in ((placed[0].x, x), (placed[0].y, y)))
            thing = Thing(shape, look, x, y, size, turn)
            if all(math.hypot(x - one.x, y - one.y) > 0.9 * (size + one.radius) for one in (*others, *placed)):
                break
        placed.append(thing)
    return placed
