"""Attention across frames: among all tokens of all frames, then among corresponding tokens.

COVE (arXiv 2406.08850), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .correspondence import Correspondence
from .merging import bipartite_order, merge_weights, removed_tokens

# Bytes of working memory: on a CPU what stays in its cache, elsewhere what keeps a GPU busy.
CPU_BUDGET, GPU_BUDGET = 8 << 20, 256 << 20


def sdpa(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """PyTorch's attention on [batch, tokens, channels] with the heads side by side in the channels."""
    query, key, value = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(query, key, value), "b h n d -> b n (h d)")


def spatial_temporal_attention(
    query: Tensor, key: Tensor, value: Tensor, frames: int, heads: int, attend: Callable[..., Tensor] = sdpa
) -> Tensor:
    """Compute self-attention in which every token attends to all tokens of all frames. COVE, section 3.3; Tune-A-Video.

    Args:
        query, key, value: projected tokens of whole clips, [batch*frames, tokens, channels], the frames of a clip
            together.
        attend: attention on [batch, tokens, channels] and a number of heads.

    Returns:
        [batch*frames, tokens, channels].
    """
    clips = (rearrange(x, "(b f) n c -> b (f n) c", f=frames) for x in (query, key, value))
    return rearrange(attend(*clips, heads), "b (f n) c -> (b f) n c", f=frames)


def correspondence_attention(
    tokens: Tensor,
    correspondence: Correspondence,
    heads: int,
    merge_ratio: float = 0.5,
    frame_indices: Sequence[int] | None = None,
    include_self: bool = False,
    memory_budget: int | None = None,
) -> Tensor:
    """Let each token attend to its own matches in the other frames, merged. COVE, section 3.3, Eq. 11-14.

    Queries, keys and values are the tokens themselves (Q = z, K = V = merged matches), split in heads. The set of a
    token is ordered by frame, then best match first, and merged by bipartite soft matching. Tokens are processed in
    chunks that fit the memory budget, so that the gathered sets of all tokens never exist at once.

    Args:
        tokens: the output of the spatial-temporal attention, [batch, frames, height*width, channels], any float dtype.
        correspondence: of these frames, or of the longer clip that they come from.
        heads: channels are split into this many.
        merge_ratio: share of each set that merging takes away, 0 to 0.5.
        frame_indices: which frames of the clip the tokens are; by default all, in order.
        include_self: whether a token belongs to its own set (FLATTEN) or not (COVE).
        memory_budget: bytes that the working memory may take beside input and result; by default 8 MiB on a CPU and
            256 MiB elsewhere.

    Returns:
        Of the same shape and dtype. With one frame and nothing else in the set, the tokens themselves.
    """
    if tokens.ndim != 4:
        raise ValueError(f"tokens must be [batch, frames, height*width, channels], got {list(tokens.shape)}")
    batch, frames, count, channels = tokens.shape
    frame_indices = list(range(correspondence.frames) if frame_indices is None else frame_indices)
    if len(frame_indices) != frames or len(set(frame_indices)) != frames:
        raise ValueError(f"got {frames} frames, but frame_indices names {frame_indices}")
    if count != correspondence.height * correspondence.width:
        raise ValueError(
            f"expected {correspondence.height}x{correspondence.width} tokens per frame, as in the correspondence, got "
            f"{count}"
        )
    if channels % heads:
        raise ValueError(f"{channels} channels cannot be split into {heads} heads")
    members = (frames - 1) * correspondence.k + include_self
    removed = removed_tokens(members, merge_ratio)
    if members == 0:
        return tokens

    if correspondence.pairs is None:
        correspondence = correspondence.to(tokens.device)  # small, and followed here; pairs only go where they are used
    flat = tokens.flatten(1, 2)
    inverse_norm = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32).clamp_min(1e-12).reciprocal()
    order = bipartite_order(members, tokens.device)
    result = torch.empty_like(tokens)
    if memory_budget is None:
        memory_budget = CPU_BUDGET if tokens.device.type == "cpu" else GPU_BUDGET
    chunk = max(1, memory_budget // _bytes_per_token(members, channels, heads, removed, tokens.element_size()))
    ascending = sorted(range(frames), key=frame_indices.__getitem__)
    # Copied once for all frames: a GPU is waited for at each copy.
    first_rows = count * torch.tensor(ascending, device=tokens.device)[:, None]
    for place, i in enumerate(ascending):
        matches = _member_rows(correspondence, sorted(frame_indices), place, include_self, first_rows)[:, order]
        for b in range(batch):
            for query, some, out in zip(*(x.split(chunk) for x in (tokens[b, i], matches, result[b, i])), strict=True):
                members_of = flat[b][some]
                if removed:
                    members_of = _merged(members_of, inverse_norm[b][some], removed)
                out.copy_(sdpa(query[:, None], members_of, members_of, heads)[:, 0])
    return result


def _member_rows(
    correspondence: Correspondence, clip_frames: Sequence[int], place: int, include_self: bool, first_rows: Tensor
) -> Tensor:
    """Return the attention set of every token of one frame as rows of [frames*height*width, channels]: Eq. 11.

    Args:
        clip_frames: the frames of the clip that the tokens are, ascending.
        place: which of them.
        first_rows: where the tokens of each of them begin, int64 [frames, 1].

    Returns:
        Frames ascending in the clip, best match first, int64 [height*width, members].
    """
    others = [*clip_frames[:place], *clip_frames[place + 1 :]]
    matches = correspondence.follow(clip_frames[place], others).to(first_rows.device)
    earlier, later = matches[:, :place] + first_rows[:place], matches[:, place:] + first_rows[place + 1 :]
    own = [torch.arange(len(matches), device=matches.device)[:, None] + first_rows[place]] if include_self else []
    return torch.cat((earlier.flatten(1), *own, later.flatten(1)), dim=1)


def _merged(members: Tensor, inverse_norm: Tensor, removed: int) -> Tensor:
    """Average `removed` tokens of A into B in sets ordered A, B, [queries, members, channels]. Eq. 12.

    The same as `merge_tokens`, for sets whose norms are known: normalised copies of the sets would cost more than all
    the rest.
    """
    sources = (members.shape[1] + 1) // 2
    a, b = members[:, :sources].float(), members[:, sources:].float()
    similarity = torch.bmm(a, b.transpose(1, 2))
    similarity *= inverse_norm[:, :sources, None]
    similarity *= inverse_norm[:, None, sources:]
    return torch.bmm(merge_weights(similarity, removed).to(members.dtype), members)


def _bytes_per_token(members: int, channels: int, heads: int, removed: int, element: int) -> int:
    """Return the working memory of one query and its set, in bytes."""
    left = members - removed
    gathered = members * channels * element
    converted = members * channels * 4 if removed and element < 4 else 0
    merged = left * channels * element + 8 * left * members if removed else 0
    return gathered + converted + merged + 16 * members + 8 * heads * left
