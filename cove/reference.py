"""The method as plain loops: slow, obvious, the definition of "correct". Only tests and benchmarks use it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .correspondence import Correspondence


def best_in_window(source: Tensor, target: Tensor, row: int, column: int, window: int, k: int) -> list[int]:
    """The `k` tokens of `target` [height, width, channels] most similar to one token of `source`: Eq. 8 and 10."""
    height, width, _ = target.shape
    reach = window // 2
    ranked = []
    for h in range(height):
        for w in range(width):
            if abs(h - row) <= reach and abs(w - column) <= reach:
                similarity = torch.dot(source[row, column], target[h, w]) / (
                    source[row, column].norm() * target[h, w].norm()
                )
                ranked.append((-float(similarity), (h - row) ** 2 + (w - column) ** 2, h, w))
    return [h * width + w for *_, h, w in sorted(ranked)[:k]]


def find_correspondence(features: Tensor, window: int, k: int) -> Correspondence:
    """`cove.correspondence.find_correspondence`, token by token; features [frames, height, width, channels]."""
    frames, height, width, _ = features.shape

    def match(i: int, j: int) -> list[list[int]]:
        return [best_in_window(features[i], features[j], h, w, window, k) for h in range(height) for w in range(width)]

    empty = torch.empty((0, height * width, k), dtype=torch.int32)
    forward = [torch.tensor(match(i, i + 1), dtype=torch.int32) for i in range(frames - 1)]
    backward = [torch.tensor(match(i + 1, i), dtype=torch.int32) for i in range(frames - 1)]
    return Correspondence(
        torch.stack(forward) if forward else empty, torch.stack(backward) if backward else empty, height, width, window
    )


def follow(correspondence: Correspondence, frame: int, token: int, other: int) -> list[int]:
    """The matches of one token of `frame` in `other`, best first: Eq. 9."""
    if correspondence.pairs is not None:
        return correspondence.pairs[frame, other, token].tolist()
    matches = []
    while frame != other:
        if frame < other:
            matches = correspondence.forward[frame][token].tolist()
            frame += 1
        else:
            matches = correspondence.backward[frame - 1][token].tolist()
            frame -= 1
        token = matches[0]
    return matches


def refine(correspondence: Correspondence, features: Tensor) -> list[list[list[list[int]]]]:
    """`cove.refine.refine`, token by token: matches of token p of frame i in frame j as [i][j][p], best first."""
    frames, height, width, _ = features.shape
    reach = 1
    while min(reach + 1, height) * min(reach + 1, width) < correspondence.k:  # a corner holds k
        reach += 1
    pairs = [[[[p] * correspondence.k for p in range(height * width)] for _ in range(frames)] for _ in range(frames)]
    for i in range(frames):
        for p in range(height * width):
            for others in (range(i + 1, frames), range(i - 1, -1, -1)):
                at, before = p, i
                for j in others:
                    row, column = divmod(follow(correspondence, before, at, j)[0], width)
                    ranked = []
                    for h in range(max(0, row - reach), min(height, row + reach + 1)):
                        for w in range(max(0, column - reach), min(width, column + reach + 1)):
                            one, other = features[i].flatten(0, 1)[p], features[j, h, w]
                            alike = float(torch.dot(one, other) / (one.norm() * other.norm()))
                            ranked.append((-alike, (h - row) ** 2 + (w - column) ** 2, h, w))
                    pairs[i][j][p] = [h * width + w for *_, h, w in sorted(ranked)[: correspondence.k]]
                    at, before = pairs[i][j][p][0], j
    return pairs


def merge_tokens(tokens: Tensor, ratio: float) -> tuple[Tensor, list[int]]:
    """`cove.merging.merge_tokens` for one set [M, channels]: ToMe's bipartite soft matching."""
    a = list(range(0, len(tokens), 2))
    b = list(range(1, len(tokens), 2))
    ties = []
    for i in a:
        similarity = [float(torch.dot(tokens[i], tokens[j]) / (tokens[i].norm() * tokens[j].norm())) for j in b]
        if b:
            best = max(range(len(b)), key=lambda n: (similarity[n], -n))
            ties.append((-similarity[best], i, b[best]))
    merged = sorted(ties)[: math.floor(ratio * len(tokens))]
    gone = {i for _, i, _ in merged}
    groups = [[i] for i in a if i not in gone] + [[j] + [i for _, i, to in merged if to == j] for j in b]
    return torch.stack([tokens[group].mean(0) for group in groups]), [len(group) for group in groups]


