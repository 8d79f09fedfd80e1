"""Matches between distant frames, without the drift of following links.

COVE (arXiv 2406.08850), Eq. 9, follows the best match from frame to frame. Each link ends at the middle of a token, so
what is lost in rounding adds up: after a few frames the token followed is a neighbour of the right one. Here every step
is put right by looking at the token it began from. This is ours, not the paper's; `docs/results.md` says what it gains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .correspondence import ROWS_BYTES, Correspondence, first_best, nearest_first


def refine(
    correspondence: Correspondence,
    features: Tensor,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str | None = None,
) -> Correspondence:
    """Add, for each pair of frames, matches that were compared with the token itself.

    A token is followed by its best links, as in Eq. 9; in every frame on the way, the tokens around the one it led to
    are compared with the token in the frame that it began in: the `k` most similar are its matches there, and the
    best is where the next link begins. Looked at are 3x3 tokens, more only where `k` does not fit into their corner.

    Args:
        correspondence: links between neighbouring frames, found in `features`.
        features: [frames, height, width, channels], any float dtype; compared by cosine, in double.
        progress: called with (done, total) frames.
        device: where two frames at a time are compared; by default where the features are. Matches stay with them.

    Returns:
        A correspondence with `pairs`: frames^2 * height * width * k numbers of four bytes.
    """
    frames, height, width, _ = features.shape
    if (frames, height, width) != (correspondence.frames, correspondence.height, correspondence.width):
        raise ValueError(
            f"features of {frames} frames of {height}x{width} tokens came for a correspondence of "
            f"{correspondence.frames} frames of {correspondence.height}x{correspondence.width}"
        )
    reach = 1
    while min(reach + 1, height) * min(reach + 1, width) < correspondence.k:
        reach += 1
    device = device or features.device
    offsets = nearest_first(2 * reach + 1, device)
    flat = features.flatten(1, 2)
    norms = torch.stack([torch.linalg.vector_norm(frame.to(device).float(), dim=-1) for frame in flat])
    inverse_norm = norms.clamp_min(1e-12).reciprocal()
    own = torch.arange(height * width, dtype=torch.int32, device=features.device)
    pairs = own[:, None].repeat(frames, frames, 1, correspondence.k)
    for i in range(frames):
        source = flat[i].to(device)
        for step, ahead in ((1, range(i + 1, frames)), (-1, range(i - 1, -1, -1))):
            at = own
            for j in ahead:
                links = correspondence.forward[j - 1] if step == 1 else correspondence.backward[j]
                around = links[at.long(), 0].long().to(device)
                target = flat[j].to(device)
                pairs[i, j] = _best_around(source, target, inverse_norm[j], around, offsets, width, correspondence.k)
                at = pairs[i, j, :, 0]
        if progress is not None:
            progress(i + 1, frames)
    return replace(correspondence, pairs=pairs)


def _best_around(
    source: Tensor, target: Tensor, inverse_norm: Tensor, around: Tensor, offsets: Tensor, width: int, k: int
) -> Tensor:
    """Return the `k` tokens of `target` near given ones most similar to each token of `source`: int32 [tokens, k].

    Args:
        source, target: [tokens, channels]. inverse_norm: of the target's tokens, [tokens].
        around: a token of the target for each of the source.
        offsets: (dy, dx) of the tokens to look at, the nearest first; what lies outside the frame does not count.
    """
    precise = torch.float32 if source.device.type == "mps" else torch.float64  # Metal has no doubles
    height = len(target) // width
    budget = ROWS_BYTES if source.device.type == "cpu" else 4 * ROWS_BYTES
    chunk = max(1, budget // (8 * (len(offsets) + 1) * source.shape[1]))
    found = []
    for query, middle in zip(source.split(chunk), around.split(chunk), strict=True):
        rows, columns = (middle // width)[:, None] + offsets[:, 0], (middle % width)[:, None] + offsets[:, 1]
        outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        tokens = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
        similarity = torch.bmm(target[tokens].to(precise), query.to(precise)[:, :, None])[:, :, 0]
        similarity = (similarity * inverse_norm[tokens]).float().masked_fill(outside, -torch.inf)
        found.append(tokens.gather(1, first_best(similarity, k)).int())
    return torch.cat(found)
