"""Frames out of files: which stream is shown, what is broken, how many there are.

PyAV decodes; Pillow does where FFmpeg cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import IO

import av
import numpy as np
from PIL import Image


def decoded(
    container: av.container.InputContainer, stream: av.VideoStream, notes: dict[str, str]
) -> Iterator[av.VideoFrame]:
    """The frames of a stream. What is broken is passed over, and noted."""
    decoder, frames = _decoder(stream), 0

    def decode(packet: av.Packet | None) -> Iterator[av.VideoFrame]:
        nonlocal frames
        try:
            for frame in decoder.decode(packet):
                frame.time_base = stream.time_base  # frames that come out at the end have none
                frames += 1
                yield frame
        except av.FFmpegError as error:
            note(error)

    def note(error: av.FFmpegError) -> None:
        notes.setdefault(
            "broken",
            f"A part of the file is broken ({error.strerror}): {frames} frames before it could be read, and what comes "
            "after it as far as possible.",
        )

    try:
        for packet in container.demux(stream):
            if packet.size:
                yield from decode(packet)
    except av.FFmpegError as error:
        note(error)
    yield from decode(None)


def _decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """FFmpeg's own decoders of VP8 and VP9 leave out the alpha that WebM keeps beside the picture; libvpx does not."""
    names = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
    if stream.metadata.get("alpha_mode") == "1" and stream.codec.name in names:
        decoder = av.CodecContext.create(names[stream.codec.name], "r")
        decoder.extradata = stream.codec_context.extradata
        return decoder
    stream.thread_type = "AUTO"
    return stream.codec_context


def count_packets(source: Path | BytesIO, name: str, enough: int, begin: float, end: float) -> int:
    """Packets of the video within these times, up to `enough` of them, 0 = all. A broken end ends the count."""
    packets = 0
    with opened(source, name) as container:
        try:
            for packet in container.demux(video_stream(container, name)):
                time = None if packet.pts is None else float(packet.pts * packet.time_base)
                packets += packet.size > 0 and (time is None or begin <= time < end)
                if enough and packets == enough:
                    break
        except av.FFmpegError:  # decoding comes to the same place, and notes it
            pass
    return packets


def announced_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """How long the video lasts by the header, 0 = it does not say. Other streams may last longer."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    hours, minutes, seconds = stream.metadata.get("DURATION", "0:0:0").split(":")  # Matroska's
    seconds = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if not seconds and len(container.streams) == 1 and container.duration:
        seconds = container.duration / av.time_base
    return seconds


@contextmanager
def opened(source: Path | BytesIO, name: str) -> Iterator[av.container.InputContainer]:
    """A container that reads this file only; errors of FFmpeg and of the disk say which file, and what to do.

    FFmpeg would open other files and addresses that a playlist names, and take a "%" in a path for a numbering pattern.
    """
    try:
        with _bytes_of(source) as data:
            data.seek(0)
            options = {"protocol_whitelist": "none"}
            with av.open(data, metadata_errors="ignore", options=options) as container:
                yield container
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            f"{name} cannot be decoded ({error.strerror}). It may be damaged, incompletely copied, or no video: "
            "choose another file, or convert it to an H.264 mp4."
        ) from error


@contextmanager
def _bytes_of(source: Path | BytesIO) -> Iterator[IO[bytes]]:
    if isinstance(source, BytesIO):
        yield source
    else:
        with source.open("rb") as data:
            yield data


def video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The stream that players show: one that is marked as default, and of several the one FFmpeg finds best."""
    # The cover of an audio file is a video stream too, of one picture.
    cover, default = av.stream.Disposition.attached_pic, av.stream.Disposition.default
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise ValueError(f"{name} has no video stream (it holds {kinds}). Choose a video or a folder of images.")
    streams = [stream for stream in streams if stream.disposition & default] or streams
    best = container.streams.best("video")
    return best if best in streams else streams[0]


# --- animated WebP, which FFmpeg does not decode ---


def is_animated_webp(path: Path) -> bool:
    with path.open("rb") as data:
        head = data.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def webp_frames(image: Image.Image) -> Iterator[av.VideoFrame]:
    """All frames of an animated WebP that Pillow has opened."""
    for index in range(image.n_frames):
        image.seek(index)
        frame = av.VideoFrame.from_ndarray(np.array(image.convert("RGBA")), format="rgba")
        frame.pts, frame.time_base = image.info["timestamp"], Fraction(1, 1000)
        yield frame
