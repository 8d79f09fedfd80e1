"""Optical flow without a model, as a baseline: OpenCV's DIS, and matches and tracks derived from it. Needs OpenCV."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .correspondence import Correspondence
from .tracks import correspondence_along, look_up


def dis_flow(frames: Tensor, progress: Callable[[int, int], None] | None = None) -> tuple[Tensor, Tensor]:
    """Return where each pixel moves to in the next frame, and where each pixel of the next frame comes from.

    Dense inverse search (Kroeger et al., 2016, ECCV), as OpenCV has it, at its finest setting.

    Args:
        frames: [frames, height, width, 3] of values in 0..1, 12 pixels or more a side.
        progress: called with (done, total) pairs of frames.

    Returns:
        forward, backward: [frames - 1, height, width, 2], (x, y) in pixels, float32.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("DIS optical flow needs OpenCV: pip install opencv-python-headless") from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape[1:3]) < 12:
        raise ValueError(
            f"expected frames [frames, height, width, 3] of 12x12 pixels or more, got {list(frames.shape)}"
        )
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (frames.cpu() * 255).round().byte().numpy()]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)

    forward, backward = flows = torch.empty((2, len(grey) - 1, *frames.shape[1:3], 2))
    for i, (one, other) in enumerate(pairwise(grey)):
        flows[0, i] = torch.from_numpy(dis.calc(one, other, None))
        flows[1, i] = torch.from_numpy(dis.calc(other, one, None))
        if progress is not None:
            progress(i + 1, len(grey) - 1)
    return forward, backward


def agree(forward: Tensor, backward: Tensor) -> Tensor:
    """Return the pixels whose forward and backward flow agree: those visible in the next frame.

    The bound is that of Sundaram et al., 2010 (ECCV), Eq. 5: |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5.

    Args:
        forward, backward: as `dis_flow` gives them.

    Returns:
        [frames - 1, height, width], bool.
    """
    height, width = forward.shape[1:3]
    there = _pixels(height, width).to(forward) + forward
    back = look_up(backward, there, (height, width))
    inside = (there >= -0.5).all(-1) & (there <= there.new_tensor([width - 0.5, height - 0.5])).all(-1)
    bound = 0.01 * (forward.square().sum(-1) + back.square().sum(-1)) + 0.5
    return inside & ((forward + back).square().sum(-1) < bound)


def correspondence_of(forward: Tensor, backward: Tensor, height: int, width: int) -> Correspondence:
    """Return the one match in every frame to which the flow leads each token of a `height` x `width` grid."""
    every = [flow_tracks(forward, backward, frame, height, width) for frame in range(len(forward) + 1)]
    return correspondence_along(torch.stack(every))


def flow_tracks(forward: Tensor, backward: Tensor, frame: int, height: int, width: int) -> Tensor:
    """Return positions of the tokens of `frame` in every frame, followed along the flow: [frames, h, w, 2]."""
    size = forward.new_tensor([forward.shape[2] / width, forward.shape[1] / height])
    places = [_pixels(height, width).to(forward)]
    for flow in forward[frame:]:
        places.append(places[-1] + look_up(flow[None], places[-1][None], (height, width))[0] / size)
    for flow in backward[:frame].flip(0):
        places.insert(0, places[0] + look_up(flow[None], places[0][None], (height, width))[0] / size)
    return torch.stack(places)


def _pixels(height: int, width: int) -> Tensor:
    """Return (x, y) of every pixel: [height, width, 2]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows], -1).float()
