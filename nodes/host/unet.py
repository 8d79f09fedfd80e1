"""The UNet of a MODEL: its blocks, levels, token grids and sigmas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.model_sampling import ModelSamplingDiscrete
from torch import Tensor

from ...cove.schedule import MAX_STEPS, TRAIN_TIMESTEPS, Schedule

Block = tuple[str, int]


def unet_of(model) -> UNetModel:
    """Return the UNet of an SD-type MODEL; ValueError when MODEL is another architecture or cannot be inverted."""
    unet, name = model.get_model_object("diffusion_model"), type(model.model).__name__
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"expected a Stable Diffusion UNet (SD1.5, SD2.x or SDXL) as `model`, got {name} ({type(unet).__name__}). "
            f"Load such a checkpoint."
        )
    if any(isinstance(part, SpatialVideoTransformer) for part in unet.modules()):
        raise ValueError(
            f"expected an image model (SD1.5, SD2.x or SDXL), got the video model {name}, which runs on all frames as "
            f"one clip. Load an image checkpoint."
        )
    sampling = model.get_model_object("model_sampling")
    if not _denoises(sampling):
        raise ValueError(
            f"expected a model that removes noise from latents + sigma * noise (epsilon, v, x0, EDM or LCM "
            f"prediction), got {name} with {sampling_name(sampling)}. Remove the node that set this model sampling, or "
            f"load another checkpoint."
        )
    return unet


def _denoises(sampling) -> bool:
    """Whether noise is added as DDIM in sigma needs it, to latents that reach the UNet scaled down with sigma.

    Flow models mix latents and noise; image-to-image models (Lotus) take latents as they are, without noise.
    """
    sigma, latent = torch.as_tensor(sampling.sigma_max).detach().float().cpu().reshape(1), torch.ones(1)
    noisy = sampling.noise_scaling(sigma, torch.ones(1), latent)
    plain = torch.allclose(noisy, latent + sigma) and torch.equal(sampling.inverse_noise_scaling(sigma, latent), latent)
    return plain and float(sampling.calculate_input(sigma, noisy)) < 2


def sampling_name(sampling) -> str:
    """Name the host's schedule and prediction; the class that joins them is made when a model is loaded."""
    return " and ".join(base.__name__ for base in type(sampling).__bases__)


def sigmas_at(model, timesteps: list[int]) -> Tensor:
    """Return sigma at each of SD's timesteps 0 to 999 for MODEL as it is patched now, float32.

    A model that counts the same timesteps has a sigma of its own at each. Other models are conditioned on a function of
    sigma (EDM, continuous v, Cascade); for them a timestep is the signal-to-noise ratio that SD's schedule has at it.

    Args:
        timesteps: ascending. ValueError when sigma does not rise from each to the next: a distilled model (LCM) has
            fewer noise levels.
    """
    sampling = model.get_model_object("model_sampling")

    def sigmas_of(some: list[int]) -> Tensor:
        if float(sampling.timestep(sampling.sigma_max)) == TRAIN_TIMESTEPS - 1:
            return sampling.sigma(torch.tensor(some, dtype=torch.float32)).float()
        return ModelSamplingDiscrete().sigmas[some] * sampling.sigma_data

    sigmas = sigmas_of(timesteps)
    if not (sigmas[1:] > sigmas[:-1]).all():
        levels = sigmas_of(list(range(TRAIN_TIMESTEPS)))
        grids = {steps: levels[Schedule(steps).sampling] for steps in range(1, MAX_STEPS + 1)}
        most = max(steps for steps, grid in grids.items() if (grid[1:] > grid[:-1]).all())
        raise ValueError(
            f"expected a different noise level for each step, but {sampling_name(sampling)} has too few levels for "
            f"timesteps {timesteps[:3]} and so on. With this model, DDIM Inversion can take at most {most} steps (its "
            f"`steps` times `multiple`)."
        )
    return sigmas


def block_levels(unet: UNetModel) -> dict[Block, int]:
    """Return each block, and how many times its grid has been halved from latent size."""
    levels, level = {}, 0
    for place, block in blocks_of(unet).items():
        levels[place] = level
        level += sum(isinstance(layer, Downsample) for layer in block)
        level -= sum(isinstance(layer, Upsample) for layer in block)
    return levels


def blocks_of(unet: UNetModel) -> dict[Block, torch.nn.Module]:
    """Return every block, in the order in which they run. Distilled UNets (KOALA) have no middle block."""
    middle = [] if unet.middle_block is None else [unet.middle_block]
    parts = {"input": unet.input_blocks, "middle": middle, "output": unet.output_blocks}
    return {(part, number): block for part, blocks in parts.items() for number, block in enumerate(blocks)}


def self_attention_levels(unet: UNetModel) -> dict[Block, int]:
    """Return `block_levels` of the blocks with self-attention."""
    levels = block_levels(unet)
    return {place: levels[place] for place, block in blocks_of(unet).items() if transformers_of(block)}


def transformers_of(block: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the transformer blocks with self-attention in a block of the UNet, in the order of the host's block_index.

    Where a UNet has no self-attention (outer levels of the x4 upscaler and SDXS), `attn1` attends to the prompt.
    """
    transformers = [
        part for layer in block if isinstance(layer, SpatialTransformer) for part in layer.transformer_blocks
    ]
    return [] if any(part.disable_self_attn for part in transformers) else transformers


def grid_at(latent_size: tuple[int, int], level: int) -> tuple[int, int]:
    """Return height and width of the token grid after `level` halvings; odd sizes are rounded up, as the UNet does."""
    height, width = latent_size
    return -(-height // 2**level), -(-width // 2**level)


def decoder_level_end(unet: UNetModel, from_last: int) -> torch.nn.Module:
    """Return the layer whose output is the hidden state of a decoder level, counted from the last level."""
    ends = [block[-1] for block in unet.output_blocks if isinstance(block[-1], Upsample)] + [unet.output_blocks[-1][-1]]
    if from_last >= len(ends):
        raise ValueError(f"this UNet has {len(ends)} decoder levels; `level` must be 0 to {len(ends) - 1}")
    return ends[-1 - from_last]


@contextmanager
def captured(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a layer while the `with` block runs."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()
