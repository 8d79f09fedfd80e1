"""Correspondence between the tokens of frames: sliding-window top-K matches, followed through time.

COVE (arXiv 2406.08850), section 3.2, "Sliding-window Strategy", Eq. 7-10.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import atomic_write, save_tensors

CORRESPONDENCE_FORMAT = "cove.correspondence.1"


@dataclass(frozen=True)
class Correspondence:
    """The `k` best matches of every token in the frame after it and in the frame before it.

    Attributes:
        forward: token of frame i -> flat row-major tokens of frame i + 1, best first,
            int32 [frames-1, height*width, k].
        backward: token of frame i + 1 -> tokens of frame i, best first, int32 [frames-1, height*width, k].
        height, width: the token grid.
        window: side of the search square the matches were found in, in tokens.
        pairs: token of frame i -> tokens of frame j, best first, int32 [frames, frames, height*width, k], where the
            matches of frames further apart were found by `refine`; None where they are followed from link to link.
    """

    forward: Tensor
    backward: Tensor
    height: int
    width: int
    window: int
    pairs: Tensor | None = None

    def __post_init__(self):
        tokens = self.height * self.width
        for name in ("forward", "backward"):
            matches = getattr(self, name)
            if matches.dtype != torch.int32 or matches.ndim != 3 or matches.shape[1] != tokens:
                raise ValueError(
                    f"{name} must be int32 [frames-1, {tokens}, k] for a grid of {self.height}x{self.width} tokens, "
                    f"got {matches.dtype} {list(matches.shape)}"
                )
        if self.forward.shape != self.backward.shape:
            raise ValueError(f"forward and backward differ: {list(self.forward.shape)} and {list(self.backward.shape)}")
        expected = (self.frames, self.frames, tokens, self.k)
        if self.pairs is not None and (self.pairs.dtype != torch.int32 or self.pairs.shape != expected):
            raise ValueError(f"pairs must be int32 {list(expected)}, got {self.pairs.dtype} {list(self.pairs.shape)}")

    @property
    def frames(self) -> int:
        return self.forward.shape[0] + 1

    @property
    def k(self) -> int:
        return self.forward.shape[2]

    @property
    def bytes(self) -> int:
        """Return about the size of its file."""
        return sum(tensor.nbytes for tensor in (self.forward, self.backward, self.pairs) if tensor is not None)

    def follow(self, frame: int, others: Sequence[int]) -> Tensor:
        """Return the `k` matches of every token of `frame` in each frame of `others`.

        The best match is followed from frame to frame, forwards or backwards; the matches in a frame are those of the
        token followed to its neighbour. COVE, Eq. 9. Refined ones are looked up in `pairs`.

        Args:
            frame: where the tokens are.
            others: frames to look in, in the order wanted; `frame` itself cannot be among them.

        Returns:
            Flat row-major token indices, best first, int64 [height*width, len(others), k].
        """
        for index in (frame, *others):
            if not 0 <= index < self.frames:
                raise ValueError(f"frame {index} is outside this correspondence of {self.frames} frames")
        if frame in others:
            raise ValueError(f"frame {frame} cannot be matched with itself")
        if self.pairs is not None:
            return self.pairs[frame, list(others)].movedim(0, 1).long()
        column = {other: i for i, other in enumerate(others)}
        found = self.forward.new_empty((self.height * self.width, len(others), self.k), dtype=torch.int64)
        for links, path, reached in (
            (self.forward, range(frame, max((*others, frame))), 1),
            (self.backward, range(frame - 1, min((*others, frame)) - 1, -1), 0),
        ):
            at = None  # the token itself, before the first link
            for link in path:
                matches = links[link] if at is None else links[link][at]
                at = matches[:, 0]
                if link + reached in column:
                    found[:, column[link + reached]] = matches
        return found

    def crop(self, top: int, left: int, height: int, width: int) -> Correspondence:
        """Crop the matches to a rectangle of the grid; a match outside it becomes the nearest token inside."""
        if not (0 <= top and top + height <= self.height and 0 <= left and left + width <= self.width):
            raise ValueError(
                f"rectangle {height}x{width} at row {top}, column {left} leaves the grid of {self.height}x{self.width}"
            )

        def cropped(matches: Tensor) -> Tensor:
            return crop_matches(matches, (self.height, self.width), top, left, height, width)

        pairs = None if self.pairs is None else cropped(self.pairs.flatten(0, 1)).unflatten(0, self.pairs.shape[:2])
        return Correspondence(cropped(self.forward), cropped(self.backward), height, width, self.window, pairs)

    def to(self, device: torch.device | str) -> Correspondence:
        """Return a copy on another device."""
        if self.forward.device == torch.device(device):
            return self
        moved = {name: matches.to(device) for name, matches in self._matches().items()}
        return replace(self, **moved)

    def _matches(self) -> dict[str, Tensor]:
        found = {"forward": self.forward, "backward": self.backward, "pairs": self.pairs}
        return {name: matches for name, matches in found.items() if matches is not None}

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, under a temporary name and then renamed: a kill leaves the old file or none."""
        metadata = {"format": CORRESPONDENCE_FORMAT} | {
            name: str(getattr(self, name)) for name in ("height", "width", "window")
        }
        with atomic_write(path) as temporary:
            save_tensors(self._matches(), temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Correspondence:
        """Read a file of `save`; ValueError if the file is something else or damaged."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != CORRESPONDENCE_FORMAT:
                    raise ValueError(f"{path} holds no COVE correspondence (expected format {CORRESPONDENCE_FORMAT})")
                found = cls(
                    file.get_tensor("forward"),
                    file.get_tensor("backward"),
                    *(int(metadata[name]) for name in ("height", "width", "window")),
                    file.get_tensor("pairs") if "pairs" in file.keys() else None,  # noqa: SIM118
                )
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
        tokens = found.height * found.width
        if any(((matches < 0) | (matches >= tokens)).any() for matches in found._matches().values()):
            raise ValueError(f"{path} is damaged: it names tokens outside its grid of {found.height}x{found.width}")
        return found


def crop_matches(matches: Tensor, grid: tuple[int, int], top: int, left: int, height: int, width: int) -> Tensor:
    """Crop matches between token grids, [n, height*width, k], to a rectangle; outside becomes the nearest inside."""
    inside = matches.unflatten(1, grid)[:, top : top + height, left : left + width]
    rows = (inside // grid[1] - top).clamp(0, height - 1)
    columns = (inside % grid[1] - left).clamp(0, width - 1)
    return (rows * width + columns).flatten(1, 2)


def check_window(window: int, k: int, height: int, width: int) -> None:
    """Raise ValueError unless `window` is odd and every window, clipped at the border, holds `k` tokens."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, so that it has a centre; got {window}")
    reach = window // 2 + 1  # what is left of one side of the window in a corner
    smallest = min(reach, height) * min(reach, width)
    if not 1 <= k <= smallest:
        raise ValueError(
            f"k must be from 1 to {smallest}, the tokens of the smallest window of {window}x{window} clipped at the "
            f"border of a {height}x{width} grid; got {k}. Lower k or widen the window."
        )


