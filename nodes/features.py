"""Diffusion Features: what the UNet sees in each frame."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..cove import features
from . import _host


class DiffusionFeatures(io.ComfyNode):
    """COVE (arXiv 2406.08850), section 3.2, Eq. 4: one step of denoising at t = 261, the decoder's hidden state."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveDiffusionFeatures",
            display_name="Diffusion Features",
            category="COVE",
            description="Takes the diffusion feature of every frame: noise is added, the UNet runs once, and what its "
            "decoder holds is kept. Alike features mean the same thing in the picture.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2.x or SDXL, without Correspondence Attention."),
                io.Latent.Input("latent", tooltip="The clip's frames from VAE Encode, one latent a frame."),
                io.Int.Input(
                    "timestep",
                    default=261,
                    min=1,
                    max=999,
                    tooltip="More adds more noise: the features follow meaning rather than detail. The paper uses 261.",
                ),
                io.Int.Input(
                    "level",
                    default=0,
                    min=0,
                    max=3,
                    tooltip="More takes the features earlier in the decoder: coarser, with more meaning. 0 = last "
                    "level (COVE), 2 = two levels up (DIFT's choice for SD).",
                ),
                io.Int.Input(
                    "ensemble",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="More averages more draws of noise: steadier matches, and that many times the time. "
                    "The paper uses 1.",
                ),
                io.Int.Input(
                    "attention_level",
                    default=0,
                    min=0,
                    max=3,
                    tooltip="More guides the attention on a coarser grid; the features are averaged down to it. "
                    "0 = the finest grid on which this model has self-attention.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=8,
                    min=1,
                    max=4096,
                    tooltip="More runs more frames at once: faster, and takes more memory. The result stays the same.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    tooltip="Another number draws other noise. Each frame gets its own.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="The source prompt: what the clip shows. Without one, zeros take its place.",
                ),
            ],
            outputs=[
                _host.FeaturesType.Output(display_name="features"),
                io.Image.Output(display_name="picture", tooltip="The main components as colours: alike is alike."),
            ],
        )

    @classmethod
    def execute(
        cls, model, latent, timestep, level, ensemble, attention_level, batch_size, seed, conditioning=None
    ) -> io.NodeOutput:
        node = "Diffusion Features"
        unet = _host.unet_of(model, node)
        _host.check_without(model, _host.ATTENTION_KEY, "Correspondence Attention", node)
        _host.check_without(model, _host.INJECTION_KEY, "Feature Injection", node)
        _host.check_without(model, _host.TOKENFLOW_KEY, "TokenFlow", node)
        _host.check_not_compiled(model, node)
        _host.check_no_motion_modules(model, node)
        _host.check_no_step_cache(model.wrappers, node)
        layer = _host.decoder_level_end(unet, level, node)
        grids = sorted(set(_host.self_attention_levels(unet).values()))
        if attention_level >= len(grids):
            raise ValueError(f"{node}: `attention_level` must be 0 to {len(grids) - 1} for this model")
        size = tuple(latent["samples"].shape[-2:])
        bar = comfy.utils.ProgressBar(1)
        found: list[Tensor] = []

        def progress(done: int, total: int) -> None:
            bar.update_absolute(done, total)
            comfy.model_management.throw_exception_if_processing_interrupted()

        def probe(denoise, x, sigmas, extra_args, callback, disable):
            def decode(noisy: Tensor, frames: range) -> Tensor:
                with _host.captured(layer) as outputs:
                    _host.run_unet(denoise, noisy, frames, sigmas[0], extra_args["model_options"])
                if not outputs:
                    raise _host.skipped(node, float(sigmas[0]))
                if len(outputs) != 1:
                    raise RuntimeError(f"{node}: the UNet's decoder ran {len(outputs)} times, expected once")
                return outputs[0]

            grid = _host.grid_at(size, grids[attention_level])
            found.append(features.diffusion_features(decode, x, sigmas[0], grid, ensemble, batch_size, seed, progress))
            return x

        sigmas = _host.sigmas_at(model, [timestep], node)
        source = _host.plain_conditioning(model, conditioning)
        _host.check_conditioning(source, latent, node)
        _host.run(model, probe, latent, sigmas, source, node=node)
        result = found[0].to(comfy.model_management.intermediate_device())
        _host.check_finite(result, "features", node)
        picture = features.feature_picture(result).movedim(-1, 1)
        picture = torch.nn.functional.interpolate(picture, (size[0] * 8, size[1] * 8), mode="nearest")
        return io.NodeOutput(result, picture.movedim(1, -1))


NODES = [DiffusionFeatures]
