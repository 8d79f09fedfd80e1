"""Per-frame inputs stay with their frames wherever a batch is cut: by batch size, keyframes or windows.

Each test compares with an uncut run. Frames attend only to themselves, so a cut must not change the result.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.compatibility.per_frame_helpers import (
    CUTS,
    LONG,
    AnchoredWindows,
    alone,
    anchored,
    assert_near,
    drop_control,  # noqa: F401  (a fixture)
    evolved,
    hinted,
    image_prompts,
    masked,
    rows,
)
from tests.helpers import call, latents, predict, prompt
from tests.inversion_helpers import ALL, answer_at, flow, guide, inject, invert, sample, tiny

STEPS = LONG - 1  # core's windows (0.3.75) compare sigmas with frames one by one


@pytest.fixture(params=["before", "after"])
def cut_with(request):
    """Name of a cut, patch, MODEL -> MODEL cut before or after it is patched."""

    def made(cut, patch, model):
        return patch(CUTS[cut](model)) if request.param == "before" else CUTS[cut](patch(model))

    return made


# --- sampling ---


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["rows", "masks", "hints", "images"])
def test_correspondence_attention_of_own_frame_is_independent_of_windows(small, nodes, cut_with, cut, kind):
    make = {"rows": rows, "masks": masked, "hints": hinted}.get(kind, prompt)
    model = image_prompts(small) if kind == "images" else small
    asked = (latents(LONG), make(2), make(3), 2.0)
    expected = predict(alone(nodes, model), *asked)
    got = predict(cut_with(cut, lambda model: alone(nodes, model), model), *asked)
    assert_near(got, expected)


@pytest.mark.parametrize("cut", CUTS)
def test_ddim_inversion_and_sampler_are_independent_of_windows(small, nodes, cut):
    windowed = CUTS[cut](small)
    wires = {"conditioning": hinted(2), "latent": latents(LONG), "steps": STEPS}
    (noise, _), (expected, _) = (invert(nodes, model, **wires) for model in (windowed, small))
    # Hints hardly affect the noise.
    assert_near(noise["samples"], expected["samples"], 1e-5)
    edits = [sample(nodes, model, expected, hinted(3)) for model in (windowed, small)]
    assert_near(*edits, 1e-5)


@pytest.mark.parametrize("cut", ["anchored", "evolved"])
def test_cut_controls_cuts_hints_once_for_both_prompts(small, nodes, cut):
    """Both halves run together only while they share one ControlNet; the user's ControlNet is unchanged."""
    shared = hinted(1)
    (positive,) = shared
    negative = [[prompt(3)[0][0], {"control": positive[1]["control"]}]]
    before = dict(vars(positive[1]["control"]))
    seen = []
    model = CUTS[cut](alone(nodes, small))
    model.add_wrapper_with_key(
        "diffusion_model", "watch", lambda run, x, *more, **kw: seen.append(len(x)) or run(x, *more, **kw)
    )
    predict(model, latents(LONG), shared, negative, 2.0)
    assert seen == [6, 6]
    after = vars(positive[1]["control"])
    assert after.keys() == before.keys() and all(
        after[name] is before[name] for name in ("cond_hint", "cond_hint_original")
    )


# --- features ---


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["rows", "images"])
def test_diffusion_features_of_per_frame_inputs_are_independent_of_batch_size(small, nodes, batch_size, kind):
    model = image_prompts(small) if kind == "images" else small
    source = rows(1) if kind == "rows" else prompt(1)
    settings = {"latent": latents(LONG), "conditioning": source}
    expected = call(nodes["DiffusionFeatures"], model=model, batch_size=100, **settings)[0].tokens
    got = call(nodes["DiffusionFeatures"], model=model, batch_size=batch_size, **settings)[0].tokens
    assert_near(got, expected)
    for i in (0, LONG - 1):
        assert not torch.allclose(expected[i], expected[i - 1])


@pytest.mark.parametrize("cut", CUTS)
def test_diffusion_features_ignore_windows(small, nodes, cut):
    settings = {"latent": latents(LONG), "conditioning": rows(1), "batch_size": 3}
    expected = call(nodes["DiffusionFeatures"], model=small, **settings)[0].tokens
    assert torch.equal(call(nodes["DiffusionFeatures"], model=CUTS[cut](small), **settings)[0].tokens, expected)


def instruct(seed=0):
    """Return a tiny InstructPix2Pix MODEL, which concatenates latents of a picture with the noisy ones."""
    import comfy.model_patcher
    import comfy.supported_models

    plain = tiny(seed=seed)
    config = {**plain.model.model_config.unet_config, "in_channels": 8}
    model = comfy.supported_models.SD15_instructpix2pix(config).get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            weight.normal_(0, 0.5 / weight[0].numel() ** 0.5, generator=generator)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def test_diffusion_features_keep_pictures_of_instruct_models_with_their_frames(comfy, nodes):
    with torch.inference_mode():
        model = instruct()
        source = prompt(1, concat_latent_image=latents(LONG, seed=8)["samples"])
        settings = {"model": model, "latent": latents(LONG), "conditioning": source}
        expected = call(nodes["DiffusionFeatures"], batch_size=LONG, **settings)[0].tokens
        assert_near(call(nodes["DiffusionFeatures"], batch_size=3, **settings)[0].tokens, expected)
        edit = predict(alone(nodes, model), latents(LONG), source)
        windowed = predict(anchored(alone(nodes, model)), latents(LONG), source)
        assert_near(windowed, edit)


