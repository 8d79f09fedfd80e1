"""Train the demo model: `python -m evidence.shapes.train`; the same command resumes a stopped run.

The autoencoder comes first, then UNet and text encoder on its latents, then the file for Load Demo Model. SIGTERM and
Ctrl-C save the state after the current step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..chance import HELD_OUT
from ..scene import Scene
from ..training.export import export
from ..training.networks import Size, Stage
from ..training.recipe import StopOnSignal, World, train_autoencoder, train_diffusion
from ..training.words import make_tokenizer
from .scenes import WORDS, caption, random_scene

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".training" / "shapes"

# Two hours on two CPU cores.
SIZE = Size(
    autoencoder=64,
    unet=(64, 128, 128),
    heads=2,
    context=128,
    autoencoder_batch=24,
    autoencoder_steps=900,
    stages=(
        Stage(64, batch=64, fresh=16, steps=2400, rate=8e-4, fall=0.6, focus=(300, 900)),
        Stage(128, batch=24, fresh=6, steps=2000, rate=5e-4, fall=1.0, focus=(450, 1000)),
    ),
)


def scene(number: int) -> Scene:
    return random_scene(Generator().manual_seed(number))


def example(number: int, size: int) -> tuple[Tensor, str]:
    return scene(number).draw(size), caption(scene(number))


WORLD = World(example, WORDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="state of the training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "shapes.safetensors", help="the finished file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    device, stop = torch.device("cuda" if torch.cuda.is_available() else "cpu"), StopOnSignal()

    autoencoder = train_autoencoder(SIZE, WORLD, options.folder, device, stop)
    diffusion, scale = train_diffusion(SIZE, WORLD, autoencoder, options.folder, device, stop)
    pictures = WORLD.pictures(range(HELD_OUT, HELD_OUT + 64), SIZE.picture).to(device)
    export(options.output, SIZE, make_tokenizer(WORDS), autoencoder, diffusion, scale, pictures)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