def find_correspondence(
    features: Tensor,
    window: int = 9,
    k: int = 3,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str | None = None,
) -> Correspondence:
    """Find, for every token, the `k` most similar tokens near the same position in the next and the previous frame.

    Similarity is cosine. Only the `window` x `window` tokens centred on the same position are compared, clipped at
    the border. Among equals the nearer token comes first, so that a plain area does not seem to move. COVE
    (arXiv 2406.08850), section 3.2, Eq. 7-10.

    Rows of tokens are multiplied with rows of tokens, a few at a time, so that what is held beside two frames stays
    near `ROWS_BYTES`, whatever the window. The products are summed in double: single precision would round them
    differently from column to column, and equal tokens would not tie.

    Args:
        features: [frames, height, width, channels], any float dtype; compared in float32.
        window: side of the search square, in tokens, odd.
        k: matches to keep, 1 <= k <= the smallest clipped window.
        progress: called with (done, total) pairs of frames.
        device: where two frames at a time are compared; by default where the features are. Matches stay with them.
    """
    if features.ndim != 4:
        raise ValueError(f"features must be [frames, height, width, channels], got {list(features.shape)}")
    frames, height, width, _ = features.shape
    check_window(window, k, height, width)
    forward = torch.empty((frames - 1, height * width, k), dtype=torch.int32, device=features.device)
    backward = torch.empty_like(forward)

    def unit(frame: int) -> Tensor:
        return F.normalize(features[frame].to(device or features.device).float(), dim=-1)

    after = unit(0)
    for i in range(frames - 1):
        before, after = after, unit(i + 1)
        forward[i] = _match(before, after, window, k)
        backward[i] = _match(after, before, window, k)
        if progress is not None:
            progress(i + 1, frames - 1)
    return Correspondence(forward, backward, height, width, window)


