"""What the pack knows about ComfyUI: its types, its UNet blocks, its patch slots, its sampling.

Kept to what core nodes use, too; `tests/host_contract.py` lists it. Nothing is changed outside of clones.
"""

from comfy_api.v0_0_2 import io

from .attention import GuidedSelfAttention, guide_self_attention
from .clip import check_same_space, image_embeddings, text_embedding
from .demo import load_demo
from .files import check_name, check_space, list_saved, listed, output_path, path_of, saving, state_of
from .identity import check_fits, conditioning_of
from .injection import KEY as INJECTION_KEY
from .injection import inject, sites_of
from .inversion import invert, left_unfinished, noise_of
from .model import captured, decoder_level_end, grid_at, self_attention_levels, sigmas_at, unet_of
from .run_info import KEY as ATTENTION_KEY
from .sampling import (
    check_channels,
    check_conditioning,
    check_finite,
    check_no_motion_modules,
    check_not_compiled,
    check_unmasked,
    check_without,
    name_of,
    plain_conditioning,
    preview,
    report_status,
    run,
    run_unet,
)
from .start import sample_from_noise, sampling_sigmas, warn_of_start
from .storage import STORAGES, store_features
from .tokenflow import KEY as TOKENFLOW_KEY
from .tokenflow import flow_tokens
from .video import read_video
from .visits import check_no_step_cache, skipped

FeaturesType = io.Custom("COVE_FEATURES")
CorrespondenceType = io.Custom("COVE_CORRESPONDENCE")
InversionType = io.Custom("COVE_INVERSION")

__all__ = [
    "ATTENTION_KEY",
    "INJECTION_KEY",
    "STORAGES",
    "TOKENFLOW_KEY",
    "CorrespondenceType",
    "FeaturesType",
    "GuidedSelfAttention",
    "InversionType",
    "captured",
    "check_channels",
    "check_conditioning",
    "check_finite",
    "check_fits",
    "check_name",
    "check_no_motion_modules",
    "check_no_step_cache",
    "check_not_compiled",
    "check_same_space",
    "check_space",
    "check_unmasked",
    "check_without",
    "conditioning_of",
    "decoder_level_end",
    "flow_tokens",
    "grid_at",
    "guide_self_attention",
    "image_embeddings",
    "inject",
    "invert",
    "left_unfinished",
    "list_saved",
    "listed",
    "load_demo",
    "name_of",
    "noise_of",
    "output_path",
    "path_of",
    "plain_conditioning",
    "preview",
    "read_video",
    "report_status",
    "run",
    "run_unet",
    "sample_from_noise",
    "sampling_sigmas",
    "saving",
    "self_attention_levels",
    "sigmas_at",
    "sites_of",
    "skipped",
    "state_of",
    "store_features",
    "text_embedding",
    "unet_of",
    "warn_of_start",
]
