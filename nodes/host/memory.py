"""Memory that ComfyUI reserves for a run, beside the weights: it is estimated from the shape of the noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from comfy.patcher_extension import WrappersMP

Shape = list[int]  # of the noise: frames, channels, height and width


def reserve_frames(model, key: str, frames: int) -> None:
    """Let this clone of MODEL reserve memory for so many frames at most, which are evaluated at a time."""
    _reserve(model, key, lambda model, shape: [min(frames, shape[0]), *shape[1:]])


def reserve_bytes(model, key: str, bytes_of: Callable[[Shape], int]) -> None:
    """Let this clone of MODEL reserve more bytes than its evaluation takes, as so many more frames."""

    def larger(model, shape: Shape) -> Shape:
        of_frame = model.model.memory_required([2, *shape[1:]])  # the host counts prompt and negative prompt
        return [shape[0] + math.ceil(bytes_of(shape) / max(1, of_frame)), *shape[1:]]

    _reserve(model, key, larger)


def _reserve(model, key: str, change: Callable[..., Shape]) -> None:
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, partial(_prepare, change))


def _prepare(change: Callable[..., Shape], executor, model, noise_shape, conds, *args, **kwargs):
    return executor(model, change(model, list(noise_shape)), conds, *args, **kwargs)
