"""GPU kernels in Triton, each equal to a function of `cove` in torch, and the choice between the two."""

from __future__ import annotations

import logging
from functools import cache

import torch

AUTO, TRITON, TORCH = KERNELS = ("auto", "triton", "torch")
LIMIT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # largest error of tokens from -1 to 1


def use_triton(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the Triton kernel runs on tensors of a device and a dtype.

    Args:
        kernel: "auto": on NVIDIA GPUs, if it compiles there and is right on a small random case, tried once per device
            and dtype; "triton": always; "torch": never.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if kernel != AUTO:
        return kernel == TRITON
    usable = device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None and dtype in LIMIT
    return usable and _is_right(device, dtype)


@cache
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare kernel and torch on one small case; log why the kernel is not used if they differ or it fails."""
    try:
        error = error_of_attend(device, dtype)
    except Exception as failure:  # Triton is missing, finds no compiler, or does not know the GPU
        reason = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    else:
        if error <= LIMIT[dtype]:
            return True
        reason = f"it is off by {error:.2g} on {device}"
    logging.warning("COVE: guided attention uses PyTorch instead of the Triton kernel and is slower (%s)", reason)
    return False


def error_of_attend(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference between the kernel and torch for 2 clips of 3 frames of 5 tokens."""
    from ..attention import attend_to_sets
    from . import attend

    generator = torch.Generator().manual_seed(0)
    tokens = torch.rand((2, 3, 5, 80), generator=generator) * 2 - 1
    # Without a token twice in a set: where similarities are equal, rounding decides what merges with what.
    sets = torch.rand((3, 5, 15), generator=generator).argsort(-1)[..., :7].int().to(device)
    exact = attend_to_sets(tokens.to(device, dtype).float(), sets, 2, 0.5, kernel=TORCH)
    made = attend.attend_to_sets(tokens.to(device, dtype), sets, 2, 3)
    return float((made.float() - exact).abs().max())
