"""What the demo model draws: captions it was never trained on, a sheet to look at, how often each word is obeyed.

    python benchmarks/samples.py [--count 64] [--output demo/samples.jpg]

Judged by a classifier that was trained on drawn pictures only (`training/classifier.py`). A second row of figures is
what it says of the drawn pictures themselves, through the model's autoencoder: no model can do better by it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Generator, Tensor  # noqa: E402

from benchmarks.model import load_demo  # noqa: E402
from benchmarks.records import FOLDER, Records  # noqa: E402
from scripts.host import provide_host  # noqa: E402
from training.classifier import QUESTIONS, answers, load_classifier  # noqa: E402
from training.world import caption, draw, random_scene  # noqa: E402

STEPS, CFG, SIDE, SEED = 50, 3.0, 128, 77


def sample(model, clip, side: int, words: str, seed: int) -> Tensor:
    """Latents of one picture, by ComfyUI's own sampler."""
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
    """Share of pictures, [n, 3, height, width], that show what they should, for each question; and all of it."""
    hits = torch.stack([score.argmax(1) for score in load_classifier()(pictures)], 1) == right
    return dict(zip(QUESTIONS, hits.float().mean(0).tolist(), strict=True)) | {"all": hits.all(1).float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--file", default="shapes.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "samples.jpg")
    arguments = parser.parse_args()

    records = Records(FOLDER / "samples.jsonl")
    scenes = [random_scene(Generator().manual_seed(SEED * 2**32 + i), most=1) for i in range(arguments.count)]
    right = torch.tensor([answers(scene) for scene in scenes])
    drawn = torch.stack([draw(scene, SIDE) for scene in scenes])
    model, clip, vae, _ = load_demo(provide_host(), arguments.file)
    with torch.inference_mode():
        side = SIDE // vae.downscale_ratio
        made = torch.cat([vae.decode(sample(model, clip, side, caption(s), i)) for i, s in enumerate(scenes)])
        again = vae.decode(vae.encode(drawn.movedim(1, -1)))
        for name, pictures in (("sampled", made), ("drawn", again)):
            found = agreement(pictures.movedim(-1, 1).float(), right)
            records.add({"pictures": name, "count": arguments.count}, found)
            print(f"{name:8}" + ", ".join(f"{question} {100 * share:.0f} %" for question, share in found.items()))
    columns = math.isqrt(arguments.count)
    rows = [torch.cat(list(row), 1) for row in made.split(columns) if len(row) == columns]
    Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()).save(arguments.output, quality=85)
    for number, scene in enumerate(scenes):
        print(f"row {number // columns + 1}, column {number % columns + 1}: {caption(scene)}")


if __name__ == "__main__":
    main()
