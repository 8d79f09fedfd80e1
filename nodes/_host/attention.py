"""The patch of self-attention: spatial-temporal, then guided by the correspondence."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ...cove.attention import correspondence_attention, spatial_temporal_attention
from ...cove.correspondence import Correspondence
from ...cove.fingerprint import fingerprint
from .attend import attend_with
from .frames import check_no_reference, check_rows
from .model import Block, grid_at, self_attention_levels, unet_of
from .run_info import KEY, area_of, frames_of, latent_size, publish_run, sigma_of

# Core nodes that change how many tokens self-attention sees, by the file they stand in.
TOKEN_CHANGERS = {"nodes_tomesd": "Patch ToMe", "nodes_hypertile": "HyperTile"}


# sigma_start and sigma_end of a patch that is on from 0 % to 100 %.
WHOLE_RUN = (999999999.9, 0.0)


@dataclass(frozen=True, eq=False)
class GuidedSelfAttention:
    """Takes the place of self-attention in the blocks of one level. Holds settings; nothing changes in a run."""

    correspondence: Correspondence | None  # None: spatial-temporal attention alone
    merge_ratio: float
    all_frames: bool
    sigma_start: float
    sigma_end: float
    include_self: bool
    level: int

    def __deepcopy__(self, memo: dict) -> GuidedSelfAttention:
        """Itself: MODEL.clone() copies its options deeply, and the correspondence is large."""
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Projected tokens [conds*frames, tokens, channels] -> what goes into `to_out`, of the same shape."""
        heads = options["n_heads"]
        attend = attend_with(query, options)
        grid = tuple(options["activations_shape"][2:])
        if query.shape[1] != math.prod(grid):
            raise _other_tokens(f"{query.shape[1]} tokens", grid)
        area = area_of(options, options["uuids"][0])  # what runs together has areas of one size
        expected = grid_at(latent_size(options) if area is None else area[:2], self.level)
        if grid != expected:
            raise _other_tokens(f"{grid[0]}x{grid[1]}", expected)
        if not self.sigma_end <= sigma_of(options) <= self.sigma_start:
            return attend(query, key, value, heads)

        conds = len(options["cond_or_uncond"])
        batch = frames_of(options)
        frames = len(batch)
        if query.shape[0] != conds * frames:
            raise ValueError(
                f"Correspondence Attention: expected {frames} frames for each of {conds} conditionings, got a batch of "
                f"{query.shape[0]}. Remove the node that cuts batches from this model."
            )
        if self.all_frames:
            tokens = spatial_temporal_attention(query, key, value, frames, heads, attend_with(query, options, frames))
        else:
            tokens = attend(query, key, value, heads)
        if self.correspondence is None:
            return tokens
        if grid_at(latent_size(options), self.level) != (self.correspondence.height, self.correspondence.width):
            return tokens
        # A window's anchor may be among its own frames, too: it is guided once, and its tokens are the same.
        clip_frames = list(dict.fromkeys(batch))
        clips = tokens.unflatten(0, (conds, frames))[:, [batch.index(frame) for frame in clip_frames]]
        guided = [
            correspondence_attention(
                clip[None],
                self._of_area(area_of(options, uuid), grid),
                heads,
                self.merge_ratio,
                clip_frames,
                self.include_self,
            )
            for clip, uuid in zip(clips, options["uuids"], strict=True)
        ]
        return torch.cat(guided)[:, [clip_frames.index(frame) for frame in batch]].flatten(0, 1)

    def _of_area(self, area: tuple[int, ...] | None, grid: tuple[int, int]) -> Correspondence:
        """The correspondence on the part of the picture that a conditioning with an area is run on."""
        if area is None:
            return self.correspondence
        return self.correspondence.crop(area[2] >> self.level, area[3] >> self.level, *grid)


def _other_tokens(came: str, grid: tuple[int, int]) -> ValueError:
    return ValueError(
        f"Correspondence Attention: expected a grid of {grid[0]}x{grid[1]} tokens, got {came}. Another node changes "
        f"them (ToMe, HyperTile, Deep Shrink or the like); take it off this model."
    )


def guide_self_attention(
    model,
    correspondence: Correspondence | None,
    merge_ratio: float,
    all_frames: bool,
    start_percent: float,
    end_percent: float,
    include_self: bool = False,
    *,
    node: str,
):
    """A clone of MODEL whose self-attention is spatial-temporal and, on the correspondence's grid, guided by it."""
    levels = self_attention_levels(unet_of(model, node))
    model = model.clone()
    check_slots(model.model_options, node)
    sampling = model.get_model_object("model_sampling")
    start, end = (sampling.percent_to_sigma(percent) for percent in (start_percent, end_percent))
    # percent_to_sigma(1.0) is 0; the smallest sigma sampled is above it.
    patches = {
        block: GuidedSelfAttention(correspondence, merge_ratio, all_frames, start, end, include_self, level)
        for block, level in levels.items()
    }
    for block, patch in patches.items():
        # Without a transformer index: a perturbing guider (PAG) can then put its own in for its own pass.
        model.set_model_attn1_replace(patch, *block)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, partial(_check_run, node, patches))
    publish_run(model)
    return model