# --- source and edit ---


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["rows", "hints"])
def test_feature_injection_in_windows_injects_the_source_of_the_same_frames(small, nodes, cut_with, cut, kind):
    source = {"rows": rows, "hints": hinted}[kind](1)
    noise, inversion = invert(nodes, small, conditioning=source, latent=latents(LONG), steps=STEPS)

    def patch(model):
        return inject(nodes, model, inversion, conditioning=source, **ALL)

    # Several steps, because AnimateDiff-Evolved leaves its last window set after each.
    asked = (noise, rows(2), rows(3))
    assert_near(sample(nodes, cut_with(cut, patch, small), *asked), sample(nodes, patch(small), *asked))


@pytest.mark.parametrize("kind", ["rows", "masks", "hints", "images"])
def test_token_flow_keyframes_run_with_their_own_per_frame_inputs(small, nodes, kind):
    """Keyframes alone equal keyframes among all frames, the mode for AnimateDiff-Evolved."""
    make = {"rows": rows, "masks": masked, "hints": hinted}.get(kind, prompt)
    model = image_prompts(small) if kind == "images" else small
    _, inversion = invert(nodes, model, latent=latents(LONG), steps=2)
    asked = (inversion, 1, make(2), make(3))
    got = answer_at(flow(nodes, model, inversion, 3), *asked)
    expected = answer_at(flow(nodes, evolved(model, whole=True), inversion, 3), *asked)
    assert_near(got, expected)


class FollowingControl:
    """Hints selected by `ad_params` and cached until `sub_idxs` changes, as in Advanced-ControlNet."""

    def __init__(self, frames=LONG):
        self.strengths, self.kept, self.sub_idxs = torch.rand(frames), None, None

    def __call__(self, tokens, options):
        params = options["ad_params"]
        if params["sub_idxs"] is not None or self.kept is None:
            self.kept = self.strengths if params["sub_idxs"] is None else self.strengths[params["sub_idxs"]]
        batch = len(tokens) // len(options["cond_or_uncond"])
        shares = self.kept[torch.arange(batch) % len(self.kept)].repeat(len(options["cond_or_uncond"]))
        return tokens * (1 + shares[:, None, None])


def test_token_flow_publishes_the_whole_clip_after_the_keyframes(small, nodes):
    """Otherwise code that caches its last selection would apply the keyframes' to all frames."""
    follower = FollowingControl()
    model = small.clone()
    model.set_model_attn2_output_patch(follower)
    noise, inversion = invert(nodes, model, latent=latents(LONG))
    flowing = flow(nodes, model, inversion, 3)
    expected = sample(nodes, flow(nodes, evolved(model, whole=True), inversion, 3), noise)
    assert_near(sample(nodes, flowing, noise), expected)


# --- windows with an anchor ---


def test_correspondence_attention_treats_an_anchored_window_as_a_clip(small, nodes):
    guided = guide(nodes, small, latents(LONG))
    windows = ([0], [2, 3], [4, 1])
    batches = ([0], [1, 2, 3], [3, 4, 1])
    got = predict(anchored(guided, windows), latents(LONG), prompt(1))
    for frames, batch in zip(windows, batches, strict=True):
        own = predict(_only(guided, batch), latents(LONG), prompt(1))
        assert_near(got[frames], own[frames])


def _only(model, batch):
    """Return MODEL that runs only on these frames; the others are zeros."""

    class Part(AnchoredWindows):
        def execute(self, run, model, conds, x, timestep, model_options):
            model_options["transformer_options"]["context_window"] = SimpleNamespace(index_list=batch)
            whole = [torch.zeros_like(x) for _ in conds]
            for result, part in zip(whole, run(model, conds, x[batch], timestep[batch], model_options), strict=True):
                result[batch] = part
            return whole

    model = model.clone()
    model.model_options["context_handler"] = Part([batch])
    return model


def test_correspondence_attention_counts_an_anchor_inside_its_window_once(small, nodes):
    """Core runs the anchor twice; its matches are in a token's set only once."""
    guided = guide(nodes, small, latents(LONG), spatial_temporal="own frame")
    got = predict(anchored(guided, ([0, 1, 2, 3, 4], [4, 2, 3])), latents(LONG), prompt(1))
    whole, own = (predict(_only(guided, batch), latents(LONG), prompt(1)) for batch in ([*range(LONG)], [4, 2, 3]))
    assert not torch.allclose(whole[3], own[3], rtol=1e-2)
    assert_near(got[[2, 3, 4]], (whole + own)[[2, 3, 4]] / 2)
