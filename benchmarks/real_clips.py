"""Colours of real clips, carried from the first frame through the clip by matches.

    python benchmarks/real_clips.py [CLIP ...] [--seeds 0 1 2]

Nobody knows the true motion of a real clip, but its own later frames say whether a match was right: every token of a
later frame takes the colour of the token that its matches lead to in the first frame, and the two are compared (PSNR at
the tokens' resolution). That favours matches made of colours. Each seed has another piece of each clip, from its
beginning to its end. Without CLIPs, those in ../shared/clips. The demo model never saw a picture of the world.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.masks import carried  # noqa: E402
from benchmarks.matches import AFTER, FRAMES, SIDE, Probe, ways  # noqa: E402
from benchmarks.model import digest_of, load_demo  # noqa: E402
from benchmarks.records import FOLDER, Records, add_part  # noqa: E402
from cove.frames import read_frames  # noqa: E402
from cove.metrics import psnr  # noqa: E402
from scripts.host import provide_host  # noqa: E402

CLIPS = ROOT.parent / "shared" / "clips"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="*", default=sorted(CLIPS.glob("*.mp4")), metavar="CLIP")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER / "real_clips.jsonl")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    pieces = list(product(arguments.seeds, arguments.clips))
    probe, records = Probe(*load_demo(provide_host())), Records(arguments.output)
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
            for way, find in ways(probe, pictures, "", number):
                found = torch.stack([carried(colours[0], find(after)[0]) for after in AFTER])
                values = psnr(found, colours[list(AFTER)]).tolist()
                measured[way] = {str(after): round(value, 3) for after, value in zip(AFTER, values, strict=True)}
            records.add(case, measured)
            print(f"{number + 1} of {len(pieces)} pieces", flush=True)


if __name__ == "__main__":
    main()
