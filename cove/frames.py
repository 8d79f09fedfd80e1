"""Video files and folders of images as frames in torch, as players display them, with their audio.

Frames are [frames, height, width, 3] float32 in 0..1, ComfyUI's IMAGE. Only the selected frames are converted, each
resized as it is decoded, so the clip is never held at its full size.
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

from .audio import Audio, read_audio
from .convert import UNTAGGED, FrameConverter, deinterlace, frame_orientation, has_known_colours, image_orientation
from .decode import (
    Packets,
    Source,
    are_joined,
    count_packets,
    decode_video,
    decode_webp,
    frame_tags,
    header_duration,
    is_animated_png,
    is_animated_webp,
    open_container,
    select_video,
)
from .timeline import Selection, Timeline

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CLIP_SUFFIXES = (".3gp", ".apng", ".gif", ".m2ts", ".mts", ".ts")  # clips whose MIME type is not "video"
IMAGE_FPS = 24.0  # of folders of images, which have no rate; this is cinema's
MAX_DRIFT = 0.2  # seconds between sound and picture that are worth a note

Progress = Callable[[int, int], None]


class Frames(NamedTuple):
    """A clip.

    images: [frames, height, width, 3] float32 in 0..1, over black where the clip is transparent.
    mask: [frames, height, width] float32, 1 where the clip is transparent and in bars beside it.
    fps: frames a second.
    audio: of the same span; None if the clip has none.
    notes: what a user should know about the file, in sentences.
    """

    images: Tensor
    mask: Tensor
    fps: float
    audio: Audio | None
    notes: tuple[str, ...]


def read_frames(
    source: str | os.PathLike | BytesIO,
    start: int = 0,
    count: int = 0,
    stride: int = 1,
    width: int = 0,
    height: int = 0,
    fit: str = "crop",
    progress: Progress | None = None,
    window: tuple[float, float] | None = None,
) -> Frames:
    """Read every `stride`-th frame of a video file or a folder of images, from `start` on, at `width` x `height`.

    A video is decoded from its beginning, because seeking is not frame-exact, up to the last frame needed. Of several
    video streams the default one is read. Frames are rotated, mirrored and stretched as the file says; interlaced ones
    are deinterlaced; HDR becomes SDR. For uneven frame times, `fps` is their average rate. Damaged packets are skipped.

    Images are read in natural order ("frame2" before "frame10") and play at 24 frames a second.

    Args:
        source: a video file (its path or its bytes), or a folder whose images all have the same size.
        start: index of the first frame, from 0.
        count: frames to return, 0 = to the end.
        stride: distance between two frames, 1 = every frame. The rate is divided by it.
        width, height, fit: see `FrameConverter`.
        progress: called as progress(done, total) for each decoded frame; exceptions it raises end the reading.
        window: read only video frames whose time stamp is in [first, second), in seconds.

    Raises:
        ValueError: nothing at `source`, no video in it, it cannot be decoded, it has fewer frames than asked, its
            images differ in size, or an argument is out of range.
    """
    selection, converter = _selection(start, count, stride), FrameConverter(width, height, fit)
    progress = progress or (lambda done, total: None)
    if isinstance(source, BytesIO):
        return _read_video(source, "The video", selection, converter, progress, window)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"There is no file or folder at {path}; expected a video file or a folder of images.")
    if path.is_dir():
        files = image_files(path)
        if not files:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"The folder {path.name} holds no images; expected files ending in {suffixes}.")
        return _read_images(path.name, files, selection, converter, progress)
    if is_animated_webp(path):
        return _read_webp(path, selection, converter, progress)
    if path.suffix.lower() in IMAGE_SUFFIXES and not is_animated_png(path):
        return _read_images(path.name, [path], selection, converter, progress)
    return _read_video(path, path.name, selection, converter, progress, window)


def fit_frames(
    images: Tensor,
    fps: float,
    audio: Audio | None = None,
    start: int = 0,
    count: int = 0,
    stride: int = 1,
    width: int = 0,
    height: int = 0,
    fit: str = "crop",
) -> Frames:
    """Select and resize frames in memory as `read_frames` does those of a file, in 16 bits.

    Args:
        images: [frames, height, width, 3], or 4 with alpha, float in 0..1.
        fps, audio: of all of them.
        start, count, stride, width, height, fit: see `read_frames`.
    """
    selection, converter = _selection(start, count, stride), FrameConverter(width, height, fit)
    selected = images[start::stride][: count or None]
    if len(selected) == 0 or len(selected) < count:
        raise _too_few("The video", len(images), selection)
    buffer, pix_fmt = _FrameBuffer(len(selected)), "rgba64le" if images.shape[-1] == 4 else "rgb48le"
    for image in selected:
        pixels = (image.float().clamp(0, 1) * 65535).round().cpu().numpy().astype(np.uint16)
        buffer.append(converter(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=pix_fmt)))
    if audio is not None:
        first, total = round(start / fps * audio.rate), round(len(selected) * stride / fps * audio.rate)
        samples = audio.samples[:, first : first + total]
        audio = Audio(F.pad(samples, (0, total - samples.shape[1])), audio.rate)
    return Frames(*buffer.tensors(), fps / stride, audio, ())


def image_files(folder: str | os.PathLike) -> list[Path]:
    """Return the images directly in `folder`, in natural order, without hidden files."""
    files = [file for file in Path(folder).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    return sorted((file for file in files if file.is_file() and file.name[0] != "."), key=_natural)


def _natural(file: Path) -> tuple[list, str]:
    # Splitting by a group alternates text and digits, so equal places always compare equal types. The name itself
    # decides between "frame1" and "frame01".
    parts = re.split(r"(\d+)", file.name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], file.name


def _selection(start: int, count: int, stride: int) -> Selection:
    for name, value, least in (("start", start, 0), ("count", count, 0), ("stride", stride, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more.")
    return Selection(start, count, stride)


# --- videos ---


def _read_video(
    source: Source,
    name: str,
    selection: Selection,
    converter: FrameConverter,
    progress: Progress,
    window: tuple[float, float] | None,
) -> Frames:
    begin, end = window or (-inf, inf)
    # Headers announce too many frames, or too few. Counting packets decodes nothing.
    packets, notes = count_packets(source, name, selection.needed, begin, end), {}
    with open_container(source, name) as container:
        stream = select_video(container, name)
        frames = deinterlace(decode_video(container, stream, notes))
        frames = (frame for frame in frames if frame.time is None or begin <= frame.time < end)
        buffer, times = _collect(name, frames, packets.video, selection, converter, progress, notes, stream)
        rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
        rates = rates or [IMAGE_FPS]
        timeline = Timeline(times, 1 / rates[0], are_joined(container))
        if timeline.jumps:
            notes["jump"] = (
                f"The time stamps of {name} jump at frame {timeline.jumps[0]}, as in joined recordings. The jump was "
                "removed."
            )
        if not selection.count and window is None and (announced := _missing(container, stream, packets, timeline)):
            notes["missing"] = (
                f"{name} ends early, or its header is wrong: it announces {announced}, but has {len(times)} frames."
            )
        first, last = selection.start, selection.start + (buffer.length - 1) * selection.stride
        fps = timeline.frame_rate(first, last, selection.stride, rates, float(stream.time_base))
    with open_container(source, name) as container:
        audio = read_audio(container, timeline.recordings(), timeline.positions[first], buffer.length / fps, notes)
    drift = timeline.drift(first, last, fps * selection.stride)
    if audio is not None and drift > MAX_DRIFT:
        notes["drift"] = (
            f"The frames of {name} are not evenly spaced in time. At {fps:.3g} frames a second they are up to "
            f"{drift:.1f} s away from their sound. Convert it to a constant frame rate to avoid that."
        )
    return Frames(*buffer.tensors(), fps, audio, tuple(notes.values()))


def _missing(
    container: av.container.InputContainer, stream: av.VideoStream, packets: Packets, timeline: Timeline
) -> str | None:
    """Return what the header announces if the file has less."""
    if stream.frames > packets.video + 1:  # AVI may announce one more than it has
        return f"{stream.frames} frames"
    seconds, usual = header_duration(stream), float(1 / stream.average_rate) if stream.average_rate else inf
    if seconds:
        return f"{seconds:.1f} seconds" if timeline.ends_before(seconds, usual) else None
    seconds = (container.duration or 0) / av.time_base  # of the longest stream
    return f"{seconds:.1f} seconds" if seconds > packets.seconds + 0.5 and not are_joined(container) else None


def _read_webp(path: Path, selection: Selection, converter: FrameConverter, progress: Progress) -> Frames:
    try:
        with Image.open(path) as image:
            frames = decode_webp(image)
            buffer, times = _collect(path.name, frames, image.n_frames, selection, converter, progress, {})
            usual = (image.info.get("duration") or 1000 / IMAGE_FPS) / 1000
    except (OSError, EOFError, SyntaxError) as error:
        raise ValueError(f"{path.name} cannot be decoded ({error}). Save it again, or choose another file.") from error
    first, last = selection.start, selection.start + (buffer.length - 1) * selection.stride
    fps = Timeline(times, usual).frame_rate(first, last, selection.stride, [1 / usual], 0.001)
    return Frames(*buffer.tensors(), fps, None, ())


def _collect(
    name: str,
    frames: Iterable[av.VideoFrame],
    available: int,
    selection: Selection,
    converter: FrameConverter,
    progress: Progress,
    notes: dict[str, str],
    stream: av.VideoStream | None = None,
) -> tuple[_FrameBuffer, list[float | None]]:
    """Convert the selected frames. Returns them, and the time stamps of all frames up to the last one."""
    if available < max(selection.needed, selection.start + 1):
        raise _too_few(name, available, selection)
    buffer, times, orientations = _FrameBuffer(selection.size_of(available)), [], {}
    for index, frame in enumerate(frames):
        times.append(frame.time)
        if index in selection:
            # An encoder may write the orientation once. And PyAV keeps a frame until garbage collection once its side
            # data was read: read it only where a recording may begin.
            size = frame.width, frame.height
            if size not in orientations:
                orientations[size] = frame_orientation(frame)
            orientation, exact = orientations[size]
            if not exact:
                notes["rotation"] = f"{name} is rotated by an odd angle; it was rounded to quarter turns."
            if not has_known_colours(frame):
                notes["colours"] = (
                    f"{name} has colours that cannot be converted (matrix {int(frame.colorspace)} of H.273); they may "
                    "look wrong."
                )
            buffer.append(converter(frame, orientation, UNTAGGED if stream is None else frame_tags(frame, stream)))
        progress(index + 1, max(index + 1, selection.needed or available))
        if index + 1 == selection.needed:
            break
    if not times:
        details = " ".join(["", *notes.values()])
        raise ValueError(f"No frame of {name} could be decoded.{details} Convert it to an H.264 mp4.")
    if not buffer.length or buffer.length < selection.count:
        raise _too_few(name, len(times), selection)
    return buffer, times


# --- images ---


def _read_images(
    name: str, files: list[Path], selection: Selection, converter: FrameConverter, progress: Progress
) -> Frames:
    selected = files[selection.start :: selection.stride][: selection.count or None]
    if not selected or len(selected) < selection.count:
        raise _too_few(name, len(files), selection)

    buffer, size = _FrameBuffer(len(selected)), None
    for index, file in enumerate(selected):
        with open_container(file, file.name) as container:
            frame = next(container.decode(select_video(container, file.name)), None)
        if frame is None:
            raise ValueError(f"{file.name} holds no picture. Remove it or save it again.")
        orientation = image_orientation(file)
        display = (frame.height, frame.width) if orientation.transpose else (frame.width, frame.height)
        size = size or display
        if display != size:
            raise ValueError(
                f"{file.name} is {display[0]} x {display[1]} pixels, but {selected[0].name} is {size[0]} x {size[1]}; "
                f"the images of a clip need one size. Resize it, or move it out of the folder {name}."
            )
        buffer.append(converter(frame, orientation))
        progress(index + 1, len(selected))
    return Frames(*buffer.tensors(), IMAGE_FPS / selection.stride, None, ())


# --- both ---


class _FrameBuffer:
    """Frames written one after another into one tensor, since a list and its stack would need the memory twice.

    Room for `expected` frames is reserved, which uses no memory before it is written, and doubled when it is full.
    """

    def __init__(self, expected: int):
        self.expected, self.length, self.images, self.mask = max(1, expected), 0, None, None

    def append(self, picture: Tensor) -> None:
        """Append [height, width, 3], or 4 with alpha."""
        if self.images is None:
            self.images = torch.empty(self.expected, *picture.shape[:2], 3)
        elif self.length == len(self.images):
            self.images = torch.cat([self.images, torch.empty_like(self.images)])
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.zeros_like(self.mask)])
        self.images[self.length].numpy()[:] = picture[..., :3].numpy()  # see FrameConverter for why in numpy
        if picture.shape[-1] == 4 and (picture[..., 3] < 1).any():
            if self.mask is None:
                self.mask = torch.zeros(self.images.shape[:3])
            self.mask[self.length] = 1 - picture[..., 3]
        self.length += 1

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return images and mask. If nothing is transparent, all frames share one mask of zeros."""
        images = self.images[: self.length]
        mask = torch.zeros(1, *images.shape[1:3]).expand(images.shape[:3]) if self.mask is None else self.mask
        return images, mask[: self.length]


def _too_few(name: str, available: int, selection: Selection) -> ValueError:
    start, count, stride = selection
    wanted = f"start {start}, count {count}, stride {stride} needs {start + max(count - 1, 0) * stride + 1}"
    usable = len(range(start, available, stride))
    mend = f"Set count to {usable} or less (0 = all)" if usable else f"Set start to {max(0, available - 1)} or less"
    return ValueError(f"{name} has {available} frames, but {wanted}. {mend}, or choose a longer clip.")
