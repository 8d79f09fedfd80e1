"""Correspondence Attention in a real UNet: each block against the reference, for every way the host calls it."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from tests.helpers import (
    FRAMES,
    HEIGHT,
    WIDTH,
    call,
    latents,
    predict,
    prompt,
    run_stock,
    set_free_memory,
    state_of,
    windowed,
)

LEVEL_0, LEVEL_1 = (5, 7), (3, 4)  # token grids of 5x7 latents in a UNet of two levels


@pytest.fixture
def matches(cove):
    """(frames, grid) -> a correspondence of random tokens: any token may match any other, none twice."""

    def random(frames=FRAMES, grid=LEVEL_0, k=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        tokens = grid[0] * grid[1]
        both = torch.rand((2, frames - 1, tokens, tokens), generator=generator).argsort(-1)[..., :k].int()
        return cove.correspondence.Correspondence(*both, *grid, window=3)

    return random


@pytest.fixture
def guide(nodes):
    """MODEL and settings -> MODEL patched by Correspondence Attention."""
    return lambda model, correspondence=None, **settings: call(
        nodes["CorrespondenceAttention"], model=model, correspondence=correspondence, **settings
    )[0]


@pytest.fixture
def recorded(host_module, monkeypatch):
    """Every later call of the patch: its inputs and its result."""
    calls, original = [], host_module.attention.GuidedSelfAttention.__call__

    def record(self, query, key, value, options):
        result = original(self, query, key, value, options)
        calls.append(SimpleNamespace(patch=self, qkv=(query, key, value), options=options, result=result))
        return result

    monkeypatch.setattr(host_module.attention.GuidedSelfAttention, "__call__", record)
    return calls


def reference(cove, seen, correspondence, merge_ratio=0.5, window=None, stride=1, include_self=False):
    """Return the expected result of a recorded call, computed in plain loops."""
    heads, conds = seen.options["n_heads"], len(seen.options["cond_or_uncond"])
    frames = seen.qkv[0].shape[0] // conds
    numbers = range(frames) if window is None else window
    seen_by_all = [place for place, frame in enumerate(numbers) if stride and frame % stride == 0]
    tokens = cove.reference.key_frame_attention(*seen.qkv, frames, heads, seen_by_all)
    if correspondence is None or seen.options["activations_shape"][2:] != [correspondence.height, correspondence.width]:
        return tokens
    clips = tokens.unflatten(0, (conds, frames))
    guided = cove.reference.correspondence_attention(clips, correspondence, heads, merge_ratio, window, include_self)
    return guided.flatten(0, 1)


@pytest.mark.parametrize(
    ("merge_ratio", "spatial_temporal", "include_self", "grid"),
    [
        (0.5, "all frames", False, LEVEL_0),
        (0.5, "all frames", True, LEVEL_0),
        (0.0, "own frame", False, LEVEL_0),
        (0.5, "every 2nd frame", False, LEVEL_0),
        (0.5, "every 4th frame", False, None),
        (0.25, "all frames", False, LEVEL_1),
        (0.5, "all frames", False, None),
    ],
)
def test_correspondence_attention_matches_reference_in_every_block(
    sd15, cove, guide, matches, recorded, merge_ratio, spatial_temporal, include_self, grid
):
    correspondence = matches(grid=grid) if grid else None
    settings = {"merge_ratio": merge_ratio, "include_self": include_self}
    model = guide(sd15, correspondence, **settings, spatial_temporal=spatial_temporal)
    predict(model, latents(), prompt(1))
    grids = [tuple(seen.options["activations_shape"][2:]) for seen in recorded]
    assert grids == [LEVEL_0, LEVEL_1, LEVEL_1, LEVEL_1, LEVEL_1, LEVEL_0, LEVEL_0]
    for seen in (recorded[0], recorded[2], recorded[-1]):
        stride = {"all frames": 1, "every 2nd frame": 2, "every 4th frame": 4, "own frame": None}[spatial_temporal]
        expected = reference(cove, seen, correspondence, **settings, stride=stride)
        assert_close(seen.result, expected, rtol=1e-4, atol=1e-4)


def test_correspondence_attention_keeps_the_device(sd15, guide, matches, recorded):
    """Repeat each call with fake CUDA tensors; the correspondence is on the CPU, as in the nodes."""
    from comfy.ldm.modules.attention import attention_pytorch

    predict(guide(sd15, found := matches(), include_self=True), latents(), prompt(1))
    for seen in recorded[:]:
        options = dict(seen.options)
        # ComfyUI's choice on a GPU; its choice on a CPU queries the free memory.
        options["optimized_attention_override"] = lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)
        with FakeTensorMode():
            links = {name: torch.empty(found.forward.shape, dtype=torch.int32) for name in ("forward", "backward")}
            query, key, value = (torch.empty(x.shape, device="cuda") for x in seen.qkv)
            result = replace(seen.patch, correspondence=replace(found, **links))(query, key, value, options)
        assert (result.device, result.shape) == (query.device, seen.result.shape)


# --- batches of conditionings ---


def test_correspondence_attention_is_independent_of_the_order_of_conditionings(
    comfy, sd15, guide, matches, recorded, monkeypatch
):
    import comfy.samplers

    model = guide(sd15, matches())
    arguments = (latents(), prompt(1), prompt(2), 5.0)

    def batches():
        return [seen.options["cond_or_uncond"] for seen in recorded][:: len(model_blocks(model))]

    together = predict(model, *arguments)
    assert batches() == [[1, 0]]

    recorded.clear()
    swapped = model.clone()
    swapped.model_options["sampler_calc_cond_batch_function"] = lambda seen: comfy.samplers.calc_cond_batch(
        seen["model"], seen["conds"][::-1], seen["input"], seen["sigma"], seen["model_options"]
    )[::-1]
    assert_close(predict(swapped, *arguments), together, rtol=1e-3, atol=2e-3)
    assert batches() == [[1, 0]] and len(recorded) == len(model_blocks(model))

    recorded.clear()
    set_free_memory(monkeypatch, 0)
    assert_close(predict(model, *arguments), together, rtol=1e-3, atol=2e-3)
    assert sorted(batches()) == [[0], [1]]

    # cfg 1 skips the negative half; a negative prompt equal to the positive one cancels guidance at any cfg
    recorded.clear()
    alone = predict(model, latents(), prompt(1), prompt(2), cfg=1.0)
    assert batches() == [[0]]
    monkeypatch.undo()
    assert_close(predict(model, latents(), prompt(1), prompt(1), cfg=5.0), alone, rtol=1e-4, atol=1e-4)


def model_blocks(model) -> dict:
    return model.model_options["transformer_options"]["patches_replace"]["attn1"]


# --- more than two conditionings ---


@pytest.mark.parametrize("grid", [LEVEL_0, LEVEL_1])
def test_correspondence_attention_crops_the_correspondence_to_areas(sd15, cove, guide, matches, recorded, grid):
    correspondence = matches(grid=grid)
    level, shape = (0, (3, 4)) if grid == LEVEL_0 else (1, (2, 2))
    model = guide(sd15, correspondence)

    def calls(*areas) -> tuple[SimpleNamespace, list]:
        """Return the first guided call on part of the picture, and query, key, value, result of each conditioning."""
        recorded.clear()
        predict(model, latents(), [*prompt(0), *(prompt(1, area=area)[0] for area in areas)])
        guided = (seen for seen in recorded if seen.patch.level == level)
        seen = next(seen for seen in guided if seen.options["activations_shape"][2:] == list(shape))
        assert len(seen.options["uuids"]) == len(areas)
        return seen, list(zip(*(x.chunk(len(areas)) for x in (*seen.qkv, seen.result)), strict=True))

    # Equal sizes at different places, so that they form one batch; each place is first checked alone.
    places = {(1, 3): (3, 4, 1, 3), (2, 0): (3, 4, 2, 0), (0, 3): ("percentage", 3 / 5, 4 / 7, 0, 3 / 7)}
    alone = []
    for (top, left), area in places.items():
        seen, (one,) = calls(area)
        part = cut_out(cove, correspondence, top >> level, left >> level, *shape)
        assert_close(seen.result, reference(cove, seen, part), rtol=1e-4, atol=1e-4)
        alone.append(one)
    _, together = calls(*places.values())
    for query, _, _, result in together:
        (expected,) = (one[-1] for one in alone if torch.allclose(one[0], query, rtol=1e-3, atol=1e-3))
        assert_close(result, expected, rtol=1e-3, atol=1e-3)


def cut_out(cove, correspondence, top, left, height, width):
    """Return part of a correspondence, token by token; matches outside move to the nearest token inside."""

    def part(link):
        rows = []
        for row in range(top, top + height):
            for column in range(left, left + width):
                away = link[row * correspondence.width + column].tolist()
                places = [divmod(token, correspondence.width) for token in away]
                inside = [(min(max(r - top, 0), height - 1), min(max(c - left, 0), width - 1)) for r, c in places]
                rows.append([r * width + c for r, c in inside])
        return torch.tensor(rows, dtype=torch.int32)

    both = (torch.stack([part(link) for link in links]) for links in (correspondence.forward, correspondence.backward))
    return cove.correspondence.Correspondence(*both, height, width, correspondence.window)


def test_correspondence_attention_mixes_masked_and_combined_prompts_like_the_host(comfy, sd15, guide, matches):
    model = guide(sd15, matches())
    one, two, three = (predict(model, latents(), prompt(seed)) for seed in (1, 2, 3))
    mask = torch.zeros(1, HEIGHT * 8, WIDTH * 8)
    mask[:, :, :24] = 1.0
    masked = [*prompt(1, mask=mask), *prompt(2, mask=1 - mask)]
    left = torch.nn.functional.interpolate(mask[None], (HEIGHT, WIDTH), mode="bilinear")
    assert_close(predict(model, latents(), masked), left * one + (1 - left) * two, rtol=1e-4, atol=1e-3)
    several = [*prompt(1), *prompt(2, strength=2.0)]
    mixed = (one + 2 * two) / 3
    assert_close(predict(model, latents(), several), mixed, rtol=1e-4, atol=1e-3)
    with_negative = predict(model, latents(), several, prompt(3), cfg=2.0)
    assert_close(with_negative, 2 * mixed - three, rtol=1e-4, atol=1e-3)


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_correspondence_attention_in_half_precision_is_as_exact_as_plain_attention(sd15, guide, matches, dtype):
    def error(model):
        half = model.clone()
        half.set_model_compute_dtype(dtype)
        exact, rounded = (predict(each, latents(), prompt(1)) for each in (model, half))
        assert rounded.dtype == torch.float32 and rounded.isfinite().all()
        return (rounded - exact).abs().mean()

    plain, guided = error(sd15), error(guide(sd15, matches()))
    assert 0 < guided < 2 * plain


# --- frames ---


def test_correspondence_attention_counts_every_4th_frame_of_the_clip_in_a_window(
    comfy, sd15, cove, guide, matches, recorded
):
    """In the window of frames 2 to 4, tokens see their own frame and frame 4."""
    model = windowed(
        guide(sd15, matches(frames=5), spatial_temporal="every 4th frame"), context_length=3, causal_window_fix=False
    )
    predict(model, latents(5), prompt(1))
    for frames, seen in zip([[0, 1, 2], [2, 3, 4]], recorded[:: len(model_blocks(model))], strict=True):
        expected = reference(cove, seen, matches(frames=5), window=frames, stride=4)
        assert_close(seen.result, expected, rtol=1e-4, atol=1e-4)


def test_correspondence_attention_uses_the_matches_of_a_window(comfy, sd15, cove, guide, matches, recorded):
    correspondence = matches(frames=5)
    # Windows after and before our node.
    plain = {"context_length": 3, "causal_window_fix": False}
    after = windowed(guide(sd15, correspondence), **plain)
    got = predict(after, latents(5), prompt(1), prompt(2), cfg=2.0)
    windows = [[0, 1, 2], [2, 3, 4]]
    blocks = len(model_blocks(after))
    for frames, seen in zip(windows, recorded[::blocks], strict=True):
        assert seen.options["context_window"].index_list == frames
        assert_close(seen.result, reference(cove, seen, correspondence, window=frames), rtol=1e-4, atol=1e-4)

    before = guide(windowed(sd15, **plain), correspondence)
    assert torch.equal(predict(before, latents(5), prompt(1), prompt(2), cfg=2.0), got)

    # AnimateDiff-Evolved cuts the same windows in its own wrapper, inside or around ours.
    def evolved(executor, model, conds, x, timestep, model_options):
        total, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        for frames in windows:
            model_options["transformer_options"]["ad_params"]["sub_idxs"] = frames
            parts = executor(model, conds, x[frames], timestep[frames], model_options)
            for whole, part in zip(total, parts, strict=True):
                whole[frames] += part
            count[frames] += 1
        return [whole / count for whole in total]

    for inner in (True, False):
        model = sd15.clone()
        model.model_options["transformer_options"]["ad_params"] = {"sub_idxs": None}
        model = guide(model, correspondence) if inner else model
        model.add_wrapper_with_key("calc_cond_batch", "ADE", evolved)
        model = model if inner else guide(model, correspondence)
        assert_close(predict(model, latents(5), prompt(1), prompt(2), cfg=2.0), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"start_percent": 1.0}, {"end_percent": 0.0}])
def test_correspondence_attention_outside_its_percents_is_the_plain_model(sd15, guide, matches, settings):
    assert torch.equal(
        predict(guide(sd15, matches(), **settings), latents(), prompt(1)), predict(sd15, latents(), prompt(1))
    )


def test_correspondence_attention_is_active_from_start_to_end_percent(sd15, guide, matches):
    sampling = sd15.get_model_object("model_sampling")
    part = guide(sd15, matches(), start_percent=0.25, end_percent=0.75)
    whole = guide(sd15, matches())
    for percent, there in ((0.2, False), (0.3, True), (0.7, True), (0.8, False)):
        sigma = sampling.percent_to_sigma(percent)
        got, plain, guided = (predict(model, latents(), prompt(1), sigma=sigma) for model in (part, sd15, whole))
        assert not torch.equal(plain, guided)
        assert torch.equal(got, guided if there else plain)


def test_correspondence_attention_of_one_frame_is_the_plain_model(sd15, guide, matches):
    one = latents(frames=1)
    assert torch.equal(predict(guide(sd15, matches(frames=1)), one, prompt(1)), predict(sd15, one, prompt(1)))


# --- no trace, no sharing ---


def test_correspondence_attention_models_share_nothing_and_leave_no_trace(sd15, guide, matches):
    before = predict(sd15, latents(), prompt(1))
    state = state_of(sd15)
    random = torch.random.get_rng_state()
    first, second = guide(sd15, matches(seed=1)), guide(sd15, matches(seed=2), merge_ratio=0.0)
    alone = [predict(model, latents(), prompt(1)) for model in (first, second)]
    assert not torch.equal(*alone)
    for model, expected in ((second, alone[1]), (sd15, before), (first, alone[0]), (first, alone[0])):
        assert torch.equal(predict(model, latents(), prompt(1)), expected)
    assert state_of(sd15) == state
    assert torch.equal(torch.random.get_rng_state(), random)


def test_correspondence_attention_survives_clones_without_copying_the_matches(sd15, guide, matches):
    """MODEL.clone() makes a deep copy of its options."""
    correspondence = matches()
    guided = guide(sd15, correspondence)
    clone = copy.copy(guided.clone()).clone()
    assert all(patch.correspondence is correspondence for patch in model_blocks(clone).values())
    assert torch.equal(predict(clone, latents(), prompt(1)), predict(guided, latents(), prompt(1)))


def test_correspondence_attention_works_with_perturbed_attention_guidance(comfy, sd15, guide, matches):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    guided = guide(sd15, matches())
    after = run_stock(PerturbedAttentionGuidance, guided, 3.0)[0]
    before = guide(run_stock(PerturbedAttentionGuidance, sd15, 3.0)[0], matches())
    got = predict(after, latents(), prompt(1), prompt(2), cfg=2.0)
    assert got.isfinite().all()
    assert (got - predict(guided, latents(), prompt(1), prompt(2), cfg=2.0)).abs().mean() > 1e-3
    assert torch.equal(predict(before, latents(), prompt(1), prompt(2), cfg=2.0), got)


def test_correspondence_attention_is_independent_of_weight_offloading(comfy, sd15, guide, matches, monkeypatch):
    """With low memory, weights move to the device layer by layer, after patching."""
    import comfy.model_management as management

    expected = predict(guide(sd15, matches()), latents(), prompt(1))
    management.unload_all_models()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    guided = guide(sd15, matches())
    got = predict(guided, latents(), prompt(1))
    assert guided.model.model_lowvram
    management.unload_all_models()
    assert torch.equal(got, expected)


def test_attend_with_avoids_sub_quadratic_attention_for_joint_frames(host_module, monkeypatch):
    """ComfyUI's sub-quadratic attention takes twice the time; it is kept if requested, and for single frames."""
    from comfy.cli_args import args
    from comfy.ldm.modules import attention

    query, attend_with = torch.zeros(1, 1, 1), host_module.attention.attend_with
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_sub_quad)
    assert attend_with(query, {}, jointly=2).func is attention.attention_pytorch
    assert attend_with(query, {}).func is attention.attention_sub_quad
    assert attend_with(query.to("meta"), {}, jointly=2).func is attention.attention_sub_quad
    monkeypatch.setattr(args, "use_quad_cross_attention", True)
    assert attend_with(query, {}, jointly=2).func is attention.attention_sub_quad
    monkeypatch.setattr(args, "use_quad_cross_attention", False)
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_split)
    assert attend_with(query, {}, jointly=2).func is attention.attention_split
