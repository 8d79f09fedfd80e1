"""Conversion of one decoded frame to RGB, as a player displays it, at the size asked for.

FFmpeg's filters rotate, mirror, deinterlace, resize and convert; `hdr` has what they lack. Transparent pixels become
black.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .hdr import BT2020, needs_conversion, to_bt709

FITS = ("crop", "pad", "stretch")
SIZE_STEP = 8  # pixels to a latent token of every Stable Diffusion VAE
MAX_SIZE = 16384  # pixels of a side, the limit of ComfyUI's own nodes

UNSPECIFIED = 2  # of every colour tag, by Rec. ITU-T H.273
MATRICES = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}  # H.273
UNMARKED = (0, 2, 3)  # matrices, likewise: RGB, unspecified, reserved
SCALE = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
OPAQUE = 65280  # of 65535; swscale makes 65532 of an opaque 8 bit alpha, and 65472 of one in 10 bits


class Orientation(NamedTuple):
    """The steps from the stored to the displayed picture, in this order."""

    transpose: bool = False
    hflip: bool = False
    vflip: bool = False


UPRIGHT = Orientation()
EXIF_ORIENTATION = 0x0112
EXIF_ORIENTATIONS = {  # CIPA DC-008, 4.6.5
    2: Orientation(False, True, False),
    3: Orientation(False, True, True),
    4: Orientation(False, False, True),
    5: Orientation(True, False, False),
    6: Orientation(True, True, False),
    7: Orientation(True, True, True),
    8: Orientation(True, False, True),
}


class Tags(NamedTuple):
    """What a stream says about all of its frames.

    aspect: width of a pixel divided by its height.
    transfer, primaries: numbers of Rec. ITU-T H.273.
    """

    aspect: float = 1.0
    transfer: int = UNSPECIFIED
    primaries: int = UNSPECIFIED


UNTAGGED = Tags()


class FrameFormat(NamedTuple):
    """Everything that decides which filters a frame needs."""

    width: int
    height: int
    pix_fmt: str
    matrix: int
    range: int
    tags: Tags = UNTAGGED
    orientation: Orientation = UPRIGHT
    transparent: bool = False


class FrameConverter:
    """Convert frames to pictures of one size, which the first frame decides.

    "crop" fills the size and cuts the rest, equally on both sides; "pad" shows the whole frame between black bars;
    "stretch" ignores the proportions. A size of 0 follows from the other one at the frame's proportions. If both are 0
    nothing is resized: the centre is cut out, at the next smaller multiple of 8. Later frames of another size are
    fitted to the same picture.

    Args:
        width, height: multiples of 8 in pixels, or 0.
        fit: "crop", "pad" or "stretch".
    """

    def __init__(self, width: int = 0, height: int = 0, fit: str = "crop"):
        for name, size in (("width", width), ("height", height)):
            if size < 0 or size > MAX_SIZE or size % SIZE_STEP:
                near = min(_multiple(size), MAX_SIZE)
                raise ValueError(
                    f"{name} is {size}; expected a multiple of {SIZE_STEP}, such as {near}, up to {MAX_SIZE}, or 0 to "
                    "let it follow."
                )
        if fit not in FITS:
            raise ValueError(f'fit is "{fit}"; expected one of {", ".join(FITS)}.')
        self.width, self.height, self.fit = width, height, fit
        self.size: tuple[int, int] | None = None  # width and height of every picture
        self.unscaled: tuple[int, int] | None = None  # display size of frames that need no resizing
        self.format: FrameFormat | None = None

    def __call__(self, frame: av.VideoFrame, orientation: Orientation = UPRIGHT, tags: Tags = UNTAGGED) -> Tensor:
        """Return the picture, [height, width, 3] float32 in 0..1, or [..., 4] with alpha, premultiplied."""
        if not has_known_colours(frame):
            frame.colorspace = UNSPECIFIED  # swscale refuses it
        format = _format_of(frame)._replace(orientation=orientation, tags=tags)
        # FFmpeg's premultiply changes opaque colours, too, by up to 1 of 255: opaque frames bypass it.
        format = format._replace(transparent=_is_transparent(frame, format))
        if format != self.format:
            self.graph, self.format = self._build_graph(format), format
        pixels = _run(self.graph, frame)
        # In numpy, on one thread: torch's threads would compete with the decoder's.
        picture = torch.from_numpy(np.divide(pixels, np.iinfo(pixels.dtype).max, dtype=np.float32))
        if format.transparent:
            picture[..., 3][picture[..., 3] >= OPAQUE / 65535] = 1
        if needs_conversion(tags.transfer, tags.primaries):
            picture[..., :3] = to_bt709(picture[..., :3], tags.transfer, tags.primaries)
        return _crop_or_pad(picture, *self.size)

    def _build_graph(self, format: FrameFormat) -> av.filter.Graph:
        """Build the filters from this format to RGB, before cropping and padding."""
        display = _display_size(format)
        self.size = self.size or self._picture_size(*display)
        scaled = self._scaled_size(*display)
        width, height = scaled[::-1] if format.orientation.transpose else scaled
        deep = max(component.bits for component in av.VideoFormat(format.pix_fmt).components) > 8
        resize = f"{width}:{height}:{SCALE}"
        colour = f"in_color_matrix={_matrix(format)}:out_range=pc"
        if format.transparent:
            # Resizing before premultiplication would mix the hidden colours of transparent pixels into edges.
            planar, packed = ("gbrap16le", "rgba64le") if deep else ("gbrap", "rgba")
            filters = [("scale", colour), ("format", planar), ("premultiply", "inplace=1"), ("scale", resize)]
        else:
            packed = "rgb48le" if deep else "rgb24"
            filters = [("scale", f"{resize}:{colour}")]
        filters.append(("format", packed))
        steps = {"transpose": ("transpose", "cclock_flip"), "hflip": ("hflip",), "vflip": ("vflip",)}
        filters += [steps[name] for name, needed in format.orientation._asdict().items() if needed]
        return _graph(format, *filters)

    def _picture_size(self, display_width: int, display_height: int) -> tuple[int, int]:
        if self.width == self.height == 0:
            self.unscaled = display_width, display_height
            size = tuple(side // SIZE_STEP * SIZE_STEP for side in (display_width, display_height))
            if min(size) == 0:
                raise ValueError(
                    f"The frames are {display_width} x {display_height} pixels, and neither side can be kept below "
                    f"{SIZE_STEP}. Give a width and a height to enlarge them to."
                )
        else:
            size = (
                self.width or _multiple(self.height * display_width / display_height),
                self.height or _multiple(self.width * display_height / display_width),
            )
        if max(size) > MAX_SIZE:
            raise ValueError(
                f"The frames are {display_width} x {display_height} pixels; at these proportions the result would be "
                f"{size[0]} x {size[1]}, but no side may exceed {MAX_SIZE}. Give a smaller width or height."
            )
        return size

    def _scaled_size(self, display_width: int, display_height: int) -> tuple[int, int]:
        """Return the size of the whole frame before it is cropped or padded."""
        if self.unscaled == (display_width, display_height):
            return self.unscaled
        scales = self.size[0] / display_width, self.size[1] / display_height
        if self.fit != "stretch":
            scales = (max(scales) if self.fit == "crop" else min(scales),) * 2
        return max(1, round(display_width * scales[0])), max(1, round(display_height * scales[1]))


def deinterlace(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield as many frames as come in, at the same times, with interlaced ones deinterlaced (FFmpeg's bwdif)."""
    graph, format = None, None
    for frame in frames:
        present = _format_of(frame)
        if graph is not None and present != format:
            yield from _flush(graph)
            graph = None
        if graph is None and frame.interlaced_frame and min(frame.width, frame.height) >= SIZE_STEP:  # bwdif's least: 3
            base, format = frame.time_base, present
            bwdif = ("bwdif", "mode=send_frame:deint=interlaced")
            graph = _graph(format, bwdif, time_base=f"{base.numerator}/{base.denominator}")
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _pull_all(graph)
    if graph is not None:
        yield from _flush(graph)


