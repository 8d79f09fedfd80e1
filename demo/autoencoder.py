"""The demo model's autoencoder: 4x4 pixels to one latent of four numbers.

Stable Diffusion's own has group norms of 32 groups. As narrow as this model is, that leaves a channel or two a group,
and a norm over one channel takes away what a flat colour is. So this one has none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4  # pixels a side of what one latent stands for
LATENTS = 4

Conv = type[nn.Conv2d]


class Block(nn.Module):
    def __init__(self, channels: int, conv: Conv):
        super().__init__()
        self.one, self.two = (conv(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.silu(self.one(F.silu(x))))


class Larger(nn.Module):
    """Twice the size, half the channels."""

    def __init__(self, channels: int, conv: Conv):
        super().__init__()
        self.conv = conv(channels, channels // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Autoencoder(nn.Module):
    """Pictures [n, 3, height, width] from -1 to 1, and latents [n, 4, height / 4, width / 4].

    conv: a host that lends weights to layers one by one brings its own.
    """

    def __init__(self, channels: int, conv: Conv = nn.Conv2d):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(PATCH),
            conv(3 * PATCH**2, channels, 3, padding=1),
            *(Block(channels, conv) for _ in range(3)),
            conv(channels, LATENTS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            conv(LATENTS, channels, 3, padding=1),
            *(Block(channels, conv) for _ in range(4)),
            Larger(channels, conv),
            Block(channels // 2, conv),
            Larger(channels // 2, conv),
            Block(channels // 4, conv),
            conv(channels // 4, 3, 3, padding=1),
        )

    def encode(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)
