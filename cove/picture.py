"""One decoded frame as players show it: a picture of the size asked for.

FFmpeg's filters do the work. They turn and mirror, stretch pixels that are not square, resize, and convert to RGB; what
they cannot do about HDR is in `hdr`. A place that is transparent shows black.
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

from .hdr import to_bt709

FITS = ("crop", "pad", "stretch")
SIZE_STEP = 8  # pixels to a latent token of every Stable Diffusion VAE
MAX_SIZE = 16384  # pixels of a side, as ComfyUI's own nodes allow

# What swscale calls the matrices that ITU-T H.273 numbers
MATRICES = {1: "bt709", 4: "fcc", 5: "bt470", 6: "smpte170m", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
OPAQUE = 65280  # of 65535; swscale makes 65532 of 255 in 8 bits, and 65472 of 1023 in 10
EXACT = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"


class Orientation(NamedTuple):
    """How the stored picture is brought upright: first mirrored at its diagonal (x and y change places), or not, then
    left to right, then top to bottom."""

    transpose: bool = False
    left_right: bool = False
    top_bottom: bool = False


EXIF_ORIENTATION = 0x0112
# What the values of EXIF's tag mean (CIPA DC-008, 4.6.5)
ORIENTATIONS = {
    2: Orientation(False, True, False),
    3: Orientation(False, True, True),
    4: Orientation(False, False, True),
    5: Orientation(True, False, False),
    6: Orientation(True, True, False),
    7: Orientation(True, True, True),
    8: Orientation(True, False, True),
}


class Kind(NamedTuple):
    """All that decides how a frame becomes a picture."""

    width: int
    height: int
    format: str
    matrix: int
    range: int
    transfer: int
    primaries: int
    orientation: Orientation
    aspect: float  # width of a pixel over its height
    transparent: bool = False  # somewhere in this frame


class Pictures:
    """Frames in, pictures of one size out.

    The first frame decides what a size of 0 means. "crop" fills the size and cuts what stands over, equally on both
    sides; "pad" shows everything between black bars; "stretch" ignores the proportions. A size of 0 follows from the
    other one at the picture's proportions. If both are 0 nothing is resampled: the centre is cut out, at the next
    smaller multiple of 8. Frames of another size that come later are fitted to the same picture.
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
        self.size: tuple[int, int] | None = None  # width and height of every picture, after the first frame
        self.kept: tuple[int, int] | None = None  # the first frame's own size, where it is not resized
        self.kind: Kind | None = None

    def __call__(self, frame: av.VideoFrame, orientation: Orientation, aspect: float = 1.0) -> Tensor:
        """The picture, [height, width, 3] float32 in 0..1, or [..., 4] with alpha, its colours multiplied by it."""
        kind = _kind(frame, orientation, aspect)
        # FFmpeg's premultiply changes opaque colours, too, by one level of 255: frames without a gap go past it.
        kind = kind._replace(transparent=_is_transparent(frame, kind))
        if kind != self.kind:
            self.graph, self.kind = self._graph(kind), kind
        pixels = _through(self.graph, frame)
        image = torch.from_numpy(pixels.astype(np.float32))
        image /= np.iinfo(pixels.dtype).max
        if kind.transparent:
            image[..., 3][image[..., 3] >= OPAQUE / 65535] = 1
        image[..., :3] = to_bt709(image[..., :3], kind.transfer, kind.primaries)
        return _place(image, *self.size)

    def _graph(self, kind: Kind) -> av.filter.Graph:
        """The filters from a frame of this kind to RGB, not yet cut or padded."""
        shown = _shown_size(kind)
        self.size = self.size or self._picture_size(*shown)
        inner = self._inner_size(*shown)
        stored = inner[::-1] if kind.orientation.transpose else inner
        deep = max(component.bits for component in av.VideoFormat(kind.format).components) > 8
        colour = f"in_color_matrix={_matrix(kind)}:out_range=pc"

        resize = f"{stored[0]}:{stored[1]}:flags={EXACT}"
        if kind.transparent:
            # Colours that are resized before alpha is applied bring what hides in transparent places to the edges.
            planes, packed = ("gbrap16le", "rgba64le") if deep else ("gbrap", "rgba")
            filters = [("scale", colour), ("format", planes), ("premultiply", "inplace=1"), ("scale", resize)]
        else:
            packed = "rgb48le" if deep else "rgb24"
            filters = [("scale", f"{resize}:{colour}")]
        filters.append(("format", packed))
        upright = {"transpose": ("transpose", "cclock_flip"), "left_right": ("hflip",), "top_bottom": ("vflip",)}
        filters += [upright[name] for name, wanted in kind.orientation._asdict().items() if wanted]
        return _chain(kind, *filters)

    def _picture_size(self, shown_width: int, shown_height: int) -> tuple[int, int]:
        if self.width == self.height == 0:
            self.kept = shown_width, shown_height
            size = tuple(side // SIZE_STEP * SIZE_STEP for side in (shown_width, shown_height))
            if min(size) == 0:
                raise ValueError(
                    f"The frames are {shown_width} x {shown_height} pixels, and neither side can be kept below "
                    f"{SIZE_STEP}. Give a width and a height to enlarge them to."
                )
        else:
            size = (
                self.width or _multiple(self.height * shown_width / shown_height),
                self.height or _multiple(self.width * shown_height / shown_width),
            )
        if max(size) > MAX_SIZE:
            raise ValueError(
                f"The frames are {shown_width} x {shown_height} pixels; at these proportions they would come out as "
                f"{size[0]} x {size[1]}, and {MAX_SIZE} is the most for a side. Give a smaller width or height."
            )
        return size

    def _inner_size(self, shown_width: int, shown_height: int) -> tuple[int, int]:
        """The size of the whole picture, before what stands over is cut and what is missing is filled."""
        if self.kept == (shown_width, shown_height):
            return self.kept
        scales = self.size[0] / shown_width, self.size[1] / shown_height
        if self.fit != "stretch":
            scales = (max(scales) if self.fit == "crop" else min(scales),) * 2
        return max(1, round(shown_width * scales[0])), max(1, round(shown_height * scales[1]))


def deinterlaced(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """As many frames as come in, at their times; those that consist of two fields become whole (FFmpeg's bwdif)."""
    graph, kind = None, None
    for frame in frames:
        present = _kind(frame, Orientation(), 1)
        if graph is not None and present != kind:
            yield from _flushed(graph)
            graph = None
        if graph is None and frame.interlaced_frame:
            base, kind = frame.time_base, present
            bwdif = ("bwdif", "mode=send_frame:deint=interlaced")
            graph = _chain(kind, bwdif, time_base=f"{base.numerator}/{base.denominator}")
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _pulled(graph)
    if graph is not None:
        yield from _flushed(graph)


def orientation_of(frame: av.VideoFrame) -> tuple[Orientation, bool]:
    """How players bring a frame of a video upright, and whether that is all that its display matrix asks for."""
    try:
        side = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV stumbles over side data that it has no name for, EXIF among them
        return _turned(frame.rotation)
    if side is None:
        return Orientation(), True
    a, b, _, c, d = np.frombuffer(bytes(side), dtype=np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0), b == c == 0
    return Orientation(True, c < 0, b < 0), a == d == 0


def orientation_of_image(file: Path) -> Orientation:
    """How viewers bring an image upright, by its EXIF tag."""
    try:
        with Image.open(file) as image:
            return ORIENTATIONS.get(image.getexif().get(EXIF_ORIENTATION), Orientation())
    except (OSError, SyntaxError, ValueError):  # an image that only FFmpeg can read
        return Orientation()


def _turned(degrees: int) -> tuple[Orientation, bool]:
    """The orientation after a turn counterclockwise."""
    quarters = {0: (False, False, False), 1: (True, False, True), 2: (False, True, True), 3: (True, True, False)}
    return Orientation(*quarters[round(degrees / 90) % 4]), degrees % 90 == 0


def _kind(frame: av.VideoFrame, orientation: Orientation, aspect: float) -> Kind:
    numbers = (frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries)
    return Kind(frame.width, frame.height, frame.format.name, *map(int, numbers), orientation, aspect)


def _is_transparent(frame: av.VideoFrame, kind: Kind) -> bool:
    if not frame.format.has_palette and not any(component.is_alpha for component in frame.format.components):
        return False
    alpha = _through(_chain(kind, ("format", "rgba64le"), ("alphaextract",)), frame)
    return bool(alpha.min() < OPAQUE)


def _chain(kind: Kind, *filters: tuple[str, ...], time_base: str = "1/1000000") -> av.filter.Graph:
    """A graph of filters, one after another, for frames of this kind."""
    graph = av.filter.Graph()
    frames = (
        f"video_size={kind.width}x{kind.height}:pix_fmt={kind.format}:time_base={time_base}"
        f":colorspace={kind.matrix}:range={kind.range}"
    )
    nodes = [graph.add("buffer", frames), *(graph.add(*filter) for filter in filters), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph


def _through(graph: av.filter.Graph, frame: av.VideoFrame) -> np.ndarray:
    graph.vpush(frame)
    return graph.vpull().to_ndarray()


def _shown_size(kind: Kind) -> tuple[int, int]:
    """The size on the screen. Pixels are stretched along their longer side, so that nothing stored is thrown away."""
    width = round(kind.width * max(1.0, kind.aspect))
    height = round(kind.height / min(1.0, kind.aspect))
    return (height, width) if kind.orientation.transpose else (width, height)


def _matrix(kind: Kind) -> str:
    """The matrix to read colours by. Players take an untagged picture for BT.709 from HD on; mpv has these sizes."""
    if kind.matrix in MATRICES:
        return MATRICES[kind.matrix]
    if kind.primaries == 9:
        return "bt2020"
    return "bt709" if kind.width >= 1280 or kind.height > 576 else "bt601"


def _place(image: Tensor, width: int, height: int) -> Tensor:
    """Centred on a black, transparent canvas of this size: what is larger is cut, what is smaller gets bars."""
    missing_x, missing_y = width - image.shape[1], height - image.shape[0]
    if missing_x == missing_y == 0:
        return image
    if max(missing_x, missing_y) > 0 and image.shape[-1] == 3:
        image = torch.cat([image, torch.ones_like(image[..., :1])], dim=-1)
    left, top = int(missing_x / 2), int(missing_y / 2)
    return F.pad(image, (0, 0, left, missing_x - left, top, missing_y - top))  # a negative width cuts


def _multiple(size: float) -> int:
    """The multiple of 8 nearest to `size`, at least 8."""
    return max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def _flushed(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    graph.vpush(None)
    yield from _pulled(graph)
