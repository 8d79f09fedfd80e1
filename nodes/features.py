"""Diffusion Features: hidden states of the UNet for every frame."""

from __future__ import annotations

from typing import NamedTuple

import comfy.model_management
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..cove import features
from . import host

PAPER, SHARP = "paper", "sharp"


class Preset(NamedTuple):
    """Settings of features and matching that belong together. refine: of Correspondence."""

    timestep: int
    level: int
    ensemble: int
    refine: bool


# docs/results.md: level 1 with one draw finds 46 % of points after five frames, refined with eight draws 74 %.
PRESETS = {SHARP: Preset(261, 1, 8, True), PAPER: Preset(261, 1, 1, False)}


class Features(NamedTuple):
    """The value of a FEATURES wire.

    tokens: unit vectors, float32 [frames, height, width, channels].
    preset: the settings of matching that go with them.
    """

    tokens: Tensor
    preset: Preset


class DiffusionFeatures(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.2, Eq. 4: one step of denoising at t = 261, the decoder's hidden state."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDiffusionFeatures",
            display_name="COVE Diffusion Features",
            category="COVE/match",
            description="Computes the diffusion features of every frame: noise is added, the UNet runs, and the "
            "hidden state of its decoder is kept. Similar features mean the same part of the picture.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2.x or SDXL, without Correspondence Attention."),
                io.Latent.Input("latent", tooltip="The clip's frames from VAE Encode, one latent per frame."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=SHARP,
                    tooltip="sharp: level 1, timestep 261, 8 draws, refined matches; follows the clip best. paper: "
                    "level 1, timestep 261, 1 draw, matches followed from frame to frame. The settings below replace "
                    "single values of it.",
                ),
                io.Int.Input(
                    "timestep",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="Noise level. A larger one makes features follow meaning rather than detail. 0 = as in the "
                    "preset; the paper uses 261.",
                ),
                io.Int.Input(
                    "level",
                    default=-1,
                    min=-1,
                    max=3,
                    tooltip="Decoder level, counted from the end: 0 is the last. A larger one is coarser, with more "
                    "meaning. -1 = as in the preset; the paper uses 1, DIFT 2.",
                ),
                io.Int.Input(
                    "ensemble",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Draws of noise that are averaged. More give steadier matches and take proportionally "
                    "longer. 0 = as in the preset; the paper uses 1.",
                ),
                io.Int.Input(
                    "attention_level",
                    default=0,
                    min=0,
                    max=3,
                    tooltip="Grid of the guided attention. A larger value is a coarser grid, to which features are "
                    "averaged. 0 = the finest on which this model has self-attention, as in the paper.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=8,
                    min=1,
                    max=4096,
                    tooltip="Frames per model evaluation. A larger value is faster and takes more memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="A different seed gives different noise. Each frame has its own.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The source prompt: what the clip shows. Without one, zeros are used.",
                ),
            ],
            outputs=[
                host.wires.Features.Output(display_name="features"),
                io.Image.Output(
                    display_name="picture",
                    tooltip="Principal components as RGB; similar colours mean similar features.",
                ),
            ],
        )

    @classmethod
    @host.errors.named
    def execute(
        cls, model, latent, preset, timestep, level, ensemble, attention_level, batch_size, seed, conditioning=None
    ) -> io.NodeOutput:
        preset = PRESETS[preset]
        timestep, ensemble = timestep or preset.timestep, ensemble or preset.ensemble
        level = preset.level if level < 0 else level
        unet = host.unet.unet_of(model)
        host.checks.check_without(model, *host.checks.NAMES)
        host.checks.check_not_compiled(model)
        host.checks.check_no_motion_modules(model)
        host.checks.check_no_step_cache(model.wrappers)
        layer = host.unet.decoder_level_end(unet, level)
        grids = sorted(set(host.unet.self_attention_levels(unet).values()))
        if attention_level >= len(grids):
            raise ValueError(f"`attention_level` must be 0 to {len(grids) - 1} for this model, got {attention_level}")
        size = tuple(latent["samples"].shape[-2:])
        progress = host.status.progress_bar()
        found: list[Tensor] = []

        def probe(denoise, x, sigmas, extra_args, callback, disable):
            def decode(noisy: Tensor, frames: range) -> Tensor:
                with host.unet.captured(layer) as outputs:
                    host.run.run_unet(denoise, noisy, frames, sigmas[0], extra_args["model_options"])
                if not outputs:
                    raise host.checks.skipped(float(sigmas[0]), cls)
                if len(outputs) != 1:
                    raise ValueError(f"expected one run of the UNet's decoder, got {len(outputs)}.")
                return outputs[0]

            grid = host.unet.grid_at(size, grids[attention_level])
            found.append(features.diffusion_features(decode, x, sigmas[0], grid, ensemble, batch_size, seed, progress))
            return x

        sigmas = host.unet.sigmas_at(model, [timestep])
        source = host.run.plain_conditioning(model, conditioning)
        host.checks.check_conditioning(source, len(latent["samples"]))
        host.run.run_sampler(model, probe, latent, sigmas, source, at_once=batch_size)
        result = found[0].to(comfy.model_management.intermediate_device())
        host.checks.check_finite(result, "features")
        picture = features.feature_picture(result).movedim(-1, 1)
        picture = torch.nn.functional.interpolate(picture, (size[0] * 8, size[1] * 8), mode="nearest")
        return io.NodeOutput(Features(result, preset), picture.movedim(1, -1))


NODES = [DiffusionFeatures]
