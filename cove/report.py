"""What can be measured on an edit of any clip, as a table of plain text and as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .flow import agree, dis_flow
from .metrics import psnr, ssim, warping_error

Columns = dict[str, list[float]]  # one number a frame; NaN where there is none


def edit_columns(source: Tensor, edited: Tensor, progress: Callable[[int, int], None] | None = None) -> Columns:
    """How far each frame is from the source, and from its next frame once the source's motion is taken out.

    The motion is DIS optical flow of the source; pixels that it does not find again are left out. The source's own
    error stands beside the edit's, as a floor: light changes, and the flow is not perfect.

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


def flicker(columns: Columns) -> float:
    """How many times as much as the source's own frames those of the edit differ, motion taken out: of the means."""
    edit, source = (
        torch.tensor(columns[name], dtype=torch.float64).nanmean() for name in ("warping error", "of the source")
    )
    return float(edit / source)


def table(columns: Columns) -> str:
    """A line a frame and one of the means, right-aligned; dB with one digit, all else with four."""
    lines = [["frame"], *([str(frame)] for frame in range(len(next(iter(columns.values()))))), ["mean"]]
    for name, values in columns.items():
        known = [value for value in values if not math.isnan(value)]
        mean = sum(known) / len(known) if known else math.nan
        cells = [name, *(_spell(value, 1 if "PSNR" in name else 4) for value in (*values, mean))]
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _spell(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def panels_of(columns: Columns) -> dict[str, Columns]:
    """What `plot` takes, of `edit_columns` and of columns whose names begin with CLIP."""
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
    """Curves over the frames, one panel beneath another. Needs matplotlib.

    Args:
        panels: title -> name of a curve -> one number a frame.

    Returns:
        A picture, [1, height, width, 3] from 0 to 1.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 2.2 * len(panels)), dpi=100, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(range(len(values)), values, marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    axes.set_xlabel("frame")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="rgba")
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    pixels = torch.frombuffer(bytearray(drawn.getvalue()), dtype=torch.uint8).view(1, height, width, 4)
    return pixels[..., :3].float() / 255
