"""The audio of a time span of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import inf
from typing import NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

MAX_ROUNDING = 0.02  # seconds; audio frames nearer to one another are contiguous: their time stamps are rounded
MAX_OVERLAP = 0.5  # seconds; audio further behind what was played belongs to a recording that was not asked for


class Audio(NamedTuple):
    """`samples` [channels, samples] float32 in -1..1, `rate` samples a second."""

    samples: Tensor
    rate: int


class Recording(NamedTuple):
    """A stretch of a file that begins at time stamp `start`, and is displayed from `position` on, both in seconds."""

    start: float
    position: float


def read_audio(
    container: av.container.InputContainer, recordings: list[Recording], begin: float, seconds: float, notes: dict
) -> Audio | None:
    """Return the audio from position `begin` on, silent where the file has none; None if it has no audio stream.

    Damaged packets are skipped. Audio that cannot be decoded is reported in `notes`.
    """
    stream = container.streams.best("audio") if container.streams.audio else None
    if stream is None:
        return None
    if stream.codec_context is None or not stream.rate:
        notes["audio"] = "The sound is left out: FFmpeg cannot decode it. Convert the file to an H.264 mp4 with AAC."
        return None
    rate = stream.rate
    total, samples, current, expected, played = round(seconds * rate), None, 0, None, 0.0
    rounding = max(MAX_ROUNDING, 1.5 * float(stream.time_base))
    for time, piece in _split(_decode(container, stream, rate), recordings, rate):
        if samples is None:
            samples = torch.zeros(len(piece), total)
        if expected is not None and abs(time - expected) < rounding:
            time = expected
        current = _recording_of(time, recordings, current, played)
        start, position = recordings[current]
        place = position + time - start
        if place > begin + seconds + 1 and current == len(recordings) - 1:
            break
        if place < played - MAX_OVERLAP:
            continue
        expected = time + piece.shape[1] / rate
        stop = recordings[current + 1].position if current + 1 < len(recordings) else inf
        played = min(place + piece.shape[1] / rate, stop)
        bounds = max(0.0, position - begin) * rate, min(stop - begin, seconds) * rate
        _place(samples, piece, round((place - begin) * rate), *bounds)
    return None if samples is None else Audio(samples, rate)


def _split(
    pieces: Iterable[tuple[float, np.ndarray]], recordings: list[Recording], rate: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield pieces that end where a recording begins: a pause that is left out may begin and end within one."""
    for time, piece in pieces:
        cuts = sorted(round((start - time) * rate) for start, _ in recordings)
        for begin, end in pairwise([0, *(cut for cut in cuts if 0 < cut < piece.shape[1]), piece.shape[1]]):
            yield time + begin / rate, piece[:, begin:end]


def _recording_of(time: float, recordings: list[Recording], current: int, played: float) -> int:
    """Return which recording audio at this time stamp belongs to: the one in which it follows most closely on `played`.

    That is the current one or a later one.
    """

    def distance(index: int) -> float:
        start, position = recordings[index]
        return abs(position + time - start - played)

    return min(range(current, len(recordings)), key=distance)


def _place(samples: Tensor, piece: np.ndarray, offset: int, first: float, stop: float) -> None:
    """Write a piece that begins at sample `offset`, as far as it lies between samples `first` and `stop`."""
    begin, end = max(offset, round(first)), min(offset + piece.shape[1], round(stop))
    if begin < end:
        samples[: len(piece), begin:end] = torch.from_numpy(piece[:, begin - offset : end - offset])


def _decode(
    container: av.container.InputContainer, stream: av.AudioStream, rate: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield time stamps and samples [channels, samples] float32, all at one rate and with the stream's channels."""
    layout, format, resampler = stream.layout.name, None, None
    for frame in _decode_frames(container, stream):
        if frame.time is None:
            continue
        if format != (frame.format.name, frame.layout.name, frame.rate):  # resamplers refuse a change
            format = (frame.format.name, frame.layout.name, frame.rate)
            resampler = av.AudioResampler("flt", layout, rate)
        time = frame.time
        for converted in resampler.resample(frame):
            # Interleaved, since PyAV 18 crashes on planar audio of eight channels.
            yield time, converted.to_ndarray().reshape(-1, converted.layout.nb_channels).T
            time += converted.samples / rate


def _decode_frames(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue
    except av.FFmpegError:  # a damaged container: what comes before it is all there is
        return
