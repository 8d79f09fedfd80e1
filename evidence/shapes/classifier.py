"""Classifier of pictures of shapes, trained on drawn pictures only, for scoring samples of a diffusion model.

It predicts shape, colour and texture of the thing, and colour and kind of the ground. `python -m
evidence.shapes.classifier` trains it, writes `classifier.safetensors` beside this file, and prints its accuracy on
held-out scenes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from cove.files import atomic_write

from ..chance import HELD_OUT
from ..drawing import COLOURS, GROUNDS, SHAPES, TEXTURES
from ..scene import Scene
from .scenes import random_scene

FILE = Path(__file__).parent / "classifier.safetensors"
FOLDER = Path(__file__).parents[2] / ".training"
SIDE, BATCH, STEPS = 128, 32, 4000
SEED = 11

QUESTIONS = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "ground colour": tuple(COLOURS),
    "ground": GROUNDS,
}


def answers(scene: Scene) -> list[int]:
    """Return the index of the correct choice for each of `QUESTIONS`."""
    thing, ground = scene.things[-1], scene.ground
    right = (thing.shape, thing.colour, thing.texture, ground.colour, ground.kind)
    return [choices.index(one) for choices, one in zip(QUESTIONS.values(), right, strict=True)]


class Classifier(nn.Module):
    """Map pictures, [n, 3, height, width] from 0 to 1, to one score per choice for each question."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = (3, width, 2 * width, 4 * width, 4 * width, 4 * width)
        self.body = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 5 if before == 3 else 3, stride=2, padding=2 if before == 3 else 1),
                    nn.GroupNorm(8, after),
                    nn.SiLU(),
                )
                for before, after in zip(channels[:-1], channels[1:], strict=True)
            )
        )
        self.heads = nn.ModuleList(nn.Linear(2 * channels[-1], len(choices)) for choices in QUESTIONS.values())

    def forward(self, pictures: Tensor) -> list[Tensor]:
        seen = self.body(pictures * 2 - 1).flatten(2)
        return [head(torch.cat([seen.mean(-1), seen.amax(-1)], 1)) for head in self.heads]


def load_classifier() -> Classifier:
    if not FILE.is_file():
        raise FileNotFoundError(f"{FILE} is missing: train it with python -m evidence.shapes.classifier")
    classifier = Classifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(FILE).items()})
    return classifier.eval().requires_grad_(False)


def _examples(number: int, count: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Return pictures and answers from scene `number` on; with a generator, augmented with blur and noise."""
    scenes = [random_scene(Generator().manual_seed(number + i), most=1) for i in range(count)]
    pictures = torch.stack([scene.draw(SIDE) for scene in scenes])
    if generator is not None:
        for index, chance in enumerate(torch.rand(count, generator=generator).tolist()):
            if chance < 0.5:
                small = F.interpolate(pictures[index : index + 1], size=SIDE // 2 + int(chance * SIDE), mode="area")
                pictures[index] = F.interpolate(small, size=SIDE, mode="bilinear")[0]
        pictures = pictures + 0.03 * torch.randn(pictures.shape, generator=generator)
    return pictures, torch.tensor([answers(scene) for scene in scenes])


def train(folder: Path) -> Classifier:
    from ..training.recipe import Run, falling  # needs diffusers, scoring does not

    rate = partial(falling, 2e-3, STEPS)
    run = Run(Classifier, folder / "classifier.pt", STEPS, rate, SEED, torch.device("cpu"))

    def loss_of(generator: Generator) -> Tensor:
        number = int(torch.randint(HELD_OUT, (), generator=generator))
        pictures, right = _examples(number, BATCH, generator)
        scores = run.model(pictures)
        return sum(F.cross_entropy(score.float(), answer) for score, answer in zip(scores, right.T, strict=True))

    return run.train(loss_of)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    classifier = train(FOLDER)
    with atomic_write(FILE) as temporary:
        save_file({name: value.half().contiguous() for name, value in classifier.state_dict().items()}, temporary)
    pictures, right = _examples(HELD_OUT, 500, None)
    scores = load_classifier()(pictures)
    for name, score, answer in zip(QUESTIONS, scores, right.T, strict=True):
        print(f"{name}: {100 * (score.argmax(1) == answer).float().mean():.1f} %")


if __name__ == "__main__":
    main()
