"""The world of shapes: pictures match their captions, tracks follow the motion."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from evidence.clip import Clip
from evidence.drawing import COLOURS, GROUNDS, SHAPES, TEXTURES, pixels
from evidence.scene import Scene
from evidence.shapes.clips import MOTIONS, random_clip
from evidence.shapes.scenes import WORDS, caption, random_scene
from evidence.shapes.world import Ground, Thing
from tests.method_helpers import generator, randn

SIZE = 97
THING = Thing("star", "red", "striped", x=0.13, y=-0.29, radius=0.53, angle=0.7)
GROUND = Ground("blue", "cloudy", tilt=1.1, seed=7, x=0.3, y=-0.2, zoom=1.1)


@pytest.mark.parametrize("layer", [THING, GROUND], ids=["thing", "ground"])
def test_outside_is_the_inverse_of_inside(layer):
    points = randn(5, 7, 2)
    assert not torch.allclose(layer.inside(points), points, atol=0.1)
    assert_close(layer.outside(layer.inside(points)), points)


def test_thing_has_its_position_and_turns_clockwise():
    p = torch.tensor([[0.0, -1.0]])  # its top
    assert_close(replace(THING, angle=0.0).outside(p), torch.tensor([[0.13, -0.29 - 0.53]]))
    assert_close(replace(THING, angle=math.pi / 2).outside(p), torch.tensor([[0.13 + 0.53, -0.29]]))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_the_unit_circle(shape):
    """Each reaches three quarters of its radius, stays inside it (except a square's corners), and has its own area."""
    points = pixels(301) * 1.4
    inside = SHAPES[shape](points) < 0
    reach = points.norm(dim=-1)[inside].max()
    assert 0.75 < reach < 1.12
    area = inside.float().mean() * 1.4**2 * 4
    known = {
        "circle": math.pi * 0.9**2,
        "square": (2 * 0.78) ** 2,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 5 * math.sin(math.pi / 5) * 0.42,
        "heart": 2 * 0.53**2 * 2 + math.pi * 0.53**2,
        "ring": math.pi * (0.93**2 - 0.39**2),
        "cross": 4 * 0.95 * 0.32 * 2 - (2 * 0.32) ** 2,
    }
    if shape in known:
        assert area == pytest.approx(known[shape], rel=0.02)
    else:
        assert 0.5 < area < 2  # the moon


def test_shapes_distance_has_unit_slope_at_the_edge():
    """Otherwise the softness of an edge would not be in pixels."""
    for distance in SHAPES.values():
        points = pixels(201).double() * 1.1
        points.requires_grad_(True)
        value = distance(points)
        (slope,) = torch.autograd.grad(value.sum(), points)
        near = (value.abs() < 0.02) & (points.norm(dim=-1) > 0.1)
        assert_close(slope.norm(dim=-1)[near].median(), torch.tensor(1.0, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize("colour", COLOURS)
def test_draw_of_a_plain_thing_has_its_colour(colour):
    scene = Scene(Ground("white", "plain", 0.0, 0), (Thing("circle", colour, "plain", 0.0, 0.0, 0.7, 0.0),))
    middle = scene.draw(SIZE)[:, SIZE // 2, SIZE // 2]
    assert_close(middle, torch.tensor(COLOURS[colour]), rtol=0, atol=0.02)


def test_draw_differs_for_every_word():
    def drawn(thing=THING, ground=GROUND):
        return Scene(ground, (thing,)).draw(31)

    for pictures in (
        [drawn(replace(THING, shape=shape)) for shape in SHAPES],
        [drawn(replace(THING, colour=colour)) for colour in COLOURS],
        [drawn(replace(THING, texture=texture)) for texture in TEXTURES],
        [drawn(ground=replace(GROUND, colour=colour)) for colour in COLOURS],
        [drawn(ground=replace(GROUND, kind=kind)) for kind in GROUNDS],
    ):
        for number, one in enumerate(pictures):
            assert one.shape == (3, 31, 31) and one.min() >= 0 and one.max() <= 1
            assert all((one - other).abs().max() > 0.1 for other in pictures[:number])


def test_caption_lists_objects_and_ground_in_known_words():
    scene = Scene(GROUND, (replace(THING, colour="orange", texture="plain"), THING))
    assert caption(scene) == "a striped red star and an orange star on a cloudy blue ground"
    for seed in range(200):
        assert set(caption(random_scene(generator(seed))).split()) <= set(WORDS)


def test_random_scene_is_deterministic_and_covers_every_kind():
    assert random_scene(generator(3)) == random_scene(generator(3)) != random_scene(generator(4))
    things = [thing for seed in range(400) for thing in random_scene(generator(seed)).things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {(thing.colour, thing.texture) for thing in things} == {(c, t) for c in COLOURS for t in TEXTURES}


def test_random_scene_never_repeats_a_colour():
    for seed in range(200):
        scene = random_scene(generator(seed))
        colours = [scene.ground.colour, *(thing.colour for thing in scene.things)]
        assert len(set(colours)) == len(colours)


def looked_up(pictures, places):
    """Return the colours of [frames, size, size, 3] at places in pixels, [frames, h, w, 2] -> [frames, h, w, 3]."""
    grid = (places + 0.5) / pictures.shape[1] * 2 - 1
    return F.grid_sample(pictures.movedim(-1, 1), grid, align_corners=False).movedim(1, -1)


@pytest.mark.parametrize("motion", MOTIONS)
def test_tracks_keep_the_colour(motion):
    """Colours are constant along true tracks, except at interpolated edges; at fixed places they change."""
    size, frames = 131, 5
    for seed in range(3):
        clip = random_clip(generator(seed), frames, motion)
        pictures = clip.draw(size)
        assert pictures.shape == (frames, size, size, 3)
        for frame in (0, 3):
            places, visible = clip.tracks(frame, size)
            assert places.shape == (frames, size, size, 2) and visible.shape == (frames, size, size)
            still = pixels(size).expand(frames, -1, -1, -1)
            still = (still + 1) / 2 * size - 0.5
            assert_close(places[frame], still[0], atol=1e-3, rtol=0)
            assert visible[frame].all()
            moved = (looked_up(pictures, places) - pictures[frame]).abs().amax(-1)[visible]
            stayed = (looked_up(pictures, still) - pictures[frame]).abs().amax(-1)[visible]
            assert moved.quantile(0.75) < 0.03
            assert moved.mean() < 0.5 * stayed.mean()


def test_tracks_are_invisible_behind_other_objects():
    """A disc is hidden under the square in front of it; the square is never hidden."""
    behind, before = Thing("circle", "red", "plain", 0, 0, 0.8, 0), Thing("square", "blue", "plain", -0.9, 0, 0.3, 0)
    ground = Ground("white", "plain", 0.0, 0)
    clip = Clip(tuple(Scene(ground, (behind, replace(before, x=x))) for x in (-0.9, 0.1)))
    size = 61
    top = [scene.on_top(pixels(size)) for scene in clip.scenes]
    _, visible = clip.tracks(0, size)
    disc, square = top[0] == 0, top[0] == 1
    assert torch.equal(visible[1][disc], ~(top[1] == 1)[disc])
    assert visible[1][square].all()
    assert (top[1] == 1)[disc].any()


def test_tracks_are_invisible_outside_the_picture():
    ground = Ground("white", "tiled", 0.0, 0)
    clip = Clip((Scene(ground, ()), Scene(replace(ground, x=0.5), ())))
    places, visible = clip.tracks(0, 20)
    assert_close(places[1] - places[0], torch.tensor([5.0, 0.0]).expand(20, 20, 2))
    assert visible[1][:, :15].all() and not visible[1][:, 15:].any()


def test_random_clip_is_deterministic_and_refuses_unknown_motions():
    assert random_clip(generator(1), 5) == random_clip(generator(1), 5) != random_clip(generator(2), 5)
    with pytest.raises(ValueError, match=r"motion must be one of move, scale, .*, got 'jump'"):
        random_clip(generator(), 5, "jump")


def test_random_clip_changes_only_the_parameters_of_its_motion():
    def seen(motion, value):
        return len({value(scene) for scene in random_clip(generator(3), 5, motion).scenes})

    for motion in MOTIONS:
        scales, turns = motion in ("scale", "all"), motion in ("rotate", "all")
        assert seen(motion, lambda scene: scene.ground.zoom) == (5 if scales else 1)
        assert seen(motion, lambda scene: scene.things[0].radius) == (5 if scales else 1)
        assert seen(motion, lambda scene: scene.things[0].angle) == (5 if turns else 1)
        assert seen(motion, lambda scene: (scene.ground.x, scene.ground.y)) == 5
        assert seen(motion, lambda scene: len(scene.things)) == 1


def test_random_clip_accepts_one_frame():
    (scene,) = random_clip(generator(), 1, "scale").scenes
    assert len(scene.things) == 1
