"""What the pack knows about ComfyUI: its types, its UNet blocks, its patch slots, its sampling.

Everything here is read from ComfyUI 0.3.75 and kept to what core nodes use, too. Nothing is changed outside of clones.
"""

from comfy_api.v0_0_2 import io

from .attention import GuidedSelfAttention, guide_self_attention
from .model import captured, decoder_level_end, grid_at, self_attention_levels, sigmas_at, unet_of
from .sampling import (
    GRID_KEY,
    check_conditioning,
    check_finite,
    check_start,
    check_unguided,
    check_unmasked,
    plain_conditioning,
    preview,
    run,
    run_unet,
)

FeaturesType = io.Custom("COVE_FEATURES")
CorrespondenceType = io.Custom("COVE_CORRESPONDENCE")

__all__ = [
    "GRID_KEY",
    "CorrespondenceType",
    "FeaturesType",
    "GuidedSelfAttention",
    "captured",
    "check_conditioning",
    "check_finite",
    "check_start",
    "check_unguided",
    "check_unmasked",
    "decoder_level_end",
    "grid_at",
    "guide_self_attention",
    "plain_conditioning",
    "preview",
    "run",
    "run_unet",
    "self_attention_levels",
    "sigmas_at",
    "unet_of",
]
