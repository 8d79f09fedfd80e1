"""TokenFlow in ComfyUI: the source's fields, the keyframes, then all frames, in one evaluation of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ...cove.attention import spatial_temporal_attention
from ...cove.correspondence import crop_matches
from ...cove.inversion import Inversion
from ...cove.tokenflow import Between, between_keyframes, choose_keyframes, nearest_tokens, propagate
from .attend import attend_with
from .attention import check_slots
from .frames import Cut, check_no_reference, check_rows, cut_conds, frames_in
from .model import Block, blocks_of, grid_at, self_attention_levels, transformers_of, unet_of
from .run_info import area_of, latent_size, options_with, publish_run
from .sampling import check_not_compiled
from .source import ATTENTION, RUNNING, SourceBranch, check_one_prompt
from .visits import Evaluations, Visits, check_no_step_cache

KEY, EVALUATIONS = "cove_tokenflow", "cove_tokenflow_evaluations"

WRAPPERS = comfy.patcher_extension.WrappersMP


@dataclass(frozen=True, eq=False)
class _Flow:
    """What TokenFlow was set to. Nothing in it changes in a run."""

    source: SourceBranch
    every: int
    blend_keyframes: bool
    seed: int
    levels: Mapping[Block, int]
    places: frozenset[tuple]  # of self-attention

    def frames_in(self, options: dict[str, Any]) -> tuple[int, ...]:
        """The frames of the clip that the UNet runs on."""
        return frames_in(options) or tuple(range(self.source.inversion.frames))


@dataclass(eq=False)
class _Step:
    """One evaluation of the model: its keyframes, and what each block finds and leaves for the next pass.

    number: of the inversion's steps.
    fields: by frames and block, of the whole picture: see `nearest_tokens`.
    edited: output of the keyframes, by the keyframes, block and conditioning.
    drawn: keyframes, by the number of frames.
    visits: of the pass that is under way.
    """

    flow: _Flow
    number: int
    fields: dict[tuple, Tensor] = field(default_factory=dict)
    edited: dict[tuple, Tensor] = field(default_factory=dict)
    drawn: dict[int, list[int]] = field(default_factory=dict)
    visits: Visits = field(default_factory=Visits)
    prompt: Any = None  # the uuid of the source's

    @contextmanager
    def visiting(self, conds, timestep: Tensor, options: dict[str, Any]) -> Iterator[None]:
        """Around a pass of the UNet: an error when it did not come to every place of self-attention.

        A perturbing guider (PAG) takes some places for its own pass.
        """
        self.visits = Visits()
        yield
        replaced = options["patches_replace"]["attn1"]
        places = [
            place
            for place in self.flow.places
            if isinstance(replaced.get(place, replaced.get(place[:2])), FlowingSelfAttention)
        ]
        self.visits.check(places, conds, timestep, self.flow.source.node)

    def keyframes(self, frames: int) -> list[int]:
        """Of so many frames: the seed's first draw at the noisiest step, its second at the next, and so on."""
        if frames not in self.drawn:
            generator = torch.Generator().manual_seed(self.flow.seed)
            for _ in range(self.number, self.flow.source.inversion.schedule.steps):
                self.drawn[frames] = choose_keyframes(frames, self.flow.every, generator)
        return self.drawn[frames]

    def between(self, frames: int) -> list[Between]:
        return between_keyframes(frames, self.keyframes(frames), self.flow.blend_keyframes)


# --- in place of self-attention ---


@dataclass(frozen=True, eq=False)
class FlowingSelfAttention:
    """Takes the place of self-attention, and does what each call of the UNet says; nothing else where it says nothing.

    Projected tokens [conds*frames, tokens, channels] -> what goes into `to_out`, of the same shape.
    """

    def __deepcopy__(self, memo: dict) -> FlowingSelfAttention:
        """Itself: it is known by its identity, and MODEL.clone() copies its options deeply."""
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        instead = options.get(ATTENTION)
        if instead is None:
            return attend_with(query, options)(query, key, value, options["n_heads"])
        return instead((query, key, value), options)


Tokens = tuple[Tensor, Tensor, Tensor]  # query, key, value


def _find_fields(step: _Step, tokens: Tokens, options: dict[str, Any]) -> Tensor:
    """The source: plain self-attention, whose output says which tokens belong together."""
    step.visits.add(_place(options), options)
    flow, frames = step.flow, step.flow.frames_in(options)
    step.prompt = check_one_prompt(options, flow.source.node, step.prompt)
    result = attend_with(tokens[0], options)(*tokens, options["n_heads"])
    (clip,) = _by_frames(result, len(frames), options, flow.source.node)
    step.fields[frames, _place(options)] = nearest_tokens(clip, step.keyframes(len(frames)), step.between(len(frames)))
    return result


