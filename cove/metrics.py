"""Similarity of clips, accuracy of tracks, and colour drift along them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import agree, dis_flow
from .tracks import look_up

# Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, section III-C.
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each frame in dB, for values in 0..1; infinite where they are equal.

    Args:
        one, other: [frames, ...], of the same shape.

    Returns:
        [frames], float64.
    """
    _check_alike(one, other)
    return -10 * (one.double() - other.double()).square().flatten(1).mean(1).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Return the structural similarity of each frame, for values in 0..1; 1 if equal. Wang et al., 2004, Eq. 13.

    Means, variances and covariance are those under a Gaussian window of 11x11 pixels and sigma 1.5; the mean over the
    places where the window lies inside the frame, and over the channels.

    Args:
        one, other: [frames, height, width, channels], of the same shape, 11 pixels or more a side.

    Returns:
        [frames], float64.
    """
    _check_alike(one, other)
    if one.ndim != 4 or min(one.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"expected frames of {SSIM_WINDOW}x{SSIM_WINDOW} pixels or more, got {list(one.shape)}")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=one.device) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window = window / window.sum()
    return torch.stack([_ssim_of_frame(*pair, window) for pair in zip(one, other, strict=True)])


def _ssim_of_frame(one: Tensor, other: Tensor, window: Tensor) -> Tensor:
    """SSIM of two frames [height, width, channels]."""

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values[:, None], window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    x, y = one.double().movedim(-1, 0), other.double().movedim(-1, 0)
    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()


def _check_alike(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise ValueError(f"expected clips of the same shape, got {list(one.shape)} and {list(other.shape)}")


def pck(places: Tensor, true: Tensor, visible: Tensor, radius: float) -> Tensor:
    """Return the share of visible points that were found within `radius` tokens (percentage of correct keypoints).

    Args:
        places, true: [frames, height, width, 2], found and true tracks.
        visible: [frames, height, width], bool; other points do not count.

    Returns:
        [frames], float64; NaN for a frame without a visible point.
    """
    _check_tracks(places, visible)
    _check_tracks(true, visible)
    right = (places.double() - true.double()).norm(dim=-1) <= radius
    return (right & visible).flatten(1).sum(1).double() / visible.flatten(1).sum(1)


def colour_drift(frames: Tensor, places: Tensor, visible: Tensor) -> float:
    """Return how much points change colour along their tracks: root mean square deviation from the track's mean.

    0 when each point keeps its colour in every frame where it is visible. Noise of a standard deviation s from frame
    to frame gives s * sqrt(1 - 1/n) for tracks of n frames.

    Args:
        frames: [frames, height, width, channels] of values in 0..1, the edited clip; its size need not be the grid's.
        places, visible: tracks on the source clip; points that are seen in one frame only do not count.
    """
    _check_tracks(places, visible)
    seen = look_up(frames, places, tuple(visible.shape[1:])).double()
    weight = (visible & (visible.sum(0) > 1)).double()[..., None]
    count = weight.sum(0)
    if not count.any():
        raise ValueError("no point is visible in two frames: nothing can be said of how colours drift")
    mean = (seen * weight).sum(0) / count.clamp(min=1)
    return float((((seen - mean) ** 2 * weight).sum() / (weight.sum() * frames.shape[-1])).sqrt())


def warping_error(frames: Tensor, flow: Tensor, visible: Tensor) -> Tensor:
    """Return the difference of each frame to the next, warped back along the flow: Lai et al., 2018, section 4.3.

    Args:
        frames: [frames, height, width, channels] of values in 0..1.
        flow: [frames - 1, height, width, 2], (x, y) in pixels, where each pixel moves to in the next frame.
        visible: [frames - 1, height, width], bool; pixels that the next frame hides do not count.

    Returns:
        Mean squared difference of each pair of frames, [frames - 1], float64; NaN where no pixel is visible.
    """
    if flow.shape != (len(frames) - 1, *frames.shape[1:3], 2) or visible.shape != flow.shape[:-1]:
        raise ValueError(
            f"expected flow [{len(frames) - 1}, {frames.shape[1]}, {frames.shape[2]}, 2] and visible without its last "
            f"axis for frames {list(frames.shape)}, got {list(flow.shape)} and {list(visible.shape)}"
        )
    height, width = frames.shape[1:3]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    here = torch.stack([columns, rows], -1).to(flow)
    after = look_up(frames[1:], here + flow, (height, width)).double()
    squared = (after - frames[:-1].double()).square().mean(-1)
    return (squared * visible).flatten(1).sum(1) / visible.flatten(1).sum(1)


def _check_tracks(places: Tensor, visible: Tensor) -> None:
    if places.ndim != 4 or places.shape != (*visible.shape, 2) or visible.dtype != torch.bool:
        raise ValueError(
            f"expected places [frames, height, width, 2] and bool visible without the last axis, got "
            f"{list(places.shape)} and {visible.dtype} {list(visible.shape)}"
        )


# --- an edit, frame by frame ---

Columns = dict[str, list[float]]  # one number a frame; NaN where there is none
DIGITS = {"warping error": 6, "of the source": 6}  # squares of small differences


def check_libraries() -> None:
    """Raise ImportError naming the missing packages if OpenCV or matplotlib is not installed."""
    needed = {"cv2": "opencv-python-headless", "matplotlib": "matplotlib"}
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"measuring an edit needs more libraries: pip install {' '.join(missing)}")


def measure_edit(source: Tensor, edited: Tensor, progress: Callable[[int, int], None] | None = None) -> Columns:
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


def summarize_edit(columns: Columns) -> str:
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


def format_table(columns: Columns) -> str:
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
