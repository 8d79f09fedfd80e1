"""TokenFlow against plain loops: keyframes, nearest tokens of the source, propagation."""

import math

import pytest
import torch
from torch.testing import assert_close

from cove import reference
from cove.attention import spatial_temporal_attention
from cove.tokenflow import between_keyframes, choose_keyframes, nearest_tokens, propagate
from tests.method_helpers import DEVICES, Held, half_is_as_good, randn

TOKENS, CHANNELS, HEADS = 13, 22, 11
SETS = [(7, [2, 5]), (7, [0, 3, 6]), (5, [4]), (5, [0, 1, 2, 3, 4]), (1, [0]), (11, [1, 7, 8])]  # frames, keyframes


def tokenflow(query, key, value, source, keyframes, heads=HEADS, blend=True, attend=None, **budget):
    """Run the functions of `cove.tokenflow` in the order of the node."""
    between = between_keyframes(len(query), keyframes, blend)
    some = (x[keyframes] for x in (query, key, value))
    base = spatial_temporal_attention(*some, len(keyframes), heads, **({"attend": attend} if attend else {}))
    return propagate(base, nearest_tokens(source, keyframes, between, **budget), between)


def clip(frames, dtype=torch.float32):
    """Return query, key, value and source, each [frames, 13, 22]."""
    return tuple(randn(frames, TOKENS, CHANNELS, seed=seed, dtype=dtype) for seed in range(4))


# --- keyframes ---


@pytest.mark.parametrize(("frames", "every"), [(7, 3), (11, 5), (5, 5), (3, 7), (13, 1), (1, 8)])
def test_choose_keyframes_returns_one_in_every_interval(frames, every):
    found = choose_keyframes(frames, every, torch.Generator().manual_seed(0))
    intervals = [range(first, min(first + every, frames)) for first in range(0, frames, every)]
    assert len(found) == len(intervals)
    assert all(keyframe in interval for keyframe, interval in zip(found, intervals, strict=True))


def test_choose_keyframes_covers_every_frame_and_repeats_with_the_seed():
    generator = torch.Generator().manual_seed(5)
    draws = [choose_keyframes(7, 3, generator) for _ in range(60)]
    assert [{draw[i] for draw in draws} for i in range(3)] == [{0, 1, 2}, {3, 4, 5}, {6}]
    again = torch.Generator().manual_seed(5)
    assert [choose_keyframes(7, 3, again) for _ in range(60)] == draws
    random = torch.random.get_rng_state()
    choose_keyframes(7, 3, generator)
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("blend", [True, False])
@pytest.mark.parametrize(("frames", "keyframes"), SETS)
def test_between_keyframes_returns_the_closest_keyframes(frames, keyframes, blend):
    for i, (past, future, _) in enumerate(between_keyframes(frames, keyframes, blend)):
        assert (keyframes[past], keyframes[future]) == reference.around(i, keyframes, blend)


def test_between_keyframes_weights_are_the_papers():
    sigmoid = [1 / (1 + math.exp(-share)) for share in (0.25, 0.5, 0.75, 1.0)]
    found = between_keyframes(7, [1, 5])
    assert [(past, future) for past, future, _ in found] == [(0, 0), (0, 0), *[(0, 1)] * 4, (1, 1)]
    assert_close([weight for *_, weight in found[2:6]], sigmoid)
    assert [(past, future) for past, future, _ in between_keyframes(7, [1, 5], False)][5] == (1, 1)


# --- nearest tokens and propagation ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("blend", [True, False])
@pytest.mark.parametrize(("frames", "keyframes"), SETS)
def test_tokenflow_matches_reference(frames, keyframes, blend, device):
    tensors = clip(frames)
    expected = reference.tokenflow_attention(*tensors, keyframes, HEADS, blend)
    assert_close(tokenflow(*(x.to(device) for x in tensors), keyframes, blend=blend).cpu(), expected)


@pytest.mark.parametrize("blend", [True, False])
def test_nearest_tokens_matches_reference(blend):
    source, keyframes = clip(7)[3], [2, 5]
    fields = nearest_tokens(source, keyframes, between_keyframes(7, keyframes, blend))
    for i in range(7):
        for side, keyframe in enumerate(reference.around(i, keyframes, blend)):
            expected = [reference.nearest_token(source, i, p, keyframe) for p in range(TOKENS)]
            assert fields[i, side].tolist() == expected


def test_nearest_tokens_ignores_the_norm():
    source, keyframes = clip(5)[3], [1, 4]
    between = between_keyframes(5, keyframes)
    longer = source * torch.linspace(0.1, 9.0, TOKENS)[:, None]
    assert torch.equal(nearest_tokens(longer, keyframes, between), nearest_tokens(source, keyframes, between))


def test_propagate_follows_shuffled_tokens():
    """Frames are shuffled copies of one another, so the keyframe's edit is shuffled the same way."""
    first, orders = randn(TOKENS, CHANNELS), [torch.randperm(TOKENS) for _ in range(5)]
    source = torch.stack([first[order] for order in orders])
    between = between_keyframes(5, [2])
    edit = randn(TOKENS, CHANNELS, seed=1)
    result = propagate(edit[orders[2]][None], nearest_tokens(source, [2], between), between)
    assert torch.equal(result, torch.stack([edit[order] for order in orders]))


