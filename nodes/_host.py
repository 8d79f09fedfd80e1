"""What the pack knows about ComfyUI: its types, its UNet blocks, its patch slots, its sampling.

Everything here is read from ComfyUI 0.3.75 and kept to what core nodes use, too. Nothing is changed outside of clones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..cove.attention import correspondence_attention, spatial_temporal_attention
from ..cove.correspondence import Correspondence

FeaturesType = io.Custom("COVE_FEATURES")
CorrespondenceType = io.Custom("COVE_CORRESPONDENCE")

KEY = "cove"
GRID_KEY = "cove_sigmas"
# Core nodes that change how many tokens self-attention sees, by the file they stand in.
TOKEN_CHANGERS = {"nodes_tomesd": "Patch ToMe", "nodes_hypertile": "HyperTile"}

Block = tuple[str, int]


# --- the model ---------------------------------------------------------------------------------------------------


def unet_of(model, node: str) -> UNetModel:
    """The UNet of an SD-type MODEL, or an error that says what came instead."""
    unet = model.get_model_object("diffusion_model")
    predicts = (comfy.model_base.ModelType.EPS, comfy.model_base.ModelType.V_PREDICTION)
    if not isinstance(unet, UNetModel) or model.model.model_type not in predicts:
        raise ValueError(
            f"{node}: expected a Stable Diffusion UNet (SD1.5, SD2.x or SDXL, predicting epsilon or v) as `model`, "
            f"got {type(model.model).__name__} ({type(unet).__name__}, {model.model.model_type.name}). "
            f"Load such a checkpoint."
        )
    return unet


def self_attention_levels(unet: UNetModel) -> dict[Block, int]:
    """Each block with self-attention, and how many times its grid has been halved from latent size."""
    levels, level = {}, 0
    for name, blocks in (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks)):
        for number, block in enumerate(blocks):
            if any(isinstance(layer, SpatialTransformer) for layer in block):
                levels[name, number] = level
            level += sum(isinstance(layer, Downsample) for layer in block)
            level -= sum(isinstance(layer, Upsample) for layer in block)
    return levels


def grid_at(latent_size: tuple[int, int], level: int) -> tuple[int, int]:
    """Height and width of the token grid after `level` halvings; odd sizes are rounded up, as the UNet does."""
    height, width = latent_size
    return -(-height // 2**level), -(-width // 2**level)


def decoder_level_end(unet: UNetModel, from_last: int, node: str) -> torch.nn.Module:
    """The layer whose output is the hidden state of a decoder level, counted from the last level."""
    ends = [block[-1] for block in unet.output_blocks if isinstance(block[-1], Upsample)] + [unet.output_blocks[-1][-1]]
    if from_last >= len(ends):
        raise ValueError(f"{node}: this UNet has {len(ends)} decoder levels; `level` must be 0 to {len(ends) - 1}")
    return ends[-1 - from_last]


@contextmanager
def captured(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects what a layer puts out while the block runs; the hook is gone afterwards, whatever happened."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


# --- sampling ----------------------------------------------------------------------------------------------------


def sigmas_at(model, timesteps: list[int]) -> Tensor:
    """The model's sigma at each timestep of its training schedule, float32."""
    return model.get_model_object("model_sampling").sigmas[timesteps].float().cpu()