def frame_orientation(frame: av.VideoFrame) -> tuple[Orientation, bool]:
    """Return how to display a frame of a video, and whether its display matrix is exactly that."""
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV fails on side data that it has no name for
        quarters = {0: (False, False, False), 1: (True, False, True), 2: (False, True, True), 3: (True, True, False)}
        return Orientation(*quarters[round(frame.rotation / 90) % 4]), frame.rotation % 90 == 0
    if side_data is None:
        return UPRIGHT, True
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype=np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0), b == c == 0
    return Orientation(True, c < 0, b < 0), a == d == 0


def has_known_colours(frame: av.VideoFrame) -> bool:
    """Return whether the colour matrix of a frame is one that swscale converts, or none."""
    return int(frame.colorspace) in MATRICES or int(frame.colorspace) in UNMARKED


def image_orientation(file: Path) -> Orientation:
    """Return how to display an image, by its EXIF tag."""
    try:
        with Image.open(file) as image:
            return EXIF_ORIENTATIONS.get(image.getexif().get(EXIF_ORIENTATION), UPRIGHT)
    except (OSError, SyntaxError, ValueError):  # an image that only FFmpeg can read
        return UPRIGHT


def _format_of(frame: av.VideoFrame) -> FrameFormat:
    return FrameFormat(frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range))


