"""Scores of invented patterns: their agreement from frame to frame, and how much detail they have.

Blurring lowers detail and leaves agreement, so that neither is read without the other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cove.metrics import colour_drift
from cove.tracks import look_up

from ..clip import Clip
from ..drawing import pixels
from ..patterns.edits import Edit

SCALE = 6.0  # standard deviation in pixels of the blur that detail is the difference to: a cell of a mosaic
MARGIN = 3  # pixels at the edges of things and of the frame that do not count: outlines are drawn there
APART = 8  # pixels between the points that are compared for the level of chance


def true_flow(clip: Clip, apart: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return flow [frames - apart, height, width, 2] and visibility of each frame's pixels `apart` frames later."""
    flows, seen = [], []
    for pair in zip(clip.scenes, clip.scenes[apart:], strict=False):
        places, visible = Clip(pair).tracks(0, height, width)
        flows.append(places[1] - places[0])
        seen.append(visible[1])
    return torch.stack(flows), torch.stack(seen)


def region(clip: Clip, on_things: bool, on_ground: bool, height: int, width: int) -> Tensor:
    """Return where things, the ground or both are, without a margin at edges: bool [frames, height, width]."""
    points = pixels(height, width)
    found = []
    for scene in clip.scenes:
        on_top = scene.on_top(points)
        inner = torch.stack([_eroded(on_top == number) for number in on_top.unique()]).any(0)
        found.append(inner & (((on_top >= 0) & on_things) | ((on_top < 0) & on_ground)))
    return torch.stack(found)


def _eroded(mask: Tensor) -> Tensor:
    outside = F.pad((~mask)[None, None].float(), [MARGIN] * 4, value=1.0)
    return F.max_pool2d(outside, 2 * MARGIN + 1, stride=1)[0, 0] == 0


def detail_of(frames: Tensor, where: Tensor) -> Tensor:
    """Return the difference of pixels to a blur of the pixels of the same region around them; 0 outside of it.

    Args:
        frames: [frames, height, width, 3].
        where: the region, bool [frames, height, width].

    Returns:
        As `frames`, float64.
    """
    reach = round(3 * SCALE)
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * SCALE**2))

    def blurred(values: Tensor) -> Tensor:
        values = F.conv2d(values[:, None], weights.view(1, 1, -1, 1), padding=(reach, 0))
        return F.conv2d(values, weights.view(1, 1, 1, -1), padding=(0, reach))[:, 0]

    inside = where.double()
    share = blurred(inside).clamp_min(1e-9)
    channels = [(c - blurred(c * inside) / share) * inside for c in frames.double().unbind(-1)]
    return torch.stack(channels, -1)


def agreement(detail: Tensor, where: Tensor, flow: Tensor, seen: Tensor) -> float:
    """Return the correlation of a region's detail with that of later frames along the flow; NaN without detail.

    Args:
        detail: [frames, height, width, 3], of `detail_of`.
        where: the region, bool [frames, height, width].
        flow, seen: of `true_flow`, or other flow.
    """
    height, width = where.shape[1:]
    apart = len(where) - len(flow)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    there = torch.stack([columns, rows], -1) + flow
    # One look-up for values and region. What is interpolated with a point outside of the region does not count.
    after = look_up(torch.cat([detail[apart:], where[apart:, ..., None]], -1), there, (height, width)).double()
    inside = there.ge(0).all(-1) & (there[..., 0] <= width - 1) & (there[..., 1] <= height - 1)
    both = where[:-apart] & seen & inside & (after[..., 3] > 0.999)
    one, other = detail[:-apart][both], after[..., :3][both]
    return float((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt())


def scores_of(edit: Edit, made: Tensor, drawn: Tensor) -> dict[str, float]:
    """Return the scores of an edit where it changes the clip.

    - agreement: of invented detail along the true motion, between frames half a clip apart: over one frame the
      motion is so small that a pattern that stands still agrees, too.
    - chance: the same between points that are `APART` pixels apart, the mean of four directions.
    - detail: its standard deviation, as a share of that of the drawn target.
    - drift: root mean square deviation of colours along their tracks, as a share of the standard deviation between
      points of a frame; a blurred clip does not gain.

    A score is NaN where nothing of the region can be followed.

    Args:
        made: the edited frames, [frames, height, width, 3].
        drawn: the target as the model's autoencoder decodes it.
    """
    height, width = made.shape[1:3]
    clip = edit.target
    where = region(clip, edit.on_things, edit.on_ground, height, width)
    flow, seen = true_flow(clip, len(made) // 2, height, width)
    found, wanted = detail_of(made, where), detail_of(drawn, where)
    steps = APART * torch.tensor([(1, 0), (-1, 0), (0, 1), (0, -1)])
    chance = [agreement(found, where, flow + step, seen) for step in steps]
    known = [value for value in chance if not math.isnan(value)]
    places, visible = clip.tracks(len(clip.scenes) // 2, height, width)
    visible = visible & where[len(clip.scenes) // 2]
    shown = [frame[inside].double() for frame, inside in zip(made, where, strict=True) if inside.sum() > 1]
    contrast = float(torch.stack([colours.var(0).mean() for colours in shown]).mean().sqrt()) if shown else 0.0
    followed = bool((visible & (visible.sum(0) > 1)).any())
    return {
        "agreement": agreement(found, where, flow, seen),
        "chance": sum(known) / len(known) if known else math.nan,
        "detail": float((found[where].square().mean() / wanted[where].square().mean()).sqrt()),
        "drift": colour_drift(made, places, visible) / contrast if contrast and followed else math.nan,
    }