def _edit_keyframes(step: _Step, tokens: Tokens, options: dict[str, Any]) -> Tensor:
    """The edit before keyframes are blended: their joint attention is kept. The other frames are of no use here."""
    step.visits.add(_place(options), options)
    flow, frames = step.flow, step.flow.frames_in(options)
    keyframes = [*range(len(frames))] if RUNS_ON_KEYFRAMES in options else step.keyframes(len(frames))
    edited = _attend_jointly(tokens, len(frames), keyframes, options, flow.source.node)
    named = tuple(frames[keyframe] for keyframe in keyframes)
    step.edited.update(zip(_names(named, options), edited, strict=True))
    result = torch.zeros_like(tokens[0])
    result.unflatten(0, (-1, len(frames)))[:, keyframes] = edited
    return result


def _propagate(step: _Step, tokens: Tokens, options: dict[str, Any]) -> Tensor:
    """The edit: every frame takes the tokens of the keyframes around it."""
    step.visits.add(_place(options), options)
    flow, frames = step.flow, step.flow.frames_in(options)
    keyframes, between = step.keyframes(len(frames)), step.between(len(frames))
    if flow.blend_keyframes:
        _by_frames(tokens[0], len(frames), options, flow.source.node)
        named = tuple(frames[keyframe] for keyframe in keyframes)
        edited = [step.edited.pop(name) for name in _names(named, options)]
    else:
        edited = _attend_jointly(tokens, len(frames), keyframes, options, flow.source.node)
    fields = step.fields[frames, _place(options)]
    found = [
        propagate(one, _of_area(flow, fields, area_of(options, uuid), options), between)
        for one, uuid in zip(edited, options["uuids"], strict=True)
    ]
    return torch.cat(found)


def _attend_jointly(tokens: Tokens, frames: int, keyframes: list[int], options, node: str) -> Tensor:
    """Eq. 3: [conds, keyframes, tokens, channels]."""
    some = (_by_frames(x, frames, options, node)[:, keyframes].flatten(0, 1) for x in tokens)
    attend = attend_with(tokens[0], options, len(keyframes))
    joint = spatial_temporal_attention(*some, len(keyframes), options["n_heads"], attend)
    return joint.unflatten(0, (-1, len(keyframes)))


def _by_frames(tokens: Tensor, frames: int, options: dict[str, Any], node: str) -> Tensor:
    """[conds*frames, ...] -> [conds, frames, ...], or an error when another node cut frames or tokens away."""
    conds, grid = len(options["cond_or_uncond"]), options["activations_shape"][2:]
    if len(tokens) != conds * frames:
        raise ValueError(
            f"{node}: expected {frames} frames for each of {conds} conditionings, got a batch of {len(tokens)}. Remove "
            f"the node that cuts batches from this model."
        )
    if tokens.shape[1] != math.prod(grid):
        raise _other_tokens(f"{tokens.shape[1]} tokens", grid, node)
    return tokens.unflatten(0, (conds, frames))


def _of_area(flow: _Flow, fields: Tensor, area: tuple[int, ...] | None, options: dict[str, Any]) -> Tensor:
    """The fields on the part of the picture that a conditioning with an area is run on."""
    level, part = flow.levels[options["block"]], options["activations_shape"][2:]
    if area is not None:
        whole, corner = grid_at(latent_size(options), level), (area[2] >> level, area[3] >> level)
        if fields.shape[-1] != math.prod(whole):
            raise _other_tokens(f"{fields.shape[-1]} in the source", whole, flow.source.node)
        return crop_matches(fields.transpose(1, 2), whole, *corner, *part).transpose(1, 2)
    if fields.shape[-1] != math.prod(part):
        raise _other_tokens(f"{fields.shape[-1]} in the source", part, flow.source.node)
    return fields


def _other_tokens(came: str, grid: list[int], node: str) -> ValueError:
    return ValueError(
        f"{node}: expected a grid of {grid[0]}x{grid[1]} tokens, got {came}. Another node changes them (ToMe, "
        f"HyperTile, Deep Shrink beside an area of the prompt, or the like); take it off this model."
    )


def _place(options: dict[str, Any]) -> tuple:
    return (*options["block"], options["block_index"])


def _names(keyframes: tuple[int, ...], options: dict[str, Any]) -> list[tuple]:
    """Of what is kept for each conditioning. The host gives both halves one uuid where one takes the other's area."""
    halves = zip(options["cond_or_uncond"], options["uuids"], strict=True)
    return [(keyframes, _place(options), *half) for half in halves]


