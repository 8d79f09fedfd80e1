"""Measure the round trip of inversion and sampling on the demo model, with and without guided attention.

    python -m evidence.tables.reconstruction [--frames 4] [--seeds 0 1 2]

The measure is the lowest PSNR of a frame against the frame as the autoencoder decodes it, with the source prompt at
cfg 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch

from cove.metrics import psnr

from ..chance import held_out
from ..shapes.clips import random_clip
from ..shapes.scenes import caption
from .demo import digest_of, load_demo
from .edits import COVE, SIDE, Editor
from .records import FOLDER, Records, add_part

STEPS, MULTIPLES, REFINEMENTS = (20, 50), (1, 2), (0, 1, 2, 3)


@contextmanager
def counted_evaluations(extrapolate: bool) -> Iterator[list[float]]:
    """Make DDIM Inversion start its steps with or without extrapolation; yield the sigmas of its evaluations."""
    ddim, evaluations = sys.modules["pack.cove.ddim"], []
    plain = ddim.inversion_steps

    def steps(model, *args, **kwargs):
        def counted(x, sigma, **extra):
            evaluations.append(float(sigma[0]))
            return model(x, sigma, **extra)

        return plain(counted, *args, **kwargs, extrapolate=extrapolate)

    ddim.inversion_steps = steps
    try:
        yield evaluations
    finally:
        ddim.inversion_steps = plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--output", type=Path, default=FOLDER / "reconstruction.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one clip each")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    records, loaded = Records(arguments.output), load_demo()
    cases = product(STEPS, arguments.seeds, (False, True), MULTIPLES, REFINEMENTS, (True, False))
    for number, (steps, seed, guided, multiple, refinements, extrapolate) in enumerate(cases):
        case = {"frames": arguments.frames, "steps": steps, "multiple": multiple, "refinements": refinements}
        case |= {"extrapolate": extrapolate, "guided": guided, "seed": seed, "model": digest_of()}
        if number % parts != part or case in records:
            continue
        clip = random_clip(held_out(4000 + seed), arguments.frames)
        with torch.inference_mode():
            editor = Editor(*loaded, arguments.frames, steps)
            latent = {"samples": editor.vae.encode(clip.draw(SIDE))}
            words, nothing = editor.prompt(caption(clip.scenes[0])), editor.prompt("")
            model = editor.guided(COVE, clip, latent, words, seed) if guided else editor.model
            settings = {"steps": steps, "multiple": multiple, "refinements": refinements}
            with counted_evaluations(extrapolate) as evaluations:
                noise, _ = editor.node("DDIMInversion", model=model, conditioning=words, latent=latent, **settings)
            wires = {"model": model, "positive": words, "negative": nothing, "noise": noise}
            (back,) = editor.node("DDIMSampler", **wires, cfg=1.0)
            found = psnr(editor.vae.decode(back["samples"]), editor.vae.decode(latent["samples"]))
        records.add(case, {"lowest PSNR": round(float(found.min()), 2), "evaluations": len(evaluations)})
        print(case, f"{found.min():.1f} dB", flush=True)


if __name__ == "__main__":
    main()
