"""Tracks and measures along them, against plain loops and known answers at the limits."""

import math

import pytest
import torch
from torch.testing import assert_close

from cove.correspondence import find_correspondence
from cove.metrics import colour_drift, pck, warping_error
from cove.tracks import look_up, tracks_of
from tests.method_helpers import randn

FRAMES, HEIGHT, WIDTH, CHANNELS = 5, 7, 11, 3
ROWS, COLUMNS = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
OWN = torch.stack([COLUMNS, ROWS], -1).float()
STILL = OWN.expand(FRAMES, -1, -1, -1)
ALL = torch.ones(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)


def some(seed=0):
    return randn(FRAMES, HEIGHT, WIDTH, seed=seed) > -0.5


@pytest.mark.parametrize("frame", [0, 2, FRAMES - 1])
def test_tracks_of_follows_the_best_match(frame):
    correspondence = find_correspondence(randn(FRAMES, HEIGHT, WIDTH, 13), window=5, k=3)
    places = tracks_of(correspondence, frame)
    assert places.shape == (FRAMES, HEIGHT, WIDTH, 2)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            token = row * WIDTH + column
            for other in range(frame, FRAMES):
                assert places[other, row, column].tolist() == [token % WIDTH, token // WIDTH]
                if other + 1 < FRAMES:
                    token = int(correspondence.forward[other, token, 0])
            token = row * WIDTH + column
            for other in range(frame, -1, -1):
                assert places[other, row, column].tolist() == [token % WIDTH, token // WIDTH]
                if other > 0:
                    token = int(correspondence.backward[other - 1, token, 0])


def test_tracks_of_one_frame_and_of_a_still_clip_stay_in_place():
    features = randn(1, HEIGHT, WIDTH, 13)
    assert_close(tracks_of(find_correspondence(features, window=5, k=2), 0), STILL[:1])
    assert_close(tracks_of(find_correspondence(features.expand(FRAMES, -1, -1, -1), window=5, k=2), 3), STILL)


@pytest.mark.parametrize("radius", [0.5, 1, 2.5])
def test_pck_matches_a_plain_loop(radius):
    found, true, visible = STILL + randn(*STILL.shape), STILL + randn(*STILL.shape, seed=1), some()
    shares = pck(found, true, visible, radius)
    for frame in range(FRAMES):
        right = count = 0
        for row in range(HEIGHT):
            for column in range(WIDTH):
                if visible[frame, row, column]:
                    count += 1
                    dx, dy = (found - true)[frame, row, column].tolist()
                    right += math.hypot(dx, dy) <= radius
        assert shares[frame] == pytest.approx(right / count)
    assert 0 < shares.min() and shares.max() < 1


def test_pck_is_one_for_exact_places_and_nan_without_visible_ones():
    assert_close(pck(STILL, STILL, ALL, 0), torch.ones(FRAMES, dtype=torch.float64))
    off = STILL + torch.tensor([3.0, 4.0])
    assert pck(off, STILL, ALL, 5).min() == 1 and pck(off, STILL, ALL, 4.99).max() == 0
    assert pck(STILL, STILL, ALL & (torch.arange(FRAMES) != 2)[:, None, None], 1).isnan().tolist() == [
        frame == 2 for frame in range(FRAMES)
    ]


def test_look_up_is_bilinear_and_scales_the_grid():
    # A ramp of 0, 1, 2... along x; the picture is twice as wide and three times as high as the grid.
    picture = torch.arange(2 * WIDTH).float().expand(FRAMES, 3 * HEIGHT, -1)[..., None]
    found = look_up(picture, STILL + torch.tensor([0.25, 0.0]), (HEIGHT, WIDTH))
    assert found.shape == (FRAMES, HEIGHT, WIDTH, 1)
    assert_close(found[..., 0], (2 * (COLUMNS + 0.25) + 0.5).expand(FRAMES, -1, -1).clamp(max=2 * WIDTH - 1))
    frames = randn(FRAMES, HEIGHT, WIDTH, CHANNELS)
    assert_close(look_up(frames, STILL, (HEIGHT, WIDTH)), frames)
    assert_close(look_up(frames, STILL + 1000, (HEIGHT, WIDTH))[1, 2, 3], frames[1, -1, -1])


def test_colour_drift_matches_a_plain_loop():
    frames, visible = randn(FRAMES, HEIGHT, WIDTH, CHANNELS), some()
    squares = count = 0
    for row in range(HEIGHT):
        for column in range(WIDTH):
            seen = [frames[frame, row, column] for frame in range(FRAMES) if visible[frame, row, column]]
            if len(seen) > 1:
                mean = sum(seen) / len(seen)
                squares += sum(float(((one - mean) ** 2).sum()) for one in seen)
                count += len(seen) * CHANNELS
    assert colour_drift(frames, STILL, visible) == pytest.approx(math.sqrt(squares / count))


def test_colour_drift_is_zero_for_pure_motion_and_known_for_noise():
    """Drift is zero if everything moves with its colours, and the expected drift of noise is known."""
    frames = randn(1, HEIGHT, WIDTH, CHANNELS)
    rolled = torch.cat([frames.roll(frame, 2) for frame in range(FRAMES)])
    moving = STILL + torch.arange(FRAMES).view(-1, 1, 1, 1) * torch.tensor([1.0, 0.0])
    inside = moving[..., 0] < WIDTH
    assert colour_drift(rolled, moving, inside) == pytest.approx(0, abs=1e-6)
    assert colour_drift(rolled, STILL, ALL) > 0.5
    noise = 0.1 * randn(FRAMES, 97, 101, CHANNELS)
    places = torch.zeros(FRAMES, 97, 101, 2) + torch.stack(
        torch.meshgrid(torch.arange(101.0), torch.arange(97.0), indexing="xy"), -1
    )
    everywhere = torch.ones(FRAMES, 97, 101, dtype=torch.bool)
    assert colour_drift(noise, places, everywhere) == pytest.approx(0.1 * math.sqrt(1 - 1 / FRAMES), rel=0.02)


def test_colour_drift_refuses_points_visible_only_once():
    once = torch.zeros_like(ALL)
    once[1] = True
    with pytest.raises(ValueError, match="no point is visible in two frames"):
        colour_drift(randn(FRAMES, HEIGHT, WIDTH, CHANNELS), STILL, once)


def test_warping_error_matches_a_plain_loop():
    frames, visible = randn(FRAMES, HEIGHT, WIDTH, CHANNELS), some()[1:]
    steps = randn(FRAMES - 1, HEIGHT, WIDTH, 2, seed=1).round()  # whole pixels, without interpolation
    errors = warping_error(frames, steps, visible)
    for frame in range(FRAMES - 1):
        squares = []
        for row in range(HEIGHT):
            for column in range(WIDTH):
                if visible[frame, row, column]:
                    x, y = (steps[frame, row, column] + torch.tensor([column, row])).int().tolist()
                    there = frames[frame + 1, min(max(y, 0), HEIGHT - 1), min(max(x, 0), WIDTH - 1)]
                    squares.append(float(((there - frames[frame, row, column]) ** 2).mean()))
        assert errors[frame] == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_warping_error_of_pure_motion_is_zero():
    frames = torch.cat([randn(1, HEIGHT, WIDTH, CHANNELS).roll(frame, 1) for frame in range(FRAMES)])
    down = torch.tensor([0.0, 1.0]).expand(FRAMES - 1, HEIGHT, WIDTH, 2)
    seen = (ROWS < HEIGHT - 1).expand(FRAMES - 1, -1, -1)
    assert warping_error(frames, down, seen).max() < 1e-10
    assert warping_error(frames, -down, seen).min() > 0.1
    assert warping_error(frames, down, seen & False).isnan().all()


def test_pck_and_warping_error_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"places \[frames, height, width, 2\].*\[5, 7, 11\]"):
        pck(STILL[..., 0], STILL, ALL, 1)
    with pytest.raises(ValueError, match="bool visible"):
        pck(STILL, STILL, ALL.float(), 1)
    with pytest.raises(ValueError, match=r"expected flow \[4, 7, 11, 2\]"):
        warping_error(randn(FRAMES, HEIGHT, WIDTH, CHANNELS), STILL, ALL)
