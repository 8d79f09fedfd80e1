"""Masks of animated emoji, carried from the first frame through the clip by matches.

    python benchmarks/masks.py [--clips 4] [--seeds 0 1 2]

Every token of a later frame takes what the token says that its matches lead to in the first frame: on the emoji, or on
the ground. Counted is the overlap with the true mask (intersection over union, the J of the DAVIS benchmark). The demo
model never saw an emoji. They are fetched with npm, once.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.matches import FRAMES, SIDE, Probe, ways  # noqa: E402
from benchmarks.model import digest_of, load_demo  # noqa: E402
from benchmarks.records import FOLDER, Records, add_part  # noqa: E402
from cove.metrics import overlap  # noqa: E402
from scripts.host import provide_host  # noqa: E402
from training.clips import Clip, on_top  # noqa: E402
from training.emoji import Emoji, animated_scenes  # noqa: E402
from training.world import caption, held_out, pixels, random_ground  # noqa: E402

STEP = 4  # of the animation's frames, which are drawn 24 a second
AFTER = (1, 5)  # frames


def carried(values: Tensor, places: Tensor) -> Tensor:
    """Values [height, width, ...] of the tokens that places [height, width, 2] lead to."""
    height, width = values.shape[:2]
    x, y = places.round().long().unbind(-1)
    return values[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="clips a seed, of other emoji each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER / "masks.jsonl")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    emoji, records = Emoji(ROOT / ".training" / "emoji"), Records(arguments.output)
    probe = Probe(*load_demo(provide_host()))
    grid = SIDE // probe.vae.downscale_ratio
    names = emoji.moving()
    shuffled = torch.randperm(len(names), generator=held_out(3000)).tolist()
    with torch.inference_mode():
        for seed, number in product(arguments.seeds, range(arguments.clips)):
            index = seed * arguments.clips + number
            case = {"seed": seed, "emoji": names[shuffled[index]], "model": digest_of()}
            if index % parts != part or case in records:
                continue
            ground = random_ground(held_out(3001 + index))
            clip = Clip(animated_scenes(emoji.animation(case["emoji"]), ground, FRAMES, STEP))
            masks = torch.stack([on_top(scene, pixels(grid)) == 0 for scene in clip.scenes])
            measured = {}
            for way, find in ways(probe, clip.draw(SIDE), caption(clip.scenes[0]), index):
                found = {after: carried(masks[0], find(after)[0]) for after in AFTER}
                measured[way] = {str(after): round(overlap(mask, masks[after]), 4) for after, mask in found.items()}
            records.add(case, measured)
            print(f"seed {seed}: {number + 1} of {arguments.clips} clips", flush=True)


if __name__ == "__main__":
    main()
