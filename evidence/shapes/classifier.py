"""Questions on pictures of shapes; `python -m evidence.shapes.classifier` trains the classifier that answers them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..classifier import FOLDER, Exam, train
from ..drawing import COLOURS, GROUNDS, SHAPES, TEXTURES
from ..scene import Scene
from .scenes import random_scene

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


EXAM = Exam(QUESTIONS, partial(random_scene, most=1), answers, Path(__file__).parent / "classifier.safetensors")
load_classifier = EXAM.load

if __name__ == "__main__":
    train(EXAM, FOLDER / "classifier.pt")
