"""The method on fake CUDA tensors, on any machine: devices never mix, and working memory is bounded.

torch tracks devices, shapes and storage through every operation without computing. Kernels and their workspace are not
covered; products of integers, which have no CUDA kernel, are checked separately.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cove.attention import correspondence_attention, spatial_temporal_attention
from cove.correspondence import find_correspondence
from cove.features import resample
from cove.injection import inject_features
from cove.merging import merge_tokens
from cove.refine import refine
from cove.tokenflow import between_keyframes, nearest_tokens, propagate
from tests.method_helpers import Held

FRAMES, GRID, CHANNELS, HEADS = 5, (3, 7), 22, 2


PRODUCTS = ("mm", "mv", "bmm", "dot", "addmm", "addmv", "baddbmm", "convolution")


class NoWholeProducts(TorchDispatchMode):
    """Refuse integers in operations that have only floating-point kernels on a GPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in PRODUCTS:
            dtypes = [one.dtype for one in args if isinstance(one, torch.Tensor)]
            assert all(dtype.is_floating_point for dtype in dtypes), f"{operation} of {dtypes}"
        return operation(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def without_data():
    with FakeTensorMode(), NoWholeProducts():
        yield


def test_no_whole_products_detects_a_product_of_integers():
    with pytest.raises(AssertionError, match=r"mv.*int64"):
        cuda(3, 2, dtype=torch.int64) @ cuda(2, dtype=torch.int64)


def cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_find_correspondence_and_refine_working_memory_is_bounded_on_cuda():
    """Beyond features and result, 64x64x320 may take 64 MiB minus cuBLAS' 32, for any number of frames."""
    matching, refining = [], []
    for frames in (4, 7):
        features = cuda(frames, 64, 64, 320)
        with Held() as held:
            found = find_correspondence(features, 9, 3)
        matching.append(held.peak - 2 * found.forward.nbytes)
        with Held() as held:
            refined = refine(found, features)
        refining.append(held.peak - refined.pairs.nbytes)
    print(*(f"{used / 2**20:.1f} MiB" for used in (*matching, *refining)))
    assert 10 << 20 < max(matching) < 32 << 20  # two frames of unit vectors alone are 10 MiB
    assert 16 << 20 < max(refining) < 32 << 20
    for few, many in (matching, refining):
        assert many <= 1.01 * few


def test_find_correspondence_and_refine_hold_two_frames_on_the_device():
    """Features of 64x64x320 stay on the CPU, like the matches, however many frames there are."""
    peaks = []
    for frames in (3, 9):
        features = torch.empty(frames, 64, 64, 320)
        with Held("cuda") as held:
            found = refine(find_correspondence(features, 9, 3, device="cuda"), features, device="cuda")
        assert found.forward.device.type == found.pairs.device.type == "cpu"
        peaks.append(held.peak - 4 * frames * 64 * 64)  # the norms of all tokens
    print(*(f"{peak / 2**20:.1f} MiB" for peak in peaks))
    assert 10 << 20 < peaks[0] and peaks[1] <= 1.01 * peaks[0] < 48 << 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("matched_on", ["cpu", "cuda"])
def test_correspondence_attention_keeps_device_and_dtype_on_cuda(dtype, refined, matched_on):
    features = torch.empty((FRAMES, *GRID, CHANNELS), device=matched_on)
    matches = find_correspondence(features, 5, 3)
    assert matches.forward.device.type == matched_on
    if refined:
        matches = refine(matches, features)
        assert matches.pairs.device.type == matched_on
    tokens = cuda(FRAMES, GRID[0] * GRID[1], CHANNELS, dtype=dtype)
    seen = spatial_temporal_attention(tokens, tokens, tokens, FRAMES, HEADS)
    guided = correspondence_attention(seen[None], matches, HEADS, include_self=True)
    assert (guided.device.type, guided.dtype, guided.shape) == ("cuda", dtype, (1, *tokens.shape))
    assert merge_tokens(tokens, 0.5)[0].device.type == "cuda"


class Copies(TorchDispatchMode):
    """Count copies from CPU to GPU; each waits for all earlier GPU work."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.device.type == "cuda":
            self.count += any(isinstance(one, torch.Tensor) and one.device.type == "cpu" for one in args)
        return result


def test_correspondence_attention_copies_to_the_gpu_do_not_grow_with_frames():
    counts = []
    for frames in (2, 7):
        matches = find_correspondence(torch.empty(frames, *GRID, CHANNELS), 5, 3)
        with Copies() as copies:
            correspondence_attention(cuda(1, frames, GRID[0] * GRID[1], CHANNELS), matches, HEADS)
        counts.append(copies.count)
    assert 0 < counts[0] == counts[1]


def test_tokenflow_functions_keep_the_device():
    keyframes, between = [1, 3], between_keyframes(FRAMES, [1, 3])
    tokens = cuda(FRAMES, 21, CHANNELS, dtype=torch.float16)
    fields = nearest_tokens(tokens, keyframes, between)
    assert fields.device.type == propagate(tokens[keyframes], fields, between).device.type == "cuda"


def test_resample_and_inject_features_keep_the_device():
    assert resample(cuda(FRAMES, CHANNELS, 5, 7), (10, 14)).device.type == "cuda"
    stored = torch.empty((FRAMES, CHANNELS, *GRID), dtype=torch.float16)  # an inversion stores features on the CPU
    assert inject_features(cuda(2 * FRAMES, CHANNELS, *GRID), stored, 2).device.type == "cuda"
