"""Classifier of drawn pictures, for scoring samples of a diffusion model; each world has its own questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from cove.files import atomic_write

from .chance import HELD_OUT
from .scene import Scene

Questions = Mapping[str, tuple[str, ...]]  # the choices of each
FOLDER = Path(__file__).parents[1] / ".training"
SIDE, BATCH, STEPS = 128, 32, 4000
SEED = 11


@dataclass(frozen=True)
class Exam:
    """Questions on random scenes with one thing.

    scene: draws one.
    answers: returns the index of the correct choice for each question.
    file: of the trained classifier.
    """

    questions: Questions
    scene: Callable[[Generator], Scene]
    answers: Callable[[Scene], list[int]]
    file: Path

    def load(self) -> Classifier:
        """Return the trained classifier."""
        if not self.file.is_file():
            raise FileNotFoundError(
                f"{self.file} is missing: train it with python -m evidence.{self.file.parent.name}.classifier"
            )
        classifier = Classifier(self.questions)
        classifier.load_state_dict({name: value.float() for name, value in load_file(self.file).items()})
        return classifier.eval().requires_grad_(False)

    def examples(self, number: int, count: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Return pictures and answers from scene `number` on; with a generator, augmented with blur and noise."""
        scenes = [self.scene(Generator().manual_seed(number + i)) for i in range(count)]
        pictures = torch.stack([scene.draw(SIDE) for scene in scenes])
        if generator is not None:
            for index, chance in enumerate(torch.rand(count, generator=generator).tolist()):
                if chance < 0.5:
                    small = F.interpolate(pictures[index : index + 1], size=SIDE // 2 + int(chance * SIDE), mode="area")
                    pictures[index] = F.interpolate(small, size=SIDE, mode="bilinear")[0]
            pictures = pictures + 0.03 * torch.randn(pictures.shape, generator=generator)
        return pictures, torch.tensor([self.answers(scene) for scene in scenes])


class Classifier(nn.Module):
    """Map pictures, [n, 3, height, width] from 0 to 1, to one score per choice for each question."""

    def __init__(self, questions: Questions, width: int = 32):
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
        self.heads = nn.ModuleList(nn.Linear(2 * channels[-1], len(choices)) for choices in questions.values())

    def forward(self, pictures: Tensor) -> list[Tensor]:
        seen = self.body(pictures * 2 - 1).flatten(2)
        return [head(torch.cat([seen.mean(-1), seen.amax(-1)], 1)) for head in self.heads]


def train(exam: Exam, state: Path, steps: int = STEPS) -> None:
    """Train the classifier of an exam, write its file, and print its accuracy on held-out scenes.

    Args:
        state: file to resume from.
    """
    from .training.recipe import Run, falling  # needs diffusers, scoring does not

    state.parent.mkdir(parents=True, exist_ok=True)
    run = Run(
        partial(Classifier, exam.questions), state, steps, partial(falling, 2e-3, steps), SEED, torch.device("cpu")
    )

    def loss_of(generator: Generator) -> Tensor:
        number = int(torch.randint(HELD_OUT, (), generator=generator))
        pictures, right = exam.examples(number, BATCH, generator)
        scores = run.model(pictures)
        return sum(F.cross_entropy(score.float(), answer) for score, answer in zip(scores, right.T, strict=True))

    classifier = run.train(loss_of)
    with atomic_write(exam.file) as temporary:
        save_file({name: value.half().contiguous() for name, value in classifier.state_dict().items()}, temporary)
    pictures, right = exam.examples(HELD_OUT, 500, None)
    scores = exam.load()(pictures)
    for name, score, answer in zip(exam.questions, scores, right.T, strict=True):
        print(f"{name}: {100 * (score.argmax(1) == answer).float().mean():.1f} %")
