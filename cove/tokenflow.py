"""TokenFlow: keyframes are edited together, and every frame combines the tokens of its nearest keyframes.

TokenFlow (arXiv 2307.10373), section 4. Which tokens: the body of the paper (Eq. 3 and 4, figures 2 to 4) says the
output of self-attention, its appendix A says the input; the authors' code takes the input. Here it is the output, as
Eq. 3 has it: before `to_out`. The result takes the place of that output. Behind `to_out` it would be the same, since
that is linear and the weights of Eq. 5 add up to 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import GPU_BUDGET

# Bytes of similarities that are held at a time: on a CPU what stays in its cache, elsewhere what keeps a GPU busy.
FIELDS_CPU_BUDGET = 4 << 20


class Between(NamedTuple):
    """Where a frame lies among the keyframes.

    past, future: positions in the list of keyframes; the same where there is only one to take tokens from.
    weight: share of the future one, of 1. Eq. 6.
    """

    past: int
    future: int
    weight: float


def choose_keyframes(frames: int, every: int, generator: torch.Generator) -> list[int]:
    """Draw one random frame from every `every` frames, and from the remainder at the end. Section 4.1.

    Args:
        frames: of the clip, at least 1.
        every: length of an interval, at least 1. The paper: 8.
        generator: on the CPU; the paper draws anew at each step.

    Returns:
        Ascending.
    """
    if frames < 1 or every < 1:
        raise ValueError(f"expected at least 1 frame and intervals of at least 1, got {frames} and {every}")
    return [
        first + int(torch.randint(min(every, frames - first), (), generator=generator))
        for first in range(0, frames, every)
    ]


def between_keyframes(frames: int, keyframes: Sequence[int], blend_keyframes: bool = True) -> list[Between]:
    """Return each frame's nearest keyframes before and after it, and the weight of the later one. Eq. 6.

    A frame before the first or after the last keyframe has one only. A keyframe counts as its own future, which the
    paper leaves open: so it keeps sigmoid(1) = 0.73 of its own tokens (about what the authors' code leaves it).

    Args:
        keyframes: ascending, at least one, of 0 ... frames - 1.
        blend_keyframes: whether keyframes take part, as the paper says, or stay as they are.

    Returns:
        One for each frame.
    """
    keyframes = list(keyframes)
    if not keyframes or sorted(set(keyframes)) != keyframes or keyframes[0] < 0 or keyframes[-1] >= frames:
        raise ValueError(f"keyframes must ascend within {frames} frames, got {keyframes}")
    found = []
    for frame in range(frames):
        future = bisect_left(keyframes, frame)
        past = future - 1
        if future == len(keyframes):
            future = past
        elif past < 0 or (keyframes[future] == frame and not blend_keyframes):
            past = future
        before, after = frame - keyframes[past], keyframes[future] - frame
        share = before / (before + after) if past != future else 1.0
        found.append(Between(past, future, 1 / (1 + math.exp(-share))))
    return found


def nearest_tokens(
    tokens: Tensor, keyframes: Sequence[int], between: Sequence[Between], memory_budget: int | None = None
) -> Tensor:
    """Find, for every token of the source, the most similar token in the keyframes around its frame. Eq. 4.

    Similarity is cosine, over the whole frame. In the frame itself that is the token itself. Rows of similarities are
    made as many at a time as fit the memory budget.

    Args:
        tokens: of the source, [frames, tokens, channels], any float dtype; compared in float32.
        keyframes: which frames are keyframes.
        between: of each frame, from `between_keyframes`.
        memory_budget: bytes of similarities held at a time, one row at least; by default 4 MiB on a CPU and 256 MiB
            elsewhere.

    Returns:
        Tokens in the past and in the future keyframe, int32 [frames, 2, tokens].
    """
    if tokens.ndim != 3 or len(tokens) != len(between):
        raise ValueError(f"tokens must be [{len(between)} frames, tokens, channels], got {list(tokens.shape)}")
    count = tokens.shape[1]
    if memory_budget is None:
        memory_budget = FIELDS_CPU_BUDGET if tokens.device.type == "cpu" else GPU_BUDGET
    rows = max(1, memory_budget // (4 * count))
    keys = F.normalize(tokens[list(keyframes)].float(), dim=-1).transpose(1, 2)
    own = torch.arange(count, device=tokens.device)
    fields = torch.empty((len(tokens), 2, count), dtype=torch.int32, device=tokens.device)
    for i, (past, future, _) in enumerate(between):
        queries = tokens[i].float().split(rows)  # their lengths do not change which key is the nearest
        for side, keyframe in enumerate((past, future)):
            if keyframes[keyframe] == i:
                fields[i, side] = own
            elif side == 1 and past == future:
                fields[i, 1] = fields[i, 0]
            else:
                fields[i, side] = torch.cat([(some @ keys[keyframe]).argmax(1) for some in queries])
    return fields


def propagate(base: Tensor, fields: Tensor, between: Sequence[Between]) -> Tensor:
    """Propagate the keyframes' tokens to all frames: Eq. 5.

    Args:
        base: output of the keyframes' joint attention, [keyframes, tokens, channels], any float dtype.
        fields: from `nearest_tokens`, [frames, 2, tokens].
        between: of each frame, the same as for `nearest_tokens`.

    Returns:
        [frames, tokens, channels], of the dtype of `base`.
    """
    if base.ndim != 3 or fields.shape != (len(between), 2, base.shape[1]):
        raise ValueError(
            f"tokens of keyframes {list(base.shape)} and fields {list(fields.shape)} of {len(between)} frames do not "
            f"fit: expected [keyframes, tokens, channels] and [frames, 2, tokens]"
        )
    result = base.new_empty((len(between), *base.shape[1:]))
    for out, (before, after), (past, future, weight) in zip(result, fields, between, strict=True):
        tokens = base[future][after]
        out.copy_(tokens if past == future else torch.lerp(base[past][before], tokens, weight))
    return result
