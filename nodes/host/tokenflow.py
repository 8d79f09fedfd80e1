"""TokenFlow in ComfyUI: the source's fields, the keyframes, then all frames, in one evaluation of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...cove.attention import spatial_temporal_attention
from ...cove.correspondence import crop_matches
from ...cove.inversion import Inversion
from ...cove.tokenflow import Between, between_keyframes, choose_keyframes, nearest_tokens, propagate
from . import options
from .attention import attend_with
from .batch import cut_conds
from .checks import check_no_reference, check_rows, check_slots, one_prompt, other_batch, other_tokens
from .errors import naming
from .options import Area, Cut, frames_in, options_with, run_info
from .run import publish_run
from .source import SourceBranch
from .unet import Block, blocks_of, grid_at, self_attention_levels, transformers_of, unet_of
from .visits import Evaluations, Visits


@dataclass(frozen=True, eq=False)
class _Flow:
    """Settings of TokenFlow. Nothing in it changes in a run."""

    source: SourceBranch
    every: int
    blend_keyframes: bool
    seed: int
    levels: Mapping[Block, int]
    places: frozenset[tuple]  # of self-attention

    @property
    def node(self) -> type:
        return self.source.node

    def frames_in(self, transformer_options: dict[str, Any]) -> tuple[int, ...]:
        """Return the frames of the clip that the UNet runs on."""
        return frames_in(transformer_options) or tuple(range(self.source.inversion.frames))


@dataclass(eq=False)
class _Step:
    """One evaluation of the model: its keyframes, and what each block passes to the next pass.

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
    def visiting(self, conds, timestep: Tensor, transformer_options: dict[str, Any]) -> Iterator[None]:
        """Raise after a pass of the UNet that did not visit every place of self-attention.

        A perturbing guider (PAG) replaces some places in its own pass.
        """
        self.visits = Visits()
        yield
        replaced = transformer_options["patches_replace"]["attn1"]
        places = [
            place
            for place in self.flow.places
            if isinstance(replaced.get(place, replaced.get(place[:2])), FlowingSelfAttention)
        ]
        self.visits.check(places, conds, timestep, self.flow.node)

    def keyframes(self, frames: int) -> list[int]:
        """Return keyframes of this many frames: the seed's first draw at the noisiest step, its second at the next."""
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
    """An attn1 replacement that runs the function published for each call of the UNet, else plain self-attention.

    Projected tokens [conds*frames, tokens, channels] -> input of `to_out`, of the same shape.
    """

    def __deepcopy__(self, memo: dict) -> FlowingSelfAttention:
        """Itself: it is known by its identity, and MODEL.clone() copies its options deeply."""
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        instead = transformer_options.get(options.SELF_ATTENTION)
        if instead is None:
            return attend_with(query, transformer_options)(query, key, value, transformer_options["n_heads"])
        return instead(_Call((query, key, value), transformer_options))


@dataclass(frozen=True)
class _Call:
    """One call of self-attention: query, key and value, [conds*frames, tokens, channels], and its options."""

    tokens: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]

    @property
    def place(self) -> tuple:
        return (*self.options["block"], self.options["block_index"])

    @property
    def grid(self) -> list[int]:
        return self.options["activations_shape"][2:]

    def attend(self) -> Tensor:
        """Return plain self-attention."""
        return attend_with(self.tokens[0], self.options)(*self.tokens, self.options["n_heads"])

    def attend_jointly(self, frames: int, keyframes: list[int], node) -> Tensor:
        """Return the joint attention of keyframes (Eq. 3), [conds, keyframes, tokens, channels]."""
        some = (self.by_frames(x, frames, node)[:, keyframes].flatten(0, 1) for x in self.tokens)
        attend = attend_with(self.tokens[0], self.options, len(keyframes))
        joint = spatial_temporal_attention(*some, len(keyframes), self.options["n_heads"], attend)
        return joint.unflatten(0, (-1, len(keyframes)))

    def by_frames(self, tokens: Tensor, frames: int, node) -> Tensor:
        """[conds*frames, ...] -> [conds, frames, ...]; raise if another node cut frames or tokens away."""
        conds = len(self.options["cond_or_uncond"])
        if len(tokens) != conds * frames:
            raise other_batch(frames, conds, len(tokens), node)
        if tokens.shape[1] != math.prod(self.grid):
            raise other_tokens(f"{tokens.shape[1]} tokens", self.grid, node)
        return tokens.unflatten(0, (conds, frames))

    def names(self, keyframes: tuple[int, ...]) -> list[tuple]:
        """Return keys for each conditioning's output. The host may give both halves one uuid, for a shared area."""
        halves = zip(self.options["cond_or_uncond"], self.options["uuids"], strict=True)
        return [(keyframes, self.place, *half) for half in halves]


