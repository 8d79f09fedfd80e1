"""Flat shapes of one colour and texture on a textured ground."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..drawing import COLOURS, OUTLINE, SHAPES, ground_base, ground_light, soft_step
from ..scene import Panned, Placed


@dataclass(frozen=True)
class Thing(Placed):
    """One shape, with a texture in its own coordinates that moves with it."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float

    def covers(self, points: Tensor) -> Tensor:
        """Return whether points of the picture lie on the thing: [..., 2] -> [...] bool."""
        return SHAPES[self.shape](self.inside(points)) < 0

    def draw_on(self, picture: Tensor, points: Tensor, pixel: float) -> Tensor:
        """Return the picture [..., 3] with the thing over it."""
        own, softness = self.inside(points), pixel / self.radius
        distance = SHAPES[self.shape](own)
        colour = own.new_tensor(COLOURS[self.colour])
        # The second colour is a pale tint; on white and black, grey.
        grey = self.colour in ("white", "black")
        second = own.new_tensor([0.55, 0.55, 0.58]) if grey else 0.25 * colour + 0.75
        share = second_colour_at(self.texture, own, softness)[..., None]
        light = 1 - 0.14 * (own[..., :1] + own[..., 1:]).clamp(-1.4, 1.4)
        edge = soft_step(distance + OUTLINE, softness)[..., None]
        look = (((1 - share) * colour + share * second) * light).clamp(0, 1) * (1 - 0.7 * edge)
        return torch.lerp(picture, look, soft_step(-distance, softness)[..., None])


@dataclass(frozen=True)
class Ground(Panned):
    """Background. `tilt` is the direction of its brightness gradient in radians, `seed` the seed of its clouds."""

    colour: str
    kind: str
    tilt: float
    seed: int
    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0

    def draw(self, points: Tensor, pixel: float) -> Tensor:
        """Return the colours at points of the picture, with edges of width `pixel`: [..., 2] -> [..., 3]."""
        light = ground_light(self.kind, self.inside(points), self.tilt, self.seed, pixel / self.zoom)
        return (ground_base(COLOURS[self.colour], points) * light).clamp(0, 1)


def second_colour_at(texture: str, points: Tensor, softness: float) -> Tensor:
    """Return the share of the second colour of a texture at points, from 0 to 1: [..., 2] -> [...]."""
    x, y = points.unbind(-1)
    match texture:
        case "striped":
            return soft_step(0.125 - ((y % 0.5) - 0.25).abs(), softness)
        case "dotted":
            return soft_step(0.13 - torch.hypot((x % 0.5) - 0.25, (y % 0.5) - 0.25), softness)
        case "checkered":
            one, other = (
                torch.minimum(*(0.25 - ((a + shift) % 1.0 - 0.5).abs() for a in (x, y))) for shift in (0, 0.5)
            )
            return soft_step(torch.maximum(one, other), softness)
    return torch.zeros_like(x)