def run(
    model,
    function: Callable[..., Tensor],
    latent: dict[str, Any],
    sigmas: Tensor,
    positive,
    negative=None,
    cfg: float = 1.0,
    *,
    node: str,
    callback: Callable | None = None,
    **options,
) -> dict[str, Any]:
    """Run a k-diffusion style function on a LATENT as the core samplers do, without adding noise."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"{node}: expected latents [frames, {channels}, height, width] for this model, got {list(samples.shape)}. "
            f"Encode the frames with the VAE of the same checkpoint."
        )
    check_finite(samples, "latents that came in", node)
    try:
        result = comfy.sample.sample_custom(
            model,
            torch.zeros_like(samples),
            cfg,
            comfy.samplers.KSAMPLER(function, extra_options=options),
            sigmas,
            positive,
            positive if negative is None else negative,
            samples,
            callback=callback,
            seed=0,
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"{node}: {error}") from error
    return {name: value for name, value in latent.items() if name != GRID_KEY} | {"samples": result}


def run_unet(denoise, x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> None:
    """One pass of the UNet inside `run`, with the positive conditioning and without what guiders or windows add."""
    guider = denoise.inner_model
    options = {**model_options, "context_handler": None}
    comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, sigma.expand(len(x)), options)


def plain_conditioning(model, conditioning=None):
    """The first of the conditionings, on the whole picture and without control; zeros where there is none."""
    if conditioning:
        text, extras = conditioning[0]
        cut = ("control", "control_apply_to_uncond", "area", "mask", "gligen", "start_percent", "end_percent", "hooks")
        return [[text, {name: value for name, value in extras.items() if name not in cut}]]
    unet = model.model.model_config.unet_config
    # SDXL's vector holds the pooled text and six sizes of 256 numbers each.
    pooled = torch.zeros(1, max(0, (unet.get("adm_in_channels") or 0) - 6 * 256))
    return [[torch.zeros(1, 77, unet["context_dim"]), {"pooled_output": pooled}]]


def preview(model, steps: int) -> Callable:
    """Progress bar, latent preview and a check for interruption after each step."""
    show = latent_preview.prepare_callback(model, steps)

    def callback(*step) -> None:
        show(*step)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return callback


def check_finite(frames: Tensor, what: str, node: str) -> None:
    """An error that names the frames with NaN or Inf in them, if there are any."""
    broken = [i for i, frame in enumerate(frames) if not frame.isfinite().all()]
    if broken:
        raise ValueError(
            f"{node}: expected finite numbers, got NaN or Inf in the {what}, frames {broken[:8]}. Look at the node "
            f"before; if it ran in half precision, run it in fp32 or bf16."
        )


def check_unmasked(latent: dict[str, Any], node: str) -> None:
    """An error when a LATENT carries a mask: ComfyUI would keep the noise outside of it, not the clip."""
    if "noise_mask" in latent:
        raise ValueError(
            f"{node}: expected latents without a noise mask, got some with one, which cannot work on inverted noise. "
            f"Take the mask off; after decoding, put the edited frames over the source with ImageCompositeMasked."
        )


def check_unguided(model, node: str) -> None:
    """An error when MODEL has Correspondence Attention already."""
    if model.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY):
        raise ValueError(
            f"{node}: expected a model without Correspondence Attention, got one with it. Connect the one before it."
        )


def check_start(latent: dict[str, Any], sigmas: Tensor, node: str) -> None:
    """An error when the latents come from an inversion that ended elsewhere than where `sigmas` start."""
    check_unmasked(latent, node)
    grid = latent.get(GRID_KEY)
    if grid is not None and not math.isclose(float(grid[-1]), float(sigmas[0]), rel_tol=1e-4):
        raise ValueError(
            f"{node}: the inversion ended at sigma {float(grid[-1]):.4f} ({len(grid) - 1} steps), but sampling starts "
            f"at sigma {float(sigmas[0]):.4f} ({len(sigmas) - 1} steps). Set `sampling_steps` of DDIM Inversion to "
            f"{len(sigmas) - 1}, and use the same checkpoint for both."
        )


def check_hints(conds: list[dict], frames: int, model_options: dict[str, Any], node: str) -> None:
    """An error when a ControlNet's hints are neither one nor one a frame; `conds` are conditioning dictionaries."""
    windows = model_options.get("context_handler")
    cut = windows is not None and frames > windows.context_length
    for cond in conds:
        control = cond.get("control")
        while control is not None:
            hint = getattr(control, "cond_hint_original", None)
            if hint is not None and len(hint) not in (1, frames):
                raise ValueError(
                    f"{node}: a ControlNet has {len(hint)} hint images for {frames} frames. Give it one image, or one "
                    f"for each frame: make the hints from the same frames, with the same start, count and stride."
                )
            # Advanced-ControlNet follows the window by itself.
            if hint is not None and len(hint) > 1 and cut and not hasattr(control, "sub_idxs"):
                raise ValueError(
                    f"{node}: with context windows, ComfyUI gives every window the hints of the first frames. Remove "
                    f"the context windows, use one hint image for all frames, or use Advanced-ControlNet."
                )
            control = getattr(control, "previous_controlnet", None)