def _find_fields(step: _Step, call: _Call) -> Tensor:
    """The source: plain self-attention, whose output says which tokens correspond."""
    step.visits.add(call.place, call.options)
    flow, frames = step.flow, step.flow.frames_in(call.options)
    step.prompt = one_prompt(call.options, step.prompt, flow.node)
    result = call.attend()
    (clip,) = call.by_frames(result, len(frames), flow.node)
    step.fields[frames, call.place] = nearest_tokens(clip, step.keyframes(len(frames)), step.between(len(frames)))
    return result


def _edit_keyframes(step: _Step, call: _Call) -> Tensor:
    """The edit before keyframes are blended: their joint attention is kept, other frames are not used."""
    step.visits.add(call.place, call.options)
    flow, frames = step.flow, step.flow.frames_in(call.options)
    keyframes = [*range(len(frames))] if options.ON_KEYFRAMES in call.options else step.keyframes(len(frames))
    edited = call.attend_jointly(len(frames), keyframes, flow.node)
    step.edited.update(zip(call.names(tuple(frames[keyframe] for keyframe in keyframes)), edited, strict=True))
    result = torch.zeros_like(call.tokens[0])
    result.unflatten(0, (-1, len(frames)))[:, keyframes] = edited
    return result


def _propagate(step: _Step, call: _Call) -> Tensor:
    """The edit: every frame takes the tokens of the keyframes around it."""
    step.visits.add(call.place, call.options)
    flow, frames = step.flow, step.flow.frames_in(call.options)
    keyframes, between = step.keyframes(len(frames)), step.between(len(frames))
    if flow.blend_keyframes:
        call.by_frames(call.tokens[0], len(frames), flow.node)
        names = call.names(tuple(frames[keyframe] for keyframe in keyframes))
        edited = [step.edited.pop(name) for name in names]
    else:
        edited = call.attend_jointly(len(frames), keyframes, flow.node)
    fields, info = step.fields[frames, call.place], run_info(call.options)
    found = [
        propagate(one, _of_area(flow, fields, info.area_of(uuid), call), between)
        for one, uuid in zip(edited, call.options["uuids"], strict=True)
    ]
    return torch.cat(found)


def _of_area(flow: _Flow, fields: Tensor, area: Area | None, call: _Call) -> Tensor:
    """Return the fields of the part of the picture that a conditioning with an area runs on."""
    level = flow.levels[call.options["block"]]
    whole = call.grid if area is None else grid_at(run_info(call.options).latent_size, level)
    if fields.shape[-1] != math.prod(whole):
        raise other_tokens(f"{fields.shape[-1]} in the source", whole, flow.node)
    if area is None:
        return fields
    return crop_matches(fields.transpose(1, 2), whole, area[2] >> level, area[3] >> level, *call.grid).transpose(1, 2)


# --- around the run ---


