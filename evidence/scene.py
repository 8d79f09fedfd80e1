"""Scene of things in front of a ground, each in its own coordinates; each world defines its things and grounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .drawing import pixels


class Placed:
    """Coordinates of a thing, whose edge is at +-1 for every position, size and angle.

    `angle` in radians, clockwise as seen.
    """

    x: float
    y: float
    radius: float
    angle: float

    def inside(self, points: Tensor) -> Tensor:
        """Return points of the picture, [..., 2] as (x, y), in the thing's own coordinates."""
        turned = (points - points.new_tensor([self.x, self.y])) / self.radius
        c, s = math.cos(self.angle), math.sin(self.angle)
        return torch.stack([c * turned[..., 0] + s * turned[..., 1], c * turned[..., 1] - s * turned[..., 0]], -1)

    def outside(self, points: Tensor) -> Tensor:
        """The inverse of `inside`."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        turned = torch.stack([c * points[..., 0] - s * points[..., 1], s * points[..., 0] + c * points[..., 1]], -1)
        return turned * self.radius + points.new_tensor([self.x, self.y])


class Panned:
    """Coordinates of a ground, moved by `x`, `y` and `zoom` like a camera."""

    x: float
    y: float
    zoom: float

    def inside(self, points: Tensor) -> Tensor:
        """Return points of the picture, [..., 2] as (x, y), in the ground's own coordinates."""
        return (points - points.new_tensor([self.x, self.y])) / self.zoom

    def outside(self, points: Tensor) -> Tensor:
        """The inverse of `inside`."""
        return points * self.zoom + points.new_tensor([self.x, self.y])


class Ground(Protocol):
    def inside(self, points: Tensor) -> Tensor: ...
    def outside(self, points: Tensor) -> Tensor: ...

    def draw(self, points: Tensor, pixel: float) -> Tensor:
        """Return the colours at points of the picture, with edges of width `pixel`: [..., 2] -> [..., 3]."""
        ...


class Thing(Protocol):
    def inside(self, points: Tensor) -> Tensor: ...
    def outside(self, points: Tensor) -> Tensor: ...

    def covers(self, points: Tensor) -> Tensor:
        """Return whether points of the picture lie on the thing: [..., 2] -> [...] bool."""
        ...

    def draw_on(self, picture: Tensor, points: Tensor, pixel: float) -> Tensor:
        """Return the picture [..., 3] with the thing over it."""
        ...


@dataclass(frozen=True)
class Scene:
    ground: Ground
    things: tuple[Thing, ...]  # back to front

    def on_top(self, points: Tensor) -> Tensor:
        """Return the index in `things` of the thing visible at points, -1 for the ground: [..., 2] -> [...]."""
        seen = torch.full(points.shape[:-1], -1)
        for number, thing in enumerate(self.things):
            seen[thing.covers(points)] = number
        return seen

    def draw(self, height: int, width: int | None = None) -> Tensor:
        """Return the picture, [3, height, width] float32 from 0 to 1, edges one pixel wide; square without `width`."""
        points, pixel = pixels(height, width), 2 / min(height, width or height)
        picture = self.ground.draw(points, pixel)
        for thing in self.things:
            picture = thing.draw_on(picture, points, pixel)
        return picture.permute(2, 0, 1)
