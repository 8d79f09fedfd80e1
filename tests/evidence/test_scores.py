"""Edits that must invent, their scores, and the alternatives to averaging over matches."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from cove.attention import attend_to_sets, attention_sets
from cove.correspondence import find_correspondence
from evidence.patterns.clips import MOTIONS
from evidence.patterns.edits import GRAIN, KINDS, Edit, random_edit
from evidence.patterns.scenes import FREE, caption
from evidence.tables.alternatives import ALTERNATIVES, alternative, gathered, matches_of
from evidence.tables.grids import Grids
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
        (before, twin), (after, _) = source.things, target.things
        assert before.kind == twin.kind and len({thing.kind for thing in target.things}) == 1
        assert before.look.texture == "plain" and before.look.colour != FREE and source.ground.kind != "paved"
        assert (target.ground.kind == "paved") == edit.on_ground == ("ground" in kind)
        assert (after.look != before.look) == edit.on_things == ("things" in kind)
        assert (after.look.texture == "patterned") == kind.startswith("patterned")
        assert (after.look.colour == FREE) == (kind == "tinted things")
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
    where, flow = region(edit.target, True, True, HEIGHT, WIDTH), true_flow(edit.target, 1, HEIGHT, WIDTH)
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
    edit = edit_of(5, "patterned things")
    assert math.isnan(
        scores_of(edit, torch.zeros(FRAMES, HEIGHT, WIDTH, 3), edit.target.draw(HEIGHT, WIDTH))["agreement"]
    )


def sets_of(frames: int = 3, still: bool = False) -> Tensor:
    features = torch.ones(frames, 5, 7, 1) if still else randn(frames, 5, 7, 11)
    return attention_sets(find_correspondence(features, 1 if still else 9, 1))


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_alternatives_keep_identical_frames(name):
    tokens = randn(2, 1, 35, 22).expand(2, 3, 35, 22)
    found = alternative(name, 7)(tokens, sets_of(still=True), 2)
    assert_close(found, tokens, rtol=1e-5, atol=1e-5)


def test_returning_and_blended_are_attention_where_nothing_moves():
    """Every match returns to its start."""
    tokens, sets = randn(2, 3, 35, 22), sets_of(still=True)
    attended = attend_to_sets(tokens, sets, 2, 0.0)
    assert_close(alternative("returning", 7)(tokens, sets, 2), attended)
    assert_close(alternative("blended", 7)(tokens, sets, 2), (tokens + attended) / 2)


@pytest.mark.parametrize("name", ["sharper", "restored"])
def test_sharper_and_restored_take_the_only_match(name):
    tokens, sets = randn(2, 2, 35, 22), sets_of(2, still=True)
    assert_close(alternative(name, 7)(tokens, sets, 2), tokens.flip(1), rtol=1e-4, atol=1e-5)
    tokens, sets = randn(2, 3, 35, 22), sets_of(still=True)
    assert not torch.allclose(alternative(name, 7)(tokens, sets, 2), attend_to_sets(tokens, sets, 2, 0.0))


def test_returning_keeps_tokens_whose_matches_do_not_return():
    sets, tokens = sets_of(), randn(1, 3, 35, 22)
    made, matches = alternative("returning", 7)(tokens, sets, 2), matches_of(sets)
    kinds = set()
    for i in range(3):
        for token in range(35):
            back = {j: int(matches[j, i, matches[i, j, token]]) for j in range(3) if j != i}
            near = [j for j, at in back.items() if math.hypot(at % 7 - token % 7, at // 7 - token // 7) <= 1]
            kinds.add(len(near))
            if not near:
                assert_close(made[0, i, token], tokens[0, i, token])
            elif len(near) == 1:
                assert_close(made[0, i, token], tokens[0, near[0], matches[i, near[0], token]])
    assert kinds >= {0, 1}


def test_reference_frame_gives_every_frame_the_tokens_of_one():
    sets, tokens = sets_of(), randn(1, 3, 35, 22)
    matches = matches_of(sets)
    made = alternative("reference frame, fixed", 7)(tokens, sets, 2)
    assert_close(made, torch.stack([tokens[:, 1][:, matches[i, 1]] for i in range(3)], 1))
    redrawn = alternative("reference frame, redrawn", 7)
    seen = {tuple(redrawn(tokens, sets, 2)[0, :, 0, 0].tolist()) for _ in range(20)}
    assert len(seen) == 3


def test_most_typical_is_one_of_the_set():
    sets, tokens = sets_of(), randn(1, 3, 35, 22)
    made = alternative("most typical", 7)(tokens, sets, 2)
    members = torch.cat([tokens[:, :, :, None], gathered(tokens, sets)], 3)
    assert (members == made[..., None, :]).all(-1).any(-1).all()


def test_matches_of_are_those_of_the_correspondence():
    found = find_correspondence(randn(3, 5, 7, 11), 9, 1)
    matches = matches_of(attention_sets(found))
    for i in range(3):
        for j in range(3):
            expected = torch.arange(35) if i == j else found.follow(i, [j])[:, 0, 0]
            assert_close(matches[i, j], expected)


def test_grids_show_all_frames_at_once_and_put_them_back():
    """Two conditionings of six frames, each frame of one value: grids of 2 x 3, in another order at each timestep."""
    x = torch.arange(6.0).repeat(2)[:, None, None, None].expand(12, 4, 5, 7)
    prompt = torch.arange(2.0).repeat_interleave(6)[:, None, None].expand(12, 3, 8)
    orders = []

    def apply_model(grid, timestep, c_crossattn, transformer_options):
        assert grid.shape == (2, 4, 10, 21) and timestep.shape == (2,) and transformer_options == {"some": 1}
        assert torch.equal(c_crossattn[:, 0, 0], torch.tensor([0.0, 1.0]))
        assert torch.equal(grid[0], grid[1])
        orders.append(tuple(grid[0, 0, ::5, ::7].flatten().int().tolist()))
        return grid + 10 * c_crossattn[:, :1, :1, None]

    for timestep in (0.3, 0.3, 0.7):
        call = {"input": x, "timestep": torch.full((12,), timestep), "cond_or_uncond": [0, 1]}
        call["c"] = {"c_crossattn": prompt, "transformer_options": {"some": 1}}
        assert_close(Grids(seed=3)(apply_model, call), x + 10 * prompt[:, :1, :1, None])
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert orders[0] == orders[1] != orders[2]
