"""Says what a picture of the world shows; never trained on anything a diffusion model made.

It judges edits: shape, colour and texture of the thing in front, colour and kind of the ground.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .world import COLOURS, GROUNDS, SHAPES, TEXTURES, Scene

QUESTIONS = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "ground colour": tuple(COLOURS),
    "ground": GROUNDS,
}


def answers(scene: Scene) -> list[int]:
    """What is right for a scene, in the order of `QUESTIONS`."""
    thing, ground = scene.things[-1], scene.ground
    right = (thing.shape, thing.colour, thing.texture, ground.colour, ground.kind)
    return [choices.index(one) for choices, one in zip(QUESTIONS.values(), right, strict=True)]


class Classifier(nn.Module):
    """Pictures [n, 3, height, width] from 0 to 1 -> one score a choice, for each question."""

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
