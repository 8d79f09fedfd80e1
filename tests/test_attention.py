"""Attention across frames against plain loops, for any chunk size, and its peak memory."""

import pytest
import torch
from torch.testing import assert_close

from cove import reference
from cove.attention import (
    attend_to_sets,
    attention_sets,
    correspondence_attention,
    key_frame_attention,
    sdpa,
    spatial_temporal_attention,
)
from cove.correspondence import find_correspondence
from tests.method_helpers import DEVICES, Held, half_is_as_good, randn

SIZES = [(2, 3, 5, 7, 22), (1, 5, 7, 5, 33), (1, 3, 7, 11, 15)]  # batch, frames, height, width, channels
RATIOS = [0, 0.25, 0.3, 0.5]


def clip(batch, frames, height, width, channels, k=3, dtype=torch.float32):
    found = find_correspondence(randn(frames, height, width, 4, seed=1), 5, k)
    return randn(batch, frames, height * width, channels, dtype=dtype), found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("size", "heads", "k", "include_self"),
    [(SIZES[0], 2, 3, False), (SIZES[0], 11, 4, True), (SIZES[1], 3, 2, False), (SIZES[2], 5, 3, True)],
)
def test_correspondence_attention_matches_reference(size, heads, k, include_self, ratio, device):
    tokens, found = clip(*size, k)
    result = correspondence_attention(tokens.to(device), found, heads, ratio, include_self=include_self)
    expected = reference.correspondence_attention(tokens, found, heads, ratio, include_self=include_self)
    assert_close(result.cpu(), expected)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("frame_indices", [[1, 2, 4], [4, 1], [3, 0, 4, 1]])
def test_correspondence_attention_of_selected_frames_matches_reference(frame_indices, include_self):
    tokens, found = clip(*SIZES[1])
    arguments = tokens[:, frame_indices], found, 3, 0.3, frame_indices, include_self
    assert_close(correspondence_attention(*arguments), reference.correspondence_attention(*arguments))


