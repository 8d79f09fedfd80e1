"""Refined matches: equal to plain loops, without drift, and usable like any correspondence."""

import pytest
import torch
import torch.nn.functional as F

from cove import reference, refine
from cove.attention import correspondence_attention
from cove.correspondence import Correspondence, find_correspondence
from cove.tracks import tracks_of
from tests.method_helpers import DEVICES, randn

FRAMES, HEIGHT, WIDTH, CHANNELS = 5, 7, 11, 13


@pytest.fixture(scope="module")
def features():
    """Features of similar frames, so that links and refined matches sometimes differ."""
    return randn(1, HEIGHT, WIDTH, CHANNELS) + randn(FRAMES, HEIGHT, WIDTH, CHANNELS, seed=1)


@pytest.fixture(scope="module")
def links(features):
    return find_correspondence(features, 5, 3)


@pytest.fixture(scope="module")
def refined(links, features):
    return refine.refine(links, features)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "window", "k"),
    [
        ((5, 7, 11, 13), 5, 3),
        ((3, 5, 7, 11), 3, 1),
        ((3, 5, 7, 11), 7, 4),  # the tokens of a 3x3 window in a corner
        ((3, 5, 7, 11), 5, 5),  # more, so 5x5 tokens are compared
        ((3, 2, 7, 11), 7, 8),  # a frame lower than the window
        ((2, 5, 7, 3), 5, 2),
        ((1, 5, 7, 11), 3, 2),
    ],
)
def test_refine_matches_reference(shape, window, k, device):
    features = randn(1, *shape[1:]) + randn(*shape, seed=1)
    links = find_correspondence(features, window, k)
    found = refine.refine(links.to(device), features.to(device))
    assert found.pairs.dtype == torch.int32 and found.pairs.device.type == device
    assert found.pairs.tolist() == reference.refine(links, features)
    assert torch.equal(found.forward.cpu(), links.forward) and torch.equal(found.backward.cpu(), links.backward)


@pytest.mark.parametrize("budget", [1, 5000, 10**9])
def test_refine_is_independent_of_the_chunk_size(links, features, refined, monkeypatch, budget):
    monkeypatch.setattr(refine, "ROWS_BYTES", budget)
    assert torch.equal(refine.refine(links, features).pairs, refined.pairs)


def test_refine_ignores_norm_and_dtype_of_features(links, features, refined):
    longer = features.double() * (1 + randn(FRAMES, HEIGHT, WIDTH, 1, seed=2).abs() * 9)
    assert torch.equal(refine.refine(links, longer).pairs, refined.pairs)


def test_refine_of_identical_frames_is_identity(features):
    still = features[:1].expand(FRAMES, -1, -1, -1)
    found = refine.refine(find_correspondence(still, 5, 1), still)
    assert (found.pairs[..., 0] == torch.arange(HEIGHT * WIDTH)).all()


def test_refine_does_not_accumulate_rounding():
    """A texture moves 1.4 tokens per frame: links find 1 each time, refined matches remain the nearest token."""
    height, width, frames, step = 13, 41, 8, 1.4
    texture = F.interpolate(randn(1, 31, 17, 19), size=(170, 700), mode="bicubic", align_corners=True)
    columns = 10 * (torch.arange(width)[None] - step * torch.arange(frames)[:, None]) + 200  # ten values per token
    moving = torch.stack([texture[0, :, 10:140:10, one.round().long()].movedim(0, -1) for one in columns])
    links = find_correspondence(moving, 5, 1)
    true = torch.arange(width) + step * torch.arange(frames)[:, None]  # of the first frame's columns, in each frame
    inside = (true < width - 3)[:, None].expand(-1, height, -1)
    off = {}
    for name, matches in (("links", links), ("refined", refine.refine(links, moving))):
        off[name] = (tracks_of(matches, 0)[..., 0] - true[:, None]).abs()
    assert off["refined"][inside].max() <= 0.61
    assert off["links"][-1][inside[-1]].median() > 2
    assert refine.refine(links, moving).window == links.window


def test_follow_reads_the_pairs(refined):
    for frame, others in ((0, [4, 1]), (3, [0, 1, 2, 4]), (2, [])):
        found = refined.follow(frame, others)
        assert found.dtype == torch.int64 and found.shape == (HEIGHT * WIDTH, len(others), 3)
        for column, other in enumerate(others):
            assert torch.equal(found[:, column].int(), refined.pairs[frame, other])
    with pytest.raises(ValueError, match="cannot be matched with itself"):
        refined.follow(1, [0, 1])


@pytest.mark.parametrize("frame_indices", [None, [3, 0, 2]])
def test_correspondence_attention_uses_the_pairs(refined, frame_indices):
    frames = len(frame_indices or range(FRAMES))
    tokens = randn(2, frames, HEIGHT * WIDTH, 6)
    settings = {"heads": 2, "merge_ratio": 0.5, "frame_indices": frame_indices}
    found = correspondence_attention(tokens, refined, **settings)
    torch.testing.assert_close(found, reference.correspondence_attention(tokens, refined, **settings))
    plain = Correspondence(refined.forward, refined.backward, HEIGHT, WIDTH, 5)
    assert (found - correspondence_attention(tokens, plain, **settings)).abs().max() > 0.1


def test_crop_cuts_every_pair(refined):
    found = refined.crop(2, 3, 4, 5)
    for i in range(FRAMES):
        for j in range(FRAMES):
            alone = Correspondence(refined.pairs[i, j][None], refined.pairs[i, j][None], HEIGHT, WIDTH, 5)
            assert torch.equal(found.pairs[i, j], alone.crop(2, 3, 4, 5).forward[0])


def test_correspondence_load_returns_the_saved_pairs(refined, links, tmp_path):
    refined.save(tmp_path / "matches")
    assert torch.equal(Correspondence.load(tmp_path / "matches").pairs, refined.pairs)
    links.save(tmp_path / "matches")
    assert Correspondence.load(tmp_path / "matches").pairs is None
    wrong = refined.pairs.clone()
    wrong[0, 1, 2, 0] = HEIGHT * WIDTH
    Correspondence(links.forward, links.backward, HEIGHT, WIDTH, 5, wrong).save(tmp_path / "matches")
    with pytest.raises(ValueError, match="names tokens outside its grid"):
        Correspondence.load(tmp_path / "matches")


def test_refine_refuses_wrong_shapes(links, features, refined):
    with pytest.raises(ValueError, match=r"features of 4 frames of 7x11 tokens came"):
        refine.refine(links, features[1:])
    with pytest.raises(ValueError, match=r"pairs must be int32 \[5, 5, 77, 3\]"):
        Correspondence(links.forward, links.backward, HEIGHT, WIDTH, 5, refined.pairs[1:])
    with pytest.raises(ValueError, match=r"pairs must be int32"):
        Correspondence(links.forward, links.backward, HEIGHT, WIDTH, 5, refined.pairs.long())


def test_refine_progress_counts_frames(links, features):
    seen = []
    refine.refine(links, features, lambda *counted: seen.append(counted))
    assert seen == [(i + 1, FRAMES) for i in range(FRAMES)]
