"""ComfyUI's VIDEO, read like a file of one's own."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import torch
from comfy_api.input_impl import VideoFromFile

from ...cove.audio import Audio
from ...cove.frames import Frames, fit_frames, read_frames


def read_video(video: Any, settings: dict[str, Any], progress: Callable[[int, int], None]) -> Frames:
    """The frames of a VIDEO: of its file, where it has one, else of what it holds.

    Args:
        settings: start, count, stride, width, height and fit, as in `read_frames`.
    """
    if isinstance(video, VideoFromFile) and (trim := _trim(video)) is not None:
        begin, seconds = trim
        window = (begin, begin + seconds if seconds else inf) if begin or seconds else None
        source = video.get_stream_source()
        return read_frames(
            Path(source) if isinstance(source, str) else source, **settings, progress=progress, window=window
        )
    parts = video.get_components()
    images, audio = parts.images, parts.audio
    if getattr(parts, "alpha", None) is not None:
        images = torch.cat([images[..., :3], parts.alpha], dim=-1)
    audio = audio and Audio(audio["waveform"][0].float(), int(audio["sample_rate"]))
    return fit_frames(images, float(parts.frame_rate), audio, **settings)


def _trim(video: VideoFromFile) -> tuple[float, float] | None:
    """Where the VIDEO begins and how long it is, in seconds, 0 = to its end; None where the host does not tell."""
    if hasattr(video, "get_active_trim_window"):
        return video.get_active_trim_window()
    return None if hasattr(video, "as_trimmed") else (0.0, 0.0)
