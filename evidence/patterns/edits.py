"""Edits that must invent: neither the source nor the prompt determines the pattern or hue that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from ..chance import pick
from ..clip import Clip
from ..drawing import COLOURS, GROUNDS
from .clips import random_clip
from .scenes import FREE, paint_for
from .world import Look

KINDS = ("patterned things", "paved ground", "patterned things on a paved ground", "tinted things")
GRAIN = 0.03  # standard deviation of the source's noise; without any, DDIM inversion of flat areas is degenerate


@dataclass(frozen=True)
class Edit:
    """target: one of the many possible results, for its motion and its amount of detail."""

    source: Clip
    target: Clip
    on_things: bool
    on_ground: bool

    def draw_source(self, height: int, width: int, generator: Generator) -> Tensor:
        """Return the source's frames with noise of its own in each, [frames, height, width, 3] from 0 to 1."""
        frames = self.source.draw(height, width)
        return (frames + GRAIN * torch.randn(frames.shape, generator=generator)).clamp(0, 1)


def random_edit(generator: Generator, kind: str, motion: str, frames: int, height: int, width: int) -> Edit:
    """Draw a clip with two equal things of a named colour on a plain, cloudy or tiled ground, and an edit of it.

    The model draws one motif on both, which takes self-attention; on a single thing it follows the noise.

    Args:
        kind: one of `KINDS`.
        motion, frames, height, width: of `random_clip`; the grid is in tokens.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    clip = random_clip(generator, frames, motion, height, width)
    while len(clip.scenes[0].things) != 2 or len({thing.kind for thing in clip.scenes[0].things}) > 1:
        clip = random_clip(generator, frames, motion, height, width)
    (thing, _), ground = clip.scenes[0].things, clip.scenes[0].ground
    named = [colour for colour in COLOURS if colour not in (thing.look.colour, ground.colour)]
    look = replace(thing.look, texture="plain")
    if look.colour == FREE:
        colour = pick(named, generator)
        look = replace(look, colour=colour, paint=paint_for(colour, generator))
    source = with_look(clip, look).with_ground(kind=pick(GROUNDS, generator))
    if kind == "tinted things":
        wanted = replace(look, colour=FREE, paint=paint_for(FREE, generator))
    else:
        wanted = replace(look, texture="patterned")
    on_things, on_ground = "things" in kind, "ground" in kind
    target = with_look(source, wanted) if on_things else source
    return Edit(source, target.with_ground(kind="paved") if on_ground else target, on_things, on_ground)


def with_look(clip: Clip, look: Look) -> Clip:
    return clip.with_things(lambda thing: replace(thing, look=look))
