"""Small video files as cameras, phones and editors write them."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from cove.frames import read_frames

RED, GREEN, BLUE = (200, 40, 40), (40, 180, 60), (50, 60, 210)
GREY = (20, 20, 20)
UPRIGHT = [RED, GREEN, BLUE, GREY]  # `colours` of the first frame of `quarters`


def quarters(count: int = 6, height: int = 64, width: int = 96) -> Tensor:
    """Return frames of four quarters, red, green, blue and a grey of 20 + 12 per frame; [count, height, width, 3]."""
    images = torch.empty(count, height, width, 3)
    top, left = height // 2, width // 2
    images[:, :top, :left], images[:, :top, left:] = torch.tensor(RED) / 255, torch.tensor(GREEN) / 255
    images[:, top:, :left] = torch.tensor(BLUE) / 255
    images[:, top:, left:] = ((20 + 12 * torch.arange(count)) / 255)[:, None, None, None]
    return images


def shown(path: Path, **settings) -> Tensor:
    """Return the frames that `read_frames` reads."""
    return read_frames(path, **settings).images


def colours(image: Tensor) -> list[list[int]]:
    """Return the colours in the middle of the quarters, 0..255."""
    height, width = image.shape[:2]
    places = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [(image[place] * 255).round().int().tolist() for place in places]


def near(found: list[list[int]], expected: list, most: int = 4) -> bool:
    return (torch.tensor(found) - torch.tensor(expected)).abs().max() <= most


def write(
    path: Path,
    images: Tensor,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int | Fraction = 12,
    matrix: str = "smpte170m",
    tags: dict[str, int] | None = None,
    aspect: Fraction | None = None,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    sound: tuple[np.ndarray, int] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a video file of these frames.

    Args:
        images: [frames, height, width, 3 or 4], 0..1; the encoded signal, independent of the tags.
        matrix: the matrix that the colours are encoded with.
        tags: numbers of colorspace, color_trc and color_primaries. None: untagged.
        times: timestamps of the frames, in milliseconds.
        sound: samples [channels, samples], -1..1, and their rate.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        for name, number in (tags or {}).items():
            setattr(context, name, number)
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        if times is not None:
            context.time_base = Fraction(1, 1000)
        audio = None
        if sound is not None:
            samples, hertz = sound
            audio = container.add_stream("pcm_s16le" if path.suffix in (".mkv", ".avi", ".mov") else "aac", rate=hertz)
            audio.layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[len(samples)]
        format = "rgba64le" if images.shape[-1] == 4 else "rgb48le"
        for index, image in enumerate(images):
            pixels = (image * 65535).round().numpy().astype(np.uint16)
            frame = _converted(av.VideoFrame.from_ndarray(pixels, format=format), pix_fmt, matrix)
            frame.pts, frame.time_base = (
                (index, 1 / Fraction(rate)) if times is None else (times[index], Fraction(1, 1000))
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            layout = audio.layout.name
            interleaved = np.ascontiguousarray(samples.T, dtype=np.float32).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(interleaved, "flt", layout)
            frame.rate, frame.pts, frame.time_base = hertz, 0, Fraction(1, hertz)
            resampler = av.AudioResampler(audio.format.name, layout, hertz, frame_size=audio.frame_size or 1024)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(audio.encode(piece))
            container.mux(audio.encode())
    return path


def _converted(frame: av.VideoFrame, pix_fmt: str, matrix: str) -> av.VideoFrame:
    graph = av.filter.Graph()
    exact = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1, 1000)),
        graph.add("scale", f"{exact}:out_color_matrix={matrix}:out_range=tv"),
        graph.add("format", pix_fmt),
        graph.add("buffersink"),
    ).configure()
    graph.vpush(frame)
    converted = graph.vpull()
    # A new frame, without the colour properties that the filter sets and the encoder would write as tags.
    plain = av.VideoFrame(frame.width, frame.height, pix_fmt)
    for to, of in zip(plain.planes, converted.planes, strict=True):
        rows = np.frombuffer(of, np.uint8).reshape(-1, of.line_size)
        width = min(to.line_size, of.line_size)
        padded = np.zeros((len(rows), to.line_size), np.uint8)
        padded[:, :width] = rows[:, :width]
        to.update(padded.tobytes())
    return plain


def tagged(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Add a display matrix (its upper left part, by rows) to an mp4 without one."""
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    data = path.read_bytes()
    place = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :])
    return path


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    """Return one channel of a tone that grows louder, so that loudness identifies the time."""
    time = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * hertz * time) * time / seconds * 0.9)[None].astype(np.float32)
