"""What the blocks of the UNet know of the run around them, published in `transformer_options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.patcher_extension
from torch import Tensor

from .frames import ad_params_of, cut_conds, cut_controls, frames_in

KEY = "cove"  # of the wrappers, and of the RunInfo in transformer_options

WRAPPERS = comfy.patcher_extension.WrappersMP

Area = tuple[int, int, int, int]  # height, width, top and left, in latents


@dataclass(frozen=True)
class RunInfo:
    """One evaluation of the UNet.

    sigma: the noise level, as a number: reading it from a tensor would keep a GPU waiting in every block.
    latent_size: height and width of the whole latents.
    areas: of those conditionings that run on a part of the picture, by their uuid.
    frames: of the clip, in the order of the batch.
    """

    sigma: float
    latent_size: tuple[int, int]
    areas: Mapping[Any, Area]
    frames: tuple[int, ...]


def area_of(options: dict[str, Any], uuid) -> Area | None:
    """The area that a conditioning is run on; None for the whole picture."""
    return options[KEY].areas.get(uuid)


def latent_size(options: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the whole latents."""
    return options[KEY].latent_size


def sigma_of(options: dict[str, Any]) -> float:
    """The noise level."""
    return options[KEY].sigma


def frames_of(options: dict[str, Any]) -> tuple[int, ...]:
    """The frames of the clip in the batch, in its order."""
    return options[KEY].frames


def options_with(model_options: dict[str, Any], **published) -> dict[str, Any]:
    """A copy of model_options with more in its transformer_options."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), **published}}


def publish_run(model) -> None:
    """Publish a RunInfo to the blocks of this clone of MODEL, and cut what goes with frames where batches are cut."""
    if not model.get_wrappers(WRAPPERS.SAMPLER_SAMPLE, KEY):
        model.add_wrapper_with_key(WRAPPERS.SAMPLER_SAMPLE, KEY, _around_run)


@dataclass(eq=False)
class _Clip:
    """The clip of one run, and its ControlNets cut to parts of it, kept for the evaluations at one sigma.

    was_cut: whether some evaluation of the run was on a part of the clip.
    """

    frames: int
    was_cut: bool = False
    sigma: float = -1.0
    controls: dict[tuple[int, ...], dict[int, Any]] = field(default_factory=dict)


def _around_run(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
    inside = partial(_evaluate, _Clip(len(noise)))
    extra_args = {**extra_args, "model_options": with_innermost(extra_args["model_options"], inside)}
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def with_innermost(model_options: dict[str, Any], inside) -> dict[str, Any]:
    """A copy of model_options in which this pack's wrappers of an evaluation come last, and `inside` after them.

    So they see the batch as the UNet gets it: windows that other packs cut in a wrapper of their own are cut around
    them, whichever node was applied first.
    """
    around, ours = _evaluation_wrappers(model_options)
    return _with_evaluation_wrappers(model_options, {**around, **ours, KEY: [inside]})


def only_ours(model_options: dict[str, Any]) -> dict[str, Any]:
    """A copy of model_options without the wrappers that other packs have around an evaluation."""
    return _with_evaluation_wrappers(model_options, _evaluation_wrappers(model_options)[1])


def _evaluation_wrappers(model_options: dict[str, Any]) -> tuple[dict[str, list], dict[str, list]]:
    """Those of other packs, and those of this one."""
    wrappers = model_options["transformer_options"].get("wrappers", {}).get(WRAPPERS.CALC_COND_BATCH, {})
    ours = {key: some for key, some in wrappers.items() if str(key).startswith(KEY)}
    return {key: some for key, some in wrappers.items() if key not in ours}, ours


def _with_evaluation_wrappers(model_options: dict[str, Any], some: dict[str, list]) -> dict[str, Any]:
    wrappers = model_options["transformer_options"].get("wrappers", {})
    return options_with(model_options, wrappers={**wrappers, WRAPPERS.CALC_COND_BATCH: some})


def _evaluate(clip: _Clip, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
    options = model_options["transformer_options"]
    frames, sigma = frames_in(options), float(timestep[0])
    if len(x_in) != (clip.frames if frames is None else len(frames)):
        raise ValueError(
            f"COVE: the model was run on {len(x_in)} frames of a clip of {clip.frames}, and no context window says on "
            f"which. Remove the node that cuts batches, or use ComfyUI's or AnimateDiff-Evolved's context windows."
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
    info = RunInfo(sigma, size, areas, whole if frames is None else frames)
    # Advanced-ControlNet keeps the hints of the part before unless the whole clip is named frame by frame.
    named = whole if frames is None and clip.was_cut else frames
    published = {KEY: info, "ad_params": ad_params_of(options, named, clip.frames)}
    return executor(model, conds, x_in, timestep, options_with(model_options, **published))
