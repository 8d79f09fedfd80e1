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
from .kernels import AUTO, use_triton
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


def key_frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frames: int,
    heads: int,
    key_frames: Sequence[int],
    attend: Callable[..., Tensor] = sdpa,
) -> Tensor:
    """Compute self-attention in which every token attends to its own frame and to the key frames.

    Its time grows with frames * (key frames + 1). It equals `spatial_temporal_attention` if all are key frames, and
    self-attention of each frame if none is.

    Args:
        query, key, value, frames, heads, attend: of `spatial_temporal_attention`.
        key_frames: positions in a clip.

    Returns:
        [batch*frames, tokens, channels].
    """
    queries, keys, values = (rearrange(x, "(b f) n c -> f b n c", f=frames) for x in (query, key, value))
    others = [frame for frame in range(frames) if frame not in key_frames]
    made = {}
    if key_frames:
        # Slices, not an index: a GPU would be waited for.
        shared = [torch.cat([x[frame] for frame in key_frames], 1) for x in (queries, keys, values)]
        jointly = attend(*shared, heads).chunk(len(key_frames), 1)
        made |= zip(key_frames, jointly, strict=True)
    for frame in others:
        own = keys[frame], values[frame]
        if key_frames:
            own = [torch.cat(pair, 1) for pair in zip(own, shared[1:], strict=True)]
        made[frame] = attend(queries[frame], *own, heads)
    return rearrange([made[frame] for frame in range(frames)], "f b n c -> (b f) n c")


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
    token is ordered by frame, then best match first, and merged by bipartite soft matching. For many calls with one
    correspondence, `attention_sets` and `attend_to_sets` do the same in two steps.

    Args:
        tokens: the output of the spatial-temporal attention, [batch, frames, height*width, channels], any float dtype.
        correspondence: of these frames, or of the longer clip that they come from.
        heads: channels are split into this many.
        merge_ratio: share of each set that merging takes away, 0 to 0.5.
        frame_indices: which frames of the clip the tokens are; by default all, in order.
        include_self: whether a token belongs to its own set (FLATTEN) or not (COVE).
        memory_budget: of `attend_to_sets`.

    Returns:
        Of the same shape and dtype. With one frame and nothing else in the set, the tokens themselves.
    """
    if tokens.ndim != 4:
        raise ValueError(f"tokens must be [batch, frames, height*width, channels], got {list(tokens.shape)}")
    if tokens.shape[2] != correspondence.height * correspondence.width:
        raise ValueError(
            f"expected {correspondence.height}x{correspondence.width} tokens per frame, as in the correspondence, got "
            f"{tokens.shape[2]}"
        )
    frame_indices = range(correspondence.frames) if frame_indices is None else frame_indices
    if len(frame_indices) != tokens.shape[1]:
        raise ValueError(f"got {tokens.shape[1]} frames, but frame_indices names {list(frame_indices)}")
    sets = attention_sets(correspondence, frame_indices, include_self).to(tokens.device)
    return attend_to_sets(tokens, sets, heads, merge_ratio, memory_budget)


def attention_sets(
    correspondence: Correspondence, frame_indices: Sequence[int] | None = None, include_self: bool = False
) -> Tensor:
    """Return the attention set of every token, in the order in which merging takes it: Eq. 11 and 12.

    Args:
        frame_indices: the frames of the clip that are in the batch, in its order; by default all.
        include_self: whether a token belongs to its own set.

    Returns:
        Rows of a batch flattened to [frames*height*width, channels]: the even positions of the set, then the odd ones,
        of a set ordered by frame, then best match first; int32 [frames, height*width, members].
    """
    frame_indices = list(range(correspondence.frames) if frame_indices is None else frame_indices)
    if len(set(frame_indices)) != len(frame_indices):
        raise ValueError(f"got {len(frame_indices)} frames, but frame_indices names {frame_indices}")
    frames, count = len(frame_indices), correspondence.height * correspondence.width
    device = correspondence.forward.device
    own = torch.arange(count, dtype=torch.int32, device=device)[:, None]
    members = (frames - 1) * correspondence.k + include_self
    order = bipartite_order(members, device)
    sets = torch.empty((frames, count, members), dtype=torch.int32, device=device)
    ascending = sorted(frame_indices)
    for i, frame in enumerate(frame_indices):
        others = [other for other in ascending if other != frame]
        found = dict(zip(others, correspondence.follow(frame, others).unbind(1), strict=True))
        if include_self:
            found[frame] = own
        rows = [found[other] + count * frame_indices.index(other) for other in sorted(found)]
        if rows:
            sets[i] = torch.cat(rows, 1)[:, order]
    return sets


def attend_to_sets(
    tokens: Tensor,
    sets: Tensor,
    heads: int,
    merge_ratio: float = 0.5,
    memory_budget: int | None = None,
    kernel: str = AUTO,
) -> Tensor:
    """Let each token attend to its set, merged by bipartite soft matching: Eq. 12-14.

    With torch, tokens are processed in chunks that fit the memory budget, so that the gathered sets of all tokens never
    exist at once. The Triton kernel gathers nothing to memory.

    Args:
        tokens: [batch, frames, height*width, channels], any float dtype.
        sets: of `attention_sets`, on the device of the tokens.
        heads: channels are split into this many.
        merge_ratio: share of each set that merging takes away, 0 to 0.5.
        memory_budget: bytes that torch's working memory may take beside input and result; by default 8 MiB on a CPU and
            256 MiB elsewhere.
        kernel: "auto", "triton" or "torch"; see `cove.kernels.use_triton`.

    Returns:
        Of the same shape and dtype; the tokens themselves if the sets are empty.
    """
    batch, frames, count, channels = tokens.shape
    members = sets.shape[2]
    if sets.shape[:2] != (frames, count):
        raise ValueError(f"expected sets of {frames} frames of {count} tokens, got {list(sets.shape)}")
    if channels % heads:
        raise ValueError(f"{channels} channels cannot be split into {heads} heads")
    removed = removed_tokens(members, merge_ratio)
    if members == 0:
        return tokens
    if use_triton(kernel, tokens.device, tokens.dtype):
        from .kernels import attend  # imports Triton, which not every machine has

        return attend.attend_to_sets(tokens, sets, heads, removed)
    flat = tokens.flatten(1, 2)
    inverse_norm = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32).clamp_min(1e-12).reciprocal()
    result = torch.empty_like(tokens)
    if memory_budget is None:
        memory_budget = CPU_BUDGET if tokens.device.type == "cpu" else GPU_BUDGET
    bytes_per_token = batch * _bytes_per_token(members, channels, heads, removed, tokens.element_size())
    chunk = max(1, memory_budget // bytes_per_token)
    for i in range(frames):
        for query, rows, out in zip(
            tokens[:, i].split(chunk, 1), sets[i].split(chunk), result[:, i].split(chunk, 1), strict=True
        ):
            gathered = flat[:, rows].flatten(0, 1)
            if removed:
                gathered = _merged(gathered, inverse_norm[:, rows].flatten(0, 1), removed)
            out.copy_(sdpa(query.flatten(0, 1)[:, None], gathered, gathered, heads).view_as(out))
    return result


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
