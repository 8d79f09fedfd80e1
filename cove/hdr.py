"""HDR and wide-gamut video converted to what a BT.709 display shows.

Transfer functions: Rec. ITU-R BT.2100-2, PQ (table 4) and HLG (table 5). SDR white is 203 cd/m2 (Rep. ITU-R BT.2408-7,
table 1); the display's gamma is 2.4 (Rec. ITU-R BT.1886).
"""

from __future__ import annotations

import av
import torch
from torch import Tensor

PQ, HLG = 16, 18  # transfer characteristics, numbered by Rec. ITU-T H.273
BT2020, P3 = 9, 12  # primaries, likewise; P3 with the white of D65, as phones and Macs record it
WHITE, PEAK = 203.0, 1000.0  # cd/m2; HLG's nominal peak, and the most common mastering peak of PQ
KNEE = 0.7  # relative to white, linear: values below stay unchanged, values up to the peak are compressed
GAMMA = 2.4
TO_BT709 = {  # of linear light
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),  # Rec. BT.2087-0
    P3: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),  # from SMPTE EG 432-1, table 3
}


def needs_conversion(transfer: int, primaries: int) -> bool:
    """Return whether `to_bt709` changes a picture with these tags."""
    return transfer in (PQ, HLG) or primaries in TO_BT709


def to_bt709(picture: Tensor, transfer: int, primaries: int) -> Tensor:
    """Convert a picture from HDR, BT.2020 or P3 to BT.709.

    Args:
        picture: non-linear RGB, [height, width, 3] float32 in 0..1.
        transfer, primaries: numbers of H.273.

    Returns:
        Non-linear RGB of BT.709, [height, width, 3] float32 in 0..1.
    """
    linear = {PQ: linear_from_pq, HLG: linear_from_hlg}.get(transfer, linear_from_sdr)(picture)
    if primaries in TO_BT709:
        linear = linear @ torch.tensor(TO_BT709[primaries]).T
    linear = linear.clamp(min=0)
    if transfer in (PQ, HLG):
        linear = _tone_map(linear)
    return linear.clamp(0, 1) ** (1 / GAMMA)


def linear_from_pq(signal: Tensor) -> Tensor:
    """Return linear light relative to SDR white: the EOTF of BT.2100-2, table 4."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = signal ** (1 / m2)
    return ((root - c1).clamp(min=0) / (c2 - c3 * root)) ** (1 / m1) * 10_000 / WHITE


def linear_from_hlg(signal: Tensor) -> Tensor:
    """Return linear light relative to SDR white: the inverse OETF of BT.2100-2, table 5, and a system gamma of 1.2.

    The gamma applies to each channel, as in FFmpeg's zscale, and not to the luminance: SDR video that was converted to
    HLG comes back unchanged.
    """
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = torch.where(signal <= 0.5, signal.square() / 3, (((signal - c) / a).exp() + b) / 12)
    return scene**1.2 * PEAK / WHITE


def linear_from_sdr(signal: Tensor) -> Tensor:
    """Return linear light relative to SDR white: BT.1886."""
    return signal**GAMMA


def _tone_map(linear: Tensor) -> Tensor:
    """Compress highlights up to the peak below 1 with FFmpeg's tonemap, which keeps the ratios of the channels."""
    height, width = linear.shape[:2]
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add("buffer", f"video_size={width}x{height}:pix_fmt=gbrpf32le:time_base=1/1"),
        graph.add("tonemap", f"mobius:param={KNEE}:desat=0:peak={PEAK / WHITE}"),
        graph.add("buffersink"),
    ).configure()
    graph.vpush(av.VideoFrame.from_ndarray(linear.contiguous().numpy(), format="gbrpf32le"))
    return torch.from_numpy(graph.vpull().to_ndarray())
