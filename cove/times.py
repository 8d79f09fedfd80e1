"""The times that a file gives its frames: where they jump, how fast they play, and which sound goes with them."""

from __future__ import annotations

from math import inf
from statistics import median
from typing import NamedTuple

from .sound import Span

JUMP = 10.0  # seconds; FFmpeg's own threshold for a jump, `-dts_delta_threshold`


class Taken(NamedTuple):
    """Which frames: every `stride`-th from `start` on, `count` of them, 0 = as many as there are."""

    start: int = 0
    count: int = 0
    stride: int = 1

    @property
    def needed(self) -> int:
        """Frames up to the last one taken, 0 = all."""
        return self.start + (self.count - 1) * self.stride + 1 if self.count else 0

    def usable(self, available: int) -> int:
        """How many can be taken of so many frames."""
        usable = len(range(self.start, available, self.stride))
        return min(usable, self.count or usable)

    def __contains__(self, index: int) -> bool:
        return index >= self.start and (index - self.start) % self.stride == 0


class Clock:
    """When the frames of a file are shown, in seconds.

    A recording that is appended to another one brings its own clock, so that time jumps. A frame after a jump follows
    at the usual distance. Slide shows have long steps, too, but they are all long: up to ten times the usual one, a
    step is none.

    jumps: indices of the frames whose time is not after the last one's, or too far after it.
    """

    def __init__(self, times: list[float | None]):
        self.known = None not in times
        self.times = times if self.known else [0.0] * len(times)
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        self.usual = median([step for step in steps if step > 0] or [0.0])
        too_far = max(JUMP, 10 * self.usual)
        self.jumps = [index for index, step in enumerate(steps, 1) if self.known and not 0 < step <= too_far]
        self.shown = [0.0]
        for index, step in enumerate(steps, 1):
            self.shown.append(self.shown[-1] + (self.usual if index in self.jumps else step))

    def rate(self, first: int, last: int, stride: int, announced: list[float], rounding: float) -> float:
        """Frames a second of every `stride`-th frame from `first` to `last`.

        That is the first announced rate that their times do not contradict, else the mean. `rounding` is the file's
        unit of time: 1 ms in Matroska, which must not turn 24 into 23.8.
        """
        frames, elapsed = (last - first) // stride, self.shown[last] - self.shown[first]
        if not frames or elapsed <= 0:
            return announced[0] / stride
        for rate in announced:
            if abs(elapsed - frames * stride / rate) <= 2 * rounding + 0.01 * elapsed:
                return rate / stride
        return frames / elapsed

    def falls_short_of(self, seconds: float) -> bool:
        """Whether a video that lasts so long must have had more frames. The last one may be shown longer than any."""
        longest = max((after - before for before, after in zip(self.shown, self.shown[1:], strict=False)), default=inf)
        return self.known and not self.jumps and seconds > self.shown[-1] + 1.5 * longest + 0.1

    def spans(self, first: int, last: int, seconds: float) -> list[Span]:
        """The pieces of the file's time, free of jumps, that play from `first` to `last`, so many seconds in all."""
        if not self.known:
            return []
        starts = [first, *(index for index in self.jumps if first < index <= last)]
        places = [self.shown[index] - self.shown[first] for index in starts]
        return [
            Span(self.times[index], place, end - place, sum(jump <= index for jump in self.jumps))
            for index, place, end in zip(starts, places, [*places[1:], seconds], strict=True)
        ]