def check_conditioning(conditioning, latent: dict[str, Any], model, node: str) -> None:
    """`check_hints` for a CONDITIONING, before a run."""
    check_hints([extras for _, extras in conditioning], len(latent["samples"]), model.model_options, node)


# --- the attention patch -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GuidedSelfAttention:
    """Takes the place of self-attention in the blocks of one level. Holds settings; nothing changes in a run."""

    correspondence: Correspondence | None  # None: spatial-temporal attention alone
    merge_ratio: float
    all_frames: bool
    sigma_start: float
    sigma_end: float
    level: int

    def __deepcopy__(self, memo: dict) -> GuidedSelfAttention:
        """Itself: MODEL.clone() copies its options deeply, and the correspondence is large."""
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Projected tokens [conds*frames, tokens, channels] -> what goes into `to_out`, of the same shape."""
        heads = options["n_heads"]
        attend = partial(optimized_attention, attn_precision=options.get("attn_precision"), transformer_options=options)
        grid = tuple(options["activations_shape"][2:])
        if query.shape[1] != math.prod(grid):
            raise _other_tokens(f"{query.shape[1]} tokens", grid)
        if not self.sigma_end <= float(options["sigmas"][0]) <= self.sigma_start:
            return attend(query, key, value, heads)

        conds = len(options["cond_or_uncond"])
        clip = query.shape[0] // conds if self.correspondence is None else self.correspondence.frames
        frame_indices = window_of(options) or list(range(clip))
        frames = len(frame_indices)
        if query.shape[0] != conds * frames:
            raise ValueError(
                f"Correspondence Attention: a batch of {query.shape[0]} came for {conds} conditionings of {frames} "
                f"frames each. The latents and the correspondence must be of the same frames."
            )
        if self.all_frames:
            tokens = spatial_temporal_attention(query, key, value, frames, heads, attend)
        else:
            tokens = attend(query, key, value, heads)
        if self.correspondence is None:
            return tokens
        run = options[KEY]
        if grid_at(run["latent_size"], self.level) != (self.correspondence.height, self.correspondence.width):
            return tokens
        clips = tokens.unflatten(0, (conds, frames))
        guided = [
            correspondence_attention(
                clip[None], self._of_area(run["areas"].get(uuid), grid), heads, self.merge_ratio, frame_indices
            )
            for clip, uuid in zip(clips, options["uuids"], strict=True)
        ]
        return torch.cat(guided).flatten(0, 1)

    def _of_area(self, area: tuple[int, ...] | None, grid: tuple[int, int]) -> Correspondence:
        """The correspondence on the part of the picture that a conditioning with an area is run on."""
        whole = (self.correspondence.height, self.correspondence.width)
        if area is None:
            if grid != whole:
                raise _other_tokens(f"{grid[0]}x{grid[1]}", whole)
            return self.correspondence
        return self.correspondence.crop(area[2] >> self.level, area[3] >> self.level, *grid)


def _other_tokens(came: str, grid: tuple[int, int]) -> ValueError:
    return ValueError(
        f"Correspondence Attention: expected a grid of {grid[0]}x{grid[1]} tokens, got {came}. Another node changes "
        f"them (ToMe, HyperTile, Deep Shrink or the like); take it off this model."
    )


def window_of(options: dict[str, Any]) -> list[int] | None:
    """The frames in the batch when a context window is at work: core's, or AnimateDiff-Evolved's."""
    window = options.get("context_window")
    if window is not None:
        return list(window.index_list)
    return (options.get("ad_params") or {}).get("sub_idxs")


def guide_self_attention(
    model,
    correspondence: Correspondence | None,
    merge_ratio: float,
    all_frames: bool,
    start_percent: float,
    end_percent: float,
    node: str,
):
    """A clone of MODEL whose self-attention is spatial-temporal and, on the correspondence's grid, guided by it."""
    levels = self_attention_levels(unet_of(model, node))
    model = model.clone()
    _check_slots(model.model_options, node)
    sampling = model.get_model_object("model_sampling")
    start, end = (sampling.percent_to_sigma(percent) for percent in (start_percent, end_percent))
    # percent_to_sigma(1.0) is 0; the smallest sigma sampled is above it.
    patches = {
        block: GuidedSelfAttention(correspondence, merge_ratio, all_frames, start, end, level)
        for block, level in levels.items()
    }
    for block, patch in patches.items():
        # Without a transformer index: a perturbing guider (PAG) can then put its own in for its own pass.
        model.set_model_attn1_replace(patch, *block)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, partial(_check_run, node, patches))
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, KEY, _tell_areas)
    return model


