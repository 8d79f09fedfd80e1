"""Measure matches on real clips, by propagating the colours of the first frame along them.

    python -m evidence.tables.real_clips FOLDER [--seeds 0 1 2]

The true motion of a real clip is unknown, but its later frames show whether a match is correct: every token of a later
frame gets the colour of its match in the first frame, which is compared with its own colour (PSNR at the resolution of
tokens). This favours matches made from colours. FOLDER holds the clips (.mp4); each seed takes another piece of each.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cove.frames import read_frames
from cove.metrics import psnr

from .demo import digest_of, load_demo
from .matches import AFTER, FRAMES, SIDE, Probe, methods
from .records import FOLDER, Records, add_part


def propagated(values: Tensor, places: Tensor) -> Tensor:
    """Return the values [height, width, ...] of the tokens at places [height, width, 2], (x, y) in tokens."""
    height, width = values.shape[:2]
    x, y = places.round().long().unbind(-1)
    return values[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the clips, .mp4 files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER / "real_clips.jsonl")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part
    clips = sorted(arguments.folder.glob("*.mp4"))
    if not clips:
        parser.error(f"expected a folder with .mp4 files, found none in {arguments.folder}")

    pieces = list(product(arguments.seeds, clips))
    probe, records = Probe(*load_demo()), Records(arguments.output)
    grid = SIDE // probe.vae.downscale_ratio
    with torch.inference_mode():
        for number, (seed, path) in enumerate(pieces):
            case = {"seed": seed, "clip": path.name, "model": digest_of()}
            if number % parts != part or case in records:
                continue
            clip = read_frames(path, width=SIDE, height=SIDE).images
            start = (len(clip) - FRAMES) * arguments.seeds.index(seed) // max(1, len(arguments.seeds) - 1)
            pictures = clip[start : start + FRAMES]
            colours = F.adaptive_avg_pool2d(pictures.movedim(-1, 1), grid).movedim(1, -1)
            measured = {}
            for name, find in methods(probe, pictures, "", number):
                found = torch.stack([propagated(colours[0], find(after)[0]) for after in AFTER])
                values = psnr(found, colours[list(AFTER)]).tolist()
                measured[name] = {str(after): round(value, 3) for after, value in zip(AFTER, values, strict=True)}
            records.add(case, measured)
            print(f"{number + 1} of {len(pieces)} pieces", flush=True)


if __name__ == "__main__":
    main()
