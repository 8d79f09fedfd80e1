"""OpenCV's DIS as flow, tracks and matches: right on a texture that moves by a known step."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from cove.flow import agree, correspondence_of, dis_flow, flow_tracks
from cove.tracks import tracks_of
from tests.method_helpers import randn

pytest.importorskip("cv2")
FRAMES, HEIGHT, WIDTH = 3, 66, 91
STEP = torch.tensor([3.0, -2.0])


@pytest.fixture(scope="module")
def moving():
    """A smooth random texture that moves by STEP a frame."""
    texture = F.interpolate(randn(1, 1, 37, 41), size=(HEIGHT + 20, WIDTH + 20), mode="bicubic")[0, 0]
    texture = (0.5 + 0.2 * texture).clamp(0, 1)[..., None].expand(-1, -1, 3)
    cuts = [(10 + 2 * frame, 10 - 3 * frame) for frame in range(FRAMES)]
    return torch.stack([texture[top : top + HEIGHT, left : left + WIDTH] for top, left in cuts])


def test_flow_finds_the_step(moving):
    forward, backward = dis_flow(moving)
    assert forward.shape == backward.shape == (FRAMES - 1, HEIGHT, WIDTH, 2)
    middle = (slice(None), slice(12, -12), slice(12, -12))
    assert (forward[middle] - STEP).norm(dim=-1).median() < 0.2
    assert (backward[middle] + STEP).norm(dim=-1).median() < 0.2


def test_pixels_that_leave_do_not_agree():
    forward = STEP.expand(FRAMES - 1, HEIGHT, WIDTH, 2)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[2:, : WIDTH - 3] = True
    assert torch.equal(agree(forward, -forward), expected.expand(FRAMES - 1, -1, -1))
    assert not agree(forward, forward).any()
    # Sundaram's bound at this step: 0.01 * 26 + 0.5 = 0.76, here with a little less of the way back.
    assert agree(forward, -forward + 0.6)[0, 30, 30] and not agree(forward, -forward + 0.63)[0, 30, 30]


def test_tokens_follow_their_middle():
    """Tokens of 11x7 pixels: a step of one token and a bit, followed for two frames, and matched to the nearest."""
    height, width = HEIGHT // 11, WIDTH // 7
    forward = torch.tensor([8.0, -13.0]).expand(FRAMES - 1, HEIGHT, WIDTH, 2)
    own = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).float()
    places = flow_tracks(forward, -forward, 1, height, width)
    for frame in range(FRAMES):
        assert_close(places[frame], own + (frame - 1) * torch.tensor([8 / 7, -13 / 11]))
    matches = correspondence_of(forward, -forward, height, width)
    assert (matches.window, matches.k, matches.frames) == (3, 1, FRAMES)
    assert_close(tracks_of(matches, 1)[2][1:, :-1], (own + torch.tensor([1.0, -1.0]))[1:, :-1])
    assert_close(tracks_of(matches, 1)[0][:-1, 1:], (own - torch.tensor([1.0, -1.0]))[:-1, 1:])


def test_one_frame_has_no_flow(moving):
    forward, backward = dis_flow(moving[:1])
    assert forward.shape == backward.shape == (0, HEIGHT, WIDTH, 2)
    assert correspondence_of(forward, backward, 6, 13).frames == 1
    assert flow_tracks(forward, backward, 0, 6, 13).shape == (1, 6, 13, 2)


def test_frames_without_colours_are_refused(moving):
    with pytest.raises(ValueError, match=r"expected frames \[frames, height, width, 3\]"):
        dis_flow(moving[..., :1])
