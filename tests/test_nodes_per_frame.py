"""Per-frame inputs stay with their frames wherever a batch is cut: by batch size, keyframes or windows.

Each test compares with an uncut run. Frames attend only to themselves, so a cut must not change the result.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import HEIGHT, WIDTH, call, hints, latents, predict, prompt, refused, windowed
from tests.inversion_helpers import ALL, answer_at, flow, guide, inject, invert, sample, store, tiny

LONG = 5
STEPS = LONG - 1  # core's windows (0.3.75) compare sigmas with frames one by one


def assert_near(got, expected, share=1e-3):
    """Check equality up to rounding, which depends on the batch size; a wrong row is off by a tenth or more."""
    assert (got - expected).norm() <= share * expected.norm()


# --- per-frame inputs ---


def rows(seed, frames=LONG):
    """Return a prompt with a row for each frame."""
    ((text, extras),) = prompt(seed)
    generator = torch.Generator().manual_seed(seed)
    return [[text + 5 * torch.randn(frames, 77, text.shape[2], generator=generator), extras]]


def masked(seed, frames=LONG):
    """Return a prompt with a mask for each frame, over an unmasked one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        *prompt(seed, mask=torch.rand(frames, 8 * HEIGHT, 8 * WIDTH, generator=generator)),
        *prompt(seed + 10, strength=0.3),
    ]


@cache
def tiny_control():
    """Return a random ControlNet of ComfyUI's own class for a tiny MODEL of two levels."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {name: value for name, value in tiny().model.model_config.unet_config.items() if name != "out_channels"}
    config |= {"hint_channels": 3, "operations": comfy.ops.disable_weight_init, "transformer_depth": [1, 1]}
    net, generator = comfy.cldm.cldm.ControlNet(**config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(0, 0.7 / weight[0].numel() ** 0.5, generator=generator)
    return comfy.controlnet.ControlNet(net.eval(), load_device=torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def drop_control():
    """Free the ControlNet before the host's modules are unloaded."""
    yield
    tiny_control.cache_clear()


def hinted(seed, frames=LONG):
    """Return a prompt with a hint for each frame, chained to a ControlNet with one hint for all frames."""
    from nodes import ControlNetApplyAdvanced

    conditioning = prompt(seed)
    for number, strength in ((1, 0.5), (frames, 1.0)):
        pictures = hints(number, seed=seed + number)
        apply = ControlNetApplyAdvanced().apply_controlnet
        conditioning = apply(conditioning, conditioning, tiny_control(), pictures, strength, 0.0, 1.0)[0]
    return conditioning


def image_prompts(model, frames=LONG, seed=3):
    """Return MODEL with an image prompt per frame as in IPAdapter: selected by `ad_params`, else by position."""
    images = torch.randn(frames, 11, generator=torch.Generator().manual_seed(seed))

    def added(tokens, options):
        params = options.get("ad_params")
        batch = len(tokens) // len(options["cond_or_uncond"])
        frames = range(batch) if params is None or params["sub_idxs"] is None else params["sub_idxs"]
        assert params is None or params["full_length"] == len(images)
        some = images[[*frames]].repeat(len(options["cond_or_uncond"]), 1).mean(1)
        return tokens + some[:, None, None]

    model = model.clone()
    model.set_model_attn2_output_patch(added)
    return model


# --- windows ---


def core_windows(model, length, **settings):
    """Return MODEL with the stock node's context windows, by default without the anchors of newer hosts."""
    return windowed(model, context_length=length, **{"causal_window_fix": False} | settings)


class AnchoredWindows:
    """Core's context handler since 0.21: a window runs with the frame before it, which is then removed.

    Like core's, it cuts tensors with a row for each frame and leaves hints whole.
    """

    context_length = 3

    def __init__(self, windows):
        self.windows = windows

    def should_use_context(self, model, conds, x_in, timestep, model_options):
        return True

    def execute(self, run, model, conds, x, timestep, model_options):
        total, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        for frames in self.windows:
            anchor = frames[0] - 1
            batch = [anchor, *frames] if anchor >= 0 else frames
            window = SimpleNamespace(index_list=frames, causal_anchor_index=anchor if anchor >= 0 else None)
            model_options["transformer_options"]["context_window"] = window
            cut = [some and [self.cut(cond, batch, len(x)) for cond in some] for some in conds]
            parts = run(model, cut, x[batch], timestep[batch], model_options)
            for whole, part in zip(total, parts, strict=True):
                whole[frames] += part[len(batch) - len(frames) :]
            count[frames] += 1
        return [whole / count for whole in total]

    @staticmethod
    def cut(cond, batch, clip):
        made = {
            name: value._copy_with(value.cond[batch]) if len(value.cond) == clip else value
            for name, value in cond["model_conds"].items()
        }
        mask = {"mask": cond["mask"][batch]} if "mask" in cond and len(cond["mask"]) == clip else {}
        return {**cond, "model_conds": made, **mask}


def anchored(model, windows=([0, 1, 2], [3, 4])):
    model = model.clone()
    model.model_options["context_handler"] = AnchoredWindows(windows)
    return model


