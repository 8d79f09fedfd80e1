"""When the frames of a file are displayed: which are selected, how fast they play, which audio belongs to them."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from .audio import Recording

# Seconds between two frames that are a discontinuity. Transport streams and their like may be joined by copying one
# file behind the other, and their gaps are mostly lost packets; elsewhere it is FFmpeg's `-dts_delta_threshold`.
JUMP_OF_JOINED, JUMP = 1.0, 10.0

INAUDIBLE = 0.05  # seconds between sound and picture


class Selection(NamedTuple):
    """Every `stride`-th frame from `start` on, `count` of them, 0 = to the end."""

    start: int = 0
    count: int = 0
    stride: int = 1

    @property
    def needed(self) -> int:
        """How many frames of the file it takes, 0 = all."""
        return self.start + (self.count - 1) * self.stride + 1 if self.count else 0

    def size_of(self, available: int) -> int:
        """Return how many frames are selected from `available` ones."""
        size = len(range(self.start, available, self.stride))
        return min(size, self.count or size)

    def __contains__(self, index: int) -> bool:
        return index >= self.start and (index - self.start) % self.stride == 0


class Timeline:
    """Time stamps of frames, with discontinuities removed.

    A recording that is appended to another one has time stamps of its own, so that time jumps back or far ahead. The
    frame after a jump is placed at the usual distance from the one before. A long step alone is no jump: a slide show
    has many, none longer than ten times the median.

    Args:
        times: seconds, in the order of display. None where the file has none: the frame is placed beside its
            neighbours.
        usual: seconds between two frames by the header.
        joined: whether recordings can follow one another in a file of this format. Elsewhere time stamps that go back
            are wrong ones (AVI has none for frames out of order), and are sorted.

    Attributes:
        jumps: indices of the frames after a discontinuity.
        positions: seconds since the first frame, without jumps.
    """

    def __init__(self, times: list[float | None], usual: float, joined: bool = False):
        self.times = _filled(times, usual) if joined else sorted(_filled(times, usual))
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        usual = median([step for step in steps if step > 0] or [0.0])
        longest = max(JUMP_OF_JOINED if joined else JUMP, 10 * usual)
        self.jumps = [index for index, step in enumerate(steps, 1) if not 0 <= step <= longest]
        self.positions = [0.0]
        for index, step in enumerate(steps, 1):
            self.positions.append(self.positions[-1] + (usual if index in self.jumps else step))

    def frame_rate(self, first: int, last: int, stride: int, announced: list[float], rounding: float) -> float:
        """Return frames a second of every `stride`-th frame from `first` to `last`.

        That is the first announced rate that the time stamps do not contradict, else their average.

        Args:
            announced: frames a second, from the header; at least one.
            rounding: unit of the time stamps in seconds: 1 ms in Matroska, which must not turn 24 into 23.8.
        """
        frames, elapsed = (last - first) // stride, self.positions[last] - self.positions[first]
        if not frames or elapsed <= 0:
            return announced[0] / stride
        for rate in announced:
            if abs(elapsed - frames * stride / rate) <= 2 * rounding + min(0.01 * elapsed, INAUDIBLE):
                return rate / stride
        return frames / elapsed

    def drift(self, first: int, last: int, frame_rate: float) -> float:
        """Return how far frames from `first` to `last` are from their time at a constant rate, at most, in seconds."""
        start = self.positions[first]
        return max(abs(self.positions[i] - start - (i - first) / frame_rate) for i in range(first, last + 1))

    def ends_before(self, seconds: float, usual: float) -> bool:
        """Return whether frames are missing from a video of this duration. The last one may be displayed longer.

        Args:
            usual: seconds between two frames by the header.
        """
        steps = [after - before for before, after in zip(self.positions, self.positions[1:], strict=False)]
        last = max(self.positions[-1], self.times[-1])  # some headers count from 0, others from the first frame
        return not self.jumps and seconds > last + 1.5 * max([usual, *steps]) + 0.1

    def recordings(self) -> list[Recording]:
        """Return where each stretch between jumps begins, in the file and without jumps."""
        return [Recording(self.times[index], self.positions[index]) for index in [0, *self.jumps]]


def _filled(times: list[float | None], usual: float) -> list[float]:
    """Return the time stamps with missing ones at the usual distance from the one before, or from the one after."""
    known = next((index for index, time in enumerate(times) if time is not None), 0)
    filled = [(times[known] or 0.0) - (known - index) * usual for index in range(known + 1)]
    for time in times[known + 1 :]:
        filled.append(filled[-1] + usual if time is None else time)
    return filled
