"""Video files and folders of images as frames in torch, and back.

Frames are [frames, height, width, 3] float32 in 0..1, ComfyUI's IMAGE. PyAV decodes and encodes; only the frames asked
for are converted, and each is resized as it is decoded, so the clip is never held at its full size.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import IO, NamedTuple

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from torch import Tensor

from .files import whole_file

FITS = ("crop", "pad", "stretch")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
IMAGE_FPS = 24.0  # a folder of images does not say how fast it plays; this is what cinema plays at
SIZE_STEP = 8  # pixels to a latent token of every Stable Diffusion VAE

Progress = Callable[[int, int], None]


class Frames(NamedTuple):
    """A clip: `images` [frames, height, width, 3] float32 in 0..1, and the `fps` they play at."""

    images: Tensor
    fps: float


def read_frames(
    path: str | os.PathLike,
    start: int = 0,
    count: int = 0,
    stride: int = 1,
    width: int = 0,
    height: int = 0,
    fit: str = "crop",
    progress: Progress | None = None,
) -> Frames:
    """Every `stride`-th frame of a video file or a folder of images, from `start` on, resized to `width` x `height`.

    A video is decoded from its beginning, because seeking is not frame-exact, up to the last frame needed. A rotation
    kept in the file is applied. Where frames are unevenly spaced in time, `fps` is the mean rate of the frames taken.
    Images are read in natural order ("frame2" before "frame10") and play at 24 frames a second.

    Args:
        path: a video file, or a folder whose images all have the same size.
        start: index of the first frame, from 0.
        count: frames to return, 0 = as many as there are.
        stride: distance between two frames, 1 = every frame. The rate is divided by it.
        width, height, fit: as in `fit_frames`.
        progress: called as progress(done, total) for each frame decoded; what it raises ends the reading.

    Returns:
        Frames(images [count, height, width, 3] float32 in 0..1, fps).

    Raises:
        ValueError: nothing at `path`, no video in it, it cannot be decoded, it has fewer frames than asked, its images
            differ in size, or an argument is out of range.
    """
    for name, value, least in (("start", start, 0), ("count", count, 0), ("stride", stride, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more.")
    _check_size(width, height, fit)
    path, progress = Path(path), progress or (lambda done, total: None)
    if not path.exists():
        raise ValueError(f"There is no file or folder at {path}; expected a video file or a folder of images.")

    def resize(image: Tensor) -> Tensor:
        return fit_frames(image[None], width, height, fit)[0]

    read = _read_folder if path.is_dir() else _read_video
    return read(path, start, count, stride, resize, progress)


def fit_frames(images: Tensor, width: int = 0, height: int = 0, fit: str = "crop") -> Tensor:
    """The images at `width` x `height`, antialiased.

    "crop" fills the new size and cuts what stands over, equally on both sides; "pad" shows the whole picture between
    black bars; "stretch" ignores the proportions. A size of 0 follows from the other one at the picture's proportions.
    If both are 0 nothing is resampled: the centre is cut out, at the next smaller multiple of 8.

    Args:
        images: [frames, height, width, 3], float, 0..1.
        width, height: multiples of 8 in pixels, or 0.
        fit: "crop", "pad" or "stretch".

    Returns:
        [frames, height, width, 3] float32, 0..1.
    """
    _check_size(width, height, fit)
    images = _check_images(images).float()
    source_height, source_width = images.shape[1:3]
    if width == height == 0:
        width, height = (size // SIZE_STEP * SIZE_STEP for size in (source_width, source_height))
        if width == 0 or height == 0:
            raise ValueError(
                f"The frames are {source_width} x {source_height} pixels, and neither side can be kept below "
                f"{SIZE_STEP}. Give a width and a height to enlarge them to."
            )
        return _place(images, width, height)

    width = width or _multiple(height * source_width / source_height)
    height = height or _multiple(width * source_height / source_width)
    scales = width / source_width, height / source_height
    if fit != "stretch":
        scales = (max(scales) if fit == "crop" else min(scales),) * 2
    inner = max(1, round(source_height * scales[1])), max(1, round(source_width * scales[0]))
    if inner != (source_height, source_width):
        planes = rearrange(images, "f h w c -> f c h w")
        planes = F.interpolate(planes, inner, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots at edges
        images = rearrange(planes, "f c h w -> f h w c")
    return _place(images, width, height)


def write_frames(path: str | os.PathLike, images: Tensor, fps: float, progress: Progress | None = None) -> None:
    """Writes an H.264 mp4 that plays everywhere (yuv420p, BT.709, index in front), whole or not at all.

    The file grows under a temporary name in the same folder and takes its own name when it is complete. After an error
    or an interrupt the temporary file is gone and a file that had the name before is as it was.

    Args:
        path: where to, ending in ".mp4", in a folder that exists.
        images: [frames, height, width, 3], float, 0..1 (clamped), finite; height and width even.
        fps: frames a second, above 0.
        progress: called as progress(done, total) after each frame.
    """
    path, images = Path(path), _check_images(images)
    height, width = images.shape[1:3]
    if path.suffix.lower() != ".mp4" or not path.parent.is_dir():
        raise ValueError(f"Cannot write {path}: expected a name ending in .mp4 in a folder that exists.")
    if height % 2 or width % 2:
        raise ValueError(f"The frames are {width} x {height} pixels; H.264 needs both even. Crop them or resize them.")
    if not (isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}; expected a number above 0.")

    with (
        whole_file(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        # 30000/1001 is what 29.97 means; this denominator keeps it, and its division by a stride, exact.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "16"}
        # Players guess the matrix of an untagged file from its size, and guess differently.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = int(Colorspace.ITU709)
        context.color_range = int(ColorRange.MPEG)
        for index, image in enumerate(images):
            if not torch.isfinite(image).all():
                raise ValueError(f"Frame {index} holds NaN or Inf; expected values in 0..1. See what made it.")
            pixels = image.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
            frame = av.VideoFrame.from_ndarray(pixels.contiguous().numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
            if progress is not None:
                progress(index + 1, len(images))
        container.mux(stream.encode())


def image_files(folder: str | os.PathLike) -> list[Path]:
    """The images that stand directly in `folder`, in natural order; hidden files are passed over."""
    files = [file for file in Path(folder).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    return sorted((file for file in files if file.is_file() and file.name[0] != "."), key=_natural)


def _natural(file: Path) -> tuple[list, str]:
    # Splitting by a group puts text and digits in turns, so equal places always compare equal types. The name itself
    # decides between "frame1" and "frame01".
    parts = re.split(r"(\d+)", file.name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], file.name


def _read_video(
    path: Path, start: int, count: int, stride: int, resize: Callable[[Tensor], Tensor], progress: Progress
) -> Frames:
    with _readable(path), path.open("rb") as data, _open(data) as container:
        stream = _video_stream(container, path)
        needed = start + (count - 1) * stride + 1 if count else 0  # source frames up to the last one taken; 0 = all
        # Where the header promises too few, counting packets settles it without decoding anything.
        if 0 < stream.frames < needed:
            packets = sum(packet.size > 0 for packet in container.demux(stream))
            if packets < needed:
                raise _too_few(path, packets, start, count, stride)
            container.seek(0)
        stream.thread_type = "AUTO"

        promised = stream.frames or int((container.duration or 0) / av.time_base * float(stream.average_rate or 0))
        usable = len(range(start, promised, stride))
        images, times, index = _Growing(min(usable, count or usable)), [], -1
        for index, frame in enumerate(container.decode(stream)):
            if index >= start and (index - start) % stride == 0:
                images.append(resize(_image(frame)))
                times.append(frame.time)
            progress(index + 1, max(index + 1, needed or promised))
            if index + 1 == needed:
                break
        available = index + 1
        if available == 0:
            raise ValueError(f"{path.name} has a video stream, but no frame in it could be decoded. Save it again.")
        if not times or len(times) < count:
            raise _too_few(path, available, start, count, stride)
        return Frames(images.tensor(), _frame_rate(stream, times, stride))


def _read_folder(
    path: Path, start: int, count: int, stride: int, resize: Callable[[Tensor], Tensor], progress: Progress
) -> Frames:
    files = image_files(path)
    if not files:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"The folder {path.name} holds no images; expected files ending in {suffixes}.")
    taken = files[start::stride][: count or None]
    if not taken or len(taken) < count:
        raise _too_few(path, len(files), start, count, stride)

    images, size = _Growing(len(taken)), None
    for index, file in enumerate(taken):
        with _readable(file), file.open("rb") as data, _open(data) as container:
            frame = next(container.decode(_video_stream(container, file)), None)
            if frame is None:
                raise ValueError(f"{file.name} holds no picture. Remove it or save it again.")
            image = _image(frame)
        size = size or image.shape
        if image.shape != size:
            raise ValueError(
                f"{file.name} is {image.shape[1]} x {image.shape[0]} pixels, but {taken[0].name} is "
                f"{size[1]} x {size[0]}; the images of a clip need one size. Resize it, or move it out of the folder "
                f"{path.name}."
            )
        images.append(resize(image))
        progress(index + 1, len(taken))
    return Frames(images.tensor(), IMAGE_FPS / stride)


class _Growing:
    """Frames put one after another into one tensor, since a list and its stack would need the memory twice.

    The tensor has room for `expected` frames from the start, and doubles when the file had promised too few.
    """

    def __init__(self, expected: int):
        self.expected, self.length, self.room = max(1, expected), 0, None

    def append(self, image: Tensor) -> None:
        if self.room is None:
            self.room = torch.empty(self.expected, *image.shape)
        elif self.length == len(self.room):
            self.room = torch.cat([self.room, torch.empty_like(self.room)])
        self.room[self.length] = image
        self.length += 1

    def tensor(self) -> Tensor:
        return self.room[: self.length]


def _open(data: IO[bytes]) -> av.container.InputContainer:
    """A container that reads this stream only.

    FFmpeg would open other files and addresses that a playlist names, and take a "%" in a path for a numbering pattern.
    """
    return av.open(data, metadata_errors="ignore", options={"protocol_whitelist": "none"})


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    # The cover of an audio file is a video stream too, of one picture.
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise ValueError(f"{path.name} has no video stream (it holds {kinds}). Choose a video or a folder of images.")
    return streams[0]


def _image(frame: av.VideoFrame) -> Tensor:
    """[height, width, 3] float32 in 0..1, turned as the file says it is to be shown."""
    # RGB has no matrix, so the target changes nothing here; but without one older PyAV (14) forgets the source's too
    # and reads every clip as BT.601.
    rgb = frame.reformat(format="rgb24", dst_colorspace=Colorspace.ITU601)
    image = torch.from_numpy(rgb.to_ndarray()).float().div_(255)
    return image.rot90(round(frame.rotation / 90), (0, 1))


def _frame_rate(stream: av.VideoStream, times: list[float | None], stride: int) -> float:
    """Rate of frames taken at `times` seconds: the file's own over the stride, unless the times contradict it."""
    nominal = float(stream.average_rate or stream.guessed_rate or IMAGE_FPS) / stride
    if len(times) < 2 or times[0] is None or times[-1] is None or times[-1] <= times[0]:
        return nominal
    elapsed, expected = times[-1] - times[0], (len(times) - 1) / nominal
    # Time stamps are rounded to the container's time base (1 ms in Matroska), which must not turn 24 into 23.8.
    if abs(elapsed - expected) <= 2 * float(stream.time_base) + 0.01 * expected:
        return nominal
    return (len(times) - 1) / elapsed


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns errors of FFmpeg and of the disk into one that says which file, and what to do."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            f"{path.name} cannot be decoded ({error.strerror}). It may be damaged, incompletely copied, or no video: "
            "choose another file, or convert it to an H.264 mp4."
        ) from error


