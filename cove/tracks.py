"""Points followed through a clip.

Tracks are `places` [frames, height, width, 2]: where what is seen at each token of one frame lies in every frame, as
(x, y) in tokens with the centre of the first at 0; and `visible` [frames, height, width]: whether it is seen there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .correspondence import Correspondence


def tracks_of(correspondence: Correspondence, frame: int) -> Tensor:
    """Follow the best matches of the tokens of `frame` from frame to frame: COVE, Eq. 9.

    Returns:
        places, [frames, height, width, 2], float32.
    """
    height, width = correspondence.height, correspondence.width
    others = [other for other in range(correspondence.frames) if other != frame]
    own = torch.arange(height * width, device=correspondence.forward.device)
    tokens = correspondence.follow(frame, others)[:, :, 0].unbind(1) if others else ()
    tokens = [*tokens[:frame], own, *tokens[frame:]]
    places = torch.stack([torch.stack([token % width, token // width], -1) for token in tokens])
    return places.float().unflatten(1, (height, width))


def correspondence_along(tracks: Tensor) -> Correspondence:
    """Return the one match of every token in every frame: the token at its track's position, rounded once.

    Args:
        tracks: [frames, frames, height, width, 2], of the tokens of each frame their places in every frame. What lies
            outside the grid ends at its border.

    Returns:
        A correspondence with `pairs`, as wide a window as its links reach.
    """
    frames, _, height, width, _ = tracks.shape
    places = tracks.round().clamp(tracks.new_tensor(0), tracks.new_tensor([width - 1, height - 1]))
    pairs = rearrange(places[..., 1] * width + places[..., 0], "i j h w -> i j (h w) 1").int()
    here, there = torch.arange(frames - 1), torch.arange(1, frames)
    steps = (places[here, there] - places[here, here]).abs(), (places[there, here] - places[there, there]).abs()
    reach = int(torch.stack(steps).max()) if frames > 1 else 0
    return Correspondence(pairs[here, there], pairs[there, here], height, width, 2 * reach + 1, pairs)


def look_up(frames: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colours at places, bilinear; outside the picture, those of its border.

    Args:
        frames: [frames, height, width, channels], pictures of any size.
        places: [frames, ..., 2], (x, y) on a grid of `grid` = (height, width) tokens that spans the picture.

    Returns:
        [frames, ..., channels].
    """
    size = places.new_tensor([grid[1], grid[0]])
    at = (places + 0.5) / size * 2 - 1
    rows = F.grid_sample(
        frames.movedim(-1, 1).float(), at.flatten(1, -2)[:, None], padding_mode="border", align_corners=False
    )
    return rows[:, :, 0].movedim(1, -1).unflatten(1, places.shape[1:-1])
