"""Questions on pictures of patterns; `python -m evidence.patterns.classifier` trains the classifier that answers them.

No scene has a colour of any hue: no picture shows that its caption leaves the hue open.
"""

from __future__ import annotations

from pathlib import Path

from torch import Generator

from ..classifier import FOLDER, Exam, train
from ..drawing import COLOURS, SHAPES
from ..scene import Scene
from .scenes import FREE, GROUND_KINDS, TEXTURE_WORDS, random_scene

TOKENS = 32  # of a side, on which the sizes of patterns depend
QUESTIONS = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "texture": TEXTURE_WORDS,
    "ground colour": tuple(COLOURS),
    "ground": GROUND_KINDS,
}


def named_scene(generator: Generator) -> Scene:
    """Draw a scene with one thing, in named colours."""
    while True:
        scene = random_scene(generator, TOKENS, TOKENS, most=1)
        if FREE not in (scene.things[0].look.colour, scene.ground.colour):
            return scene


def answers(scene: Scene) -> list[int]:
    """Return the index of the correct choice for each of `QUESTIONS`."""
    thing, ground = scene.things[-1], scene.ground
    right = (thing.shape, thing.look.colour, thing.look.texture, ground.colour, ground.kind)
    return [choices.index(one) for choices, one in zip(QUESTIONS.values(), right, strict=True)]


EXAM = Exam(QUESTIONS, named_scene, answers, Path(__file__).parent / "classifier.safetensors")

if __name__ == "__main__":
    train(EXAM, FOLDER / "patterns-classifier.pt")
