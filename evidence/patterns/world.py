"""Things and grounds whose looks are shared within a picture but not described by its caption.

A ground can be paved with one random tile. One to three things form a kind; all things of a kind share one random
`Look`, in the coordinates of the thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..drawing import OUTLINE, SHAPES, ground_base, ground_light, soft_step
from ..scene import Panned, Placed
from .textures import mosaic, mosaic_cells, second_colour_at

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Look shared by all things of one kind. The caption names only `colour` and `texture`."""

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
class Ground(Panned):
    """Background. `tilt` is the direction of its brightness gradient in radians."""

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

    def draw(self, points: Tensor, pixel: float) -> Tensor:
        """Return the colours at points of the picture, with edges of width `pixel`: [..., 2] -> [..., 3]."""
        own, softness = self.inside(points), pixel / self.zoom
        base = ground_base(self.paint, points)
        if self.kind == "paved":
            (rows, columns), (height, width) = self.tile, self.tile_size
            scale = points.new_tensor([columns / width, rows / height])
            return mosaic(mosaic_cells(self.seed, rows, columns, base), own * scale, softness * float(scale.mean()))
        return (base * ground_light(self.kind, own, self.tilt, self.seed, softness)).clamp(0, 1)
