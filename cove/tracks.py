"""Points followed through a clip.

Tracks are `places` [frames, height, width, 2]: where what is seen at each token of one frame lies in every frame, as
(x, y) in tokens with the centre of the first at 0; and `visible` [frames, height, width]: whether it is seen there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .correspondence import Correspondence


def tracks_of(correspondence: Correspondence, frame: int) -> Tensor:
    """Where the best matches, followed from frame to frame, lead the tokens of `frame`: COVE, Eq. 9.

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
