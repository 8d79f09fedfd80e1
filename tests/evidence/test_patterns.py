"""The world of patterns: repeats are exact, captions do not determine them, tracks follow the motion."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from demo.autoencoder import PATCH
from evidence.clip import Clip
from evidence.drawing import COLOURS, SHAPES, pixels
from evidence.patterns.clips import MOTIONS, WINDOW, random_clip
from evidence.patterns.looks import correlation, motif, scenes_with_repeats, tile_agreement, twins
from evidence.patterns.scenes import CELL, FREE, TEXTURE_WORDS, WORDS, caption, random_ground, random_look, random_scene
from evidence.patterns.textures import mosaic, mosaic_cells, second_colour_at
from evidence.patterns.world import Ground, Look, Thing
from evidence.scene import Scene
from tests.method_helpers import generator, randn

LOOK = Look("red", "patterned", (0.86, 0.12, 0.14), (0.96, 0.78, 0.79), period=0.5, phase=0.3, seed=5, cells=7)
THING = Thing("circle", LOOK, x=0.31, y=-0.23, radius=0.37, angle=0.4)
# Tiles of 7 x 11 tokens of 4 pixels, on a grid of 29 x 37 tokens.
GROUND = Ground(
    *("blue", "paved", (0.12, 0.32, 0.85)), tilt=1.1, seed=7, tile=(5, 6), tile_size=(14 / 29, 22 / 29), x=0.13, y=0.3
)
HEIGHT, WIDTH = 29 * PATCH, 37 * PATCH


def scenes(count, height=17, width=23, **options):
    return [random_scene(generator(seed), height, width, **options) for seed in range(count)]


def patterned(thing):
    return replace(thing, look=replace(thing.look, texture="patterned"))


def test_pixels_have_equal_steps_around_the_middle():
    points = pixels(5, 7)
    assert points.shape == (5, 7, 2)
    assert_close(points[2, 3], torch.zeros(2))
    assert_close(points.diff(dim=1)[..., 0], torch.full((5, 6), 2 / 5))
    assert_close(points.diff(dim=0)[..., 1], torch.full((4, 7), 2 / 5))


def test_mosaic_shows_its_cells_and_repeats():
    cells = mosaic_cells(3, 5, 7, torch.tensor([0.2, 0.5, 0.7]))
    assert 0 <= cells.min() and cells.max() <= 1
    middles = torch.stack(torch.meshgrid(torch.arange(7) + 0.5, torch.arange(5) + 0.5, indexing="xy"), -1)
    for shift in ((0, 0), (7, 0), (0, 5), (-14, 10)):
        assert_close(mosaic(cells, middles + torch.tensor(shift), 0.2), cells)
    edge = torch.tensor([[1.0, 0.5], [0.5, 1.0], [1.0, 1.0]])
    found = mosaic(cells, edge, 0.2)
    expected = [cells[0, :2].mean(0), cells[:2, 0].mean(0), cells[:2, :2].mean((0, 1))]
    assert_close(found, torch.stack(expected))


def test_draw_repeats_paved_ground_exactly():
    picture = Scene(GROUND, ()).draw(HEIGHT, WIDTH)
    assert_close(picture[:, 7 * PATCH :], picture[:, : -7 * PATCH], rtol=0, atol=2e-4)
    assert_close(picture[..., 11 * PATCH :], picture[..., : -11 * PATCH], rtol=0, atol=2e-4)
    assert picture.std((1, 2)).min() > 0.1
    free = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    assert tile_agreement(picture, free) > 0.999
    other = Scene(replace(GROUND, seed=8), ()).draw(HEIGHT, WIDTH)
    assert abs(tile_agreement(picture, free, other, free)) < 0.5


def test_motif_of_twins_is_equal():
    """Motifs are equal for any position, size and angle, except for the softness of edges."""
    twin = replace(THING, x=-0.53, y=0.41, radius=0.31, angle=2.0)
    picture = Scene(replace(GROUND, kind="plain"), (THING, twin)).draw(2 * HEIGHT, 2 * WIDTH)
    one, other = (motif(picture, thing) for thing in (THING, twin))
    assert correlation(one, other) > 0.9
    stranger = replace(twin, look=replace(LOOK, seed=6))
    picture = Scene(replace(GROUND, kind="plain"), (THING, stranger)).draw(2 * HEIGHT, 2 * WIDTH)
    assert abs(correlation(motif(picture, THING), motif(picture, stranger))) < 0.5


def test_draw_of_twins_whole_pixels_apart_is_equal():
    step = 2 / HEIGHT
    twin = replace(THING, x=THING.x - 53 * step, y=THING.y + 31 * step)
    picture = Scene(replace(GROUND, kind="plain"), (THING, twin)).draw(HEIGHT, WIDTH)
    where = THING.covers(pixels(HEIGHT, WIDTH)).nonzero()
    rows, columns = where[(pixels(HEIGHT, WIDTH)[tuple(where.T)] - torch.tensor([0.31, -0.23])).norm(dim=-1) < 0.3].T
    assert_close(picture[:, rows, columns], picture[:, rows + 31, columns - 53], rtol=0, atol=2e-4)


@pytest.mark.parametrize("texture", ["striped", "dotted", "checkered"])
def test_second_colour_at_covers_its_share(texture):
    points = pixels(211, 211)
    share = second_colour_at(texture, points, period=0.2, phase=0.4, softness=0.002)
    assert share.mean().item() == pytest.approx({"striped": 0.5, "dotted": 0.229, "checkered": 0.5}[texture], abs=0.02)
    assert_close(second_colour_at(texture, points + 0.4, 0.2, 0.4, 0.002), share, rtol=0, atol=0.1)
    assert (second_colour_at(texture, points, 0.2, 0.9, 0.002) - share).abs().max() > 0.9  # shifted by half a period


def test_caption_does_not_determine_the_look():
    """The caption is independent of hue, period, phase and the cells of a pattern."""
    for scene in scenes(50):
        open_to_chance = random_look(generator(1), 13.0)
        things = tuple(
            replace(thing, look=replace(open_to_chance, colour=thing.look.colour, texture=thing.look.texture))
            for thing in scene.things
        )
        if len({thing.kind for thing in things}) < len({thing.kind for thing in scene.things}):
            continue
        ground = replace(random_ground(generator(2), 17), colour=scene.ground.colour, kind=scene.ground.kind)
        assert caption(Scene(ground, things)) == caption(scene)


def test_caption_of_patterned_scenes_goes_with_many_patterns():
    looks = {}
    for scene in scenes(700, most=1):
        look = scene.things[0].look
        if look.texture == "patterned":
            looks.setdefault((look.colour, scene.things[0].shape), []).append(look.seed)
    seeds = [seed for found in looks.values() for seed in found]
    assert max(map(len, looks.values())) > 2 and len(set(seeds)) == len(seeds)


def test_caption_counts_objects():
    other = replace(THING, shape="cross", look=replace(LOOK, colour="orange", texture="plain"))
    ground = replace(GROUND, colour=FREE)
    assert caption(Scene(ground, (THING, THING, other))) == (
        "an orange cross and two patterned red circles on a paved tinted ground"
    )
    assert caption(Scene(ground, (other,) * 3)) == "three orange crosses on a paved tinted ground"


def test_random_scene_is_deterministic_and_covers_every_kind():
    assert scenes(20) == scenes(20)
    assert len(set(scenes(20))) == 20
    found = scenes(400)
    assert {thing.shape for scene in found for thing in scene.things} == set(SHAPES)
    assert {thing.look.texture for scene in found for thing in scene.things} == set(TEXTURE_WORDS)
    assert {len(scene.things) for scene in found} == {1, 2, 3}
    assert {word for scene in found for word in caption(scene).split()} == set(WORDS)
    for scene in found:
        kinds = {thing.kind for thing in scene.things}
        assert len({look.colour for _, look in kinds} | {scene.ground.colour}) == len(kinds) + 1
        assert len(scene.things) == 1 or all(thing.look == scene.things[0].look for thing in twins(scene))


def test_random_scene_keeps_objects_inside_and_cells_larger_than_a_token():
    for scene in scenes(200):
        for thing in scene.things:
            assert abs(thing.x) < 23 / 17 and abs(thing.y) < 1
            assert 2 * thing.radius * 17 / 2 / thing.look.cells > 0.7 * CELL[0]
        for cells, size in zip(scene.ground.tile, scene.ground.tile_size, strict=True):
            assert 0.8 < size * 17 / 2 / cells < 2.6


def test_random_scene_uses_the_given_period_of_tiles():
    for scene in scenes(50, height=37, width=41, period=(10, 13)):
        assert all(10 <= round(size * 37 / 2, 3) <= 13 for size in scene.ground.tile_size)


def test_draw_is_within_range_on_any_grid():
    for number, scene in enumerate(scenes(30)):
        picture = scene.draw(17 * PATCH, 23 * PATCH)
        assert picture.shape == (3, 17 * PATCH, 23 * PATCH), number
        assert picture.dtype == torch.float32 and 0 <= picture.min() and picture.max() <= 1


def test_random_look_varies_free_colours_more_than_named_ones():
    paints = {}
    for seed in range(500):
        look = random_look(generator(seed), 10.0)
        paints.setdefault(look.colour, []).append(look.paint)
    for colour, found in paints.items():
        spread = torch.tensor(found)
        assert spread.std(0).min() > (0.2 if colour == FREE else 0.02)
        if colour != FREE:
            assert (spread - torch.tensor(COLOURS[colour])).abs().max() <= 0.0701


@pytest.mark.parametrize("motion", MOTIONS)
def test_tracks_follow_the_pattern(motion):
    """In a fine drawing, a visible point keeps its colour in every frame, on objects and on the ground."""
    clip = random_clip(generator(3), 3, motion, height=29, width=37)
    clip = clip.with_things(patterned).with_ground(kind="paved")
    frames = clip.draw(29 * 12, 37 * 12).movedim(-1, 1)
    places, visible = clip.tracks(1, 29, 37)
    assert places.shape == (3, 29, 37, 2) and visible.shape == (3, 29, 37) and visible[1].all()
    own = torch.stack(torch.meshgrid(torch.arange(37.0), torch.arange(29.0), indexing="xy"), -1)
    assert_close(places[1], own, rtol=0, atol=1e-4)
    at = (places + 0.5) / torch.tensor([37, 29]) * 2 - 1
    colours = F.grid_sample(frames, at, align_corners=False)
    for frame in (0, 2):
        error = (colours[frame] - colours[1]).abs().amax(0)[visible[frame]]
        assert error.quantile(0.9) < 0.1 and visible[frame].float().mean() > 0.6
        still = (F.grid_sample(frames[frame, None], at[1, None], align_corners=False)[0] - colours[1]).abs().amax(0)
        assert still[visible[frame]].quantile(0.9) > 0.2


def test_tracks_end_at_the_edge_and_behind_things():
    other = replace(GROUND, x=GROUND.x + 10 / 29)  # five tokens to the right
    places, visible = Clip((Scene(GROUND, ()), Scene(other, ()))).tracks(0, 29, 37)
    assert_close(places[1] - places[0], torch.tensor([5.0, 0.0]).expand(29, 37, 2), rtol=0, atol=1e-4)
    assert visible[1][:, :32].all() and not visible[1][:, 32:].any()
    cover = replace(THING, x=0.0, y=0.0, radius=0.5)
    _, visible = Clip((Scene(GROUND, (replace(cover, x=5.0),)), Scene(GROUND, (cover,)))).tracks(0, 29, 37)
    assert torch.equal(visible[1], ~cover.covers(pixels(29, 37)))


def test_random_clip_has_tiles_larger_than_the_window():
    for seed in range(20):
        ground = random_clip(generator(seed), 2).scenes[0].ground
        assert min(ground.tile_size) * 24 > WINDOW


def test_random_clip_is_deterministic_and_refuses_unknown_motions():
    assert random_clip(generator(1), 5) == random_clip(generator(1), 5) != random_clip(generator(2), 5)
    with pytest.raises(ValueError, match="motion must be one of move, scale, rotate, all, got 'jump'"):
        random_clip(generator(), 5, "jump")


def test_with_things_and_with_ground_keep_the_motion():
    clip = random_clip(generator(4), 3, "move", 17, 23)
    edited = clip.with_things(patterned).with_ground(kind="paved")
    assert "paved" in caption(edited.scenes[0]) and "patterned" in caption(edited.scenes[0])
    assert all(torch.equal(*pair) for pair in zip(clip.tracks(0, 17, 23), edited.tracks(0, 17, 23), strict=True))


def test_scenes_with_repeats_have_tiles_and_twins():
    for scene in scenes_with_repeats(3, 32):
        assert scene.ground.kind == "paved" and len(twins(scene)) > 1
        picture = scene.draw(128)
        assert tile_agreement(picture, scene.on_top(pixels(128, 128)) < 0) > 0.9
        one, other = (motif(picture, thing) for thing in twins(scene)[:2])
        assert correlation(one, other) > 0.6


def test_correlation_removes_each_channels_mean():
    x = randn(3, 1009)
    assert correlation(x, 2 * x + torch.tensor([[1.0], [2.0], [3.0]])) == pytest.approx(1, abs=1e-5)
    assert abs(correlation(x, randn(3, 1009, seed=1))) < 0.1
    assert correlation(x, -x) == pytest.approx(-1, abs=1e-5)