def evolved(model, windows=([0, 1, 2], [2, 3, 4]), whole=False):
    """Return MODEL with AnimateDiff-Evolved's windows, cut in a wrapper; `whole` publishes the clip without a cut."""

    def cut(executor, model, conds, x, timestep, model_options):
        if whole:
            return executor(model, conds, x, timestep, model_options)
        total, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        params = model_options["transformer_options"]["ad_params"]
        for frames in windows:
            params |= {"sub_idxs": frames, "context_length": len(frames)}
            parts_of = [some and [AnchoredWindows.cut(cond, frames, len(x)) for cond in some] for some in conds]
            parts = executor(model, parts_of, x[frames], timestep[frames], model_options)
            for all_frames, part in zip(total, parts, strict=True):
                all_frames[frames] += part
            count[frames] += 1
        return [all_frames / count for all_frames in total]  # `sub_idxs` remains set, as in AnimateDiff-Evolved

    model = model.clone()
    params = {"full_length": LONG, "context_length": 3, "sub_idxs": None}
    model.model_options["transformer_options"]["ad_params"] = params
    model.add_wrapper_with_key("calc_cond_batch", "ADE", cut)
    return model


CUTS = {
    "core": lambda model: core_windows(model, 3),
    "core with anchors": lambda model: core_windows(model, 3, causal_window_fix=True),
    "anchored": anchored,
    "anchored and looped": lambda model: anchored(model, ([0, 1, 2], [3, 4, 2], [4, 0])),
    "evolved": evolved,
}


@pytest.fixture(params=["before", "after"])
def cut_with(request):
    """Name of a cut, patch, MODEL -> MODEL cut before or after it is patched."""

    def made(cut, patch, model):
        return patch(CUTS[cut](model)) if request.param == "before" else CUTS[cut](patch(model))

    return made


def alone(nodes, model):
    """Return MODEL with Correspondence Attention in which frames attend only to themselves."""
    return call(nodes["CorrespondenceAttention"], model=model, spatial_temporal="own frame")[0]


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


# --- errors ---

WRONG = {
    "prompt": (lambda: rows(1, 2), ("the prompt has 2 rows for 3 frames", "one for each frame")),
    "mask": (lambda: masked(1, 2), ("the mask of a prompt has 2 rows for 3 frames",)),
    "picture": (
        lambda: prompt(1, concat_latent_image=latents(2)["samples"]),
        ("InstructPixToPixConditioning", "2 rows for 3 frames"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_nodes_refuse_per_frame_inputs_for_other_frames(small, nodes, kind):
    make, wrong = WRONG[kind]
    with refused("DDIM Inversion", *wrong):
        invert(nodes, small, conditioning=make())
    noise, inversion = invert(nodes, small)
    with refused("DDIM Sampler", *wrong):
        sample(nodes, small, noise, make())
    with refused("Correspondence Attention", *wrong):  # in a stock sampler
        predict(alone(nodes, small), latents(), prompt(2), make(), 2.0)
    with refused("TokenFlow", *wrong):
        answer_at(flow(nodes, small, inversion), inversion, 1, make())
    with refused("Store Features", *wrong):
        store(nodes, small, inversion, conditioning=make())
    if kind != "mask":  # features always cover the whole picture
        with refused("Diffusion Features", *wrong):
            call(nodes["DiffusionFeatures"], model=small, latent=latents(), conditioning=make())


def test_cut_controls_refuses_another_packs_controlnet_that_cannot_be_cut(small, nodes):
    """Methods bound to the original, as in Advanced-ControlNet, would run with the hints of all frames."""
    ((text, extras),) = hinted(1)
    net = extras["control"]
    foreign = type("Foreign", (type(net),), {"__module__": "foreign_pack.nodes"})
    other = net.copy()
    other.__class__ = foreign
    conditioning = [[text, {**extras, "control": other}]]
    model = alone(nodes, small)
    assert predict(model, latents(LONG), conditioning).isfinite().all()
    with pytest.raises(ValueError, match=r"type Foreign \(foreign_pack\).*Advanced-ControlNet's for all"):
        predict(anchored(model), latents(LONG), conditioning)
    other.sub_idxs = None  # it reads ad_params itself
    assert predict(anchored(model), latents(LONG), conditioning).isfinite().all()


class Reference:
    """A hint that is not a picture, as in Advanced-ControlNet's reference: every attribute raises."""

    def __getattr__(self, name):
        raise AttributeError("Invalid use of Reference Preprocess output")


def test_nodes_refuse_reference_controlnets(small, nodes):
    ((text, extras),) = hinted(1)
    net = extras["control"].copy()
    net.cond_hint_original, net.strength = Reference(), 0.0
    conditioning = [[text, {**extras, "control": net}]]
    _, inversion = invert(nodes, small)
    wrong = ("expected ControlNets that take a picture", "got ControlNet", "Remove the reference")
    for node, model in (
        ("Correspondence Attention", alone(nodes, small)),
        ("TokenFlow", flow(nodes, small, inversion)),
    ):
        with refused(node, *wrong):
            answer_at(model, inversion, 1, conditioning)
    with refused("Store Features", *wrong):
        store(nodes, small, inversion, conditioning=conditioning)
    with refused("Feature Injection", *wrong):
        answer_at(inject(nodes, small, inversion, conditioning=conditioning, **ALL), inversion, 1)
    net.cond_hint_original, net.ref_opts = hints(1), object()  # its state after a run
    with refused("Correspondence Attention", *wrong):
        answer_at(alone(nodes, small), inversion, 1, conditioning)


def test_correspondence_attention_refuses_a_batch_cut_without_a_window(small, nodes):
    def cut(executor, model, conds, x, timestep, model_options):
        parts = [executor(model, conds, x[i : i + 2], timestep[i : i + 2], model_options) for i in range(0, len(x), 2)]
        return [torch.cat(some) for some in zip(*parts, strict=True)]

    model = small.clone()
    model.add_wrapper_with_key("calc_cond_batch", "cutter", cut)
    with pytest.raises(ValueError, match="run on 2 frames of a clip of 5, and no context window"):
        predict(alone(nodes, model), latents(LONG), prompt(1))
