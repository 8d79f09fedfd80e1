"""Scenes whose looks are shared within a picture and not given by its caption.

A ground can be paved with one random tile. Things come in kinds of one to three; all things of a kind share one `Look`,
drawn per scene in the coordinates of the thing. The unit of a picture is half its shorter side, with the origin in the
middle, x to the right and y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.world import OUTLINE, SHAPES, Placed, clouds, soft_step

from .patterns import mosaic, mosaic_cells, second_colour_at

Colour = tuple[float, float, float]
PATCH = 4  # pixels a token


@dataclass(frozen=True)
class Look:
    """The look that all things of one kind share. The caption names `colour` and `texture` and nothing else of it."""

    colour: str
    texture: str
    paint: Colour
    second: Colour
    period: float  # of stripes, dots and checks, in a thing's own units
    phase: float
    seed: int  # of the motif
    cells: int  # of the motif from edge to edge

    def paint_at(self, points: Tensor, softness: float) -> Tensor:
        """Return the colours at points in a thing's own coordinates: [..., 2] -> [..., 3]."""
        paint = points.new_tensor(self.paint)
        if self.texture == "patterned":
            motif = mosaic_cells(self.seed, self.cells, self.cells, paint)
            return mosaic(motif, (points + 1) * (self.cells / 2), softness * self.cells / 2)
        share = second_colour_at(self.texture, points, self.period, self.phase, softness)[..., None]
        return torch.lerp(paint, points.new_tensor(self.second), share)


@dataclass(frozen=True)
class Thing(Placed):
    shape: str
    look: Look
    x: float
    y: float
    radius: float
    angle: float

    @property
    def kind(self) -> tuple[str, Look]:
        return self.shape, self.look

    def covers(self, points: Tensor) -> Tensor:
        """Return whether points of the picture lie on the thing: [..., 2] -> [...] bool."""
        return SHAPES[self.shape](self.inside(points)) < 0

    def draw_on(self, picture: Tensor, points: Tensor, pixel: float) -> Tensor:
        """Return the picture [..., 3] with the thing over it."""
        own, softness = self.inside(points), pixel / self.radius
        distance = SHAPES[self.shape](own)
        light = 1 - 0.14 * own.sum(-1).clamp(-1.4, 1.4)
        edge = 1 - 0.7 * soft_step(distance + OUTLINE, softness)
        colours = self.look.paint_at(own, softness) * (light * edge)[..., None]
        return torch.lerp(picture, colours.clamp(0, 1), soft_step(-distance, softness)[..., None])


@dataclass(frozen=True)
class Ground:
    """The background. `x`, `y` and `zoom` move it like a camera; `tilt` is the direction of its gradient in radians."""

    colour: str
    kind: str
    paint: Colour
    tilt: float
    seed: int  # of clouds, or of the cells of the tile
    tile: tuple[int, int]  # cells of a tile, (rows, columns)
    tile_size: tuple[float, float]  # (height, width) in picture units at zoom 1
    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0

    def inside(self, points: Tensor) -> Tensor:
        return (points - points.new_tensor([self.x, self.y])) / self.zoom

    def outside(self, points: Tensor) -> Tensor:
        return points * self.zoom + points.new_tensor([self.x, self.y])

    def draw(self, points: Tensor, pixel: float) -> Tensor:
        own, softness = self.inside(points), pixel / self.zoom
        base = 0.62 * points.new_tensor(self.paint) + 0.38 * 0.62  # paler than a thing of the same colour
        if self.kind == "paved":
            (rows, columns), (height, width) = self.tile, self.tile_size
            scale = points.new_tensor([columns / width, rows / height])
            return mosaic(mosaic_cells(self.seed, rows, columns, base), own * scale, softness * float(scale.mean()))
        light = 1 + 0.22 * (own[..., 0] * math.cos(self.tilt) + own[..., 1] * math.sin(self.tilt)).clamp(-1.5, 1.5)
        if self.kind == "cloudy":
            light = light + 0.16 * clouds(self.seed, own).clamp(-2, 2)
        elif self.kind == "tiled":
            gap = (own % 0.5 - 0.25).abs().amin(-1)
            light = light * (1 - 0.45 * soft_step(0.035 - gap, softness))
        return (base * light[..., None]).clamp(0, 1)


@dataclass(frozen=True)
class Scene:
    ground: Ground
    things: tuple[Thing, ...]  # back to front

    def on_top(self, points: Tensor) -> Tensor:
        """Return the index in `things` of what is visible at points, -1 for the ground: [..., 2] -> [...]."""
        seen = torch.full(points.shape[:-1], -1)
        for number, thing in enumerate(self.things):
            seen[thing.covers(points)] = number
        return seen


def pixels(height: int, width: int) -> Tensor:
    """Return the centres of pixels, or of tokens, in picture units as (x, y): [height, width, 2]."""
    y, x = ((2 * torch.arange(size) + 1 - size) / min(height, width) for size in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def draw(scene: Scene, height: int, width: int) -> Tensor:
    """Return the picture, [3, height, width], float32 from 0 to 1, with edges one pixel soft."""
    points, pixel = pixels(height, width), 2 / min(height, width)
    picture = scene.ground.draw(points, pixel)
    for thing in scene.things:
        picture = thing.draw_on(picture, points, pixel)
    return picture.permute(2, 0, 1)