def _check_slots(model_options: dict[str, Any], node: str, patches: dict[Block, GuidedSelfAttention] | None = None):
    """An error when self-attention is replaced by somebody else, or sees another number of tokens."""
    options = model_options.get("transformer_options", {})
    for slot, patch in options.get("patches_replace", {}).get("attn1", {}).items():
        if patches is None or patches.get(slot[:2]) is not patch:
            raise ValueError(
                f"{node}: self-attention of block {slot[0]} {slot[1]} is already replaced by "
                f"{getattr(patch, '__module__', type(patch).__module__)}. One node can replace it: take the other off "
                f"this model (a second Correspondence Attention counts, too)."
            )
    for patch in options.get("patches", {}).get("attn1_patch", []):
        # The host names the modules of its extra nodes by their path, without the ending.
        name = TOKEN_CHANGERS.get(re.split(r"[./\\]", getattr(patch, "__module__", ""))[-1])
        if name:
            raise ValueError(f"{node}: {name} changes the number of tokens; take it off this model.")


def _check_run(node: str, patches: dict[Block, GuidedSelfAttention], executor, noise: Tensor, *args, **kwargs):
    """Before a run: does what comes fit the correspondence, and is the patch still in its place?"""
    guider = executor.class_obj
    _check_slots(guider.model_options, node, patches)
    correspondence = next(iter(patches.values())).correspondence
    if correspondence is not None:
        _check_fit(correspondence, noise, {patch.level for patch in patches.values()}, node)
    check_hints([cond for some in guider.conds.values() for cond in some], len(noise), guider.model_options, node)
    return executor(noise, *args, **kwargs)


def _check_fit(correspondence: Correspondence, noise: Tensor, levels: set[int], node: str) -> None:
    """An error when latents are not of the frames or of the size that the correspondence was found in."""
    if len(noise) != correspondence.frames:
        raise ValueError(
            f"{node}: {len(noise)} frames of latents came, but the correspondence is of {correspondence.frames}. "
            f"Make both from the same frames."
        )
    size, grid = tuple(noise.shape[-2:]), (correspondence.height, correspondence.width)
    grids = sorted({grid_at(size, level) for level in levels}, reverse=True)
    if grid not in grids:
        raise ValueError(
            f"{node}: the correspondence is of a {grid[0]}x{grid[1]} grid (height x width), but at latents of "
            f"{size[0]}x{size[1]} this model has self-attention on "
            f"{', '.join(f'{height}x{width}' for height, width in grids)}. Make the features from latents of the same "
            f"size and with the same checkpoint."
        )


def _tell_areas(executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
    """Pass on the size of the whole latents and the area of each conditioning: blocks see only cut-out tokens."""
    areas = {cond["uuid"]: tuple(cond["area"]) for some in conds for cond in some or [] if "area" in cond}
    told = {"latent_size": tuple(x_in.shape[-2:]), "areas": areas}
    options = {**model_options.get("transformer_options", {}), KEY: told}
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})
