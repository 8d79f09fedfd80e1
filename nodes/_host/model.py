"""The UNet of a MODEL: is it one, its blocks, its levels, its sigmas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_base
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from torch import Tensor

Block = tuple[str, int]


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


def block_levels(unet: UNetModel) -> dict[Block, int]:
    """Each block, and how many times its grid has been halved from latent size."""
    levels, level = {}, 0
    for name, blocks in (("input", unet.input_blocks), ("middle", [unet.middle_block]), ("output", unet.output_blocks)):
        for number, block in enumerate(blocks):
            levels[name, number] = level
            level += sum(isinstance(layer, Downsample) for layer in block)
            level -= sum(isinstance(layer, Upsample) for layer in block)
    return levels


def self_attention_levels(unet: UNetModel) -> dict[Block, int]:
    """`block_levels` of the blocks with self-attention."""
    blocks = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}
    levels = block_levels(unet)
    return {(name, number): levels[name, number] for name, number in levels if transformers_of(blocks[name][number])}


def transformers_of(block: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks in a block of the UNet, in the order of the host's block_index."""
    return [part for layer in block if isinstance(layer, SpatialTransformer) for part in layer.transformer_blocks]


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


def sigmas_at(model, timesteps: list[int]) -> Tensor:
    """The model's sigma at each timestep of its training schedule, float32."""
    return model.get_model_object("model_sampling").sigmas[timesteps].float().cpu()
