"""TokenFlow in a real UNet: each block against the reference, for every way the host calls it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import HEIGHT, WIDTH, latents, prompt, set_free_memory, state_of
from tests.inversion_helpers import (
    ALL,
    answer_at,
    ask,
    down,
    flow,
    inject,
    invert,
    joint,
    keyframes_of,
    noise_like,
    part_of,
    sample,
    tiny,
    watched,
    windows_in,
    windows_of,
)
from tests.random_models import FAMILIES

LONG = 7  # frames; enough for some between two keyframes


@pytest.fixture
def recorded(host_module, monkeypatch):
    """Every later call of the patch: its inputs and its result."""
    calls, patch = [], host_module.tokenflow.FlowingSelfAttention
    original = patch.__call__

    def record(self, query, key, value, options):
        result = original(self, query, key, value, options)
        conds, place = options["cond_or_uncond"], (*options["block"], options["block_index"])
        calls.append(SimpleNamespace(qkv=(query, key, value), result=result, conds=conds, place=place, options=options))
        return result

    monkeypatch.setattr(patch, "__call__", record)
    return calls


# --- attention of a block ---


@pytest.mark.parametrize("blend", [True, False])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_token_flow_matches_reference_in_every_block(small, nodes, cove, recorded, blend, every):
    _, inversion = invert(nodes, small, latent=latents(LONG))
    answer_at(flow(nodes, small, inversion, every, blend_keyframes=blend, seed=5), inversion, 1)
    keyframes = keyframes_of(cove, inversion, 1, every, seed=5)
    places = [seen.place for seen in recorded]
    blocks = len(set(places))
    assert blocks == 7 and len(places) == blocks * (3 if blend else 2)
    source, edit, alone = recorded[:blocks], recorded[-blocks:], recorded[blocks:-blocks]
    for i in (0, 3, 6):
        assert source[i].place == edit[i].place and len(source[i].result) == LONG
        plain = cove.reference.spatial_temporal_attention(*source[i].qkv, 1, source[i].options["n_heads"])
        assert_close(source[i].result, plain, rtol=1e-4, atol=1e-4)
        for half in range(2):
            qkv = [x.chunk(2)[half].clone() for x in edit[i].qkv]
            if blend:  # keyframes come from the earlier pass
                assert len(alone[i].qkv[0]) == 2 * len(keyframes)
                for x, first in zip(qkv, alone[i].qkv, strict=True):
                    x[keyframes] = first.chunk(2)[half]
            heads = edit[i].options["n_heads"]
            expected = cove.reference.tokenflow_attention(*qkv, source[i].result, keyframes, heads, blend)
            assert_close(edit[i].result.chunk(2)[half], expected, rtol=1e-4, atol=1e-4)


def test_token_flow_keyframes_are_edited_as_if_alone(small, nodes, cove):
    """The rest of the UNet treats frames separately, so without blending of keyframes one pass is enough."""
    _, inversion = invert(nodes, small, latent=latents(LONG))
    flowing = answer_at(flow(nodes, small, inversion, 3, blend_keyframes=False), inversion, 1)
    keyframes = keyframes_of(cove, inversion, 1, 3)
    asked = (down(inversion), -2 - 1, prompt(2), prompt(3), 2.0)
    alone = ask(joint(nodes, small), noise_like(inversion)[keyframes], *asked)
    assert_close(flowing[keyframes], alone, rtol=1e-4, atol=1e-4)
    others = [i for i in range(LONG) if i not in keyframes]
    plain = answer_at(small, inversion, 1)
    assert (flowing - plain)[others].abs().amin(dim=0).max() > 1e-3


@pytest.mark.parametrize("kind", ["masks", "prompts"])
def test_token_flow_runs_blended_keyframes_in_a_pass_of_their_own(small, nodes, kind):
    """They get their own masks and prompt rows."""
    _, inversion = invert(nodes, small, latent=latents(LONG))
    model = flow(nodes, small, inversion, 3)
    (text, extras), *_ = prompt(2)
    masks = prompt(2, mask=torch.ones(LONG, 8 * HEIGHT, 8 * WIDTH))
    each = {"masks": masks, "prompts": [[text.expand(LONG, -1, -1), extras]]}[kind]
    with watched(small) as calls:
        alone = answer_at(model, inversion, 1, cfg=1.0)
        with_each = answer_at(model, inversion, 1, each, cfg=1.0)
    assert [len(seen.latents) for seen in calls] == [7, 3, 7] * 2
    assert_close(with_each, alone, rtol=1e-4, atol=1e-4)


def test_token_flow_finds_fields_in_the_unmodified_source(small, nodes, recorded):
    """Neither injection nor keyframes affect the pass of the source."""
    _, inversion = invert(nodes, small)
    answer_at(flow(nodes, small, inversion), inversion, 1)
    plain = recorded[:7]
    for model in (
        flow(nodes, inject(nodes, small, invert(nodes, small, prompt(5))[1], **ALL), inversion),
        inject(nodes, flow(nodes, small, inversion), invert(nodes, small, prompt(5))[1], **ALL),
    ):
        recorded.clear()
        answer_at(model, inversion, 1)
        (first,) = [i for i, seen in enumerate(recorded) if torch.equal(seen.qkv[0], plain[0].qkv[0])]
        for one, other in zip(recorded[first : first + 7], plain, strict=True):
            assert torch.equal(one.result, other.result)


# --- keyframes ---


def test_token_flow_redraws_keyframes_at_each_step_from_the_seed(small, nodes, cove):
    noise, inversion = invert(nodes, small, latent=latents(LONG), steps=5)

    def drawn(seed):
        with watched(small) as calls:
            edit = sample(nodes, flow(nodes, small, inversion, 3, seed=seed), noise)
        assert len(calls) == 3 * 5
        return edit, [seen.options["context_window"].index_list for seen in calls[1::3]]

    (edit, found), (again, same), (other, others) = drawn(0), drawn(0), drawn(9)
    assert found == [keyframes_of(cove, inversion, 4 - i, 3) for i in range(5)] and len(set(map(tuple, found))) > 1
    assert same == found and torch.equal(again, edit)
    assert others != found and not torch.equal(other, edit)


# --- limits with known answers ---


@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_of_one_frame_is_the_plain_model(small, nodes, blend):
    _, inversion = invert(nodes, small, latent=latents(1))
    model = flow(nodes, small, inversion, blend_keyframes=blend)
    assert torch.equal(answer_at(model, inversion, 1), answer_at(small, inversion, 1))


def test_token_flow_with_every_frame_a_keyframe_is_joint_attention(small, nodes):
    _, inversion = invert(nodes, small)
    model = flow(nodes, small, inversion, 1, blend_keyframes=False)
    together = answer_at(joint(nodes, small), inversion, 1)
    assert torch.equal(answer_at(model, inversion, 1), together)
    assert not torch.equal(answer_at(flow(nodes, small, inversion, 1), inversion, 1), together)


@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_edits_a_still_clip_like_one_frame(small, nodes, blend):
    still = {"samples": latents(1)["samples"].expand(LONG, -1, -1, -1)}
    noise, inversion = invert(nodes, small, latent=still)
    edit = sample(nodes, flow(nodes, small, inversion, 3, blend_keyframes=blend), noise)
    assert_close(edit, edit[:1].expand_as(edit), rtol=1e-4, atol=1e-3)
    one = sample(nodes, small, noise | {"samples": noise["samples"][:1]})
    assert_close(edit[:1], one, rtol=1e-3, atol=1e-3)


def test_token_flow_with_an_interval_beyond_the_clip_has_one_keyframe(small, nodes, cove, recorded):
    _, inversion = invert(nodes, small, latent=latents(LONG))
    answer_at(flow(nodes, small, inversion, 1000), inversion, 1)
    (keyframe,) = keyframes_of(cove, inversion, 1, 1000)
    for seen in recorded[-7:]:
        for half in seen.result.chunk(2):
            # every token of every frame comes from the keyframe
            distance = torch.cdist(half.flatten(0, 1), half[keyframe], compute_mode="donot_use_mm_for_euclid_dist")
            assert distance.amin(dim=1).max() == 0


# --- batches of conditionings, areas ---


@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_is_independent_of_the_order_of_conditionings(comfy, small, nodes, monkeypatch, blend):
    import comfy.samplers

    _, inversion = invert(nodes, small, latent=latents(LONG))
    model = flow(nodes, small, inversion, 3, blend_keyframes=blend)

    def answer(model, batches, cfg=5.0):
        with watched(small) as calls:
            result = answer_at(model, inversion, 1, cfg=cfg)
        assert [seen.options["cond_or_uncond"] for seen in calls] == [[0], *batches * (2 if blend else 1)]
        return result

    together = answer(model, [[1, 0]])
    swapped = model.clone()
    swapped.model_options["sampler_calc_cond_batch_function"] = lambda seen: comfy.samplers.calc_cond_batch(
        seen["model"], seen["conds"][::-1], seen["input"], seen["sigma"], seen["model_options"]
    )[::-1]
    assert_close(answer(swapped, [[1, 0]]), together, rtol=1e-3, atol=2e-3)
    set_free_memory(monkeypatch, 0)
    assert_close(answer(model, [[1], [0]]), together, rtol=1e-3, atol=2e-3)
    monkeypatch.undo()
    # cfg 1 skips the negative half; the same prompt twice cancels guidance
    alone = answer(model, [[0]], cfg=1.0)
    assert_close(answer_at(model, inversion, 1, prompt(2), prompt(2), 5.0), alone, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_crops_the_fields_to_an_area(small, nodes, cove, recorded, blend):
    _, inversion = invert(nodes, small, latent=latents(LONG))
    model = flow(nodes, small, inversion, 3, blend_keyframes=blend)
    whole = answer_at(model, inversion, 1)
    assert_close(answer_at(model, inversion, 1, prompt(2, area=(HEIGHT, WIDTH, 0, 0))), whole, rtol=1e-4, atol=1e-4)

    recorded.clear()
    height, width, top, left = area = (3, 4, 1, 3)
    answer_at(model, inversion, 1, [*prompt(2), *prompt(4, area=area)], cfg=1.0)
    keyframes = keyframes_of(cove, inversion, 1, 3)
    between = cove.tokenflow.between_keyframes(LONG, keyframes, blend)
    fields = cove.tokenflow.nearest_tokens(recorded[0].result, keyframes, between)
    inside = [(row, column) for row in range(top, top + height) for column in range(left, left + width)]
    cut = torch.empty(LONG, 2, len(inside), dtype=torch.int64)
    for i in range(LONG):
        for side in range(2):
            for p, (row, column) in enumerate(inside):
                found = divmod(int(fields[i, side, row * WIDTH + column]), WIDTH)
                cut[i, side, p] = sum(
                    min(max(at - first, 0), size - 1) * step
                    for at, first, size, step in zip(found, (top, left), (height, width), (width, 1), strict=True)
                )
    parts = [seen for seen in recorded if seen.place == recorded[0].place and seen.qkv[0].shape[1] == len(inside)]
    qkv = [x if blend else x[keyframes] for x in parts[0].qkv]
    base = cove.reference.spatial_temporal_attention(*qkv, len(keyframes), parts[0].options["n_heads"])
    assert_close(parts[-1].result, cove.tokenflow.propagate(base, cut, between), rtol=1e-4, atol=1e-4)


# --- context windows ---


@pytest.mark.parametrize("blend", [True, False])
@pytest.mark.parametrize("order", ["core before", "core after", "evolved before", "evolved after"])
def test_token_flow_treats_a_context_window_as_a_clip(small, nodes, order, blend):
    _, inversion = invert(nodes, small, latent=latents(5), steps=4)
    model = windows_of(small, order, lambda model: flow(nodes, model, inversion, 2, blend_keyframes=blend))
    total, count = torch.zeros_like(inversion.clip), torch.zeros(5, 1, 1, 1)
    for frames, batch in windows_in(order):
        asked = (down(inversion), -2 - 1, prompt(2), prompt(3), 2.0)
        cut = flow(nodes, small, part_of(inversion, batch), 2, blend_keyframes=blend)
        total[frames] += ask(cut, noise_like(inversion)[batch], *asked)[-len(frames) :]
        count[frames] += 1
    assert_close(answer_at(model, inversion, 1), total / count, rtol=1e-4, atol=1e-4)


# --- families and numbers ---


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_token_flow_edits_every_family(load, nodes, kind):
    with torch.inference_mode():
        model, state = load(kind), state_of(load(kind))
        source, edit, negative = (prompt(seed, kind) for seed in (1, 2, 3))
        noise, inversion = invert(nodes, model, source, latents(), steps=1)
        edited = sample(nodes, flow(nodes, model, inversion), noise, edit, negative)
        assert edited.isfinite().all()
        assert not torch.equal(edited, sample(nodes, model, noise, edit, negative))
        assert state_of(model) == state


def test_token_flow_keeps_fields_of_every_transformer_of_a_block(nodes, recorded):
    """SDXL has several transformers per block."""
    with torch.inference_mode():
        model = tiny("sdxl")
        _, inversion = invert(nodes, model, prompt(1, "sdxl"), latents(), steps=1)
        answer_at(flow(nodes, model, inversion), inversion, 0, prompt(2, "sdxl"), prompt(3, "sdxl"))
    places = [seen.place for seen in recorded]
    blocks = len(set(places))
    assert places[:blocks] == places[blocks : 2 * blocks] == places[2 * blocks :]
    assert {index for *_, index in places} == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_in_half_precision_is_finite_and_close(small, nodes, dtype, blend):
    """Rounding may change the nearest token among near ties, so the median error is compared."""
    half = small.clone()
    half.set_model_compute_dtype(dtype)
    _, inversion = invert(nodes, small, latent=latents(LONG))

    def error(flowing):
        exact, rounded = (answer_at(flowing(model), inversion, 1) for model in (small, half))
        assert rounded.dtype == torch.float32 and rounded.isfinite().all()
        return (rounded - exact).abs().median()

    flowing = partial(flow, nodes, inversion=inversion, every=3, blend_keyframes=blend)
    assert 0 < error(flowing) < 3 * error(lambda model: model)