def _too_few(path: Path, available: int, start: int, count: int, stride: int) -> ValueError:
    wanted = f"start {start}, count {count}, stride {stride} needs {start + max(count - 1, 0) * stride + 1}"
    usable = len(range(start, available, stride))
    mend = f"Set count to {usable} or less (0 = all)" if usable else f"Set start to {available - 1} or less"
    return ValueError(f"{path.name} has {available} frames, but {wanted}. {mend}, or choose a longer clip.")


def _check_size(width: int, height: int, fit: str) -> None:
    for name, size in (("width", width), ("height", height)):
        if size < 0 or size % SIZE_STEP:
            near = _multiple(size)
            raise ValueError(
                f"{name} is {size}; expected a multiple of {SIZE_STEP}, such as {near}, or 0 to let it follow."
            )
    if fit not in FITS:
        raise ValueError(f'fit is "{fit}"; expected one of {", ".join(FITS)}.')


def _check_images(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0 or not images.is_floating_point():
        raise ValueError(
            f"The images are {images.dtype} {list(images.shape)}; expected floats in 0..1, [frames, height, width, 3]."
        )
    return images


def _multiple(size: float) -> int:
    """The multiple of 8 nearest to `size`, at least 8."""
    return max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)


def _place(images: Tensor, width: int, height: int) -> Tensor:
    """Centred on a black canvas of this size: what is larger is cut, what is smaller gets bars."""
    missing_x, missing_y = width - images.shape[2], height - images.shape[1]
    left, top = int(missing_x / 2), int(missing_y / 2)
    if missing_x == missing_y == 0:
        return images
    return F.pad(images, (0, 0, left, missing_x - left, top, missing_y - top))  # a negative width cuts
