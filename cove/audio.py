"""The audio of a time span of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

MAX_ROUNDING = 0.05  # seconds; audio frames nearer to one another are contiguous: their time stamps are rounded
MAX_OVERLAP, MAX_GAP = 0.5, 10.0  # seconds; beyond these, the time stamps jump


class Audio(NamedTuple):
    """`samples` [channels, samples] float32 in -1..1, `rate` samples a second."""

    samples: Tensor
    rate: int


class Span(NamedTuple):
    """`seconds` of a file from time stamp `start` on, after `jumps` discontinuities; placed at `place` seconds."""

    start: float
    place: float
    seconds: float
    jumps: int


def read_audio(container: av.container.InputContainer, spans: list[Span]) -> Audio | None:
    """Return the audio of the spans, silent where the file has none; None if it has no audio stream.

    Damaged packets are skipped.
    """
    stream = container.streams.best("audio") if container.streams.audio else None
    if stream is None or not spans:
        return None
    rate, end = stream.rate, spans[-1].start + spans[-1].seconds
    total = round((spans[-1].place + spans[-1].seconds) * rate)
    samples, jumps, expected = None, 0, None
    for time, piece in _decode(container, stream, rate):
        if samples is None:
            samples = torch.zeros(len(piece), total)
        if expected is not None:
            if abs(time - expected) < MAX_ROUNDING:
                time = expected
            elif spans[-1].jumps and not -MAX_OVERLAP < time - expected < MAX_GAP:
                jumps += 1
        expected = time + piece.shape[1] / rate
        for span in spans:
            if span.jumps == jumps:
                _place(samples, piece, time, span, rate)
        if jumps == spans[-1].jumps and time > end + 1:
            break
    return None if samples is None else Audio(samples, rate)


def _place(samples: Tensor, piece: np.ndarray, time: float, span: Span, rate: int) -> None:
    """Write the part of a piece that lies in the span."""
    offset = round((span.place + time - span.start) * rate)
    begin = max(offset, round(span.place * rate))
    end = min(offset + piece.shape[1], round((span.place + span.seconds) * rate))
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
            resampler = av.AudioResampler("fltp", layout, rate)
        time = frame.time
        for converted in resampler.resample(frame):
            yield time, converted.to_ndarray()
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
