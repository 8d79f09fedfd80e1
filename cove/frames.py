"""Video files and folders of images as frames in torch, as players show them, with their sound.

Frames are [frames, height, width, 3] float32 in 0..1, ComfyUI's IMAGE. PyAV decodes; only the frames asked for are
converted, and each is resized as it is decoded, so the clip is never held at its full size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from math import inf
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .decode import announced_seconds, count_packets, decoded, is_animated_webp, opened, video_stream, webp_frames
from .picture import Orientation, Pictures, deinterlaced, orientation_of, orientation_of_image
from .sound import Sound, read_sound
from .times import Clock, Taken

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CLIP_SUFFIXES = (".3gp", ".apng", ".gif", ".m2ts", ".mts", ".ts")  # clips that do not look like videos to everybody
IMAGE_FPS = 24.0  # a folder of images does not say how fast it plays; this is what cinema plays at
Progress = Callable[[int, int], None]
Source = str | os.PathLike | BytesIO


class Frames(NamedTuple):
    """A clip as it is shown.

    images: [frames, height, width, 3] float32 in 0..1, over black where the clip is transparent.
    mask: [frames, height, width] float32, 1 where nothing of the clip shows: transparent places, and bars beside it.
    fps: the rate they play at, frames a second.
    sound: of the same span, or None when the clip has none.
    notes: what a user should know of the file, in sentences.
    """

    images: Tensor
    mask: Tensor
    fps: float
    sound: Sound | None
    notes: tuple[str, ...]


def read_frames(
    source: Source,
    start: int = 0,
    count: int = 0,
    stride: int = 1,
    width: int = 0,
    height: int = 0,
    fit: str = "crop",
    progress: Progress | None = None,
    window: tuple[float, float] | None = None,
) -> Frames:
    """Every `stride`-th frame of a video file or a folder of images, from `start` on, resized to `width` x `height`.

    A video is decoded from its beginning, because seeking is not frame-exact, up to the last frame needed. Of several
    video streams the one marked as default is taken. Frames are turned, mirrored and stretched as the file says;
    interlaced ones become whole; HDR is brought to SDR. Where frames are unevenly spaced in time, `fps` is the mean
    rate of the frames taken. What is broken in the middle is passed over, as players do, and noted.

    Images are read in natural order ("frame2" before "frame10") and play at 24 frames a second.

    Args:
        source: a video file (its path or its bytes), or a folder whose images all have the same size.
        start: index of the first frame, from 0.
        count: frames to return, 0 = as many as there are.
        stride: distance between two frames, 1 = every frame. The rate is divided by it.
        width, height: multiples of 8 in pixels, or 0: as in `Pictures`.
        fit: "crop", "pad" or "stretch", likewise.
        progress: called as progress(done, total) for each frame decoded; what it raises ends the reading.
        window: of a video, only the frames from the first to before the second of these times, in seconds.

    Raises:
        ValueError: nothing at `source`, no video in it, it cannot be decoded, it has fewer frames than asked, its
            images differ in size, or an argument is out of range.
    """
    pictures, taken = Pictures(width, height, fit), _taken(start, count, stride)
    progress = progress or (lambda done, total: None)
    if isinstance(source, BytesIO):
        return _read_video(source, taken, pictures, progress, window)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"There is no file or folder at {path}; expected a video file or a folder of images.")
    if path.is_dir():
        return _read_folder(path, taken, pictures, progress)
    if is_animated_webp(path):
        return _read_webp(path, taken, pictures, progress)
    return _read_video(path, taken, pictures, progress, window)


def fit_frames(
    images: Tensor,
    fps: float,
    sound: Sound | None = None,
    start: int = 0,
    count: int = 0,
    stride: int = 1,
    width: int = 0,
    height: int = 0,
    fit: str = "crop",
) -> Frames:
    """Frames that are in memory already, taken and resized like those of a file.

    Args:
        images: [frames, height, width, 3], or 4 with alpha, float in 0..1.
        fps, sound: of all of them.
        start, count, stride, width, height, fit: as in `read_frames`.
    """
    pictures, taken = Pictures(width, height, fit), _taken(start, count, stride)
    kept = images[start::stride][: count or None]
    if len(kept) == 0 or len(kept) < count:
        raise _too_few("The video", len(images), taken)
    room, format = _Room(len(kept)), "rgba64le" if images.shape[-1] == 4 else "rgb48le"
    for image in kept:
        pixels = (image.float().clamp(0, 1) * 65535).round().cpu().numpy().astype(np.uint16)
        room.append(pictures(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=format), Orientation()))
    if sound is not None:
        first = round(start / fps * sound.rate)
        total = round(len(kept) * stride / fps * sound.rate)
        heard = sound.samples[:, first : first + total]
        sound = Sound(F.pad(heard, (0, total - heard.shape[1])), sound.rate)
    return Frames(*room.tensors(), fps / stride, sound, ())


def _taken(start: int, count: int, stride: int) -> Taken:
    for name, value, least in (("start", start, 0), ("count", count, 0), ("stride", stride, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more.")
    return Taken(start, count, stride)


def image_files(folder: str | os.PathLike) -> list[Path]:
    """The images that stand directly in `folder`, in natural order; hidden files are passed over."""
    files = [file for file in Path(folder).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    return sorted((file for file in files if file.is_file() and file.name[0] != "."), key=_natural)


def _natural(file: Path) -> tuple[list, str]:
    # Splitting by a group puts text and digits in turns, so equal places always compare equal types. The name itself
    # decides between "frame1" and "frame01".
    parts = re.split(r"(\d+)", file.name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], file.name


# --- videos ---


def _read_video(
    source: Path | BytesIO,
    taken: Taken,
    pictures: Pictures,
    progress: Progress,
    window: tuple[float, float] | None,
) -> Frames:
    name = source.name if isinstance(source, Path) else "The video"
    begin, end = window or (-inf, inf)
    # Headers promise too much and too little. Packets are counted without decoding any.
    packets, notes = count_packets(source, name, taken.needed, begin, end), {}
    with opened(source, name) as container:
        stream = video_stream(container, name)
        whole = deinterlaced(decoded(container, stream, notes))
        within = (frame for frame in whole if frame.time is None or begin <= frame.time < end)
        aspect = float(stream.sample_aspect_ratio or 1)
        room, clock = _take(name, within, packets, taken, pictures, progress, notes, aspect)
        if not taken.count and not window and (announced := _missing(container, stream, packets, clock)):
            notes["short"] = (
                f"{name} is cut short, or its header promises too much: it announces {announced}, and "
                f"{len(clock.times)} frames are there."
            )
        first, last = taken.start, taken.start + (room.length - 1) * taken.stride
        rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
        fps = clock.rate(first, last, taken.stride, rates or [IMAGE_FPS], float(stream.time_base))
    with opened(source, name) as container:
        heard = read_sound(container, clock.spans(first, last, room.length / fps))
    return Frames(*room.tensors(), fps, heard, tuple(notes.values()))


def _missing(container: av.container.InputContainer, stream: av.VideoStream, packets: int, clock: Clock) -> str:
    """What the header announces, if there is less; "" when all is there."""
    if stream.frames > packets:
        return f"{stream.frames} frames"
    seconds = announced_seconds(container, stream)
    return f"{seconds:.1f} seconds" if clock.falls_short_of(seconds) else ""


def _take(
    name: str,
    frames: Iterable[av.VideoFrame],
    expected: int,
    taken: Taken,
    pictures: Pictures,
    progress: Progress,
    notes: dict[str, str],
    aspect: float = 1.0,
) -> tuple[_Room, Clock]:
    """The pictures of the frames taken, and the times of all frames up to the last of them."""
    if expected < max(taken.needed, taken.start + 1):
        raise _too_few(name, expected, taken)
    room, times, orientations = _Room(taken.usable(expected)), [], {}
    for index, frame in enumerate(frames):
        times.append(frame.time)
        if index in taken:
            # PyAV keeps a frame whose side data was asked for until the garbage is collected: ask once.
            turn = frame.rotation, frame.width, frame.height
            if turn not in orientations:
                orientations[turn] = orientation_of(frame)
            orientation, whole = orientations[turn]
            if not whole:
                notes["turn"] = f"{name} asks for a turn that is not by quarters; the nearest quarter was taken."
            room.append(pictures(frame, orientation, aspect))
        progress(index + 1, max(index + 1, taken.needed or expected))
        if index + 1 == taken.needed:
            break
    if not times:
        why = " ".join(notes.values())
        raise ValueError(f"{name} has a video stream, but no frame in it could be decoded. {why} Save it again.")
    if not room.length or room.length < taken.count:
        raise _too_few(name, len(times), taken)
    clock = Clock(times)
    if clock.jumps:
        notes["jump"] = (
            f"The time stamps of {name} jump at frame {clock.jumps[0]}, as where a recording is appended to another; "
            "that frame was taken to follow the one before it."
        )
    return room, clock


def _read_webp(path: Path, taken: Taken, pictures: Pictures, progress: Progress) -> Frames:
    try:
        with Image.open(path) as image:
            room, clock = _take(path.name, webp_frames(image), image.n_frames, taken, pictures, progress, {})
    except (OSError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path.name} cannot be decoded ({error}). Save it again, or choose another file.") from error
    first, last = taken.start, taken.start + (room.length - 1) * taken.stride
    return Frames(*room.tensors(), clock.rate(first, last, taken.stride, [IMAGE_FPS], 0.001), None, ())


# --- folders ---


def _read_folder(path: Path, taken: Taken, pictures: Pictures, progress: Progress) -> Frames:
    files = image_files(path)
    if not files:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"The folder {path.name} holds no images; expected files ending in {suffixes}.")
    kept = files[taken.start :: taken.stride][: taken.count or None]
    if not kept or len(kept) < taken.count:
        raise _too_few(path.name, len(files), taken)

    room, size = _Room(len(kept)), None
    for index, file in enumerate(kept):
        with opened(file, file.name) as container:
            frame = next(container.decode(video_stream(container, file.name)), None)
        if frame is None:
            raise ValueError(f"{file.name} holds no picture. Remove it or save it again.")
        orientation = orientation_of_image(file)
        shown = (frame.height, frame.width) if orientation.transpose else (frame.width, frame.height)
        size = size or shown
        if shown != size:
            raise ValueError(
                f"{file.name} is {shown[0]} x {shown[1]} pixels, but {kept[0].name} is {size[0]} x {size[1]}; the "
                f"images of a clip need one size. Resize it, or move it out of the folder {path.name}."
            )
        room.append(pictures(frame, orientation))
        progress(index + 1, len(kept))
    return Frames(*room.tensors(), IMAGE_FPS / taken.stride, None, ())


# --- both ---


class _Room:
    """Pictures put one after another into one tensor, since a list and its stack would need the memory twice.

    The tensor has room for `expected` pictures from the start, and doubles when there are more. Memory is only taken
    up by what is written, and by masks only from the first transparent picture on.
    """

    def __init__(self, expected: int):
        self.expected, self.length, self.images, self.mask = max(1, expected), 0, None, None

    def append(self, picture: Tensor) -> None:
        if self.images is None:
            self.images = torch.empty(self.expected, *picture.shape[:2], 3)
        elif self.length == len(self.images):
            self.images = torch.cat([self.images, torch.empty_like(self.images)])
            self.mask = self.mask and torch.cat([self.mask, torch.zeros_like(self.mask)])
        self.images[self.length] = picture[..., :3]
        if picture.shape[-1] == 4 and (picture[..., 3] < 1).any():
            if self.mask is None:
                self.mask = torch.zeros(self.images.shape[:3])
            self.mask[self.length] = 1 - picture[..., 3]
        self.length += 1

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The images, and their mask; where nothing is transparent, all frames share one of zeros."""
        images = self.images[: self.length]
        mask = torch.zeros(1, *images.shape[1:3]).expand(images.shape[:3]) if self.mask is None else self.mask
        return images, mask[: self.length]


def _too_few(name: str, available: int, taken: Taken) -> ValueError:
    start, count, stride = taken
    wanted = f"start {start}, count {count}, stride {stride} needs {start + max(count - 1, 0) * stride + 1}"
    usable = len(range(start, available, stride))
    mend = f"Set count to {usable} or less (0 = all)" if usable else f"Set start to {available - 1} or less"
    return ValueError(f"{name} has {available} frames, but {wanted}. {mend}, or choose a longer clip.")
