"""Shapes, colours and grounds as functions of coordinates, so that moving the coordinates moves the picture.

The unit of a picture is half its shorter side, with the origin in the middle, x to the right and y down. A shape fills
-1 to 1 in its own coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.87, 0.15),
    "green": (0.13, 0.60, 0.22),
    "blue": (0.12, 0.32, 0.85),
    "purple": (0.55, 0.20, 0.70),
    "white": (0.96, 0.96, 0.96),
    "black": (0.10, 0.10, 0.12),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
GROUNDS = ("plain", "cloudy", "tiled")

OUTLINE = 0.09  # width of a shape's dark edge, as a share of its radius
NOISE = 8  # random values per side in the noise of a cloudy ground


def pixels(height: int, width: int | None = None) -> Tensor:
    """Return the centres of pixels or tokens as (x, y), [height, width, 2]; square without `width`."""
    width = height if width is None else width
    y, x = ((2 * torch.arange(size) + 1 - size) / min(height, width) for size in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def soft_step(value: Tensor, softness: float) -> Tensor:
    """Return 0 below zero and 1 above, with a linear ramp of width `softness` in between."""
    return (value / softness + 0.5).clamp(0, 1)


# ---- shapes: distance to the edge in a shape's own coordinates, [..., 2] -> [...]; negative inside ----


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _polygon(p: Tensor, corners: int, inner: float) -> Tensor:
    """Star with a corner up and inner corners at radius `inner`; a regular polygon if `inner` is cos(pi / corners)."""
    half = math.pi / corners
    angle = (torch.atan2(p[..., 0], -p[..., 1]) + half) % (2 * half) - half
    radius = p.norm(dim=-1)
    x, y = radius * angle.sin().abs(), radius * angle.cos()
    inner_x, inner_y = inner * math.sin(half), inner * math.cos(half)
    edge_x, edge_y = inner_x, inner_y - 1
    return (edge_x * (y - 1) - edge_y * x) / math.hypot(edge_x, edge_y)


def _heart(p: Tensor) -> Tensor:
    """Square standing on its corner, with a disc on each upper side."""
    x, y = p[..., 0].abs(), p[..., 1] - 0.08
    disc = torch.hypot(x - 0.375, y + 0.375) - 0.53
    return torch.minimum(disc, (x + y.abs() - 0.75) / math.sqrt(2))


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "circle": lambda p: p.norm(dim=-1) - 0.9,
    "square": lambda p: _box(p[..., 0], p[..., 1], 0.78, 0.78),
    "triangle": lambda p: _polygon(p, 3, 0.5),
    "star": lambda p: _polygon(p, 5, 0.42),
    "heart": _heart,
    "ring": lambda p: (p.norm(dim=-1) - 0.66).abs() - 0.27,
    "cross": lambda p: torch.minimum(_box(p[..., 0], p[..., 1], 0.95, 0.32), _box(p[..., 0], p[..., 1], 0.32, 0.95)),
    "moon": lambda p: torch.maximum(p.norm(dim=-1) - 0.95, 0.72 - (p - p.new_tensor([0.5, 0.0])).norm(dim=-1)),
}


# ---- grounds ----


def ground_base(paint: Sequence[float], like: Tensor) -> Tensor:
    """Return the colour [3] of a ground, paler than a shape of the same paint, so that red on red stays visible."""
    return 0.62 * like.new_tensor(paint) + 0.38 * 0.62


def ground_light(kind: str, points: Tensor, tilt: float, seed: int, softness: float) -> Tensor:
    """Return the brightness of a plain, cloudy or tiled ground at points in its own coordinates: [..., 2] -> [..., 1].

    Args:
        tilt: direction of the brightness gradient, in radians.
        seed: of the clouds.
        softness: width of an edge between tiles.
    """
    light = 1 + 0.22 * (points[..., 0] * math.cos(tilt) + points[..., 1] * math.sin(tilt)).clamp(-1.5, 1.5)
    if kind == "cloudy":
        light = light + 0.16 * clouds(seed, points).clamp(-2, 2)
    elif kind == "tiled":
        gap = (points % 0.5 - 0.25).abs().amin(-1)
        light = light * (1 - 0.45 * soft_step(0.035 - gap, softness))
    return light[..., None]


def clouds(seed: int, points: Tensor) -> Tensor:
    """Return smooth noise of mean 0 over the plane, [height, width, 2] -> [height, width].

    It repeats after 4 units, far outside the picture.
    """
    values = torch.randn(1, 1, NOISE, NOISE, generator=Generator().manual_seed(seed))
    around = F.pad(values, (2, 2, 2, 2), mode="circular")
    place = ((points / 4 + 0.5) % 1.0 * NOISE + 2) / (NOISE + 4) * 2 - 1
    return F.grid_sample(around, place[None], mode="bicubic", align_corners=False)[0, 0]
