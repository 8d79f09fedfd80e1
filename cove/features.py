"""Diffusion features: noise level, average over draws, token grid, picture.

COVE (arXiv 2406.08850), section 3.2, Eq. 4; DIFT (arXiv 2306.03881). The caller selects the layer of the UNet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def diffusion_features(
    decode: Callable[[Tensor, range], Tensor],
    latents: Tensor,
    sigma: Tensor | float,
    grid: tuple[int, int] | None = None,
    ensemble: int = 1,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Compute unit-length features of each frame with noise of one timestep added. Eq. 4.

    Every frame and every draw gets noise of its own: noise shared between frames would be matched instead of them.
    The noise is drawn on the CPU, frame after frame, so that neither device nor batch size changes it.

    Args:
        decode: noisy latents [n, channels, h, w] at `sigma`, and which frames of `latents` they are -> hidden state of
            a decoder level [n, d, height, width].
        latents: clean latents in the model's own scale, [frames, channels, h, w].
        sigma: noise level in k-diffusion's coordinates, noisy = clean + sigma * noise.
        grid: (height, width) of the tokens wanted; averaged down or interpolated up to it. By default as they come.
        ensemble: draws averaged; 1 is the paper.
        batch: frames given to `decode` at a time.
        progress: called with (done, total) batches.

    Returns:
        float32 [frames, height, width, d], on the device of `latents`.
    """
    if ensemble < 1 or batch < 1:
        raise ValueError(f"ensemble and batch must be 1 or more, got {ensemble} and {batch}")
    generator = torch.Generator("cpu").manual_seed(seed)
    pieces = [range(i, min(i + batch, len(latents))) for i in range(0, len(latents), batch)]
    mean = [0.0] * len(pieces)
    for draw in range(ensemble):
        for i, piece in enumerate(pieces):
            clean = latents[piece.start : piece.stop]
            noise = torch.stack([torch.randn(frame.shape, generator=generator) for frame in clean])
            hidden = decode(clean + sigma * noise.to(clean), piece).float()
            mean[i] = mean[i] + (hidden if grid is None else resample(hidden, grid)) / ensemble
            if progress is not None:
                progress(draw * len(pieces) + i + 1, ensemble * len(pieces))
    return F.normalize(rearrange(torch.cat(mean), "f d h w -> f h w d"), dim=-1)


def resample(hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a hidden state [n, d, height, width] to another grid, averaging or interpolating."""
    if hidden.shape[-2:] == grid:
        return hidden
    if hidden.shape[-2] >= grid[0] and hidden.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(hidden, grid)
    return F.interpolate(hidden, grid, mode="bilinear", align_corners=False)


def feature_picture(features: Tensor) -> Tensor:
    """Return the three principal components of all frames' features as RGB: similar colours mean similar features.

    Args:
        features: [frames, height, width, channels].

    Returns:
        float32 [frames, height, width, 3] from 0 to 1.
    """
    flat = rearrange(features.float(), "f h w c -> (f h w) c")
    flat = flat - flat.mean(0)
    # Eigenvectors of the covariance: the axes of a PCA, at the cost of a [channels, channels] problem.
    _, axes = torch.linalg.eigh(flat.T @ flat)
    axes = axes[:, -3:].flip(1)
    axes = torch.where(axes.sum(0) < 0, -axes, axes)  # an axis may point either way: choose one
    shown = flat @ axes
    shown = F.pad(shown, (0, 3 - shown.shape[1]))
    low, high = shown.amin(0), shown.amax(0)
    shown = ((shown - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return rearrange(shown, "(f h w) c -> f h w c", f=len(features), h=features.shape[1])
