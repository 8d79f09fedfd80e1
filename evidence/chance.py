"""Random draws from a `torch.Generator`, and the seeds held out from training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Generator

T = TypeVar("T")
HELD_OUT = 10**9  # seeds from this number on are held out


def held_out(number: int) -> Generator:
    """Return a generator for scenes that no model was trained on."""
    return Generator().manual_seed(HELD_OUT + number)


def pick(choices: Iterable[T], generator: Generator) -> T:
    choices = list(choices)
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def between(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def random_sign(generator: Generator) -> int:
    return 1 if float(torch.rand((), generator=generator)) < 0.5 else -1


def random_step(generator: Generator, low: float, high: float) -> tuple[float, float]:
    """Draw a vector (x, y) with a length from `low` to `high` and any direction."""
    length, angle = between(low, high, generator), between(0, 2 * math.pi, generator)
    return length * math.cos(angle), length * math.sin(angle)
