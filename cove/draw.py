"""Matches and tracks drawn on frames, and curves of measurements, as pictures.

Images are [frames, height, width, 3] float in 0..1 and are never changed in place. Places are (x, y) in pixels from the
upper left corner of the picture, so the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from .correspondence import Correspondence
    from .metrics import Columns

Color = tuple[float, float, float]
Point = tuple[float, float]

QUERY_COLOR: Color = (1.0, 0.0, 0.0)
MATCH_COLORS: tuple[Color, ...] = ((1.0, 1.0, 0.0), (0.0, 0.8, 0.0), (0.0, 0.3, 1.0))  # best match first
BLACK: Color = (0.0, 0.0, 0.0)
RADIUS = 0.0125  # of a disc, in image heights: 6.4 pixels at 512
RING = 1.5  # radius of the ring around a disc, in disc radii


def draw_matches(images: Tensor, correspondence: Correspondence, points: Sequence[Point], frame: int = 0) -> Tensor:
    """Mark the matches of some points of one frame as discs in every frame.

    As in COVE (arXiv 2406.08850), "Visualization of the correspondence in long videos": the point itself is red in its
    own frame; in every other frame its best match is yellow, the second green, the third blue, and further ones are
    blue. The best is drawn last and so lies on top. With several points, each has a ring of its own colour.

    Args:
        images: [frames, height, width, 3], the frames the correspondence was found in, at any size.
        points: (x, y) in pixels of frame `frame`, inside the picture.
        frame: index of the frame the points are in.

    Returns:
        [frames, height, width, 3], a drawn copy.
    """
    others, matches = _matches(images, correspondence, points, frame)
    images, radius = images.clone(), _radius(images)
    for point, followed, ring in zip(points, matches, _rings(len(points)), strict=True):
        _draw_disc(images[frame], point, radius, QUERY_COLOR, ring)
        for other, best_first in zip(others, followed, strict=True):
            for rank, token in reversed(list(enumerate(best_first))):
                color = MATCH_COLORS[min(rank, len(MATCH_COLORS) - 1)]
                _draw_disc(images[other], _centre(token, correspondence, images), radius, color, ring)
    return images


def draw_tracks(images: Tensor, correspondence: Correspondence, points: Sequence[Point], frame: int = 0) -> Tensor:
    """Draw the best match of each point through time: a disc at its position, a line through the previous ones.

    Args:
        images, points, frame: as in `draw_matches`.

    Returns:
        [frames, height, width, 3], a drawn copy; each point has its own colour.
    """
    _, matches = _matches(images, correspondence, points, frame)
    images, radius = images.clone(), _radius(images)
    for point, followed, color in zip(points, matches, _hues(len(points)), strict=True):
        track = [_centre(best, correspondence, images) for best, *_ in followed]
        track.insert(frame, tuple(point))
        for now, image in enumerate(images):
            for a, b in pairwise(track[: now + 1]):
                _draw_line(image, a, b, radius / 2, color)
            _draw_disc(image, track[now], radius, color, BLACK)
    return images


def contact_sheet(images: Tensor, columns: int = 0) -> Tensor:
    """Arrange all frames on one picture, row by row; cells left over stay black.

    Args:
        images: [frames, height, width, 3].
        columns: frames side by side, 0 = about as many as there are rows.

    Returns:
        [1, rows * height, columns * width, 3].
    """
    _check_images(images)
    if columns < 0:
        raise ValueError(f"columns is {columns}; expected 1 or more, or 0 for about as many as rows.")
    columns = min(columns or ceil(len(images) ** 0.5), len(images))
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns))
    return rearrange(images, "(r c) h w rgb -> 1 (r h) (c w) rgb", c=columns)


def grid_points(height: int, width: int, side: int = 3) -> list[Point]:
    """Return the centres of `side` x `side` equal fields of a picture, row by row, as (x, y) in pixels."""
    steps = [(step + 0.5) / side for step in range(side)]
    return [(x * width, y * height) for y in steps for x in steps]


def _matches(
    images: Tensor, correspondence: Correspondence, points: Sequence[Point], frame: int
) -> tuple[list[int], list[list[list[int]]]]:
    """Return the other frames, and for each point its matches in each of them; raise if the inputs do not fit."""
    _check_images(images)
    frames, height, width, _ = images.shape
    if frames != correspondence.frames:
        raise ValueError(
            f"There are {frames} images, but the correspondence is of {correspondence.frames} frames. Give the frames "
            "that the correspondence was found in."
        )
    if not 0 <= frame < frames:
        raise ValueError(f"frame is {frame}; expected 0 to {frames - 1}, as there are {frames} frames.")
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"The point ({x:g}, {y:g}) is outside the picture of {width} x {height} pixels; expected x from 0 to "
                f"{width - 1} and y from 0 to {height - 1}."
            )
    rows, columns = correspondence.height, correspondence.width
    tokens = [int(y * rows / height) * columns + int(x * columns / width) for x, y in points]
    others = [other for other in range(frames) if other != frame]
    return others, correspondence.follow(frame, others).cpu()[tokens].tolist() if others else [[] for _ in points]


def _centre(token: int, correspondence: Correspondence, images: Tensor) -> Point:
    y, x = divmod(token, correspondence.width)
    height, width = images.shape[1:3]
    return (x + 0.5) * width / correspondence.width, (y + 0.5) * height / correspondence.height


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0:
        raise ValueError(f"The images are {list(images.shape)}; expected [frames, height, width, 3].")


def _radius(images: Tensor) -> float:
    return max(1.5, RADIUS * images.shape[1])  # a smaller disc would not show its colour


def _hues(count: int) -> list[Color]:
    # Half a step away from red, which means the query, and never dark.
    return [colorsys.hsv_to_rgb((index + 0.5) / max(count, 1), 0.8, 1.0) for index in range(count)]


def _rings(count: int) -> list[Color]:
    return [BLACK] if count == 1 else _hues(count)


def _draw_disc(image: Tensor, place: Point, radius: float, color: Color, ring: Color) -> None:
    _draw_line(image, place, place, radius * RING, ring)
    _draw_line(image, place, place, radius, color)


def _draw_line(image: Tensor, a: Point, b: Point, radius: float, color: Color) -> None:
    """Paint all pixels within `radius` of the segment from a to b into `image` [height, width, 3], in place.

    A pixel is covered by how far its centre is inside, which runs from 0 to 1 over one pixel: an antialiased edge. A
    stretch of no length is a disc.
    """
    height, width, _ = image.shape
    reach = radius + 1  # past this nothing is covered, so only this box is touched
    left, right = (int(min(max(side, 0), width)) for side in (min(a[0], b[0]) - reach, max(a[0], b[0]) + reach + 1))
    top, bottom = (int(min(max(side, 0), height)) for side in (min(a[1], b[1]) - reach, max(a[1], b[1]) + reach + 1))
    x = torch.arange(left, right, device=image.device) + 0.5 - a[0]
    y = torch.arange(top, bottom, device=image.device)[:, None] + 0.5 - a[1]
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = ((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-9)).clamp(0, 1)
    distance = torch.hypot(x - along * dx, y - along * dy)
    coverage = (radius + 0.5 - distance).clamp(0, 1)[..., None].to(image.dtype)
    patch = image[top:bottom, left:right]
    patch.lerp_(image.new_tensor(color).expand_as(patch), coverage.expand_as(patch))


# --- curves ---


def plot_edit(columns: Columns) -> Tensor:
    """Plot the columns of `metrics.measure_edit`, and those whose names begin with CLIP, as a picture; see `plot`."""
    panels = {
        "Difference to the next frame, motion taken out": {
            "edited": columns["warping error"],
            "source": columns["of the source"],
        },
        "PSNR to the source, dB": {"edited": columns["PSNR"]},
    }
    similarities = {name: values for name, values in columns.items() if name.startswith("CLIP")}
    return plot(panels | ({"CLIP similarity": similarities} if similarities else {}))


def plot(panels: dict[str, Columns]) -> Tensor:
    """Plot curves over the frames, one panel below another. Needs matplotlib.

    Args:
        panels: title -> name of a curve -> one number a frame.

    Returns:
        A picture, [1, height, width, 3] from 0 to 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 * len(panels)), dpi=100, layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0], panels.items(), strict=True
    ):
        for name, values in curves.items():
            axes.plot(range(len(values)), values, marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    axes.set_xlabel("frame")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    return pixels.view(1, height, width, 4)[..., :3].float() / 255
