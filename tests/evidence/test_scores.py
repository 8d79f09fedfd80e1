"""Edits that must invent, their scores, and the alternatives to averaging over matches."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from cove.attention import correspondence_attention
from cove.correspondence import find_correspondence
from evidence.patterns.clips import MOTIONS
from evidence.patterns.edits import GRAIN, KINDS, Edit, random_edit
from evidence.patterns.scenes import FREE, caption
from evidence.tables.alternatives import ALTERNATIVES, gathered, matches_of
from evidence.tables.scores import MARGIN, agreement, detail_of, region, scores_of, true_flow
from tests.method_helpers import generator, randn

HEIGHT, WIDTH, FRAMES = 92, 124, 3


def edit_of(seed: int, kind: str, motion: str = "all") -> Edit:
    return random_edit(generator(seed), kind, motion, FRAMES, HEIGHT // 4, WIDTH // 4)


@pytest.mark.parametrize("kind", KINDS)
def test_random_edit_changes_what_its_kind_says(kind):
    for seed in range(20):
        edit = edit_of(seed, kind)
        source, target = (clip.scenes[0] for clip in (edit.source, edit.target))
        (before,), (after,) = source.things, target.things
        assert before.look.texture == "plain" and before.look.colour != FREE and source.ground.kind != "paved"
        assert (target.ground.kind == "paved") == edit.on_ground == ("ground" in kind)
        assert (after.look != before.look) == edit.on_thing == ("thing" in kind)
        assert (after.look.texture == "patterned") == kind.startswith("patterned")
        assert (after.look.colour == FREE) == (kind == "tinted thing")
        assert caption(source) != caption(target)
        for one, other in zip(edit.source.scenes, edit.target.scenes, strict=True):
            assert_close(*(torch.stack(s.tracks(0, 7, 11)[:1]) for s in (edit.source, edit.target)))
            assert one.things[0].x == other.things[0].x and one.ground.x == other.ground.x


def test_draw_source_adds_independent_grain():
    edit = edit_of(1, KINDS[0])
    grain = edit.draw_source(HEIGHT, WIDTH, generator()) - edit.source.draw(HEIGHT, WIDTH)
    assert grain.std().item() == pytest.approx(GRAIN, rel=0.1)
    assert abs(torch.corrcoef(grain[:2].flatten(1))[0, 1]) < 0.05


def test_region_keeps_away_from_edges():
    edit = edit_of(2, KINDS[2])
    things = region(edit.target, True, False, HEIGHT, WIDTH)
    ground = region(edit.target, False, True, HEIGHT, WIDTH)
    assert not (things & ground).any()
    assert_close(region(edit.target, True, True, HEIGHT, WIDTH), things | ground)
    reach = F.max_pool2d(things[:, None].float(), 2 * MARGIN + 1, 1, MARGIN)[:, 0] > 0
    assert things.any() and not (reach & ground).any()
    assert not things[:, :MARGIN].any() and not ground[:, :, -MARGIN:].any()


def test_detail_of_is_what_a_blur_removes():
    where = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    where[:, 11:71, 13:101] = True
    flat = torch.where(where[..., None], torch.tensor([0.3, 0.5, 0.9]), torch.tensor(0.0))
    assert_close(detail_of(flat, where), torch.zeros(2, HEIGHT, WIDTH, 3, dtype=torch.float64))
    noise = randn(2, HEIGHT, WIDTH, 3)
    found = detail_of(flat + noise, where)
    assert not found[~where].any()
    assert_close(found[where], noise[where].double(), rtol=0, atol=0.4)
    assert_close(detail_of(0.25 * (flat + noise), where), 0.25 * found)


@pytest.mark.parametrize("motion", MOTIONS)
def test_agreement_of_a_drawn_pattern_is_one_and_of_noise_zero(motion):
    edit = edit_of(3, KINDS[2], motion)
    where, flow = region(edit.target, True, True, HEIGHT, WIDTH), true_flow(edit.target, HEIGHT, WIDTH)
    drawn = edit.target.draw(HEIGHT, WIDTH)
    assert agreement(detail_of(drawn, where), where, *flow) > 0.9
    assert abs(agreement(detail_of(randn(*drawn.shape), where), where, *flow)) < 0.05


def test_scores_of_a_blurred_clip_gain_nothing():
    edit = edit_of(4, "paved ground", "move")
    drawn = edit.target.draw(HEIGHT, WIDTH)
    noisy = drawn + 0.1 * randn(*drawn.shape)
    grey = noisy.mean((0, 1, 2))
    faded = grey + 0.2 * (noisy - grey)
    sharp, pale = scores_of(edit, noisy, drawn), scores_of(edit, faded, drawn)
    assert sharp["agreement"] == pytest.approx(pale["agreement"], abs=1e-6)
    assert pale["detail"] == pytest.approx(0.2 * sharp["detail"], rel=1e-4)
    assert pale["drift"] == pytest.approx(sharp["drift"], rel=1e-4)
    target = scores_of(edit, drawn, drawn)
    assert target["detail"] == 1 and target["agreement"] > sharp["agreement"] > sharp["chance"] + 0.3
    assert target["drift"] < sharp["drift"] and abs(target["chance"]) < 0.4


def test_scores_of_unpatterned_frames_are_no_numbers():
    edit = edit_of(5, "patterned thing")
    assert math.isnan(
        scores_of(edit, torch.zeros(FRAMES, HEIGHT, WIDTH, 3), edit.target.draw(HEIGHT, WIDTH))["agreement"]
    )


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_alternatives_keep_identical_frames(name):
    tokens = randn(2, 1, 35, 22).expand(2, 3, 35, 22)
    still, settings = find_correspondence(torch.ones(3, 5, 7, 1), 1, 1), (2, 0.0, [0, 1, 2], False)
    assert_close(ALTERNATIVES[name]()(tokens, still, *settings), tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["returning", "blended", "sharper", "restored"])
def test_alternatives_match_attention_where_they_do_not_differ(name):
    """Every match returns if nothing moves; one match has all of the weight; half and half of equals."""
    tokens, still = randn(2, 3, 35, 22), find_correspondence(torch.ones(3, 5, 7, 1), 1, 1)
    settings = (2, 0.0, [0, 1, 2], False)
    attended = correspondence_attention(tokens, still, *settings)
    found = ALTERNATIVES[name]()(tokens, still, *settings)
    if name == "returning":
        assert_close(found, attended)
    elif name == "blended":
        assert_close(found, (tokens + attended) / 2)
    else:
        assert not torch.allclose(found, attended)
        two = tokens[:, :2]
        pair = find_correspondence(torch.ones(2, 5, 7, 1), 1, 1)
        settings = (2, 0.0, [0, 1], False)
        assert_close(ALTERNATIVES[name]()(two, pair, *settings), two.flip(1), rtol=1e-4, atol=1e-5)


def test_returning_keeps_tokens_whose_matches_do_not_return():
    features = randn(3, 5, 7, 11)
    found = find_correspondence(features, 9, 1)
    tokens = randn(1, 3, 35, 22)
    made = ALTERNATIVES["returning"]()(tokens, found, 2, 0.0, [0, 1, 2], False)
    matches = matches_of(found, [0, 1, 2])
    for i in range(3):
        for token in range(35):
            back = [matches[j, i, matches[i, j, token]] for j in range(3) if j != i]
            near = [math.hypot(int(b) % 7 - token % 7, int(b) // 7 - token // 7) <= 1 for b in back]
            if not any(near):
                assert_close(made[0, i, token], tokens[0, i, token])
            elif sum(near) == 1:
                j = [j for j in range(3) if j != i][near.index(True)]
                assert_close(made[0, i, token], tokens[0, j, matches[i, j, token]])


def test_reference_frame_gives_every_frame_the_tokens_of_one():
    found, tokens = find_correspondence(randn(3, 5, 7, 11), 9, 1), randn(1, 3, 35, 22)
    matches = matches_of(found, [0, 1, 2])
    made = ALTERNATIVES["reference frame, fixed"]()(tokens, found, 2, 0.0, [0, 1, 2], False)
    assert_close(made, torch.stack([tokens[:, 1][:, matches[i, 1]] for i in range(3)], 1))
    redrawn = ALTERNATIVES["reference frame, redrawn"]()
    seen = {tuple(redrawn(tokens, found, 2, 0.0, [0, 1, 2], False)[0, :, 0, 0].tolist()) for _ in range(20)}
    assert len(seen) == 3


def test_most_typical_is_one_of_the_set():
    found, tokens = find_correspondence(randn(3, 5, 7, 11), 9, 1), randn(1, 3, 35, 22)
    made = ALTERNATIVES["most typical"]()(tokens, found, 2, 0.0, [0, 1, 2], False)
    sets = gathered(tokens, matches_of(found, [0, 1, 2]))
    assert (sets == made[..., None, :]).all(-1).any(-1).all()
