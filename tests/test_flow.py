"""OpenCV's DIS as flow, tracks and matches, on a texture with known motion."""

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
    """A smooth random texture that moves by STEP per frame."""
    texture = F.interpolate(randn(1, 1, 37, 41), size=(HEIGHT + 20, WIDTH + 20), mode="bicubic")[0, 0]
    texture = (0.5 + 0.2 * texture).clamp(0, 1)[..., None].expand(-1, -1, 3)
    cuts = [(10 + 2 * frame, 10 - 3 * frame) for frame in range(FRAMES)]
    return torch.stack([texture[top : top + HEIGHT, left : left + WIDTH] for top, left in cuts])


def test_dis_flow_finds_a_known_step(moving):
    forward, backward = dis_flow(moving)
    assert forward.shape == backward.shape == (FRAMES - 1, HEIGHT, WIDTH, 2)
    middle = (slice(None), slice(12, -12), slice(12, -12))
    assert (forward[middle] - STEP).norm(dim=-1).median() < 0.2
    assert (backward[middle] + STEP).norm(dim=-1).median() < 0.2


def test_agree_is_false_for_pixels_that_leave():
    forward = STEP.expand(FRAMES - 1, HEIGHT, WIDTH, 2)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[2:, : WIDTH - 3] = True
    assert torch.equal(agree(forward, -forward), expected.expand(FRAMES - 1, -1, -1))
    assert not agree(forward, forward).any()
    # Sundaram's bound at this step is 0.01 * 26 + 0.5 = 0.76; here the way back is slightly shorter.
    assert agree(forward, -forward + 0.6)[0, 30, 30] and not agree(forward, -forward + 0.63)[0, 30, 30]


def test_flow_tracks_and_correspondence_follow_the_middle_of_tokens():
    """Tokens of 11x7 pixels with a different step at each frame, followed both ways and matched to the nearest."""
    height, width = HEIGHT // 11, WIDTH // 7
    steps = torch.tensor([[8.0, -13.0], [-4.0, 9.0], [15.0, 2.0]])
    forward = steps[:, None, None].expand(-1, HEIGHT, WIDTH, 2)
    own = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).float()
    moved = torch.cat([torch.zeros(1, 2), steps.cumsum(0)]) / torch.tensor([7, 11])  # in tokens, from the first frame
    for frame in range(4):
        places = flow_tracks(forward, -forward, frame, height, width)
        assert_close(places, own + (moved - moved[frame])[:, None, None])
    matches = correspondence_of(forward, -forward, height, width)
    assert (matches.window, matches.k, matches.frames) == (5, 1, 4)
    nearest = (steps / torch.tensor([7, 11])).round()
    last = torch.tensor([width - 1.0, height - 1.0])
    for link, step in enumerate(nearest):
        for found, expected in ((matches.forward, own + step), (matches.backward, own - step)):
            expected = expected.clamp(torch.zeros(2), last)  # places outside end at the border
            token = found[link, :, 0].unflatten(0, (height, width))
            assert_close(torch.stack([token % width, token // width], -1).float(), expected)
    for frame in range(4):  # distant frames are rounded once, not at every link
        places = own + (moved - moved[frame]).round()[:, None, None]
        assert_close(tracks_of(matches, frame), places.clamp(torch.zeros(2), last))


def test_dis_flow_of_one_frame_is_empty(moving):
    forward, backward = dis_flow(moving[:1])
    assert forward.shape == backward.shape == (0, HEIGHT, WIDTH, 2)
    assert correspondence_of(forward, backward, 6, 13).frames == 1
    assert flow_tracks(forward, backward, 0, 6, 13).shape == (1, 6, 13, 2)


def test_dis_flow_refuses_frames_without_colours(moving):
    with pytest.raises(ValueError, match=r"expected frames \[frames, height, width, 3\]"):
        dis_flow(moving[..., :1])
