"""Every key of `transformer_options` and of LATENT that this pack reads or writes, and what stands under it.

Wrappers of a MODEL have the key of their node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Correspondence Attention, and the RunInfo of an evaluation. All keys of this pack begin with it.
RUN = "cove"
INVERSION = "cove_inversion"
INJECTION = "cove_injection"
TOKENFLOW = "cove_tokenflow"

# For calls of the UNet: Capture or Inject (Feature Injection), a function in place of self-attention (TokenFlow),
# whether the call is of a source branch, and whether it runs on TokenFlow's keyframes only.
FEATURES = "cove_features"
SELF_ATTENTION = "cove_self_attention"
SOURCE_RUNNING = "cove_source_running"
ON_KEYFRAMES = "cove_on_keyframes"

# For one run: what Feature Injection computed of the source last, and TokenFlow's `visits.Evaluations`.
COMPUTED = "cove_injection_computed"
EVALUATIONS = "cove_tokenflow_evaluations"

# In a LATENT of inverted noise: the sigmas of sampling, ascending from 0, and `attention.guidance_of` its MODEL.
SIGMAS, GUIDANCE = "cove_sigmas", "cove_guidance"

# ComfyUI's context window; AnimateDiff-Evolved's parameters, which Advanced-ControlNet and IPAdapter read.
CONTEXT_WINDOW, AD_PARAMS = "context_window", "ad_params"

Area = tuple[int, int, int, int]  # height, width, top and left, in latents
Frames = tuple[int, ...] | None  # those of the clip in a batch, in its order; None: all


@dataclass(frozen=True)
class RunInfo:
    """One evaluation of the UNet.

    sigma: the noise level, as a number: reading it from a tensor would keep a GPU waiting in every block.
    latent_size: height and width of the whole latents.
    areas: of the conditionings that run on a part of the picture, by their uuid.
    frames: of the clip, in the order of the batch.
    kept: results that hold for the whole run, by key; see `once`.
    """

    sigma: float
    latent_size: tuple[int, int]
    areas: Mapping[Any, Area]
    frames: tuple[int, ...]
    kept: dict[Any, Any]

    def once(self, key, make: Callable[[], Any]):
        """Return what `make` returned when this run asked for the key first."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def area_of(self, uuid) -> Area | None:
        """Return the area that a conditioning runs on; None for the whole picture."""
        return self.areas.get(uuid)


@dataclass(frozen=True)
class Cut:
    """Frames that this pack cuts out of the clip, published where ComfyUI publishes its context window."""

    index_list: list[int]


def run_info(options: Mapping[str, Any]) -> RunInfo:
    return options[RUN]


def frames_in(options: Mapping[str, Any]) -> Frames:
    """Return the frames of the clip that the context window puts into the batch; None without a window.

    A ComfyUI window may run with the frame before it in front (`causal_window_fix`, since 0.21), which ComfyUI removes
    afterwards.
    """
    window = options.get(CONTEXT_WINDOW)
    if window is not None:
        anchor = getattr(window, "causal_anchor_index", None)
        return (*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list)
    frames = (options.get(AD_PARAMS) or {}).get("sub_idxs")
    return None if frames is None else tuple(frames)


def ad_params_of(options: Mapping[str, Any], frames: Sequence[int] | None, clip: int) -> dict[str, Any]:
    """Return AnimateDiff-Evolved's `ad_params` for these frames of a clip of `clip` frames.

    Advanced-ControlNet keeps what it read last, so the whole clip is published, too.
    """
    return {
        **(options.get(AD_PARAMS) or {}),
        "full_length": clip,
        "context_length": clip if frames is None else len(frames),
        "sub_idxs": None if frames is None else list(frames),
    }


def options_with(model_options: Mapping[str, Any], **published) -> dict[str, Any]:
    """Return a copy of model_options with more in its transformer_options."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), **published}}
