"""Alternatives to averaging over matches, measured in place of `cove.attention.correspondence_attention`.

COVE's appendix asks for them. Each takes the same arguments and returns the same shape; tokens are
[batch, frames, height*width, channels]. Only the best match of a token in every frame is used, and nothing is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

from cove.correspondence import Correspondence

Alternative = Callable[..., Tensor]


def matches_of(correspondence: Correspondence, frames: Sequence[int]) -> Tensor:
    """Return the best match of every token in every frame, itself in its own: [frames, frames, height*width]."""
    own = torch.arange(correspondence.height * correspondence.width)
    rows = []
    for frame in frames:
        others = [other for other in frames if other != frame]
        found = dict(zip(others, correspondence.follow(frame, others)[..., 0].unbind(1), strict=True))
        rows.append(torch.stack([found.get(other, own) for other in frames]))
    return torch.stack(rows)


def gathered(tokens: Tensor, matches: Tensor) -> Tensor:
    """Return the tokens at the matches, [batch, frames, height*width, frames, channels]."""
    sets = [torch.stack([tokens[:, j][:, where] for j, where in enumerate(row)], 2) for row in matches]
    return torch.stack(sets, 1)


def others_of(sets: Tensor) -> Tensor:
    """Drop each token itself from its set: one frame less."""
    frames = sets.shape[1]
    rows = [sets[:, i][:, :, [j for j in range(frames) if j != i]] for i in range(frames)]
    return torch.stack(rows, 1)


def attend(tokens: Tensor, members: Tensor, heads: int, sharpness: float = 1.0) -> Tensor:
    """Attend from each token to its members, [batch, frames, tokens, members, channels]."""
    query = rearrange(tokens, "b f n (h d) -> b f n h 1 d", h=heads)
    keys = rearrange(members, "b f n m (h d) -> b f n h m d", h=heads)
    found = F.scaled_dot_product_attention(query, keys, keys, scale=sharpness * query.shape[-1] ** -0.5)
    return rearrange(found, "b f n h 1 d -> b f n (h d)")


class ReferenceFrame:
    """Every token takes the output of its match in one frame, which is drawn anew at each call or fixed."""

    def __init__(self, fixed: bool = False):
        self.fixed, self.generator = fixed, Generator().manual_seed(0)

    def __call__(self, tokens, correspondence, heads, _merge_ratio, frames, _include_self) -> Tensor:
        count = len(frames)
        reference = count // 2 if self.fixed else int(torch.randint(count, (), generator=self.generator))
        matches = matches_of(correspondence, frames)
        return torch.stack([tokens[:, reference][:, row[reference]] for row in matches], 1)


def sharper(tokens, correspondence, heads, _merge_ratio, frames, _include_self, sharpness: float = 4.0) -> Tensor:
    """Attention to the matches with larger differences between their weights."""
    return attend(tokens, others_of(gathered(tokens, matches_of(correspondence, frames))), heads, sharpness)


def most_typical(tokens, correspondence, _heads, _merge_ratio, frames, _include_self) -> Tensor:
    """Return the one of a token and its matches that is nearest to their mean: nothing is averaged."""
    sets = gathered(tokens, matches_of(correspondence, frames))
    nearest = F.cosine_similarity(sets, sets.mean(3, keepdim=True), dim=-1).argmax(-1)
    return sets.gather(3, nearest[..., None, None].expand(*nearest.shape, 1, sets.shape[-1]))[..., 0, :]


def restored(tokens, correspondence, heads, _merge_ratio, frames, _include_self) -> Tensor:
    """Attention to the matches, with its deviation from the mean token scaled to that of the matches themselves."""
    members = others_of(gathered(tokens, matches_of(correspondence, frames)))
    found, middle = attend(tokens, members, heads), tokens.mean((1, 2), keepdim=True)
    wanted = (members - middle[:, :, :, None]).norm(dim=-1).mean(-1, keepdim=True)
    return middle + (found - middle) * (wanted / (found - middle).norm(dim=-1, keepdim=True).clamp_min(1e-6))


def returning(tokens, correspondence, heads, _merge_ratio, frames, _include_self, within: float = 1.0) -> Tensor:
    """Attention to the matches whose own best match lies within so many tokens of the token; else the token itself."""
    matches, width = matches_of(correspondence, frames), correspondence.width
    own = torch.arange(matches.shape[-1])
    members, keep = others_of(gathered(tokens, matches)), []
    for i, row in enumerate(matches):
        back = torch.stack([matches[j, i][where] for j, where in enumerate(row) if j != i], -1)  # [tokens, others]
        off = torch.hypot(
            (back % width - own[:, None] % width).float(), (back // width - own[:, None] // width).float()
        )
        keep.append(off <= within)
    keep = torch.stack(keep)[None]  # [1, frames, tokens, others]
    query = rearrange(tokens, "b f n (h d) -> b f n h 1 d", h=heads)
    keys = rearrange(members, "b f n m (h d) -> b f n h m d", h=heads)
    mask = (keep | ~keep.any(-1, keepdim=True))[:, :, :, None, None]
    found = F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask.expand(len(tokens), -1, -1, 1, 1, -1))
    return torch.where(keep.any(-1)[..., None], rearrange(found, "b f n h 1 d -> b f n (h d)"), tokens)


def blended(tokens, correspondence, heads, _merge_ratio, frames, _include_self, share: float = 0.5) -> Tensor:
    """Mean of the token itself and attention to its matches."""
    members = others_of(gathered(tokens, matches_of(correspondence, frames)))
    return torch.lerp(tokens, attend(tokens, members, heads), share)


ALTERNATIVES: dict[str, Callable[[], Alternative]] = {
    "reference frame, redrawn": ReferenceFrame,
    "reference frame, fixed": partial(ReferenceFrame, fixed=True),
    "sharper": lambda: sharper,
    "most typical": lambda: most_typical,
    "restored": lambda: restored,
    "returning": lambda: returning,
    "blended": lambda: blended,
}
