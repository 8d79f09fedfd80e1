"""RAVE (arXiv 2312.04524), section 4.2: frames are shuffled at every step and evaluated as one picture, a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor


class Grids:
    """A `model_function_wrapper` of ComfyUI that evaluates the frames of each conditioning as one grid.

    The grid has as many rows and columns as make it most nearly square. Frames are shuffled by the timestep, so that
    prompt and negative prompt see the same grid.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, apply_model: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        x, timestep, conds = call["input"], call["timestep"], len(call["cond_or_uncond"])
        frames = len(x) // conds
        seed = self.seed + 1000 * int(timestep[0].float().mul(1e4))
        order = torch.randperm(frames, generator=Generator().manual_seed(seed))
        rows = max(n for n in range(1, math.isqrt(frames) + 1) if frames % n == 0)
        clips = x.unflatten(0, (conds, frames))[:, order]
        grid = rearrange(clips, "n (r q) c h w -> n c (r h) (q w)", r=rows)
        rest = {name: _of_grids(value, len(x), frames) for name, value in call["c"].items()}
        made = apply_model(grid, timestep[::frames], **rest)
        made = rearrange(made, "n c (r h) (q w) -> n (r q) c h w", r=rows, q=frames // rows)
        return made[:, order.argsort()].flatten(0, 1)


def _of_grids(value: Any, rows: int, frames: int) -> Any:
    """Return one row of a conditioning per grid; every frame has the same prompt."""
    return value[::frames] if isinstance(value, Tensor) and len(value) == rows else value
