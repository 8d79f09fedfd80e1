"""Alternatives to averaging over matches, measured in place of `cove.attention.attend_to_sets`.

COVE's appendix asks for them. Each returns the shape of its tokens, [batch, frames, height*width, channels]. The sets,
[frames, height*width, frames - 1], hold one match in every other frame. Nothing is merged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

Alternative = Callable[[Tensor, Tensor, int], Tensor]


def matches_of(sets: Tensor) -> Tensor:
    """Return the match of every token in every frame, itself in its own: int64 [frames, frames, height*width]."""
    frames, count, _ = sets.shape
    matches = torch.arange(count).expand(frames, frames, count).clone()
    for i, rows in enumerate(sets.long()):
        for column in rows.unbind(1):
            matches[i, column[0] // count] = column % count
    return matches


def gathered(tokens: Tensor, sets: Tensor) -> Tensor:
    """Return the tokens of the sets, [batch, frames, height*width, members, channels]."""
    return tokens.flatten(1, 2)[:, sets]


def attend(tokens: Tensor, members: Tensor, heads: int, sharpness: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Attend from each token to its members, [batch, frames, tokens, members, channels].

    keep: the members that count, bool [frames, tokens, members].
    """
    query = rearrange(tokens, "b f n (h d) -> b f n h 1 d", h=heads)
    keys = rearrange(members, "b f n m (h d) -> b f n h m d", h=heads)
    mask = None if keep is None else keep[None, :, :, None, None]
    scale = sharpness * query.shape[-1] ** -0.5
    found = F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask, scale=scale)
    return rearrange(found, "b f n h 1 d -> b f n (h d)")


class ReferenceFrame:
    """Every token takes the output of its match in one frame, which is drawn anew at each call or fixed."""

    def __init__(self, fixed: bool = False):
        self.fixed, self.generator = fixed, Generator().manual_seed(0)

    def __call__(self, tokens: Tensor, sets: Tensor, heads: int) -> Tensor:
        frames = tokens.shape[1]
        reference = frames // 2 if self.fixed else int(torch.randint(frames, (), generator=self.generator))
        return tokens[:, reference][:, matches_of(sets)[:, reference]]


def sharper(tokens: Tensor, sets: Tensor, heads: int) -> Tensor:
    """Attention to the matches with larger differences between their weights."""
    return attend(tokens, gathered(tokens, sets), heads, sharpness=4.0)


def most_typical(tokens: Tensor, sets: Tensor, heads: int) -> Tensor:
    """Return the one of a token and its matches that is nearest to their mean: nothing is averaged."""
    members = torch.cat([tokens[:, :, :, None], gathered(tokens, sets)], 3)
    nearest = F.cosine_similarity(members, members.mean(3, keepdim=True), dim=-1).argmax(-1)
    return members.gather(3, nearest[..., None, None].expand(*nearest.shape, 1, tokens.shape[-1]))[..., 0, :]


def restored(tokens: Tensor, sets: Tensor, heads: int) -> Tensor:
    """Attention to the matches, with its deviation from the mean token scaled to that of the matches themselves."""
    members, middle = gathered(tokens, sets), tokens.mean((1, 2), keepdim=True)
    off = attend(tokens, members, heads) - middle
    wanted = (members - middle[:, :, :, None]).norm(dim=-1).mean(-1, keepdim=True)
    return middle + off * (wanted / off.norm(dim=-1, keepdim=True).clamp_min(1e-6))


def returning(tokens: Tensor, sets: Tensor, heads: int, width: int) -> Tensor:
    """Attention to the matches whose own best match lies within a token of the start; without any, the token itself.

    width: of the token grid.
    """
    count = sets.shape[1]
    matches, own = matches_of(sets), torch.arange(count)
    keep = []
    for i, rows in enumerate(sets.long()):
        home = torch.stack([matches[column[0] // count, i][column % count] for column in rows.unbind(1)], 1)
        off = torch.hypot(
            (home % width - own[:, None] % width).float(), (home // width - own[:, None] // width).float()
        )
        keep.append(off <= 1)
    keep = torch.stack(keep)
    some = keep.any(-1, keepdim=True)
    return torch.where(some, attend(tokens, gathered(tokens, sets), heads, keep=keep | ~some), tokens)


def blended(tokens: Tensor, sets: Tensor, heads: int) -> Tensor:
    """Mean of the token itself and attention to its matches."""
    return torch.lerp(tokens, attend(tokens, gathered(tokens, sets), heads), 0.5)


def alternative(name: str, width: int) -> Alternative:
    """Return a new instance of one of `ALTERNATIVES`, for a token grid of this width."""
    made = {
        "reference frame, redrawn": ReferenceFrame(),
        "reference frame, fixed": ReferenceFrame(fixed=True),
        "sharper": sharper,
        "most typical": most_typical,
        "restored": restored,
        "returning": partial(returning, width=width),
        "blended": blended,
    }
    return made[name]


ALTERNATIVES = (
    *("reference frame, redrawn", "reference frame, fixed", "sharper", "most typical", "restored", "returning"),
    "blended",
)
