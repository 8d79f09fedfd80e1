"""What is checked before a run, and the errors of a run: what was expected, what came, how to mend it.

Functions raise ValueError without the name of a node: see `errors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import comfy.sampler_helpers
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from . import options
from .batch import controls_of, follows_frames, rows_of
from .errors import NodeError

# Names of this pack's nodes by the key of their wrappers.
NAMES = {
    options.RUN: "Correspondence Attention",
    options.INJECTION: "Feature Injection",
    options.TOKENFLOW: "TokenFlow",
}

# ComfyUI's nodes that change how many tokens self-attention sees, by the file they stand in.
TOKEN_CHANGERS = {"nodes_tomesd": "Patch ToMe", "nodes_hypertile": "HyperTile"}

# ComfyUI's step caches, by the key of their wrappers.
STEP_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}

# What a conditioning may hold for each frame, and what users call it.
PER_FRAME = {
    "cross_attn": "the prompt",
    "pooled_output": "the pooled prompt",
    "mask": "the mask of a prompt",
    "concat_latent_image": "the picture of InstructPixToPixConditioning or InpaintModelConditioning",
    "concat_mask": "the mask of InpaintModelConditioning",
    "concat_image": "the picture of an upscaling model",
}


# --- MODEL ---


def check_without(model, *keys: str) -> None:
    """Raise when MODEL has been through a node of this pack, by the key of its wrappers."""
    for key in keys:
        if model.get_wrappers(WrappersMP.OUTER_SAMPLE, key):
            raise ValueError(
                f"expected a model without {NAMES[key]}, got one with it. Connect the model from before that node."
            )


def check_no_motion_modules(model) -> None:
    """Raise when MODEL has AnimateDiff's motion modules, which mix the frames of a batch and expect a whole window."""
    patches = model.model_options["transformer_options"].get("patches", {})
    if patches.get("forward_timestep_embed_patch"):
        raise ValueError(
            "expected a model without motion modules (AnimateDiff), got one with them. Connect the checkpoint's MODEL, "
            "from before the node that adds them."
        )


def is_compiled(model) -> bool:
    """Return whether TorchCompileModel compiled the UNet of MODEL."""
    return bool(model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY))


def check_not_compiled(model) -> None:
    """Raise when the UNet of MODEL is compiled: compiled code never runs hooks that come after it."""
    if is_compiled(model):
        raise ValueError(
            "expected a model that is not compiled, because compiled code never runs this node's hooks. Remove "
            "TorchCompileModel from this model."
        )


def check_no_step_cache(wrappers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise when one of ComfyUI's step caches is among the wrappers of a MODEL."""
    keys = {key for some in wrappers.values() for key, made in some.items() if made}
    for key, cache in STEP_CACHES.items():
        if key in keys:
            raise ValueError(
                f"{cache} skips evaluations of the UNet, and this node needs every one. Remove {cache} from this "
                f"model; it can stay on a model for sampling alone."
            )


def check_slots(model_options: Mapping[str, Any], patches: Mapping[tuple[str, int], Any] | None = None) -> None:
    """Raise when self-attention is replaced by something else than `patches`, or sees another number of tokens."""
    transformer_options = model_options.get("transformer_options", {})
    for slot, patch in transformer_options.get("patches_replace", {}).get("attn1", {}).items():
        if patches is None or patches.get(slot[:2]) is not patch:
            raise ValueError(
                f"self-attention of block {slot[0]} {slot[1]} is already replaced by "
                f"{getattr(patch, '__module__', type(patch).__module__)}. Only one node can replace it: remove the "
                f"other from this model (a second Correspondence Attention or TokenFlow counts as well)."
            )
    for patch in transformer_options.get("patches", {}).get("attn1_patch", []):
        # ComfyUI names the modules of its extra nodes by their path, without the ending.
        name = TOKEN_CHANGERS.get(re.split(r"[./\\]", getattr(patch, "__module__", ""))[-1])
        if name:
            raise ValueError(f"{name} changes the number of tokens. Remove it from this model.")


# --- LATENT ---


def check_channels(model, samples: Tensor) -> None:
    """Raise when latents are not those of pictures in MODEL's latent format."""
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"expected latents [frames, {channels}, height, width] for this model, got {list(samples.shape)}. Encode "
            f"the frames with the VAE of the same checkpoint."
        )