# --- around the run ---

# In transformer_options: the UNet runs on the keyframes alone.
RUNS_ON_KEYFRAMES = "cove_runs_on_keyframes"


def flow_tokens(
    model,
    inversion: Inversion,
    every: int,
    blend_keyframes: bool,
    seed: int,
    conditioning,
    node: str,
    report: Callable[..., None],
):
    """A clone of MODEL in which frames take their self-attention from keyframes, by the fields of the source."""
    unet = unet_of(model, node)
    levels, blocks = self_attention_levels(unet), blocks_of(unet)
    places = {(*place, i) for place in levels for i, _ in enumerate(transformers_of(blocks[place]))}
    model = model.clone()
    check_slots(model.model_options, node)
    source = SourceBranch(inversion, conditioning, KEY, node, report)
    flow = _Flow(source, every, blend_keyframes, seed, levels, frozenset(places))
    patches = dict.fromkeys(levels, FlowingSelfAttention())
    for block, patch in patches.items():
        # Without a transformer index, for the reason that Correspondence Attention gives.
        model.set_model_attn1_replace(patch, *block)
    source.load_with(model)
    publish_run(model)
    model.add_wrapper_with_key(WRAPPERS.OUTER_SAMPLE, KEY, partial(_check_run, flow, patches))
    model.add_wrapper_with_key(WRAPPERS.SAMPLER_SAMPLE, KEY, partial(_with_source, flow))
    model.add_wrapper_with_key(WRAPPERS.CALC_COND_BATCH, KEY, partial(_run_flowing, flow))
    return model


def _check_run(flow: _Flow, patches, executor, noise: Tensor, latent_image, sampler, sigmas: Tensor, *args, **kwargs):
    """Before a run: is this the clip and the grid of the inversion, and is the patch still in its place?"""
    guider, source = executor.class_obj, flow.source
    check_slots(guider.model_options, source.node, patches)
    check_not_compiled(guider.model_patcher, source.node)
    check_no_step_cache(guider.model_options["transformer_options"].get("wrappers", {}), source.node)
    source.check_clip(noise)
    source.check_meets(sigmas[:-1].tolist())
    source.check_prompt()
    conds = [cond for some in guider.conds.values() for cond in some]
    check_no_reference(conds, source.node)
    check_rows(conds, len(noise), source.node)
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _with_source(flow: _Flow, executor, guider, sigmas, extra_args, callback, noise, latent_image, *args):
    """Around a run: the source prompt, and a look at whether every evaluation comes."""
    flow.source.warn_of_start(guider, sigmas[0], noise, latent_image)
    evaluations = Evaluations(guider, lambda sigma: True, flow.source.node)
    with flow.source.ready(guider, extra_args, noise) as extra_args:
        extra_args["model_options"] = options_with(extra_args["model_options"], **{EVALUATIONS: evaluations})
        return executor(evaluations, sigmas, extra_args, callback, noise, latent_image, *args)


def _run_flowing(flow: _Flow, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options):
    """Around one evaluation of all conditionings: the source, the keyframes where they are blended, and all frames."""
    options = model_options["transformer_options"]
    if options.get(RUNNING):
        return executor(model, conds, x_in, timestep, model_options)
    step = _Step(flow, flow.source.step_at(float(timestep[0])))
    options[EVALUATIONS].arrive()
    published = {ATTENTION: partial(_find_fields, step)}
    with step.visiting([options[KEY]], timestep, options):
        flow.source.run(executor, model, step.number, x_in, timestep, model_options, **published)
    if flow.blend_keyframes:
        with step.visiting(conds, timestep, options):
            _run_keyframes(step, executor, model, conds, x_in, timestep, model_options)
    published = {ATTENTION: partial(_propagate, step)}
    with step.visiting(conds, timestep, options):
        return executor(model, conds, x_in, timestep, options_with(model_options, **published))


def _run_keyframes(step: _Step, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options) -> None:
    """Evaluate the keyframes before they are blended, alone where that is possible, else among all frames."""
    options = model_options["transformer_options"]
    published = {ATTENTION: partial(_edit_keyframes, step)}
    # AnimateDiff's motion modules expect as many frames as its windows have.
    if options.get("ad_params") is None:
        keyframes, batch = step.keyframes(len(x_in)), step.flow.frames_in(options)
        conds = cut_conds(conds, batch, keyframes, step.flow.source.inversion.frames)
        published |= {RUNS_ON_KEYFRAMES: True, "context_window": Cut([batch[keyframe] for keyframe in keyframes])}
        x_in, timestep = x_in[keyframes], timestep[keyframes]
    executor(model, conds, x_in, timestep, options_with(model_options, **published))
