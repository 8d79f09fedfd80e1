"""Features of the source that are injected during sampling, so that an edit keeps the source's structure.

COVE (arXiv 2406.08850), section 4.1, "first 40 timesteps". Features and sites are those of FLATTEN (arXiv 2310.05922),
after Plug-and-Play (arXiv 2211.12572): the outputs of ResNet branches, and the input of the query and key projections
of self-attention. Queries and keys are linear in it, so it replaces both at half the size; values stay the edit's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

RESNET, ATTENTION = "resnet", "attention"
# FLATTEN's decoder blocks, 3, 4, 6 and 4 to 9 of SD1 and SD2: how often the grid is halved there, and which block of
# those on that grid.
FLATTEN_BLOCKS = {RESNET: ((2, 0), (2, 1), (1, 0)), ATTENTION: ((2, 1), (2, 2), (1, 0), (1, 1), (1, 2), (0, 0))}
AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Site:
    """A layer of the decoder at which features are captured and injected.

    kind: RESNET, the output of the ResNet branch before it is added to the skip, [frames, channels, height, width];
        or ATTENTION, the normalised tokens that go into self-attention, [frames, height*width, channels].
    block: number of the decoder block. index: of the transformer in it; 0 for a ResNet.
    """

    kind: str
    block: int
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}.{self.block}.{self.index}"


def choose_blocks(kind: str, text: str, available: Sequence[int], levels: Sequence[int]) -> tuple[int, ...]:
    """Parse a list of decoder blocks such as "3, 4, 6" or "4-9"; "auto" means FLATTEN's, "none" no block.

    Args:
        kind: RESNET or ATTENTION.
        available: the blocks that have such a layer.
        levels: of each block of the decoder, how often its grid is halved. FLATTEN's blocks are those at the same
            places of the same grids, however many there are on each; those the model lacks are left out.

    Raises:
        ValueError: for a text of another form, or a block that is not available.
    """
    text = text.strip().lower()
    if text in (AUTO, NONE, ""):
        places = [(level, levels[:number].count(level)) for number, level in enumerate(levels)]
        wanted = FLATTEN_BLOCKS[kind] if text == AUTO else ()
        return tuple(number for number in available if places[number] in wanted)
    chosen: set[int] = set()
    for part in filter(None, re.split(r"[,\s]+", re.sub(r"\s*-\s*", "-", text))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f'{kind} blocks: expected numbers ("3, 4, 6", "4-9"), "auto" or "none", got "{text}"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'{kind} blocks: the range {part} ends before it begins, got "{text}"')
        chosen.update(range(first, min(last, max(first, len(levels))) + 1))
    missing = sorted(chosen.difference(available))
    if missing or not chosen:
        raise ValueError(
            f'this model has {kind} layers in the decoder blocks {", ".join(map(str, available))}; got "{text}"'
        )
    return tuple(sorted(chosen))


def inject_features(into: Tensor, features: Tensor, conds: int) -> Tensor:
    """Replace the features of every conditioning by the source's.

    Args:
        into: what the edit has there, [conds*frames, ...].
        features: the source's, [frames, ...].

    Returns:
        Of the shape, dtype and device of `into`.
    """
    if into.shape != (conds * features.shape[0], *features.shape[1:]):
        raise ValueError(
            f"features of {list(features.shape)} cannot stand in for {list(into.shape)} of {conds} conditionings"
        )
    return features.to(into).repeat(conds, *[1] * (features.ndim - 1))