def check_finite(frames: Tensor, what: str) -> None:
    """Raise when there are NaN or Inf, naming the frames."""
    broken = [i for i, frame in enumerate(frames) if not frame.isfinite().all()]
    if broken:
        raise ValueError(
            f"expected finite numbers, got NaN or Inf in the {what}, frames {broken[:8]}. Look at the node before; if "
            f"it ran in half precision, run it in fp32 or bf16."
        )


def check_unmasked(latent: Mapping[str, Any]) -> None:
    """Raise when a LATENT carries a mask: ComfyUI would keep the noise outside of it, not the clip."""
    if "noise_mask" in latent:
        raise ValueError(
            "expected latents without a noise mask, got some with one, which cannot work on inverted noise. Remove the "
            "mask; after decoding, put the edited frames over the source with ImageCompositeMasked."
        )


# --- CONDITIONING ---


def check_conditioning(conditioning, frames: int) -> None:
    """`check_rows` for a CONDITIONING."""
    check_rows(comfy.sampler_helpers.convert_cond(conditioning), frames)


def check_rows(conds: Iterable[dict], frames: int) -> None:
    """Raise when a conditioning holds neither one of something nor one for each frame.

    Args:
        conds: conditionings as the host makes them from CONDITIONING (`convert_cond`).
        frames: of the clip.
    """
    for cond in conds:
        for name, what in PER_FRAME.items():
            if rows_of(cond.get(name)) not in (1, frames):
                raise ValueError(
                    f"{what} has {len(cond[name])} rows for {frames} frames. Provide one, or one for each frame."
                )
        for control in controls_of(cond):
            rows = 1 if follows_frames(control) else rows_of(control.cond_hint_original)
            if rows not in (1, frames):
                raise ValueError(
                    f"a ControlNet has {rows} hint images for {frames} frames. Provide one image, or one for each "
                    f"frame: make the hints from the same frames, with the same start, count and stride."
                )


def check_no_reference(conds: Iterable[dict]) -> None:
    """Raise when a reference ControlNet is in a conditioning.

    Advanced-ControlNet's runs parts of the batch through self-attention by themselves, with the reference's tokens
    beside theirs, so it is unknown which frames they are. Its hint is no picture until a run has begun.
    """
    for control in (control for cond in conds for control in controls_of(cond)):
        hint = control.cond_hint_original
        if hasattr(control, "ref_opts") or not isinstance(hint, Tensor | None):
            raise ValueError(
                f"expected ControlNets that take a picture as their hint, got {type(control).__name__}, which changes "
                f"self-attention. Remove the reference ControlNet from the prompts."
            )


def one_prompt(transformer_options: Mapping[str, Any], before: Any, node) -> Any:
    """Return the uuid of the conditioning that runs as the source; raise if it is not one for the whole picture.

    Args:
        before: the uuid that ran before it, if any: where memory is short, the host runs conditionings one after
            another.
    """
    uuids = transformer_options["uuids"]
    area = options.run_info(transformer_options).area_of(uuids[0])
    if len(uuids) != 1 or before not in (None, uuids[0]) or area is not None:
        raise NodeError(
            node,
            "expected one source prompt for the whole picture, but several conditionings or one with an area ran. Use "
            "a plain source prompt.",
        )
    return uuids[0]


# --- errors of a run ---


def skipped(sigma: float, node, what: str = "the UNet or some of its blocks") -> NodeError:
    """Return the error for an evaluation or a site that was not visited."""
    return NodeError(
        node,
        f"at sigma {sigma:.4g} {what} did not run, because another node on this model skips evaluations (a step cache "
        f"such as EasyCache, TeaCache or DeepCache). Remove that node from this model.",
    )


def other_tokens(came: str, grid: Sequence[int], node) -> NodeError:
    """Return the error for tokens that are not those of the grid expected, [height, width]."""
    return NodeError(
        node,
        f"expected a grid of {grid[0]}x{grid[1]} tokens, got {came}. Another node changes them (ToMe, HyperTile, Deep "
        f"Shrink or similar). Remove it from this model.",
    )


def other_batch(frames: int, conds: int, batch: int, node) -> NodeError:
    """Return the error for a batch that does not hold `frames` frames for each of `conds` conditionings."""
    return NodeError(
        node,
        f"expected {frames} frames for each of {conds} conditionings, got a batch of {batch}. Remove the node that "
        f"cuts batches from this model.",
    )
