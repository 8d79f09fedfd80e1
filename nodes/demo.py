"""Load Demo Model and Load Demo Clip, for a first edit without a download."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import comfy.clip_model
import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy_api.v0_0_2 import io
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..cove import frames
from ..demo.autoencoder import LATENTS, PATCH, Autoencoder

FOLDER = Path(__file__).parent.parent / "demo"


class LoadDemoModel(io.ComfyNode):
    """A latent diffusion UNet in SD1.5's topology, narrow, trained by `evidence/shapes/` on drawn shapes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadDemoModel",
            display_name="COVE Load Demo Model",
            category="COVE/load",
            description="Loads a small model that comes with the pack and draws flat shapes on plain, cloudy and tiled "
            "grounds. It shows how an edit works on any computer, without a download. For your own clips, load a "
            "checkpoint.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=sorted(path.name for path in FOLDER.glob("*.safetensors")),
                    default="shapes.safetensors",
                    tooltip="What the model was trained on. shapes: frames of 128x128 pixels; prompts "
                    'like "a striped red star on a cloudy blue ground".',
                )
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(*load_demo(FOLDER / file))


class LoadDemoClip(io.ComfyNode):
    """Drawn by `evidence/shapes/clips.py`: a striped red star that moves and turns on a cloudy blue ground."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CoveLoadDemoClip",
            display_name="COVE Load Demo Clip",
            category="COVE/load",
            description="Loads a clip for the demo model: a striped red star on a cloudy blue ground, 8 frames of "
            "128x128 pixels.",
            outputs=[
                io.Image.Output(display_name="images"),
                io.Float.Output(display_name="fps"),
                io.Int.Output(display_name="frame count"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        images, _, fps, *_ = frames.read_frames(FOLDER / "clip.mp4")
        return io.NodeOutput(images, fps, len(images))


UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


def load_demo(path: Path) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """Load a file of `evidence.training.export`: Stable Diffusion's layout, with what a loader needs as metadata."""
    weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    facts = json.loads(metadata["cove_demo"])
    return _model(weights, facts), _clip(weights, facts), _vae(weights, facts)


def _part(weights: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _model(weights: dict, facts: dict) -> comfy.model_patcher.ModelPatcher:
    config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(weights, UNET))
    config.unet_config["num_heads"] = facts["heads"]
    config.latent_format.scale_factor = facts["latent_scale"]
    config.latent_format.latent_rgb_factors = facts["latent_rgb"]
    config.latent_format.latent_rgb_factors_bias = facts["latent_rgb_bias"]
    config.latent_format.taesd_decoder_name = None
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        supported_dtypes=config.supported_inference_dtypes, weight_dtype=comfy.utils.weight_dtype(weights, UNET)
    )
    config.set_inference_dtype(
        dtype, comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    )
    model = config.get_model(weights, UNET)
    model.load_model_weights(weights.copy(), UNET)
    # With dynamic offloading the host's layers keep the precision of the file, which only its own patcher casts.
    model.diffusion_model.to(dtype)
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def _vae(weights: dict, facts: dict) -> comfy.sd.VAE:
    """ComfyUI's VAE around an autoencoder it does not know: the one without weights, with ours put in."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    # The host's layers: where memory is short (--novram), it moves no others.
    autoencoder = Autoencoder(facts["autoencoder"], comfy.ops.disable_weight_init.Conv2d)
    autoencoder.load_state_dict(_part(weights, VAE))
    vae.first_stage_model = autoencoder.to(vae.vae_dtype).eval().requires_grad_(False)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.size = None  # to be counted again
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    vae.latent_channels = LATENTS
    # The decoder's widest layer: as many values a pixel as a quarter of its channels, and a few of them at a time.
    values = 4 * facts["autoencoder"]
    vae.memory_used_encode = lambda shape, dtype: values * shape[2] * shape[3] * dtype.itemsize
    vae.memory_used_decode = lambda shape, dtype: values * PATCH**2 * shape[2] * shape[3] * dtype.itemsize
    return vae


def _clip(weights: dict, facts: dict) -> comfy.sd.CLIP:
    text, length = facts["text"], facts["length"]
    start, end = (
        mark["ids"][0] for mark in json.loads(facts["tokenizer"])["post_processor"]["special_tokens"].values()
    )

    class Words:
        """One token a word; `SDTokenizer` asks for a class that loads."""

        @staticmethod
        def from_pretrained(_path):
            return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(facts["tokenizer"]))

    class FewWords(comfy.clip_model.CLIPTextModel):
        """CLIP's text tower with the table of this vocabulary; ComfyUI's own is as large as CLIP's."""

        def __init__(self, config_dict, dtype, device, operations):
            super().__init__(config_dict, dtype, device, operations)
            table = operations.Embedding(text["vocab_size"], text["hidden_size"], dtype=dtype, device=device)
            self.set_input_embeddings(table)

    tokens = partial(
        comfy.sd1_clip.SDTokenizer, max_length=length, embedding_size=text["hidden_size"], tokenizer_class=Words
    )
    encoder = partial(
        comfy.sd1_clip.SDClipModel,
        max_length=length,
        textmodel_json_config=dict(text),
        model_class=FewWords,
        special_tokens={"start": start, "end": end, "pad": end},
        return_projected_pooled=False,
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokens), partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder)
    )
    clip = comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights, CLIP))
    clip.load_sd(_part(weights, CLIP))
    return clip


NODES = [LoadDemoModel, LoadDemoClip]
