"""Textures and mosaics as functions of coordinates: equal coordinates and parameters give equal looks."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..drawing import soft_step

MOSAIC = 0.65  # share of a random colour in each cell; the rest is the named colour


def mosaic_cells(seed: int, rows: int, columns: int, colour: Tensor) -> Tensor:
    """Return random cells of a mosaic, tinted by `colour` [3]: [rows, columns, 3] from 0 to 1."""
    chance = torch.rand((rows, columns, 3), generator=Generator().manual_seed(seed))
    return MOSAIC * chance + (1 - MOSAIC) * colour


def mosaic(cells: Tensor, points: Tensor, softness: float) -> Tensor:
    """Return the colours at points of a mosaic that repeats over the plane.

    Args:
        cells: [rows, columns, 3]; cell (0, 0) covers 0 to 1 on both axes.
        points: [..., 2] as (x, y), in cells.
        softness: width of the transition between neighbouring cells, in cells.

    Returns:
        [..., 3].
    """
    first = (points - 0.5).floor()
    share = soft_step(points - 1 - first, softness)  # weight of the next cell, on each axis
    columns, rows = ([(first[..., axis].long() + step) % cells.shape[1 - axis] for step in (0, 1)] for axis in (0, 1))
    top, bottom = (torch.lerp(*(cells[row, column] for column in columns), share[..., :1]) for row in rows)
    return torch.lerp(top, bottom, share[..., 1:])


def second_colour_at(texture: str, points: Tensor, period: float, phase: float, softness: float) -> Tensor:
    """Return the share of the second colour of a texture at points, from 0 to 1: [..., 2] -> [...].

    Args:
        period: distance between stripes or dots, or a check's side, in the units of `points`.
        phase: shift of the texture along both axes, in periods.
        softness: width of an edge, in the units of `points`.
    """
    x, y = (points / period + phase).unbind(-1)
    softness = softness / period
    match texture:
        case "striped":
            return soft_step(0.25 - (y % 1 - 0.5).abs(), softness)
        case "dotted":
            return soft_step(0.27 - torch.hypot(x % 1 - 0.5, y % 1 - 0.5), softness)
        case "checkered":
            one, other = (0.5 - (along % 2 - 1).abs() for along in (x, y))
            return soft_step(torch.maximum(torch.minimum(one, other), torch.minimum(-one, -other)), softness)
    return torch.zeros_like(x)
