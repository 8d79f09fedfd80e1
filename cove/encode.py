"""Encoding of frames as a video file."""

from __future__ import annotations

import os
from fractions import Fraction
from math import isfinite
from pathlib import Path

import av
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from .files import atomic_write
from .frames import Progress


def write_frames(path: str | os.PathLike, images: Tensor, fps: float, progress: Progress | None = None) -> None:
    """Write an H.264 mp4 that plays everywhere (yuv420p, BT.709, index in front), atomically.

    The file grows under a temporary name in the same folder and takes its own name when it is complete. After an error
    or an interrupt the temporary file is gone and a file that had the name before is as it was.

    Args:
        path: where to, ending in ".mp4", in a folder that exists.
        images: [frames, height, width, 3], float, 0..1 (clamped), finite; height and width even.
        fps: frames a second, above 0.
        progress: called as progress(done, total) after each frame.
    """
    path = Path(path)
    if images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"The images are {images.dtype} {list(images.shape)}; expected floats in 0..1, [frames, height, width, 3]."
        )
    height, width = images.shape[1:3]
    if path.suffix.lower() != ".mp4" or not path.parent.is_dir():
        raise ValueError(f"Cannot write {path}: expected a name ending in .mp4 in a folder that exists.")
    if height % 2 or width % 2:
        raise ValueError(f"The frames are {width} x {height} pixels; H.264 needs both even. Crop them or resize them.")
    if not (isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}; expected a number above 0.")

    with (
        atomic_write(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        # 30000/1001 is what 29.97 means; this denominator keeps it, and its division by a stride, exact.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "16"}
        # Players guess the matrix of an untagged file from its size, and guess differently.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = int(Colorspace.ITU709)
        context.color_range = int(ColorRange.MPEG)
        for index, image in enumerate(images):
            if not torch.isfinite(image).all():
                raise ValueError(f"Frame {index} holds NaN or Inf; expected values in 0..1. See what made it.")
            pixels = image.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
            frame = av.VideoFrame.from_ndarray(pixels.contiguous().numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
            if progress is not None:
                progress(index + 1, len(images))
        container.mux(stream.encode())
