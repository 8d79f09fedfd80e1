"""Sample the demo model for 64 captions per seed: a sheet of pictures, and how often they match each word.

    python -m evidence.tables.samples [--count 64] [--seeds 0 1 2] [--output demo/samples.jpg]

A classifier that was trained on drawn pictures only (`evidence.shapes.classifier`) checks the words. The second row of
figures, for drawn pictures of the same captions after the model's autoencoder, is an upper bound. None of these scenes
was trained on, though most of the 5,376 captions were. The sheet shows the first seed.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from scripts.host import PACK

from ..chance import held_out
from ..shapes.classifier import QUESTIONS, answers, load_classifier
from ..shapes.scenes import caption, random_scene
from .demo import digest_of, load_demo
from .records import FOLDER, Records, add_part

STEPS, CFG, SIDE = 50, 3.0, 128


def sample(model, clip, side: int, words: str, seed: int) -> Tensor:
    """Sample the latents of one picture with ComfyUI's own sampler."""
    import comfy.sample

    def encoded(text: str):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    latent = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model,
        noise,
        STEPS,
        CFG,
        "ddim",
        "ddim_uniform",
        encoded(words),
        encoded(""),
        latent,
        disable_pbar=True,
        seed=seed,
    )


def agreement(pictures: Tensor, right: Tensor) -> dict[str, float]:
    """Return the share of pictures, [n, 3, height, width], with correct answers, for each question and for all."""
    hits = torch.stack([score.argmax(1) for score in load_classifier()(pictures)], 1) == right
    return dict(zip(QUESTIONS, hits.float().mean(0).tolist(), strict=True)) | {"all": hits.all(1).float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="captions per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--file", default="shapes.safetensors")
    parser.add_argument("--output", type=Path, default=PACK / "demo" / "samples.jpg")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    records, (model, clip, vae, _) = Records(FOLDER / "samples.jsonl"), load_demo(arguments.file)
    for seed in arguments.seeds:
        case = {"seed": seed, "count": arguments.count, "model": digest_of(arguments.file)}
        if seed % parts != part or case in records:
            continue
        numbers = [5000 + 1000 * seed + number for number in range(arguments.count)]
        scenes = [random_scene(held_out(number), most=1) for number in numbers]
        with torch.inference_mode():
            side = SIDE // vae.downscale_ratio
            latents = map(partial(sample, model, clip, side), map(caption, scenes), numbers)
            made = torch.cat([vae.decode(latent) for latent in latents])
            drawn = torch.stack([scene.draw(SIDE) for scene in scenes])
            drawn = vae.decode(vae.encode(drawn.movedim(1, -1)))
            right = torch.tensor([answers(scene) for scene in scenes])
            found = {
                name: agreement(pictures.movedim(-1, 1).float(), right)
                for name, pictures in (("sampled", made), ("drawn", drawn))
            }
        records.add(case, found)
        for name, shares in found.items():
            print(
                f"{seed}, {name}: " + ", ".join(f"{question} {100 * share:.0f} %" for question, share in shares.items())
            )
        if seed == arguments.seeds[0]:
            save_sheet(arguments.output, made, [caption(scene) for scene in scenes])


def save_sheet(path: Path, pictures: Tensor, captions: list[str]) -> None:
    """Save pictures, [n, height, width, 3], as a square sheet and print their captions."""
    columns = math.isqrt(len(pictures))
    rows = [torch.cat(list(row), 1) for row in pictures.split(columns) if len(row) == columns]
    Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()).save(path, quality=85)
    for number, words in enumerate(captions):
        print(f"row {number // columns + 1}, column {number % columns + 1}: {words}")


if __name__ == "__main__":
    main()