def _is_transparent(frame: av.VideoFrame, format: FrameFormat) -> bool:
    if not frame.format.has_palette and not any(component.is_alpha for component in frame.format.components):
        return False
    alpha = _run(_graph(format, ("format", "rgba64le"), ("alphaextract",)), frame)
    return bool(alpha.min() < OPAQUE)


def _display_size(format: FrameFormat) -> tuple[int, int]:
    """Return width and height on the screen. Pixels are only ever stretched, so that no detail is lost."""
    width = round(format.width * max(1.0, format.tags.aspect))
    height = round(format.height / min(1.0, format.tags.aspect))
    return (height, width) if format.orientation.transpose else (width, height)


def _matrix(format: FrameFormat) -> str:
    """Return swscale's name of the colour matrix. Untagged frames are guessed by their size, as mpv does."""
    if format.matrix in MATRICES:
        return MATRICES[format.matrix]
    if format.tags.primaries == BT2020:
        return "bt2020"
    return "bt709" if format.width >= 1280 or format.height > 576 else "bt601"


def _crop_or_pad(picture: Tensor, width: int, height: int) -> Tensor:
    """Return the picture centred at this size: cropped where it is larger, with transparent black bars elsewhere."""
    missing_x, missing_y = width - picture.shape[1], height - picture.shape[0]
    if missing_x == missing_y == 0:
        return picture
    if max(missing_x, missing_y) > 0 and picture.shape[-1] == 3:
        picture = torch.cat([picture, torch.ones_like(picture[..., :1])], dim=-1)
    left, top = int(missing_x / 2), int(missing_y / 2)
    return F.pad(picture, (0, 0, left, missing_x - left, top, missing_y - top))  # negative widths crop


def _multiple(size: float) -> int:
    """Return the multiple of 8 nearest to `size`, at least 8."""
    return max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)


def _graph(format: FrameFormat, *filters: tuple[str, ...], time_base: str = "1/1000000") -> av.filter.Graph:
    """Build a chain of filters for frames of this format."""
    graph = av.filter.Graph()
    source = (
        f"video_size={format.width}x{format.height}:pix_fmt={format.pix_fmt}:time_base={time_base}"
        f":colorspace={format.matrix}:range={format.range}"
    )
    nodes = [graph.add("buffer", source), *(graph.add(*filter) for filter in filters), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph


def _run(graph: av.filter.Graph, frame: av.VideoFrame) -> np.ndarray:
    graph.vpush(frame)
    return graph.vpull().to_ndarray()


def _pull_all(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def _flush(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    graph.vpush(None)
    yield from _pull_all(graph)
