"""The classifiers of drawn pictures: their questions have one right answer, and a short training can be loaded."""

from dataclasses import replace

import pytest
import torch

from evidence import classifier
from evidence.patterns.classifier import EXAM, named_scene
from evidence.patterns.scenes import FREE, caption
from evidence.shapes.classifier import EXAM as SHAPES
from tests.method_helpers import generator


def test_named_scene_is_described_by_the_answers():
    for seed in range(40):
        scene = named_scene(generator(seed))
        shape, colour, texture, ground_colour, ground = (
            choices[answer] for choices, answer in zip(EXAM.questions.values(), EXAM.answers(scene), strict=True)
        )
        words = caption(scene).split()
        assert FREE not in words and {shape, colour, ground_colour} <= set(words)
        assert all(kind == "plain" or kind in words for kind in (texture, ground))


@pytest.mark.parametrize("exam", [EXAM, SHAPES])
def test_examples_are_of_their_numbers(exam):
    pictures, right = exam.examples(5, 3, None)
    assert pictures.shape == (3, 3, classifier.SIDE, classifier.SIDE) and right.shape == (3, len(exam.questions))
    again, answers = exam.examples(6, 1, None)
    assert torch.equal(again[0], pictures[1]) and torch.equal(answers[0], right[1])
    assert not torch.equal(exam.examples(6, 1, generator())[0][0], again[0])


def test_train_writes_a_classifier_that_loads(tmp_path, capsys):
    exam = replace(EXAM, file=tmp_path / "patterns" / "classifier.safetensors")
    with pytest.raises(FileNotFoundError, match=r"python -m evidence\.patterns\.classifier"):
        exam.load()
    exam.file.parent.mkdir()
    classifier.train(exam, tmp_path / "state" / "classifier.pt", steps=2)
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[-5:]] == list(EXAM.questions)
    scores = exam.load()(torch.rand(2, 3, 64, 96, generator=generator()))
    assert [score.shape for score in scores] == [(2, len(choices)) for choices in EXAM.questions.values()]
