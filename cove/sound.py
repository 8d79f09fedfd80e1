"""The sound of a span of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

CLICK = 0.05  # seconds; frames of sound that are less apart follow each other: times are rounded, samples are not


class Sound(NamedTuple):
    """`samples` [channels, samples] float32, -1..1, `rate` of them a second."""

    samples: Tensor
    rate: int


class Span(NamedTuple):
    """A piece of a file's time: `seconds` from `start` on, after so many `jumps` of it, to be heard from `place` on."""

    start: float
    place: float
    seconds: float
    jumps: int


def read_sound(container: av.container.InputContainer, spans: list[Span]) -> Sound | None:
    """What is heard during the spans, silence where there is nothing; None for a file without sound.

    What is broken is passed over, like in the picture.
    """
    stream = container.streams.best("audio") if container.streams.audio else None
    if stream is None or not spans:
        return None
    rate, samples = stream.rate, None
    total = round((spans[-1].place + spans[-1].seconds) * rate)
    jumping = spans[0].jumps != spans[-1].jumps or spans[0].jumps > 0
    jumps, expected = 0, None
    for time, piece in _pieces(container, stream, rate):
        if samples is None:
            samples = torch.zeros(len(piece), total)
        if expected is not None:
            if abs(time - expected) < CLICK:
                time = expected
            elif jumping and not -0.5 < time - expected <= 10:
                jumps += 1
        expected = time + piece.shape[1] / rate
        for span in spans:
            if span.jumps != jumps:
                continue
            first = round((span.place + time - span.start) * rate)
            low, high = round(span.place * rate), min(total, round((span.place + span.seconds) * rate))
            begin, end = max(first, low), min(first + piece.shape[1], high)
            if begin < end:
                samples[: len(piece), begin:end] = torch.from_numpy(piece[:, begin - first : end - first])
        if jumps == spans[-1].jumps and expected > spans[-1].start + spans[-1].seconds + 1:
            break
    return None if samples is None else Sound(samples, rate)


def _pieces(
    container: av.container.InputContainer, stream: av.AudioStream, rate: int
) -> Iterator[tuple[float, np.ndarray]]:
    """Time and samples [channels, samples] float32 of each frame of sound, in the stream's own rate and channels."""
    layout, shape, resampler = stream.layout.name, None, None

    def decoded() -> Iterator[av.AudioFrame]:
        try:
            for packet in container.demux(stream):
                try:
                    yield from packet.decode()
                except av.FFmpegError:
                    continue
        except av.FFmpegError:
            return

    for frame in decoded():
        if frame.time is None:
            continue
        if shape != (frame.format.name, frame.layout.name, frame.rate):
            shape = (frame.format.name, frame.layout.name, frame.rate)
            resampler = av.AudioResampler("fltp", layout, rate)
        time = frame.time
        for converted in resampler.resample(frame):
            yield time, converted.to_ndarray()
            time += converted.samples / rate