def flow_tokens(model, inversion: Inversion, every: int, blend_keyframes: bool, seed: int, conditioning, node):
    """Return a clone of MODEL in which frames take their self-attention from keyframes, by the source's fields."""
    unet = unet_of(model)
    levels, blocks = self_attention_levels(unet), blocks_of(unet)
    places = {(*place, i) for place in levels for i, _ in enumerate(transformers_of(blocks[place]))}
    model = model.clone()
    check_slots(model.model_options)
    source = SourceBranch(inversion, conditioning, options.TOKENFLOW, node)
    flow = _Flow(source, every, blend_keyframes, seed, levels, frozenset(places))
    patches = dict.fromkeys(levels, FlowingSelfAttention())
    for block, patch in patches.items():
        # Without a transformer index, as in `attention.guide_self_attention`.
        model.set_model_attn1_replace(patch, *block)
    source.load_with(model)
    publish_run(model)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, options.TOKENFLOW, partial(_check_run, flow, patches))
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, options.TOKENFLOW, partial(_with_source, flow))
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, options.TOKENFLOW, partial(_run_flowing, flow))
    return model


def _check_run(flow: _Flow, patches, executor, noise: Tensor, latent_image, sampler, sigmas: Tensor, *args, **kwargs):
    """Check before a run that clip and sigmas are those of the inversion and that the patch is still in its place."""
    guider = executor.class_obj
    with naming(flow.node):
        check_slots(guider.model_options, patches)
        flow.source.check_run(guider, noise, sigmas[:-1].tolist(), True)
        conds = [cond for some in guider.conds.values() for cond in some]
        check_no_reference(conds)
        check_rows(conds, len(noise))
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _with_source(flow: _Flow, executor, guider, sigmas, extra_args, callback, noise, latent_image, *args):
    """Wrap a run: make the source prompt ready, and watch that no evaluation is skipped."""
    flow.source.warn_of_start(guider, sigmas[0], noise, latent_image)
    evaluations = Evaluations(guider, lambda sigma: True, flow.node)
    with flow.source.ready(guider, extra_args, noise) as extra_args:
        published = options_with(extra_args["model_options"], **{options.EVALUATIONS: evaluations})
        extra_args = {**extra_args, "model_options": published}
        return executor(evaluations, sigmas, extra_args, callback, noise, latent_image, *args)


def _run_flowing(flow: _Flow, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options):
    """Wrap one evaluation of all conditionings: run the source, the keyframes if they are blended, then all frames."""
    transformer_options = model_options["transformer_options"]
    if transformer_options.get(options.SOURCE_RUNNING):
        return executor(model, conds, x_in, timestep, model_options)
    step = _Step(flow, flow.source.step_at(float(timestep[0])))
    transformer_options[options.EVALUATIONS].arrive()
    published = {options.SELF_ATTENTION: partial(_find_fields, step)}
    with step.visiting([transformer_options[options.TOKENFLOW]], timestep, transformer_options):
        flow.source.run(executor, model, step.number, x_in, timestep, model_options, **published)
    if flow.blend_keyframes:
        with step.visiting(conds, timestep, transformer_options):
            _run_keyframes(step, executor, model, conds, x_in, timestep, model_options)
    published = {options.SELF_ATTENTION: partial(_propagate, step)}
    with step.visiting(conds, timestep, transformer_options):
        return executor(model, conds, x_in, timestep, options_with(model_options, **published))


def _run_keyframes(step: _Step, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options) -> None:
    """Evaluate the keyframes before they are blended, alone where that is possible, else among all frames."""
    transformer_options = model_options["transformer_options"]
    published = {options.SELF_ATTENTION: partial(_edit_keyframes, step)}
    # AnimateDiff's motion modules expect as many frames as its windows have.
    if transformer_options.get(options.AD_PARAMS) is None:
        keyframes, batch = step.keyframes(len(x_in)), step.flow.frames_in(transformer_options)
        conds = cut_conds(conds, batch, keyframes, step.flow.source.inversion.frames)
        cut = Cut([batch[keyframe] for keyframe in keyframes])
        published |= {options.ON_KEYFRAMES: True, options.CONTEXT_WINDOW: cut}
        x_in, timestep = x_in[keyframes], timestep[keyframes]
    executor(model, conds, x_in, timestep, options_with(model_options, **published))