def guidance_of(model_options: dict[str, Any]) -> dict[str, str] | None:
    """A description of the Correspondence Attention on a MODEL, and a fingerprint of it; None without the node."""
    replaced = model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
    patches = [patch for patch in replaced.values() if isinstance(patch, GuidedSelfAttention)]
    if not patches:
        return None
    first = patches[0]
    matches = first.correspondence
    parts = [f"window {matches.window}, K {matches.k}, merge {first.merge_ratio:g}"] if matches is not None else []
    parts += ["no correspondence"] * (matches is None) + ["own frame"] * (not first.all_frames)
    parts += ["include_self"] * first.include_self
    model_sigmas = first.sigma_start, first.sigma_end
    if model_sigmas != WHOLE_RUN:
        parts.append(f"sigma {first.sigma_start:.3g} to {first.sigma_end:.3g}")
    settings = (first.merge_ratio, first.all_frames, *model_sigmas, first.include_self)
    return {"name": f"Correspondence Attention ({', '.join(parts)})", "fingerprint": fingerprint(matches, settings)}


def guidance_differs(
    inverted: dict[str, str] | None, model_options: dict[str, Any], run: str = "sampled"
) -> str | None:
    """Describe how self-attention differs from that of the inversion; None if it does not. `run`: what is done now."""
    sampled = guidance_of(model_options)
    if inverted == sampled:
        return None
    then, now = (found["name"] if found else "without Correspondence Attention" for found in (inverted, sampled))
    if then == now:
        now = "another correspondence of the same settings"
    then, now = (text if text.startswith("without") else f"with {text}" for text in (then, now))
    return f"inverted {then}, {run} {now}: the clip comes back exactly only with the model that inverted it"


def check_slots(model_options: dict[str, Any], node: str, patches: dict[Block, Any] | None = None):
    """An error when self-attention is replaced by somebody else, or sees another number of tokens."""
    options = model_options.get("transformer_options", {})
    for slot, patch in options.get("patches_replace", {}).get("attn1", {}).items():
        if patches is None or patches.get(slot[:2]) is not patch:
            raise ValueError(
                f"{node}: self-attention of block {slot[0]} {slot[1]} is already replaced by "
                f"{getattr(patch, '__module__', type(patch).__module__)}. One node can replace it: take the other off "
                f"this model (a second Correspondence Attention or TokenFlow counts, too)."
            )
    for patch in options.get("patches", {}).get("attn1_patch", []):
        # The host names the modules of its extra nodes by their path, without the ending.
        name = TOKEN_CHANGERS.get(re.split(r"[./\\]", getattr(patch, "__module__", ""))[-1])
        if name:
            raise ValueError(f"{node}: {name} changes the number of tokens; take it off this model.")


def _check_run(node: str, patches: dict[Block, GuidedSelfAttention], executor, noise: Tensor, *args, **kwargs):
    """Before a run: does what comes fit the correspondence, and is the patch still in its place?"""
    guider = executor.class_obj
    check_slots(guider.model_options, node, patches)
    correspondence = next(iter(patches.values())).correspondence
    if correspondence is not None:
        _check_fit(correspondence, noise, {patch.level for patch in patches.values()}, node)
    conds = [cond for some in guider.conds.values() for cond in some]
    check_no_reference(conds, node)
    check_rows(conds, len(noise), node)
    return executor(noise, *args, **kwargs)


def _check_fit(correspondence: Correspondence, noise: Tensor, levels: set[int], node: str) -> None:
    """An error when latents are not of the frames or of the size that the correspondence was found in."""
    if len(noise) != correspondence.frames:
        raise ValueError(
            f"{node}: {len(noise)} frames of latents came, but the correspondence is of {correspondence.frames}. "
            f"Make both from the same frames."
        )
    size, grid = tuple(noise.shape[-2:]), (correspondence.height, correspondence.width)
    grids = sorted({grid_at(size, level) for level in levels}, reverse=True)
    if grid not in grids:
        raise ValueError(
            f"{node}: the correspondence is of a {grid[0]}x{grid[1]} grid (height x width), but at latents of "
            f"{size[0]}x{size[1]} this model has self-attention on "
            f"{', '.join(f'{height}x{width}' for height, width in grids)}. Make the features from latents of the same "
            f"size and with the same checkpoint."
        )