ROWS_BYTES = 4 << 20


def _match(source: Tensor, target: Tensor, window: int, k: int) -> Tensor:
    """Return the `k` best tokens of `target` for each of `source`, unit vectors [height, width, channels].

    Returns:
        Flat row-major indices, best first, int32 [height*width, k].
    """
    height, width, channels = source.shape
    row_bytes = width * (4 * window * window + 16 * channels)  # similarities, and both frames in double
    rows = max(1, ROWS_BYTES // row_bytes)
    offsets = nearest_first(window, source.device)
    dy, dx = offsets.unbind(1)
    order, shift = (dy + window // 2) * window + dx + window // 2, dy * width + dx
    matches = []
    for top in range(0, height, rows):
        similarity = _window_similarity(source[top : top + rows], target, top, window).flatten(2)[..., order]
        best = first_best(similarity, k)
        here = torch.arange(top * width, top * width + best.shape[0] * width, device=source.device)
        matches.append((here.view(-1, width, 1) + shift[best]).int())
    return torch.cat(matches).flatten(0, 1)


def first_best(similarity: Tensor, k: int) -> Tensor:
    """Return the positions of the `k` largest values of the last axis, ties by position; overwrites `similarity`.

    A stable sort would say the same; for the few values wanted here this is several times faster.
    """
    best = []
    for _ in range(k):
        best.append(similarity.argmax(dim=-1, keepdim=True))
        similarity.scatter_(-1, best[-1], -torch.inf)
    return torch.cat(best, dim=-1)


def _window_similarity(source: Tensor, target: Tensor, top: int, window: int) -> Tensor:
    """Return the cosine similarity of some rows of tokens with the windows around them, -inf outside the frame.

    Args:
        source: unit vectors, [rows, width, channels], rows `top`, `top` + 1, ... of their frame.
        target: unit vectors, [height, width, channels].

    Returns:
        [rows, width, window (dy), window (dx)].
    """
    height, width, _ = target.shape
    reach = window // 2
    precise = torch.float32 if source.device.type == "mps" else torch.float64  # Metal has no doubles
    similarity = source.new_full((source.shape[0], width, window, window), -torch.inf)
    # Of the product of two rows, column w needs columns w - reach ... w + reach: a band.
    band = torch.arange(width, device=source.device)[:, None] + torch.arange(window, device=source.device)
    for dy in range(-reach, reach + 1):
        rows = slice(max(0, -dy - top), min(source.shape[0], height - dy - top))
        if rows.start >= rows.stop:
            continue
        moved = target[rows.start + top + dy : rows.stop + top + dy]
        product = torch.bmm(source[rows].to(precise), moved.to(precise).transpose(1, 2)).to(source.dtype)
        product = F.pad(product, (reach, reach), value=-torch.inf)
        similarity[rows, :, dy + reach] = product.gather(2, band.expand(len(product), -1, -1))
    return similarity


def nearest_first(window: int, device: torch.device) -> Tensor:
    """Return the offsets (dy, dx) of a window, from its centre outwards, int64 [window*window, 2]."""
    side = torch.arange(window, device=device) - window // 2
    offsets = torch.cartesian_prod(side, side)
    return offsets[offsets.square().sum(1).sort(stable=True).indices]
