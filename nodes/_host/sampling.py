"""A run of the sampler as the core nodes start it, and what is checked before one."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from .frames import Cut, check_rows
from .run_info import only_ours, options_with, publish_run

# What a LATENT with inverted noise carries: the sigmas of sampling, ascending from 0, and `guidance_of` its model.
SIGMAS_KEY, GUIDANCE_KEY = "cove_sigmas", "cove_guidance"


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
    check_channels(model, samples, node)
    check_finite(samples, "latents that came in", node)
    model = model.clone()
    publish_run(model)
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
    carried = {name: value for name, value in latent.items() if name not in (SIGMAS_KEY, GUIDANCE_KEY)}
    return carried | {"samples": result}


def run_unet(denoise, x: Tensor, frames: Sequence[int], sigma: Tensor, model_options: dict[str, Any]) -> None:
    """Run the UNet once inside `run` on some frames, with the positive conditioning, without guiders and windows."""
    guider = denoise.inner_model
    options = only_ours({**model_options, "context_handler": None})
    options = options_with(options, context_window=Cut(list(frames)))
    comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, sigma.expand(len(x)), options)


def plain_conditioning(model, conditioning=None):
    """The first of the conditionings, on the whole picture and without control; zeros where there is none."""
    if conditioning:
        text, extras = conditioning[0]
        cut = ("control", "control_apply_to_uncond", "area", "mask", "gligen", "start_percent", "end_percent", "hooks")
        return [[text, {name: value for name, value in extras.items() if name not in cut}]]
    width = model.model.model_config.unet_config["context_dim"]
    # SDXL and its refiner need the pooled text of their larger encoder, 1280 numbers; other models ignore it.
    return [[torch.zeros(1, 77, width), {"pooled_output": torch.zeros(1, 1280)}]]


def preview(model, steps: int) -> Callable:
    """Progress bar, latent preview and a check for interruption after each step."""
    show = latent_preview.prepare_callback(model, steps)

    def callback(*step) -> None:
        show(*step)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return callback


def check_channels(model, samples: Tensor, node: str) -> None:
    """An error when latents are not those of pictures in MODEL's latent format."""
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"{node}: expected latents [frames, {channels}, height, width] for this model, got {list(samples.shape)}. "
            f"Encode the frames with the VAE of the same checkpoint."
        )


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


def check_without(model, key: str, other: str, node: str) -> None:
    """An error when MODEL has been through the node `other`, which leaves a wrapper under `key`."""
    if model.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, key):
        raise ValueError(f"{node}: expected a model without {other}, got one with it. Connect the one before it.")


def check_no_motion_modules(model, node: str) -> None:
    """Raise when MODEL has AnimateDiff's motion modules, which mix the frames of a batch and expect a whole window."""
    patches = model.model_options["transformer_options"].get("patches", {})
    if patches.get("forward_timestep_embed_patch"):
        raise ValueError(
            f"{node}: expected a model without motion modules (AnimateDiff), got one with them. Connect the "
            f"checkpoint's MODEL, before the node that adds them."
        )


def is_compiled(model) -> bool:
    """Whether TorchCompileModel compiled the UNet of MODEL."""
    return bool(model.get_wrappers(comfy.patcher_extension.WrappersMP.APPLY_MODEL, COMPILE_KEY))


def check_not_compiled(model, node: str) -> None:
    """Raise when the UNet of MODEL is compiled: compiled code never runs hooks that come after it."""
    if is_compiled(model):
        raise ValueError(
            f"{node}: expected a model that is not compiled, whose UNet would not run this node's hooks. Remove "
            f"TorchCompileModel from this model."
        )


def name_of(node) -> str:
    """Return a node's name in messages: its display name without the pack's, which is there for search."""
    return node.define_schema().display_name.removeprefix("COVE ")


def report_status(node, text: str, level: int = logging.INFO) -> None:
    """Show a line on a node in the page, while it runs, and in the log. `node` is its class."""
    logging.log(level, "%s: %s", name_of(node), text)
    module = sys.modules.get("server")  # there when ComfyUI serves a page, and not where nodes are called by a script
    if module is not None and node.hidden is not None:
        module.PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def is_noise(x: Tensor, sigma: float) -> bool:
    """Whether latents, as the model sees them, are as large as noise of this level over a clip is.

    Clean latents have a standard deviation near 1. At and below that noise level both look alike: True.
    """
    return sigma < 1 or not float(x.float().std()) < 0.6 * math.hypot(1, sigma)


def check_conditioning(conditioning, latent: dict[str, Any], node: str) -> None:
    """`check_rows` for a CONDITIONING, before a run."""
    check_rows(comfy.sampler_helpers.convert_cond(conditioning), len(latent["samples"]), node)
