"""`cove.attention.attend_to_sets` as one Triton kernel. COVE (arXiv 2406.08850), section 3.3, Eq. 12-14.

One program handles one query token: it gathers the token's set, merges it and attends to it without writing anything
but the result. Keys and values are the same merged tokens, and merging is an average. So the logit of a merged token is
the mean of its members' logits, its weight is shared equally by its members, and merged tokens are never formed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 32  # channels of a step of the products
WIDE = 16  # channels of a head that are read at a time; more would spill registers


@triton.jit
def _best_partner(
    tokens, inverse_norm, rows_a, rows_b, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, TILE_B: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return cosine similarity and position of the nearest B token of every A token; the first of equals."""
    at_a = tl.arange(0, BLOCK_A)
    at_c = tl.arange(0, STEP)
    row_a = tl.load(rows_a + at_a, mask=at_a < A, other=0)
    norm_a = tl.load(inverse_norm + row_a)
    tie = tl.full([BLOCK_A], float("-inf"), tl.float32)
    partner = tl.zeros([BLOCK_A], tl.int32)
    for first in tl.range(0, BLOCK_B, TILE_B):
        at_b = first + tl.arange(0, TILE_B)
        row_b = tl.load(rows_b + at_b, mask=at_b < B, other=0)
        similarity = tl.zeros([BLOCK_A, TILE_B], tl.float32)
        for c in tl.range(0, C, STEP):
            inside = (c + at_c) < C
            a = tl.load(tokens + row_a[:, None] * C + c + at_c[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(tokens + row_b[None, :] * C + c + at_c[:, None], mask=inside[:, None], other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            similarity = tl.dot(a, b, similarity, input_precision="ieee")
        similarity = similarity * norm_a[:, None] * tl.load(inverse_norm + row_b)[None, :]
        similarity = tl.where((at_b < B)[None, :], similarity, float("-inf"))
        best, where = tl.max(similarity, 1, return_indices=True, return_indices_tie_break_left=True)
        partner = tl.where(best > tie, first + where, partner)
        tie = tl.maximum(best, tie)
    return tie, partner


@triton.jit
def _strongest(tie, A: tl.constexpr, REMOVED: tl.constexpr, BLOCK_A: tl.constexpr):
    """Return which of the A tokens have the REMOVED strongest ties; the first of equals."""
    at_a = tl.arange(0, BLOCK_A)
    bits = (tie + 0.0).to(tl.int32, bitcast=True)  # + 0.0: no -0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # as integers, in the order of the numbers
    key = ordered * 1024 + (1023 - at_a)
    key = tl.where(at_a < A, key, -(1 << 62))
    ranked = tl.sort(key, descending=True)
    last = tl.sum(tl.where(at_a == REMOVED - 1, ranked, 0))
    return key >= last


@triton.jit
def _logits(tokens, query, rows, first, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Return the dot products of one head of the query with rows [BLOCK]."""
    found = tl.zeros([BLOCK], tl.float32)
    for d in tl.range(0, WIDTH, STEP):
        at_d = d + tl.arange(0, STEP)
        inside = at_d < WIDTH
        q = tl.load(tokens + query * C + first + at_d, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(tokens + rows[:, None] * C + first + at_d[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        found += tl.sum(k * q[None, :], 1)
    return found


@triton.jit
def _attend(
    tokens, inverse_norm, sets, result, per_clip, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, REMOVED: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, TILE_B: tl.constexpr, STEP_C: tl.constexpr, STEP_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    clip = tl.program_id(1).to(tl.int64)
    C: tl.constexpr = HEADS * WIDTH
    tokens += clip * per_clip * C
    result += clip * per_clip * C + query * C
    inverse_norm += clip * per_clip
    rows_a = sets + query.to(tl.int64) * (A + B)
    rows_b = rows_a + A
    at_a, at_b = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
    row_a = tl.load(rows_a + at_a, mask=at_a < A, other=0)
    row_b = tl.load(rows_b + at_b, mask=at_b < B, other=0)
    gone = at_a < 0
    size = tl.full([BLOCK_B], 1.0, tl.float32)
    joins = gone[:, None] & (at_b < 0)[None, :]
    if REMOVED > 0:
        tie, partner = _best_partner(
            tokens, inverse_norm, rows_a, rows_b, A, B, C, BLOCK_A, BLOCK_B, TILE_B, STEP_C, UPCAST
        )  # fmt: skip
        gone = _strongest(tie, A, REMOVED, BLOCK_A)
        joins = gone[:, None] & (partner[:, None] == at_b[None, :])
        size += tl.sum(tl.where(joins, 1.0, 0.0), 0)
    for head in tl.range(0, HEADS):
        first = head * WIDTH
        logit_a = _logits(tokens, query, row_a, first, C, WIDTH, BLOCK_A, STEP_D) * scale
        logit_b = _logits(tokens, query, row_b, first, C, WIDTH, BLOCK_B, STEP_D) * scale
        if REMOVED > 0:
            logit_b = (logit_b + tl.sum(tl.where(joins, logit_a[:, None], 0.0), 0)) / size
        logit_a = tl.where((at_a < A) & ~gone, logit_a, float("-inf"))
        logit_b = tl.where(at_b < B, logit_b, float("-inf"))
        highest = tl.maximum(tl.max(logit_a, 0), tl.max(logit_b, 0))
        weight_a, weight_b = tl.exp(logit_a - highest), tl.exp(logit_b - highest)
        total = tl.sum(weight_a, 0) + tl.sum(weight_b, 0)
        weight_a, weight_b = weight_a / total, weight_b / (total * size)
        if REMOVED > 0:
            weight_a += tl.sum(tl.where(joins, weight_b[None, :], 0.0), 1)
        for d in tl.range(0, WIDTH, STEP_D):
            at_d = d + tl.arange(0, STEP_D)
            inside = at_d < WIDTH
            there = first + at_d[None, :]
            a = tl.load(tokens + row_a[:, None] * C + there, mask=inside[None, :], other=0.0).to(tl.float32)
            b = tl.load(tokens + row_b[:, None] * C + there, mask=inside[None, :], other=0.0).to(tl.float32)
            made = tl.sum(a * weight_a[:, None], 0) + tl.sum(b * weight_b[:, None], 0)
            tl.store(result + first + at_d, made.to(result.dtype.element_ty), mask=inside)


def constants(heads: int, width: int, members: int, removed: int, upcast: bool = False) -> dict[str, int]:
    """Return the compile-time constants of the kernel."""
    a, b = (members + 1) // 2, members // 2
    block_a, block_b = (max(16, triton.next_power_of_2(n)) for n in (a, b))
    return {
        "HEADS": heads,
        "WIDTH": width,
        "A": a,
        "B": b,
        "REMOVED": removed,
        "BLOCK_A": block_a,
        "BLOCK_B": block_b,
        "TILE_B": min(block_b, 64),
        "STEP_C": CHANNELS,
        "STEP_D": WIDE,
        "UPCAST": upcast,
    }


def warps(members: int) -> int:
    return 4 if members <= 128 else 8 if members <= 256 else 16


def attend_to_sets(tokens: Tensor, sets: Tensor, heads: int, removed: int) -> Tensor:
    """Let each token attend to its set, from which merging takes `removed` tokens.

    Args:
        tokens: [batch, frames, height*width, channels], float32, float16 or bfloat16.
        sets: of `cove.attention.attention_sets`, int32 [frames, height*width, members], one member at least.

    Returns:
        Of the same shape and dtype, computed in float32.
    """
    tokens, sets = tokens.contiguous(), sets.contiguous()
    batch, frames, count, channels = tokens.shape
    per_clip, width = frames * count, channels // heads
    norm = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)
    result = torch.empty_like(tokens)
    # Triton's interpreter multiplies the bits of bfloat16.
    upcast = tokens.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    _attend[sets.shape[0] * sets.shape[1], batch](
        tokens,
        norm.clamp_min_(1e-12).reciprocal_(),
        sets,
        result,
        per_clip,
        width**-0.5,
        **constants(heads, width, sets.shape[2], removed, upcast),
        num_warps=warps(sets.shape[2]),
    )
    return result
