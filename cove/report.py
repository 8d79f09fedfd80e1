"""Measurements of an edit of any clip, as a plain-text table and as a plot."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .flow import agree, dis_flow
from .metrics import psnr, ssim, warping_error

Columns = dict[str, list[float]]  # one number a frame; NaN where there is none
DIGITS = {"warping error": 6, "of the source": 6}  # squares of small differences


def check_libraries() -> None:
    """Raise ImportError naming the missing packages if OpenCV or matplotlib is not installed."""
    needed = {"cv2": "opencv-python-headless", "matplotlib": "matplotlib"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"measuring an edit needs more libraries: pip install {' '.join(missing)}")


def edit_columns(source: Tensor, edited: Tensor, progress: Callable[[int, int], None] | None = None) -> Columns:
    """Measure each frame against the source, and against its next frame with the source's motion compensated.

    The motion is DIS optical flow of the source; pixels that it does not find again are left out. The source's own
    error stands beside the edit's, for the scale: light changes, and the flow is not perfect.

    Args:
        source, edited: [frames, height, width, 3] of values in 0..1, of the same shape, 12 pixels or more a side.
        progress: called with (done, total) pairs of frames.

    Returns:
        PSNR in dB and SSIM against the source; warping error of the edit and of the source, NaN for the last frame.
    """
    columns = {"PSNR": psnr(edited, source).tolist(), "SSIM": ssim(edited, source).tolist()}
    forward, backward = dis_flow(source, progress)
    visible = agree(forward, backward)
    for name, clip in (("warping error", edited), ("of the source", source)):
        columns[name] = [*warping_error(clip, forward, visible).tolist(), math.nan]
    return columns


def summary(columns: Columns) -> str:
    """Describe in a sentence how steady the edit is compared with the source."""
    edit, source = (_mean(columns[name]) for name in ("warping error", "of the source"))
    if math.isnan(edit):
        return "Nothing to compare: no frame has a next one that shows the same."
    if source == 0:
        return f"The source's frames do not differ, motion taken out; those of the edit do by {edit:.6f}."
    return f"Motion taken out, frames differ {edit / source:.2f} times as much as the source's own do."


def _mean(values: Sequence[float]) -> float:
    """Return the mean of all values that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def table(columns: Columns) -> str:
    """Format one line per frame and one of the means, right-aligned."""
    lines = [["frame"], *([str(frame)] for frame in range(len(next(iter(columns.values()))))), ["mean"]]
    for name, values in columns.items():
        digits = 1 if "PSNR" in name else DIGITS.get(name, 4)
        cells = [name, *(_format_number(value, digits) for value in (*values, _mean(values)))]
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _format_number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def panels_of(columns: Columns) -> dict[str, Columns]:
    """Arrange the columns of `edit_columns`, and those whose names begin with CLIP, for `plot`."""
    panels = {
        "Difference to the next frame, motion taken out": {
            "edited": columns["warping error"],
            "source": columns["of the source"],
        },
        "PSNR to the source, dB": {"edited": columns["PSNR"]},
    }
    similarities = {name: values for name, values in columns.items() if name.startswith("CLIP")}
    return panels | ({"CLIP similarity": similarities} if similarities else {})


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
