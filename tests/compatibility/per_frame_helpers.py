"""Shared by the tests of per-frame inputs: prompts, hints and image prompts, context windows, comparison."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import HEIGHT, WIDTH, call, hints, prompt, windowed
from tests.inversion_helpers import tiny

LONG = 5


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


def alone(nodes, model):
    """Return MODEL with Correspondence Attention in which frames attend only to themselves."""
    return call(nodes["CorrespondenceAttention"], model=model, spatial_temporal="own frame")[0]
