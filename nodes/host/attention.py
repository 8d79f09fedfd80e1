"""Self-attention that is spatial-temporal and guided by the correspondence, and ComfyUI's attention functions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...cove.attention import GPU_BUDGET, attend_to_sets, attention_sets, key_frame_attention
from ...cove.correspondence import Correspondence
from ...cove.fingerprint import fingerprint
from ...cove.kernels import AUTO, KERNELS
from . import options
from .checks import check_no_reference, check_rows, check_slots, other_batch, other_tokens
from .errors import naming
from .memory import Shape, reserve_bytes
from .options import Area, RunInfo, run_info
from .run import publish_run
from .unet import Block, grid_at, self_attention_levels, unet_of

# sigma_start and sigma_end of a patch that is on from 0 % to 100 %.
WHOLE_RUN = (999999999.9, 0.0)
# The frames that all tokens see, as the node names them, and the stride of each choice.
ALL_FRAMES, OWN_FRAME = "all frames", "own frame"
STRIDES: dict[str, int | None] = {ALL_FRAMES: 1, "every 2nd frame": 2, "every 4th frame": 4, OWN_FRAME: None}
KERNEL = "COVE_KERNEL"  # environment variable that forces or forbids the Triton kernel


def attend_with(query: Tensor, transformer_options: Mapping[str, Any], jointly: int = 1) -> Callable[..., Tensor]:
    """Return ComfyUI's attention function, (query, key, value, heads) -> output.

    On a CPU ComfyUI falls back to sub-quadratic attention, which holds the scores of some queries at a time. `jointly`
    frames together are thousands of tokens: torch's own attention holds no scores and takes half the time. A function
    chosen on the command line is used as it is.
    """
    chosen = attention.optimized_attention
    fallback = chosen is attention.attention_sub_quad and not args.use_quad_cross_attention
    if jointly > 1 and fallback and query.device.type == "cpu":
        chosen = attention.attention_pytorch
    precision = transformer_options.get("attn_precision")
    return partial(chosen, attn_precision=precision, transformer_options=transformer_options)


@dataclass(frozen=True, eq=False)
class GuidedSelfAttention:
    """Immutable attn1 replacement for the blocks of one level.

    stride: every n-th frame is seen by all tokens, 1 for all frames; None for the token's own frame only.
    node: the class of the node, for errors.
    kernel: of `cove.attention.attend_to_sets`.
    """

    correspondence: Correspondence | None  # None: spatial-temporal attention alone
    merge_ratio: float
    stride: int | None
    sigma_start: float
    sigma_end: float
    include_self: bool
    level: int
    node: type
    kernel: str

    def __deepcopy__(self, memo: dict) -> GuidedSelfAttention:
        """Itself: MODEL.clone() copies its options deeply, and the correspondence is large."""
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """Return the input of `to_out` for projected tokens, both [conds*frames, tokens, channels]."""
        info, heads = run_info(transformer_options), transformer_options["n_heads"]
        uuids, conds = transformer_options["uuids"], len(transformer_options["cond_or_uncond"])
        attend = attend_with(query, transformer_options)
        grid = tuple(transformer_options["activations_shape"][2:])
        if query.shape[1] != math.prod(grid):
            raise other_tokens(f"{query.shape[1]} tokens", grid, self.node)
        area = info.area_of(uuids[0])  # conditionings that run together have areas of one size
        expected = grid_at(info.latent_size if area is None else area[:2], self.level)
        if grid != expected:
            raise other_tokens(f"{grid[0]}x{grid[1]}", expected, self.node)
        if not self.sigma_end <= info.sigma <= self.sigma_start:
            return attend(query, key, value, heads)

        frames = len(info.frames)
        if query.shape[0] != conds * frames:
            raise other_batch(frames, conds, query.shape[0], self.node)
        if self.stride is not None:
            jointly = attend_with(query, transformer_options, frames)
            # Frames of the clip, so that all windows see the same ones.
            key_frames = [place for place, frame in enumerate(info.frames) if frame % self.stride == 0]
            tokens = key_frame_attention(query, key, value, frames, heads, key_frames, jointly)
        else:
            tokens = attend(query, key, value, heads)
        matches = self.correspondence
        if matches is None or grid_at(info.latent_size, self.level) != (matches.height, matches.width):
            return tokens
        # A window's anchor may also be among its own frames: it is guided once, and its tokens are the same.
        clip_frames = tuple(dict.fromkeys(info.frames))
        clips = _frames_of(tokens.unflatten(0, (conds, frames)), info.frames, clip_frames)
        areas = [info.area_of(uuid) for uuid in uuids]
        if len(set(areas)) == 1:
            guided = self._guided(clips, clip_frames, areas[0], grid, heads, info)
        else:
            parts = (
                self._guided(clip[None], clip_frames, area, grid, heads, info)
                for clip, area in zip(clips, areas, strict=True)
            )
            guided = torch.cat(list(parts))
        return _frames_of(guided, clip_frames, info.frames).flatten(0, 1)

    def _guided(
        self,
        clips: Tensor,
        frames: tuple[int, ...],
        area: Area | None,
        grid: tuple[int, int],
        heads: int,
        info: RunInfo,
    ) -> Tensor:
        """Let tokens [conds, frames, tokens, channels] attend to their matches in one area of the picture."""

        def sets() -> Tensor:
            part = self.correspondence
            if area is not None:
                part = part.crop(area[2] >> self.level, area[3] >> self.level, *grid)
            return attention_sets(part, frames, self.include_self).to(clips.device)

        key = (id(self.correspondence), self.include_self, frames, area, clips.device)
        return attend_to_sets(clips, info.once(key, sets), heads, self.merge_ratio, kernel=self.kernel)


def _frames_of(clips: Tensor, frames: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Select frames of [conds, frames, ...] by their numbers, without an index that a GPU would wait for."""
    if tuple(frames) == tuple(wanted):
        return clips
    return torch.stack([clips[:, frames.index(frame)] for frame in wanted], 1)