def spatial_temporal_attention(query: Tensor, key: Tensor, value: Tensor, frames: int, heads: int) -> Tensor:
    """`cove.attention.spatial_temporal_attention`, query by query; [batch*frames, tokens, channels]."""
    result = torch.empty_like(query)
    for n in range(query.shape[0]):
        clip = range(n // frames * frames, (n // frames + 1) * frames)
        keys, values = (torch.cat([x[j] for j in clip]) for x in (key, value))
        for p in range(query.shape[1]):
            result[n, p] = attend(query[n, p], keys, values, heads)
    return result


def key_frame_attention(
    query: Tensor, key: Tensor, value: Tensor, frames: int, heads: int, key_frames: list[int]
) -> Tensor:
    """`cove.attention.key_frame_attention`, query by query; [batch*frames, tokens, channels]."""
    result = torch.empty_like(query)
    for n in range(query.shape[0]):
        first = n // frames * frames
        seen = sorted({n, *(first + frame for frame in key_frames)})
        keys, values = (torch.cat([x[j] for j in seen]) for x in (key, value))
        for p in range(query.shape[1]):
            result[n, p] = attend(query[n, p], keys, values, heads)
    return result


def correspondence_attention(
    tokens: Tensor,
    correspondence: Correspondence,
    heads: int,
    merge_ratio: float = 0.5,
    frame_indices: list[int] | None = None,
    include_self: bool = False,
) -> Tensor:
    """`cove.attention.correspondence_attention`, token by token; tokens [batch, frames, height*width, channels]."""
    frame_indices = frame_indices or list(range(tokens.shape[1]))
    result = torch.empty_like(tokens)
    for b in range(tokens.shape[0]):
        for i, frame in enumerate(frame_indices):
            for p in range(tokens.shape[2]):
                members = []
                for other in sorted(frame_indices):
                    j = frame_indices.index(other)
                    if other != frame:
                        members += [tokens[b, j, q] for q in follow(correspondence, frame, p, other)]
                    elif include_self:
                        members.append(tokens[b, i, p])
                if members:
                    merged, _ = merge_tokens(torch.stack(members), merge_ratio)
                    result[b, i, p] = attend(tokens[b, i, p], merged, merged, heads)
                else:
                    result[b, i, p] = tokens[b, i, p]
    return result


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Eq. 14 for one query [channels] with keys and values [members, channels], head by head."""
    width = len(query) // heads
    parts = []
    for h in range(heads):
        head = slice(h * width, (h + 1) * width)
        weights = torch.softmax(keys[:, head] @ query[head] / math.sqrt(width), dim=0)
        parts.append(weights @ values[:, head])
    return torch.cat(parts)


def around(frame: int, keyframes: list[int], blend_keyframes: bool = True) -> tuple[int, int]:
    """The closest keyframe before a frame and the closest one from it on; TokenFlow (arXiv 2307.10373), section 4.2."""
    past = [keyframe for keyframe in keyframes if keyframe < frame]
    future = [keyframe for keyframe in keyframes if keyframe >= frame]
    if frame in keyframes and not blend_keyframes:
        past = []
    return max(past or future[:1]), min(future or past[-1:])


def nearest_token(tokens: Tensor, frame: int, token: int, keyframe: int) -> int:
    """TokenFlow, Eq. 4, for one token of the source, [frames, tokens, channels]."""
    if frame == keyframe:
        return token
    query, keys = tokens[frame, token], tokens[keyframe]
    return max(range(len(keys)), key=lambda q: float(torch.dot(query, keys[q]) / (query.norm() * keys[q].norm())))


def tokenflow_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    source: Tensor,
    keyframes: list[int],
    heads: int,
    blend_keyframes: bool = True,
) -> Tensor:
    """TokenFlow's self-attention of one clip, token by token: Eq. 3 to 6; all of [frames, tokens, channels]."""
    result = torch.empty_like(query)
    together = [torch.cat([x[keyframe] for keyframe in keyframes]) for x in (key, value)]
    for i in range(len(query)):
        past, future = around(i, keyframes, blend_keyframes)
        for p in range(query.shape[1]):
            before = attend(query[past, nearest_token(source, i, p, past)], *together, heads)
            after = attend(query[future, nearest_token(source, i, p, future)], *together, heads)
            share = (i - past) / (future - past) if past != future else 1
            weight = 1 / (1 + math.exp(-share))
            result[i, p] = weight * after + (1 - weight) * before
    return result
