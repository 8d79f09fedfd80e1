"""Drawn matches and tracks: position, colour and untouched pixels."""

from dataclasses import dataclass
from itertools import pairwise
from math import nextafter

import pytest
import torch

from cove.draw import (
    BLACK,
    MATCH_COLORS,
    QUERY_COLOR,
    RING,
    contact_sheet,
    draw_matches,
    draw_tracks,
    grid_points,
)

FRAMES, ROWS, COLUMNS, K = 5, 7, 11, 3
HEIGHT, WIDTH = 133, 231  # tokens of 19 x 21 pixels, at the minimum radius
RADIUS = HEIGHT * 0.0125


@dataclass
class Known:
    """A correspondence read from a table: token t of any frame has the matches table[j, t] in frame j."""

    table: torch.Tensor  # int64 [frames, height * width, k]
    frames: int = FRAMES
    height: int = ROWS
    width: int = COLUMNS

    def follow(self, frame, others):
        assert frame not in others
        return self.table[others].movedim(0, 1)


@pytest.fixture
def known():
    return Known(torch.randint(ROWS * COLUMNS, (FRAMES, ROWS * COLUMNS, K), generator=torch.Generator().manual_seed(3)))


def centre(token):
    return (token % COLUMNS + 0.5) * 21, (token // COLUMNS + 0.5) * 19


def pixel(image, place):
    return tuple(image[int(place[1]), int(place[0])].tolist())


def distances(*places):
    """Return the distance of each pixel's centre to the nearest of the places, [height, width]."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    return torch.stack([torch.hypot(x - a, y - b) for a, b in places]).amin(0)


def changed(before, after):
    return (before != after).any(-1)


@pytest.mark.parametrize("frame", [0, 2, 4])
def test_draw_matches_changes_only_the_discs_at_the_matches(known, frame):
    images, point = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.5), (100.0, 40.0)
    token = (40 // 19) * COLUMNS + 100 // 21
    known.table[:, token] = torch.arange(FRAMES * K).view(FRAMES, K) * 5  # far apart, without overlap
    drawn = draw_matches(images, known, [point], frame)
    for index in range(FRAMES):
        places = [point] if index == frame else [centre(match) for match in known.table[index, token].tolist()]
        colors = [QUERY_COLOR] if index == frame else MATCH_COLORS
        for place, color in zip(places, colors, strict=True):
            assert pixel(drawn[index], place) == pytest.approx(color)
        assert torch.equal(changed(images[index], drawn[index]), distances(*places) < RADIUS * RING + 0.5)
        inside = drawn[index][distances(*places) < RADIUS - 0.5]
        assert all(tuple(rgb) in {tuple(torch.tensor(color).tolist()) for color in colors} for rgb in inside.tolist())


def test_draw_matches_draws_antialiased_discs(known):
    drawn = draw_matches(torch.ones(FRAMES, 1033, 1231, 3), known, [(617.3, 511.8)])
    red = drawn[0, ..., 0] - drawn[0, ..., 1]  # ground and ring are grey
    assert red.sum().item() == pytest.approx(torch.pi * (1033 * 0.0125) ** 2, rel=0.02)
    assert len(red[(red > 0.02) & (red < 0.98)]) > 20  # antialiased


def test_draw_matches_draws_the_best_match_on_top(known):
    known.table[:] = 38
    drawn = draw_matches(torch.zeros(FRAMES, HEIGHT, WIDTH, 3), known, [(3, 5)])
    for index in range(1, FRAMES):
        assert pixel(drawn[index], centre(38)) == pytest.approx(MATCH_COLORS[0])


def test_draw_matches_repeats_the_last_colour_beyond_three_matches(known):
    known.table = torch.arange(5).mul(13).expand(FRAMES, ROWS * COLUMNS, 5)
    drawn = draw_matches(torch.zeros(FRAMES, HEIGHT, WIDTH, 3), known, [(3, 5)])
    for match, color in zip(range(5), [*MATCH_COLORS, MATCH_COLORS[-1], MATCH_COLORS[-1]], strict=True):
        assert pixel(drawn[3], centre(13 * match)) == pytest.approx(color)


def test_draw_matches_draws_a_distinct_ring_for_each_point(known):
    points = [(31.5, 66.5), (115.5, 66.5), (199.5, 66.5)]
    images = torch.full((FRAMES, 4 * HEIGHT, 4 * WIDTH, 3), 0.5)
    points = [(4 * x, 4 * y) for x, y in points]
    drawn = draw_matches(images, known, points)
    out = 4 * RADIUS * (1 + RING) / 2  # the middle of the ring
    rings = [pixel(drawn[0], (x + out, y)) for x, y in points]
    assert len(set(rings)) == 3 and BLACK not in rings
    assert pixel(draw_matches(images, known, points[:1])[0], (points[0][0] + out, points[0][1])) == BLACK


def test_draw_matches_and_tracks_keep_the_input_images(known):
    images = torch.rand(FRAMES, HEIGHT, WIDTH, 3)
    before = images.clone()
    for drawn in (draw_matches(images, known, [(3, 5)]), draw_tracks(images, known, [(3, 5)])):
        assert torch.equal(images, before) and not torch.equal(drawn, before)
    assert torch.equal(draw_matches(images, known, []), before)


@pytest.mark.parametrize(
    "point", [(0, 0), (WIDTH - 1, 0), (0, HEIGHT - 1), (nextafter(WIDTH, 0), nextafter(HEIGHT, 0))]
)
def test_draw_matches_accepts_points_on_the_border(known, point):
    drawn = draw_matches(torch.zeros(FRAMES, HEIGHT, WIDTH, 3), known, [point])
    assert pixel(drawn[0], point) == pytest.approx(QUERY_COLOR, abs=0.1)


def test_draw_matches_draws_only_the_query_for_one_frame():
    known = Known(torch.zeros(1, ROWS * COLUMNS, K, dtype=torch.int64), frames=1)
    images = torch.full((1, HEIGHT, WIDTH, 3), 0.5)
    drawn = draw_matches(images, known, [(50, 60)])
    assert torch.equal(changed(images, drawn)[0], distances((50, 60)) < RADIUS * RING + 0.5)


def test_draw_matches_keeps_half_precision(known):
    assert draw_matches(torch.rand(FRAMES, HEIGHT, WIDTH, 3).half(), known, [(3, 5)]).dtype == torch.float16


@pytest.mark.parametrize("draw", [draw_matches, draw_tracks])
@pytest.mark.parametrize("point", [(-0.1, 5), (5, -0.1), (WIDTH, 5), (5, HEIGHT), (float("nan"), 5)])
def test_draw_matches_and_tracks_refuse_points_outside(known, draw, point):
    with pytest.raises(ValueError, match="outside the picture of 231 x 133 pixels; expected x from 0 to 230"):
        draw(torch.zeros(FRAMES, HEIGHT, WIDTH, 3), known, [(3, 5), point])


@pytest.mark.parametrize("draw", [draw_matches, draw_tracks])
def test_draw_matches_and_tracks_refuse_mismatched_frames(known, draw):
    with pytest.raises(ValueError, match="3 images, but the correspondence is of 5 frames"):
        draw(torch.zeros(3, HEIGHT, WIDTH, 3), known, [(3, 5)])
    for frame in (-1, 5):
        with pytest.raises(ValueError, match=f"frame is {frame}; expected 0 to 4"):
            draw(torch.zeros(FRAMES, HEIGHT, WIDTH, 3), known, [(3, 5)], frame)


def test_draw_tracks_connects_earlier_positions_of_the_point(known):
    known.table[:] = torch.tensor([0, 9, 27, 45, 60])[:, None, None]
    images = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.5)
    point = centre(38)
    drawn = draw_tracks(images, known, [point], frame=2)
    track = [centre(0), centre(9), point, centre(45), centre(60)]
    for now in range(FRAMES):
        steps = [
            tuple(a + (b - a) * s / 99 for a, b in zip(here, there, strict=True))
            for here, there in pairwise(track[: now + 1])
            for s in range(100)
        ]
        near = (distances(*steps, track[now]) < RADIUS / 2) if steps else distances(track[now]) < RADIUS
        touched = changed(images[now], drawn[now])
        assert touched[near].all()
        far = distances(*steps, track[now]) > RADIUS * RING + 2
        assert not touched[far].any()


@pytest.mark.parametrize("columns, rows", [(1, 7), (3, 3), (7, 1), (20, 1), (0, 3)])
def test_contact_sheet_places_frames_row_by_row(columns, rows):
    images = torch.rand(7, 3, 5, 3)
    sheet = contact_sheet(images, columns)
    columns = min(columns or 3, 7)
    assert sheet.shape == (1, rows * 3, columns * 5, 3)
    for index in range(rows * columns):
        y, x = index // columns * 3, index % columns * 5
        cell = sheet[0, y : y + 3, x : x + 5]
        assert torch.equal(cell, images[index] if index < 7 else torch.zeros(3, 5, 3))
    with pytest.raises(ValueError, match="columns is -1"):
        contact_sheet(images, -1)


def test_grid_points_are_the_centres_of_cells():
    assert grid_points(60, 90, 3) == [(x, y) for y in (10, 30, 50) for x in (15, 45, 75)]
