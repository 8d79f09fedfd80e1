"""A run of the sampler as ComfyUI's nodes start it, and what the blocks of the UNet know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from . import options
from .batch import cut_conds, cut_controls
from .checks import check_channels, check_finite
from .errors import NodeError
from .memory import reserve_frames
from .options import Area, Cut, RunInfo, ad_params_of, frames_in, options_with

# --- starting a run ---


def run_sampler(
    model,
    function: Callable[..., Tensor],
    latent: dict[str, Any],
    sigmas: Tensor,
    positive,
    negative=None,
    cfg: float = 1.0,
    *,
    callback: Callable | None = None,
    at_once: int | None = None,
) -> dict[str, Any]:
    """Run a k-diffusion style function on a LATENT as ComfyUI's samplers do, without adding noise.

    at_once: how many frames the function evaluates at a time; by default all.
    """
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    check_channels(model, samples)
    check_finite(samples, "latents that came in")
    model = model.clone()
    publish_run(model)
    if at_once is not None:
        reserve_frames(model, options.RUN, at_once)
    result = comfy.sample.sample_custom(
        model,
        torch.zeros_like(samples),
        cfg,
        comfy.samplers.KSAMPLER(function),
        sigmas,
        positive,
        positive if negative is None else negative,
        samples,
        callback=callback,
        seed=0,
    )
    carried = {name: value for name, value in latent.items() if name not in (options.SIGMAS, options.GUIDANCE)}
    return carried | {"samples": result}


def run_unet(denoise, x: Tensor, frames: Sequence[int], sigma: Tensor, model_options: dict[str, Any]) -> None:
    """Run the UNet once inside `run_sampler` on some frames, with the positive prompt, without guiders and windows."""
    guider = denoise.inner_model
    model_options = _only_ours({**model_options, "context_handler": None})
    model_options = options_with(model_options, **{options.CONTEXT_WINDOW: Cut(list(frames))})
    conds = [guider.conds["positive"]]
    comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, sigma.expand(len(x)), model_options)


def plain_conditioning(model, conditioning=None):
    """Return the first of the conditionings for the whole picture and without control; zeros if there is none."""
    if conditioning:
        text, extras = conditioning[0]
        cut = ("control", "control_apply_to_uncond", "area", "mask", "gligen", "start_percent", "end_percent", "hooks")
        return [[text, {name: value for name, value in extras.items() if name not in cut}]]
    width = model.model.model_config.unet_config["context_dim"]
    # SDXL and its refiner need the pooled text of their larger encoder, 1280 numbers; other models ignore it.
    return [[torch.zeros(1, 77, width), {"pooled_output": torch.zeros(1, 1280)}]]


# --- around a run ---


def publish_run(model) -> None:
    """Publish a RunInfo to the blocks of this clone of MODEL, and cut what goes with frames where batches are cut."""
    if not model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, options.RUN):
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, options.RUN, _around_run)


@dataclass(eq=False)
class _Clip:
    """The clip of one run, and its ControlNets cut to parts of it, kept for the evaluations at one sigma.

    was_cut: whether some evaluation of the run was on a part of the clip.
    kept: of every `RunInfo` of the run.
    """

    frames: int
    was_cut: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)
    sigma: float = -1.0
    controls: dict[tuple[int, ...], dict[int, Any]] = field(default_factory=dict)


def _around_run(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    inside = partial(_evaluate, _Clip(len(noise)))
    extra_args = {**extra_args, "model_options": _with_innermost(extra_args["model_options"], inside)}
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def _with_innermost(model_options: dict[str, Any], inside) -> dict[str, Any]:
    """Return a copy of model_options in which this pack's wrappers of an evaluation come last, and `inside` after them.

    So they see the batch as the UNet gets it: windows that other packs cut in a wrapper of their own are cut around
    them, whichever node was applied first.
    """
    around, ours = _evaluation_wrappers(model_options)
    return _with_evaluation_wrappers(model_options, {**around, **ours, options.RUN: [inside]})


def _only_ours(model_options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of model_options without the wrappers that other packs have around an evaluation."""
    return _with_evaluation_wrappers(model_options, _evaluation_wrappers(model_options)[1])


def _evaluation_wrappers(model_options: dict[str, Any]) -> tuple[dict[str, list], dict[str, list]]:
    """Return those of other packs, and those of this one."""
    wrappers = model_options["transformer_options"].get("wrappers", {}).get(WrappersMP.CALC_COND_BATCH, {})
    ours = {key: some for key, some in wrappers.items() if str(key).startswith(options.RUN)}
    return {key: some for key, some in wrappers.items() if key not in ours}, ours


def _with_evaluation_wrappers(model_options: dict[str, Any], some: dict[str, list]) -> dict[str, Any]:
    wrappers = model_options["transformer_options"].get("wrappers", {})
    return options_with(model_options, wrappers={**wrappers, WrappersMP.CALC_COND_BATCH: some})


def _evaluate(clip: _Clip, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
    frames, sigma = frames_in(model_options["transformer_options"]), float(timestep[0])
    if len(x_in) != (clip.frames if frames is None else len(frames)):
        raise NodeError(
            "COVE",
            f"the model was run on {len(x_in)} frames of a clip of {clip.frames}, and no context window says on which. "
            f"Remove the node that cuts batches, or use ComfyUI's or AnimateDiff-Evolved's context windows.",
        )
    if frames is not None:
        clip.was_cut = True
        if clip.sigma != sigma:
            clip.sigma, clip.controls = sigma, {}
        conds = cut_conds(conds, frames, range(len(frames)), clip.frames)
        conds = cut_controls(conds, frames, clip.controls.setdefault(frames, {}))
    size = tuple(x_in.shape[-2:])

    def inside(height: int, width: int, top: int, left: int) -> Area:
        """As the host cuts an area that reaches past the picture."""
        return min(height, size[0] - top), min(width, size[1] - left), top, left

    areas = {cond["uuid"]: inside(*cond["area"]) for some in conds for cond in some or [] if "area" in cond}
    whole = tuple(range(clip.frames))
    info = RunInfo(sigma, size, areas, whole if frames is None else frames, clip.kept)
    # Advanced-ControlNet keeps the hints of the part before unless the whole clip is named frame by frame.
    named = whole if frames is None and clip.was_cut else frames
    ad_params = ad_params_of(model_options["transformer_options"], named, clip.frames)
    published = {options.RUN: info, options.AD_PARAMS: ad_params}
    return executor(model, conds, x_in, timestep, options_with(model_options, **published))
