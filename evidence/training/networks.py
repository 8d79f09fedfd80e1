"""Networks of both worlds: a narrow UNet and text encoder in Stable Diffusion's topology."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from demo.autoencoder import PATCH, Autoencoder

from .words import LENGTH

STEPS = 1000


@dataclass(frozen=True)
class Stage:
    """Training steps on pictures of one size. Smaller sizes come first: words are learned faster on fewer tokens."""

    picture: int  # pixels per side
    batch: int
    fresh: int  # new pictures per step
    steps: int
    rate: float  # learning rate at the start
    fall: float  # share of a half cosine, from that rate to zero, that the stage covers
    focus: tuple[int, int]  # range of half of the timesteps, where shapes form; higher for large pictures


@dataclass(frozen=True)
class Size:
    """Size of the networks and length of their training.

    The UNet's channels are multiples of 32, because ComfyUI's group norms have 32 groups. They are larger than 32: one
    channel per group would lose the mean of a picture. All are multiples of the first, as ComfyUI expects.
    """

    autoencoder: int  # channels
    unet: tuple[int, ...]  # channels of each level, all with attention; the first is at latent size
    heads: int  # of every attention layer, as in SD1.5
    context: int  # width of the text encoder
    autoencoder_batch: int
    autoencoder_steps: int
    stages: tuple[Stage, ...]  # of UNet and text encoder

    @property
    def picture(self) -> int:
        """Pixels per side in the last stage."""
        return self.stages[-1].picture


def make_unet(size: Size) -> UNet2DConditionModel:
    levels = len(size.unet)
    return UNet2DConditionModel(
        sample_size=size.picture // PATCH,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=size.unet,
        layers_per_block=1,
        cross_attention_dim=size.context,
        attention_head_dim=size.heads,  # diffusers' name for the number of heads
    )


def make_text_encoder(size: Size, tokenizer: Tokenizer) -> CLIPTextModel:
    start, end = tokenizer.encode("").ids
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=size.context,
            intermediate_size=4 * size.context,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


@torch.no_grad()
def encode(autoencoder: Autoencoder, pictures: Tensor) -> Tensor:
    """Return the unscaled latents of pictures from 0 to 1, computed in float32 even under autocast."""
    device = next(autoencoder.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return autoencoder.encode(pictures.to(device) * 2 - 1)


class Diffusion(nn.Module):
    """UNet and text encoder, trained jointly; predicts the noise in scaled latents."""

    def __init__(self, size: Size, tokenizer: Tokenizer):
        super().__init__()
        self.unet, self.text = make_unet(size), make_text_encoder(size, tokenizer)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, self.text(tokens).last_hidden_state).sample


def alphas() -> Tensor:
    """Return Stable Diffusion's cumulative alphas, the signal's share of variance at each timestep, [STEPS] float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()
