"""How alike two clips are, frame by frame, and what that says about an inversion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, section III-C.
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, of values in 0..1; infinite where they are equal.

    Args:
        one, other: [frames, ...], of the same shape.

    Returns:
        [frames], float64.
    """
    _check_alike(one, other)
    return -10 * (one.double() - other.double()).square().flatten(1).mean(1).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each frame, of values in 0..1; 1 where they are equal. Wang et al., 2004, Eq. 13.

    Means, variances and covariance are those under a Gaussian window of 11x11 pixels and sigma 1.5; the mean over the
    places where the window lies inside the frame, and over the channels.

    Args:
        one, other: [frames, height, width, channels], of the same shape, 11 pixels or more a side.

    Returns:
        [frames], float64.
    """
    _check_alike(one, other)
    if one.ndim != 4 or min(one.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"expected frames of {SSIM_WINDOW}x{SSIM_WINDOW} pixels or more, got {list(one.shape)}")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=one.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    return torch.stack([_ssim_of_frame(*pair, window) for pair in zip(one, other, strict=True)])


def _ssim_of_frame(one: Tensor, other: Tensor, window: Tensor) -> Tensor:
    """SSIM of two frames [height, width, channels]."""

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values[:, None], window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    x, y = one.double().movedim(-1, 0), other.double().movedim(-1, 0)
    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()


def _check_alike(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"expected clips of the same shape, got {list(one.shape)} and {list(other.shape)}")


GOOD, FAIR = 30.0, 25.0  # dB: differences one has to look for, and differences one sees at once


def verdict(lowest: float, refinements: int | None = None, diverged: bool = False, vae: float | None = None) -> str:
    """In plain words: is an inversion good enough to edit on, and if not, what to change.

    Args:
        lowest: PSNR in dB of the worst frame, sampled back; against what the autoencoder leaves of it, if known.
        refinements: of the inversion, if known. diverged: whether refining diverged at some step.
        vae: PSNR in dB of what the autoencoder leaves of that frame, if known.
    """
    if lowest >= GOOD:
        words = "Good: the clip comes back. Edit on this inversion."
    else:
        words = (
            "Fair: the clip comes back with visible loss." if lowest >= FAIR else "Poor: the clip does not come back."
        )
        more = "steps" if diverged or (refinements or 0) >= 2 else "refinements"
        words += (
            f" Set more {more} in DDIM Inversion. DDIM Sampler must have the source prompt, cfg 1, and the same model."
        )
    if vae is not None and vae < FAIR:
        words += " The VAE alone loses much: load larger frames."
    return words
