"""HDR and wide colours brought to what a screen of BT.709 shows.

The curves are those of Rec. ITU-R BT.2100-2: PQ (table 4) and HLG (table 5). White of an SDR picture stands at 203
cd/m2 (Rep. ITU-R BT.2408-7, table 1); a screen shows SDR by BT.1886 with a gamma of 2.4.
"""

from __future__ import annotations

import av
import torch
from torch import Tensor

PQ, HLG = 16, 18  # transfer characteristics, numbered by Rec. ITU-T H.273
BT2020 = 9  # primaries, likewise
WHITE, PEAK = 203.0, 1000.0  # cd/m2; the peak is the nominal one of HLG, and what PQ is mostly graded for
KNEE = 0.7  # of white, linear: darker than this nothing changes, brighter is rolled off, up to the peak
GAMMA = 2.4

# Rec. ITU-R BT.2087-0, annex 2: linear BT.2020 to linear BT.709
BT2020_TO_BT709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))


def to_bt709(image: Tensor, transfer: int, primaries: int) -> Tensor:
    """The picture as a screen of BT.709 shows it.

    Args:
        image: signal as decoded, R'G'B', [height, width, 3] float32, 0..1.
        transfer, primaries: of the signal, by H.273. Without PQ, HLG and BT.2020 nothing changes.

    Returns:
        R'G'B' of BT.709, [height, width, 3] float32, 0..1.
    """
    if transfer not in (PQ, HLG) and primaries != BT2020:
        return image
    light = {PQ: pq_light, HLG: hlg_light}.get(transfer, sdr_light)(image)
    if primaries == BT2020:
        light = light @ torch.tensor(BT2020_TO_BT709).T
    light = light.clamp(min=0)
    if transfer in (PQ, HLG):
        light = _roll_off(light)
    return light.clamp(0, 1) ** (1 / GAMMA)


def pq_light(signal: Tensor) -> Tensor:
    """Light of a PQ signal, 1 = white of SDR: the EOTF of BT.2100-2, table 4."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = signal ** (1 / m2)
    return ((root - c1).clamp(min=0) / (c2 - c3 * root)) ** (1 / m1) * 10_000 / WHITE


def hlg_light(signal: Tensor) -> Tensor:
    """Light of an HLG signal, 1 = white of SDR: the inverse OETF of BT.2100-2, table 5, and its system gamma of 1.2.

    The gamma is applied to each colour, as zscale in FFmpeg does, and not to the luminance: so a picture that was made
    from SDR comes back as it was.
    """
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = torch.where(signal <= 0.5, signal.square() / 3, (((signal - c) / a).exp() + b) / 12)
    return scene**1.2 * PEAK / WHITE


def sdr_light(signal: Tensor) -> Tensor:
    """Light of an SDR signal, 1 = white: BT.1886."""
    return signal**GAMMA


def _roll_off(light: Tensor) -> Tensor:
    """Highlights up to the peak fitted below 1 by FFmpeg's tonemap, in which the colours keep their proportions."""
    height, width = light.shape[:2]
    graph = av.filter.Graph()
    size = {"video_size": f"{width}x{height}", "pix_fmt": "gbrpf32le", "time_base": "1/1"}
    graph.link_nodes(
        graph.add("buffer", **size),
        graph.add("tonemap", f"mobius:param={KNEE}:desat=0:peak={PEAK / WHITE}"),
        graph.add("buffersink"),
    ).configure()
    frame = av.VideoFrame.from_ndarray(light.contiguous().numpy(), format="gbrpf32le")
    frame.pts = 0
    graph.vpush(frame)
    return torch.from_numpy(graph.vpull().to_ndarray())