def test_tokenflow_keeps_keyframes_even_with_equal_tokens():
    query, key, value, _ = clip(5)
    joint = spatial_temporal_attention(query[[1, 4]], key[[1, 4]], value[[1, 4]], 2, HEADS)
    result = tokenflow(query, key, value, torch.ones(5, TOKENS, CHANNELS), [1, 4], blend=False)
    assert torch.equal(result[[1, 4]], joint)


# --- limits with known answers ---


def test_tokenflow_of_one_frame_is_self_attention():
    query, key, value, source = clip(1)
    plain = spatial_temporal_attention(query, key, value, 1, HEADS)
    assert torch.equal(tokenflow(query, key, value, source, [0]), plain)


def test_tokenflow_with_every_frame_a_keyframe_is_joint_attention():
    query, key, value, source = clip(5)
    keyframes = choose_keyframes(5, 1, torch.Generator())
    joint = spatial_temporal_attention(query, key, value, 5, HEADS)
    assert torch.equal(tokenflow(query, key, value, source, keyframes, blend=False), joint)
    # As in the paper, each keyframe is also blended with the previous one.
    field = nearest_tokens(source, keyframes, between_keyframes(5, keyframes))[1, 0]
    share = 1 / (1 + math.exp(-1))
    blended = tokenflow(query, key, value, source, keyframes)
    assert_close(blended[0], joint[0])
    assert_close(blended[1], share * joint[1] + (1 - share) * joint[0][field])


@pytest.mark.parametrize("blend", [True, False])
def test_tokenflow_keeps_identical_frames_identical(blend):
    frames = [x[:1].expand(7, -1, -1) for x in clip(1)]
    result = tokenflow(*frames, [2, 5], blend=blend)
    plain = spatial_temporal_attention(*(x[:1] for x in frames[:3]), 1, HEADS)
    assert_close(result, plain.expand(7, -1, -1))


def test_tokenflow_with_an_interval_beyond_the_clip_has_one_keyframe():
    tensors = clip(5)
    (keyframe,) = choose_keyframes(5, 7, torch.Generator().manual_seed(3))
    result = tokenflow(*tensors, [keyframe])
    assert torch.equal(result[keyframe], tokenflow(*(x[keyframe][None] for x in tensors), [0])[0])
    for i, frame in enumerate(result):
        own = [reference.nearest_token(tensors[3], i, p, keyframe) for p in range(TOKENS)]
        assert torch.equal(frame, result[keyframe][own])


# --- memory and numbers ---


@pytest.mark.parametrize("budget", [1, 4 * TOKENS * 5, 1 << 20])
def test_tokenflow_is_independent_of_the_memory_budget(budget):
    tensors = clip(7)
    assert_close(tokenflow(*tensors, [2, 5], memory_budget=budget), tokenflow(*tensors, [2, 5]))


def test_nearest_tokens_never_holds_similarities_of_two_frames():
    """For 1,009 tokens they would take 3.9 MiB; the budget is 64 KiB besides the keys and one frame in float32."""
    source = randn(5, 1009, 7)
    between = between_keyframes(5, [2])
    with Held() as held:
        nearest_tokens(source, [2], between, memory_budget=1 << 16)
    assert held.peak < (1 << 16) + 8 * 1009 * (7 + 7 + 5 * 2 + 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokenflow_in_half_precision_is_as_exact_as_reference(dtype):
    tensors, keyframes = clip(5, dtype), [1, 4]
    result = tokenflow(*tensors, keyframes)
    plain = reference.tokenflow_attention(*tensors[:3], tensors[3].float(), keyframes, HEADS)
    exact = reference.tokenflow_attention(*(x.double() for x in tensors), keyframes, HEADS)
    half_is_as_good(result, plain, exact)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: choose_keyframes(0, 8, torch.Generator()), "at least 1 frame"),
        (lambda: choose_keyframes(3, 0, torch.Generator()), "got 3 and 0"),
        (lambda: between_keyframes(3, []), "must ascend"),
        (lambda: between_keyframes(3, [2, 1]), "must ascend"),
        (lambda: between_keyframes(3, [1, 1]), "must ascend"),
        (lambda: between_keyframes(3, [1, 3]), "within 3 frames"),
        (lambda: between_keyframes(3, [-1]), "within 3 frames"),
        (lambda: nearest_tokens(randn(5, 13, 22), [1], between_keyframes(3, [1])), "3 frames, tokens"),
        (lambda: propagate(randn(1, 13, 22), torch.zeros(3, 2, 11), between_keyframes(3, [1])), "do not fit"),
        (lambda: propagate(randn(1, 13, 22), torch.zeros(5, 2, 13), between_keyframes(3, [1])), "do not fit"),
    ],
)
def test_tokenflow_functions_refuse_bad_input(broken, message):
    with pytest.raises(ValueError, match=message):
        broken()