def guide_self_attention(
    model,
    correspondence: Correspondence | None,
    merge_ratio: float,
    stride: int | None,
    start_percent: float,
    end_percent: float,
    include_self: bool,
    node,
):
    """Return a clone of MODEL whose self-attention is spatial-temporal and, on the correspondence's grid, guided."""
    levels = self_attention_levels(unet_of(model))
    model = model.clone()
    check_slots(model.model_options)
    sampling = model.get_model_object("model_sampling")
    start, end = (sampling.percent_to_sigma(percent) for percent in (start_percent, end_percent))
    kernel = _chosen_kernel()
    # percent_to_sigma(1.0) is 0; the smallest sigma sampled is above it.
    patches = {
        block: GuidedSelfAttention(correspondence, merge_ratio, stride, start, end, include_self, level, node, kernel)
        for block, level in levels.items()
    }
    for block, patch in patches.items():
        # Without a transformer index: a perturbing guider (PAG) can then put its own in for its own pass.
        model.set_model_attn1_replace(patch, *block)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, options.RUN, partial(_check_run, node, patches))
    if correspondence is not None:
        reserve_bytes(model, options.RUN, partial(_bytes_of_guidance, correspondence, include_self))
    publish_run(model)
    return model


def _bytes_of_guidance(correspondence: Correspondence, include_self: bool, noise_shape: Shape) -> int:
    """Return the bytes of the attention sets of a run, and the working memory without the kernel."""
    frames, tokens = noise_shape[0], correspondence.height * correspondence.width
    members = (frames - 1) * correspondence.k + include_self
    return 4 * frames * tokens * members + GPU_BUDGET


def _chosen_kernel() -> str:
    """Return the value of the environment variable `KERNEL`."""
    kernel = os.environ.get(KERNEL, AUTO)
    if kernel not in KERNELS:
        raise ValueError(f"the environment variable {KERNEL} must be {', '.join(KERNELS)} or unset, got {kernel!r}")
    return kernel


def guidance_of(model_options: dict[str, Any]) -> dict[str, str] | None:
    """Return name and fingerprint of the Correspondence Attention on a MODEL; None without the node."""
    replaced = model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
    patches = [patch for patch in replaced.values() if isinstance(patch, GuidedSelfAttention)]
    if not patches:
        return None
    first = patches[0]
    matches = first.correspondence
    parts = [f"window {matches.window}, K {matches.k}, merge {first.merge_ratio:g}"] if matches is not None else []
    parts += ["no correspondence"] * (matches is None) + [
        name for name, stride in STRIDES.items() if stride == first.stride != 1
    ]
    parts += ["include_self"] * first.include_self
    model_sigmas = first.sigma_start, first.sigma_end
    if model_sigmas != WHOLE_RUN:
        parts.append(f"sigma {first.sigma_start:.3g} to {first.sigma_end:.3g}")
    settings = (first.merge_ratio, first.stride, *model_sigmas, first.include_self)
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


def _check_run(node, patches: Mapping[Block, GuidedSelfAttention], executor, noise: Tensor, *args, **kwargs):
    """Check before a run that the clip fits the correspondence and that the patch is still in its place."""
    guider = executor.class_obj
    with naming(node):
        check_slots(guider.model_options, patches)
        correspondence = next(iter(patches.values())).correspondence
        if correspondence is not None:
            _check_fit(correspondence, noise, {patch.level for patch in patches.values()})
        conds = [cond for some in guider.conds.values() for cond in some]
        check_no_reference(conds)
        check_rows(conds, len(noise))
    return executor(noise, *args, **kwargs)


def _check_fit(correspondence: Correspondence, noise: Tensor, levels: set[int]) -> None:
    """Raise when latents are not of the frames or of the size that the correspondence was found in."""
    if len(noise) != correspondence.frames:
        raise ValueError(
            f"expected latents of {correspondence.frames} frames, as in the correspondence, got {len(noise)}. Make "
            f"both from the same frames."
        )
    size, grid = tuple(noise.shape[-2:]), (correspondence.height, correspondence.width)
    grids = sorted({grid_at(size, level) for level in levels}, reverse=True)
    if grid not in grids:
        raise ValueError(
            f"the correspondence has a grid of {grid[0]}x{grid[1]} tokens (height x width), but at latents of "
            f"{size[0]}x{size[1]} this model has self-attention on "
            f"{', '.join(f'{height}x{width}' for height, width in grids)}. Make the features from latents of the same "
            f"size and with the same checkpoint."
        )