def test_correspondence_attention_is_equivariant_to_frame_order():
    tokens, found = clip(*SIZES[1])
    order = [3, 0, 4, 2, 1]
    expected = correspondence_attention(tokens, found, 3)[:, order]
    assert_close(correspondence_attention(tokens[:, order], found, 3, frame_indices=order), expected)


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_correspondence_attention_is_independent_of_the_memory_budget(budget, ratio):
    tokens, found = clip(*SIZES[0])
    expected = correspondence_attention(tokens, found, 2, ratio)
    assert_close(correspondence_attention(tokens, found, 2, ratio, memory_budget=budget), expected)


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_correspondence_attention_memory_budget_sets_the_chunk(budget, monkeypatch):
    """A gathered set of 6 tokens of 22 channels takes 528 bytes; a chunk fits the budget or is a token per clip."""
    chunks = []
    monkeypatch.setattr("cove.attention.sdpa", lambda q, k, v, heads: chunks.append(len(q)) or sdpa(q, k, v, heads))
    correspondence_attention(*clip(*SIZES[0]), 2, 0.5, memory_budget=budget)
    assert sum(chunks) == 2 * 3 * 35
    expected = {1: (2, 2), 20_000: (10, 20_000 // 528), 1 << 30: (70, 70)}[budget]
    assert expected[0] <= max(chunks) <= expected[1]


def test_correspondence_attention_batched_equals_one_by_one():
    tokens, found = clip(*SIZES[0])
    one_by_one = torch.cat([correspondence_attention(clip, found, 2) for clip in tokens.split(1)])
    assert_close(correspondence_attention(tokens, found, 2), one_by_one)


@pytest.mark.parametrize("frame_indices", [None, [2]])
def test_correspondence_attention_keeps_a_single_frame(frame_indices):
    tokens, found = clip(2, 3 if frame_indices else 1, 5, 7, 22)
    tokens = tokens[:, :1]
    assert torch.equal(correspondence_attention(tokens, found, 2, 0.5, frame_indices), tokens)
    assert_close(correspondence_attention(tokens, found, 2, 0.5, frame_indices, include_self=True), tokens)


def test_correspondence_attention_keeps_its_input():
    tokens, found = clip(*SIZES[0])
    correspondence_attention(tokens, found, 2)
    assert torch.equal(tokens, clip(*SIZES[0])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 0.5])
def test_correspondence_attention_in_half_precision_is_as_exact_as_reference(dtype, ratio):
    tokens, found = clip(1, 3, 5, 7, 22, dtype=dtype)
    result = correspondence_attention(tokens, found, 2, ratio)
    exact = reference.correspondence_attention(tokens.double(), found, 2, ratio)
    half_is_as_good(result, reference.correspondence_attention(tokens, found, 2, ratio), exact)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((3, 35, 22), {}, "tokens must be"),
        ((1, 2, 35, 22), {}, "got 2 frames"),
        ((1, 2, 35, 22), {"frame_indices": [0, 1, 2]}, "got 2 frames"),
        ((1, 2, 35, 22), {"frame_indices": [1, 1]}, "got 2 frames"),
        ((1, 2, 35, 22), {"frame_indices": [1, 0, 1]}, "got 2 frames"),
        ((1, 2, 35, 22), {"frame_indices": [0, 3]}, "frame 3 is outside"),
        ((1, 3, 36, 22), {}, "5x7 tokens per frame, .* got 36"),
        ((1, 3, 35, 21), {}, "21 channels cannot be split into 2"),
        ((1, 3, 35, 22), {"merge_ratio": 0.6}, "from 0 to 0.5"),
    ],
)
def test_correspondence_attention_refuses_bad_input(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        correspondence_attention(randn(*shape), clip(*SIZES[0])[1], 2, **arguments)


@pytest.mark.parametrize("frames", [1, 3])
def test_spatial_temporal_attention_matches_reference(frames):
    query, key, value = randn(3, 2 * frames, 5, 22)
    expected = reference.spatial_temporal_attention(query, key, value, frames, 2)
    assert_close(spatial_temporal_attention(query, key, value, frames, 2), expected)


@pytest.mark.parametrize("key_frames", [[], [2], [0, 3], [3, 1, 0], [0, 1, 2, 3, 4]])
def test_key_frame_attention_matches_reference(key_frames):
    query, key, value = randn(3, 2 * 5, 7, 22)
    expected = reference.key_frame_attention(query, key, value, 5, 2, key_frames)
    assert_close(key_frame_attention(query, key, value, 5, 2, key_frames), expected)


def test_key_frame_attention_of_all_frames_and_of_none():
    query, key, value = randn(3, 2 * 5, 7, 22)
    joint = spatial_temporal_attention(query, key, value, 5, 2)
    assert torch.equal(key_frame_attention(query, key, value, 5, 2, range(5)), joint)
    assert_close(key_frame_attention(query, key, value, 5, 2, []), sdpa(query, key, value, 2))


def test_key_frame_attention_counts_fewer_pairs_of_tokens():
    """Two key frames of six: 2 x 2 frames jointly, then 4 x 3."""
    pairs = []

    def attend(query, key, value, heads):
        pairs.append(query.shape[1] * key.shape[1])
        return sdpa(query, key, value, heads)

    key_frame_attention(*randn(3, 6, 7, 22), 6, 2, [0, 4], attend)
    assert sum(pairs) == 7 * 7 * (2 * 2 + 4 * 3)


def test_spatial_temporal_attention_of_one_frame_is_self_attention():
    query, key, value = randn(3, 5, 7, 22)
    assert torch.equal(spatial_temporal_attention(query, key, value, 1, 2), sdpa(query, key, value, 2))


def test_spatial_temporal_attention_uses_the_given_attention():
    def attend(query, key, value, heads):
        assert query.shape == (2, 15, 22) and heads == 11
        return query + 10 * key + 100 * value

    query, key, value = randn(3, 6, 5, 22)
    assert_close(spatial_temporal_attention(query, key, value, 3, 11, attend), query + 10 * key + 100 * value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frames", "k"), [(3, 3), (20, 3), (20, 9)])
def test_correspondence_attention_memory_is_bounded_for_any_frames_and_matches(frames, k, dtype):
    """Working memory beyond the result stays in the budget; full sets would take 18 MB a frame."""
    tokens, found = clip(1, frames, 7, 11, 352, k, dtype)
    sets = attention_sets(found)
    assert sets.nbytes == 4 * frames * 77 * (frames - 1) * k
    with Held() as held:
        result = attend_to_sets(tokens, sets, 2, memory_budget=1 << 20)
    working = held.peak - result.nbytes
    print(f"{working / 2**20:.2f} MiB")
    assert (1 << 18) < working < (1 << 20) + (1 << 17)
