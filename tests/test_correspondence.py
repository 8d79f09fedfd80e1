"""Matches against plain loops and known motion; cropping, files and memory."""

import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from cove import correspondence, files, reference
from cove.correspondence import Correspondence, check_window, find_correspondence
from tests.method_helpers import DEVICES, PEAK, Held, fresh, randn

FRAMES, HEIGHT, WIDTH, CHANNELS = 5, 7, 11, 13
TOKENS = HEIGHT * WIDTH


def assert_same(found, expected):
    for name in ("forward", "backward"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert (found.height, found.width, found.window) == (expected.height, expected.width, expected.window)


@pytest.fixture(scope="module")
def matches():
    return find_correspondence(randn(FRAMES, HEIGHT, WIDTH, CHANNELS), 5, 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "window", "k"),
    [
        ((3, 5, 7, 11), 1, 1),
        ((3, 5, 7, 11), 3, 4),  # the window's tokens in a corner
        ((3, 5, 7, 11), 13, 5),  # every window covers the frame
        ((3, 5, 7, 11), 31, 35),
        ((3, 7, 5, 2), 5, 2),
        ((3, 2, 7, 11), 5, 6),  # a frame lower than half the window
        ((5, 7, 11, 13), 3, 3),
        ((1, 5, 7, 11), 3, 2),
    ],
)
def test_find_correspondence_matches_reference(shape, window, k, device):
    features = randn(*shape)
    found = find_correspondence(features.to(device), window, k)
    assert found.forward.dtype == torch.int32 and found.forward.device.type == device
    assert (found.frames, found.k) == (shape[0], k)
    assert_same(found, reference.find_correspondence(features, window, k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_find_correspondence_compares_any_dtype_in_float32(dtype):
    features = randn(3, 5, 7, 11, dtype=dtype)
    assert_same(find_correspondence(features, 5, 3), reference.find_correspondence(features.float(), 5, 3))


def test_find_correspondence_ignores_the_norm_of_features():
    features = randn(3, 5, 7, 11)
    longer = features * (1 + randn(3, 5, 7, 1, seed=1).abs() * 9)
    assert_same(find_correspondence(longer, 5, 3), find_correspondence(features, 5, 3))


@pytest.mark.parametrize("budget", [1, 5000])
def test_find_correspondence_is_independent_of_the_chunk_size(monkeypatch, matches, budget):
    monkeypatch.setattr(correspondence, "ROWS_BYTES", budget)
    assert_same(find_correspondence(randn(FRAMES, HEIGHT, WIDTH, CHANNELS), 5, 3), matches)


def test_find_correspondence_with_a_window_over_the_frame_is_global_search():
    a, b = torch.nn.functional.normalize(randn(2, 35, 11), dim=-1)
    found = find_correspondence(torch.stack((a, b)).view(2, 5, 7, 11), 13, 3)
    assert torch.equal(found.forward[0], (a @ b.T).topk(3).indices.int())
    assert torch.equal(found.backward[0], (b @ a.T).topk(3).indices.int())


@pytest.mark.parametrize("channels", [11, 320, 640])
def test_find_correspondence_prefers_the_nearest_of_equal_tokens(channels):
    """In a uniform area tokens tie exactly in every column, and the nearest comes first."""
    features = randn(channels).expand(3, 5, 7, channels)
    found = find_correspondence(features, 5, 4)
    assert torch.equal(found.forward[..., 0], torch.arange(35).int().expand(2, 35))
    assert_same(found, reference.find_correspondence(features, 5, 4))


def test_find_correspondence_of_identical_frames_is_identity():
    found = find_correspondence(randn(1, 5, 7, 11).expand(3, 5, 7, 11), 5, 2)
    for links in (found.forward, found.backward):
        assert torch.equal(links[..., 0], torch.arange(35).int().expand(2, 35))


def test_find_correspondence_finds_known_motion():
    """The camera moves up 1 and right 2 per frame, so the scene moves down 1 and left 2."""
    scene = randn(20, 20, 11)
    clip = torch.stack([scene[5 - i : 5 - i + HEIGHT, 2 * i : 2 * i + WIDTH] for i in range(3)])
    found = find_correspondence(clip, 5, 1)
    token = torch.arange(TOKENS).view(HEIGHT, WIDTH)
    for links in found.forward, found.follow(0, [1])[:, 0].int()[None]:
        assert torch.equal(links[0].view(HEIGHT, WIDTH)[:-1, 2:], token[1:, :-2].int())
    assert torch.equal(found.backward[1].view(HEIGHT, WIDTH)[1:, :-2], token[:-1, 2:].int())
    assert torch.equal(found.follow(0, [2]).view(HEIGHT, WIDTH)[:-2, 4:], token[2:, :-4])
    assert torch.equal(found.follow(2, [0]).view(HEIGHT, WIDTH)[2:, :-4], token[:-2, 4:])


@pytest.mark.parametrize(("frame", "others"), [(0, [1, 2, 3, 4]), (4, [0, 3]), (2, [4, 0, 3, 1]), (1, [3]), (3, [])])
def test_follow_matches_reference(matches, frame, others):
    found = matches.follow(frame, others)
    assert found.dtype == torch.int64 and found.shape == (TOKENS, len(others), 3)
    for n, other in enumerate(others):
        for token in range(TOKENS):
            assert found[token, n].tolist() == reference.follow(matches, frame, token, other)


@pytest.mark.parametrize(("frame", "others"), [(0, [5]), (5, [0]), (0, [-1]), (-1, [0]), (2, [1, 2])])
def test_follow_refuses_frames_out_of_range(matches, frame, others):
    with pytest.raises(ValueError, match="frame"):
        matches.follow(frame, others)


def test_crop_matches_a_worked_example():
    #  0  1  2  3  4
    #  5  6 [7  8  9]    cropped:  0  1  2
    # 10 11[12 13 14]              3  4  5
    links = torch.zeros(1, 15, 2, dtype=torch.int32)
    links[0, [7, 8, 9, 12, 13, 14]] = torch.tensor([[7, 0], [14, 1], [8, 4], [11, 10], [9, 3], [6, 13]]).int()
    found = Correspondence(links, links.flip(2), 3, 5, 5).crop(1, 2, 2, 3)
    assert found.forward.tolist() == [[[0, 0], [5, 0], [1, 2], [3, 3], [2, 1], [0, 4]]]
    assert torch.equal(found.backward, found.forward.flip(2))
    assert (found.height, found.width, found.window) == (2, 3, 5)


@pytest.mark.parametrize("rectangle", [(-1, 0, 3, 3), (0, -1, 3, 3), (5, 0, 3, 3), (0, 9, 3, 3)])
def test_crop_refuses_rectangles_outside_the_grid(matches, rectangle):
    with pytest.raises(ValueError, match="leaves the grid of 7x11"):
        matches.crop(*rectangle)


@pytest.mark.parametrize(
    ("window", "k", "message"),
    [
        (4, 1, "odd"),
        (0, 1, "odd"),
        (-3, 1, "odd"),
        (3, 0, "from 1 to 4"),
        (3, 5, "from 1 to 4"),
        (9, 11, "from 1 to 10"),
    ],
)
def test_find_correspondence_refuses_invalid_window_and_k(window, k, message):
    with pytest.raises(ValueError, match=message):
        find_correspondence(randn(2, 2, 7, 3), window, k)


def test_check_window_limits_k_to_the_window_in_a_corner():
    check_window(9, 25, 7, 11)
    with pytest.raises(ValueError, match="from 1 to 25"):
        check_window(9, 26, 7, 11)


def test_correspondence_refuses_wrong_shapes(matches):
    with pytest.raises(ValueError, match="features must be"):
        find_correspondence(randn(5, 7, 11))
    for links in (matches.forward.long(), matches.forward[:, :-1], matches.forward[0]):
        for pair in ((links, matches.backward), (matches.forward, links)):
            with pytest.raises(ValueError, match="must be int32"):
                Correspondence(*pair, HEIGHT, WIDTH, 5)
    with pytest.raises(ValueError, match="differ"):
        Correspondence(matches.forward, matches.backward[:-1], HEIGHT, WIDTH, 5)


def test_find_correspondence_progress_counts_pairs_of_frames():
    seen = []
    find_correspondence(randn(3, 5, 7, 2), 3, 1, lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("frames", [slice(None), slice(0)])  # slice(0): the links of a single frame
def test_correspondence_load_returns_the_saved_matches(matches, tmp_path, frames):
    saved = Correspondence(matches.forward[frames], matches.backward[frames], HEIGHT, WIDTH, 5)
    saved.save(tmp_path / "a.safetensors")
    assert_same(Correspondence.load(str(tmp_path / "a.safetensors")), saved)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_correspondence_save_keeps_the_old_file_after_a_failure(matches, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    matches.save(path)
    old = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(old[: len(old) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        matches.save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.safetensors"]


METADATA = {"format": correspondence.CORRESPONDENCE_FORMAT, "height": "7", "width": "11", "window": "5"}


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", slice(100), slice(-10)])
def test_correspondence_load_refuses_a_damaged_file(matches, tmp_path, content):
    path = tmp_path / "a.safetensors"
    matches.save(path)
    path.write_bytes(path.read_bytes()[content] if isinstance(content, slice) else content)
    with pytest.raises(ValueError, match="damaged"):
        Correspondence.load(path)


@pytest.mark.parametrize(
    ("metadata", "moved", "message"),
    [
        (None, 0, "expected format"),
        (METADATA | {"format": "cove.features.1"}, 0, "expected format"),
        ({name: METADATA[name] for name in ("format", "height", "window")}, 0, "damaged"),
        (METADATA | {"width": "13"}, 0, "grid of 7x13"),
        (METADATA, 1, "damaged"),  # beyond the last token of the grid
        (METADATA, -1, "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_correspondence_load_refuses_wrong_metadata_and_indices(matches, tmp_path, metadata, moved, message, name):
    tensors = {"forward": matches.forward, "backward": matches.backward}
    save_file(tensors | {name: tensors[name] + moved}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        Correspondence.load(tmp_path / "a.safetensors")


def test_correspondence_load_refuses_a_file_without_backward(matches, tmp_path):
    save_file({"forward": matches.forward}, tmp_path / "a.safetensors", METADATA)
    with pytest.raises(ValueError, match="damaged"):
        Correspondence.load(tmp_path / "a.safetensors")


def test_correspondence_load_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        Correspondence.load(tmp_path / "missing.safetensors")


def test_find_correspondence_never_holds_similarities_of_a_whole_frame(monkeypatch):
    """With windows over the frame, similarities of two frames take 0.9 MiB, those of one row of tokens 72 KiB."""
    features = randn(3, 13, 17, 2)
    monkeypatch.setattr(correspondence, "ROWS_BYTES", 150_000)
    with Held() as held:
        find_correspondence(features, 33, 1)
    print(f"{held.peak / 2**10:.0f} KiB")
    assert held.peak < 4 * 150_000


@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
def test_find_correspondence_working_memory_on_cpu():
    """Less than 64 MiB beyond features and result, for 20 frames of 64x64x320."""
    used = fresh(
        PEAK
        + """
import torch
from cove.correspondence import find_correspondence
find_correspondence(torch.randn(2, 8, 8, 320), 9, 3)
features = torch.randn(20, 64, 64, 320)
before = peak()
found = find_correspondence(features, 9, 3)
print(peak() - before - 2 * found.forward.nbytes)
"""
    )
    print(f"{used / 2**20:.1f} MiB")
    assert 10 << 20 < used < 64 << 20  # two frames of unit vectors alone are 10 MiB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_find_correspondence_working_memory_on_gpu():
    features = torch.randn(20, 64, 64, 320, device="cuda")
    find_correspondence(features[:2], 9, 3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = find_correspondence(features, 9, 3)
    assert torch.cuda.max_memory_allocated() - before - 2 * found.forward.nbytes < 64 << 20
