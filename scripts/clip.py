"""Render a small moving clip, for tests and for edits without a clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cove.encode import write_frames

MARGIN = 1.5  # pixels over which a shape's border fades, so that motion below a pixel shows


def render_clip(path: str | Path, frames: int = 9, width: int = 256, height: int = 160, fps: int = 12) -> Path:
    """Render a rolling striped ball and a drifting box over a textured ground, with a slowly panning camera.

    The picture is a function of position and time, so motion is smooth and subpixel, and frame i does not depend on the
    number of frames.

    Args:
        path: video to write (H.264 in mp4), replaced atomically.
        width, height: in pixels, even.
    """
    if frames < 1 or width % 2 or height % 2 or min(width, height) < 16:
        raise ValueError(f"a clip needs frames and an even size of 16 or more, got {frames} of {width}x{height}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = np.stack([_frame(index / 12, width, height) for index in range(frames)])
    write_frames(path, torch.from_numpy(clip).float(), fps)
    return path


def _frame(time: float, width: int, height: int) -> np.ndarray:
    """Return the scene at `time` seconds, [height, width, 3] from 0 to 1. Lengths are in units of the height."""
    y, x = np.mgrid[0:height, 0:width] / height + 0.5 / height
    aspect = width / height

    ground = _texture(x + 0.10 * time, y)
    picture = np.stack([0.30 + 0.18 * ground, 0.48 + 0.22 * ground, 0.26 + 0.12 * ground], -1)
    picture = picture * (0.75 + 0.35 * y[..., None])

    def paint(distance: np.ndarray, colour: np.ndarray) -> None:
        cover = np.clip(0.5 - distance * height / MARGIN, 0, 1)[..., None]
        picture[:] = picture * (1 - cover) + colour * cover

    left = aspect * 0.80 - 0.22 * time
    u, v = x - left, y - 0.28 - 0.02 * np.sin(3 * time)
    planks = 0.85 + 0.15 * np.sign(np.sin(60 * v))
    box = np.maximum(abs(u) - 0.20, abs(v) - 0.11)
    paint(box, np.stack([0.85 * planks, 0.72 * planks, 0.35 * planks], -1))

    radius, middle = 0.19, aspect * 0.25 + 0.30 * time
    u, v = x - middle, y - 0.68 + 0.08 * abs(np.sin(2.5 * time))
    angle = np.arctan2(v, u) - 0.30 * time / radius  # rolls without slipping
    stripes = 0.5 + 0.5 * np.tanh(4 * np.sin(5 * angle))
    light = 1.05 - 0.5 * np.hypot(u + 0.06, v + 0.06) / radius
    ball = np.hypot(u, v) - radius
    paint(ball, np.stack([0.90 * light, (0.15 + 0.55 * stripes) * light, 0.18 * light], -1))
    return np.clip(picture, 0, 1)


def _texture(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a sum of waves in random directions, with wavelengths from 1/3 to 1/30 of the height; about -1 to 1."""
    random = np.random.default_rng(7)
    total = np.zeros_like(x)
    for _ in range(24):
        frequency, direction, phase = 3 * 10 ** random.random(), *(2 * np.pi * random.random(2))
        total += np.sin(2 * np.pi * frequency * (x * np.cos(direction) + y * np.sin(direction)) + phase)
    return total / 6
