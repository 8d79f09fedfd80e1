"""Decoding of video files: stream selection, damaged packets, headers that are wrong.

PyAV decodes, and Pillow what FFmpeg cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from math import inf
from pathlib import Path
from typing import IO, NamedTuple

import av
import numpy as np
from PIL import Image

from .convert import UNSPECIFIED, Tags

Source = Path | BytesIO


@contextmanager
def open_container(source: Source, name: str) -> Iterator[av.container.InputContainer]:
    """Open a video file, or its bytes, and nothing else.

    FFmpeg by itself opens the files and addresses that a playlist names, and takes a "%" in a path for a pattern.

    Raises:
        ValueError: FFmpeg or the disk failed; names the file.
    """
    try:
        with _open_bytes(source) as data:
            data.seek(0)
            # As `options`, they would be given to streams, too: PyAV 14 crashes where FFmpeg finds more streams later.
            options = {"protocol_whitelist": "none"}
            with av.open(data, metadata_errors="ignore", container_options=options) as container:
                yield container
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            f"{name} cannot be decoded ({error.strerror}). It may be damaged, incompletely copied, or no video: "
            "choose another file, or convert it to an H.264 mp4."
        ) from error


@contextmanager
def _open_bytes(source: Source) -> Iterator[IO[bytes]]:
    if isinstance(source, BytesIO):
        yield source
    else:
        with source.open("rb") as data:
            yield data


def select_video(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """Return the stream that FFmpeg finds best: one marked as default, if there is one."""
    # The cover of an audio file is a video stream, too, of one picture.
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise ValueError(f"{name} has no video stream (it holds {kinds}). Choose a video or a folder of images.")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise ValueError(f"{name} has a codec that FFmpeg cannot decode. Convert it to an H.264 mp4.")
    return stream


def frame_tags(frame: av.VideoFrame, stream: av.VideoStream) -> Tags:
    """Return the pixel aspect and the colour tags of a frame."""
    colours = frame if hasattr(frame, "color_trc") else stream.codec_context  # older PyAV knows the stream's only
    tags = colours.color_trc, colours.color_primaries
    return Tags(float(stream.sample_aspect_ratio or 1), *(UNSPECIFIED if tag is None else int(tag) for tag in tags))


def are_joined(container: av.container.InputContainer) -> bool:
    """Return whether time stamps may jump in files of this format, because recordings can follow one another."""
    return bool(container.format.flags & av.format.Flags.ts_discont.value)


def decode_video(
    container: av.container.InputContainer, stream: av.VideoStream, notes: dict[str, str]
) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream. Damaged packets are skipped; the first is reported in `notes`."""
    decoder, colours, frames, delay = _decoder_of(stream), stream.codec_context, 0, None

    def report(error: av.FFmpegError) -> None:
        notes.setdefault(
            "damage",
            f"The file is damaged ({error.strerror}). {frames} frames before the damage could be decoded; what comes "
            "after it was decoded as far as possible.",
        )

    def decode(packet: av.Packet | None) -> Iterator[av.VideoFrame]:
        nonlocal frames, delay
        try:
            for frame in decoder.decode(packet):
                frame.time_base = stream.time_base  # unset on the last frames
                if delay is None:  # AVI has no time stamps of display: FFmpeg guesses them too late
                    delay = (frame.pts or 0) - (stream.start_time or 0) if container.format.name == "avi" else 0
                if delay and frame.pts is not None:
                    frame.pts -= delay
                if decoder is not colours:  # libvpx does not know what the container says
                    frame.colorspace, frame.color_range = colours.colorspace, colours.color_range
                if frame.is_corrupt:
                    notes.setdefault("damage", f"The file is damaged: frame {frames} and some after it may look wrong.")
                frames += 1
                yield frame
        except av.FFmpegError as error:
            report(error)

    try:
        for packet in container.demux(stream):
            if packet.size:
                yield from decode(packet)
    except av.FFmpegError as error:
        report(error)
    yield from decode(None)


def _decoder_of(stream: av.VideoStream) -> av.VideoCodecContext:
    """Return the decoder of a stream. FFmpeg's own VP8 and VP9 decoders ignore WebM's alpha; libvpx decodes it."""
    libvpx = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
    if stream.metadata.get("alpha_mode") == "1" and stream.codec.name in libvpx:
        decoder = av.CodecContext.create(libvpx[stream.codec.name], "r")
        decoder.extradata = stream.codec_context.extradata
        return decoder
    decoder, decoder.thread_type = stream.codec_context, "AUTO"
    if decoder.name == "hevc":  # which otherwise drops every frame from a damaged one to the next key frame
        decoder.flags |= av.codec.context.Flags.output_corrupt
    return decoder


class Packets(NamedTuple):
    """`video`: how many video packets. `seconds`: from the first to the last packet of any stream."""

    video: int
    seconds: float


def count_packets(source: Source, name: str, enough: int, begin: float, end: float) -> Packets:
    """Count video packets with time stamps from `begin` to before `end`, up to `enough` of them, 0 = all.

    Nothing is decoded. Counting ends where the container is damaged, as decoding does.
    """
    packets, first, last = 0, inf, -inf
    with open_container(source, name) as container:
        video = select_video(container, name)
        try:
            for packet in container.demux():
                time = None if packet.pts is None else float(packet.pts * packet.time_base)
                if time is not None:
                    first = min(first, time)
                    last = max(last, time + float((packet.duration or 0) * packet.time_base))
                if packet.stream is video:
                    packets += packet.size > 0 and (time is None or begin <= time < end)
                if enough and packets == enough:
                    break
        except av.FFmpegError:
            pass
    return Packets(packets, max(0.0, last - first))


def header_duration(stream: av.VideoStream) -> float:
    """Return the duration of the video by its header, in seconds, 0 = unknown."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    parts = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)\s*", stream.metadata.get("DURATION", ""))  # Matroska
    if parts is None:
        return 0.0
    hours, minutes, seconds = parts.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def is_animated_webp(path: Path) -> bool:
    """Return whether a file is a WebP with the animation flag."""
    with path.open("rb") as data:
        header = data.read(21)
    return header[:4] == b"RIFF" and header[8:16] == b"WEBPVP8X" and bool(header[20] & 2)


def is_animated_png(path: Path) -> bool:
    """Return whether a file is a PNG whose animation chunk is near its beginning, where encoders write it."""
    with path.open("rb") as data:
        header = data.read(1024)
    return header.startswith(b"\x89PNG") and b"acTL" in header.partition(b"IDAT")[0]


def decode_webp(image: Image.Image) -> Iterator[av.VideoFrame]:
    """Yield the frames of an animated WebP, which FFmpeg cannot decode."""
    for index in range(image.n_frames):
        image.seek(index)
        frame = av.VideoFrame.from_ndarray(np.array(image.convert("RGBA")), format="rgba")
        frame.pts, frame.time_base = image.info["timestamp"], Fraction(1, 1000)
        yield frame
