"""Features captured in the decoder while the UNet runs, and injected while it runs on something else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...cove.injection import ATTENTION, RESNET, Site, choose_blocks, inject_features
from ...cove.inversion import SIGMA_TOLERANCE, Inversion
from . import options
from .checks import check_without, one_prompt, other_tokens, skipped
from .errors import NodeError, naming
from .memory import reserve_bytes
from .options import Frames, frames_in, options_with, run_info
from .run import publish_run
from .source import SourceBranch
from .unet import block_levels, grid_at, transformers_of, unet_of
from .visits import Evaluations, Visits

# --- sites ---


def sites_of(model, resnet_blocks: str, attention_blocks: str) -> tuple[Site, ...]:
    """Return the sites in MODEL's decoder that the texts name."""
    unet = unet_of(model)
    decoder = unet.output_blocks
    levels = [level for (part, _), level in block_levels(unet).items() if part == "output"]
    transformers = {number: len(transformers_of(block)) for number, block in enumerate(decoder)}
    available = {
        RESNET: [number for number, block in enumerate(decoder) if isinstance(block[0], ResBlock)],
        ATTENTION: [number for number, count in transformers.items() if count],
    }
    texts = {RESNET: resnet_blocks, ATTENTION: attention_blocks}
    chosen = {kind: choose_blocks(kind, texts[kind], available[kind], levels) for kind in texts}
    resnets = [Site(RESNET, block) for block in chosen[RESNET]]
    return (*resnets, *(Site(ATTENTION, block, i) for block in chosen[ATTENTION] for i in range(transformers[block])))


def bytes_of(model, sites: tuple[Site, ...], size: tuple[int, int]) -> int:
    """Return the bytes of one frame's features at one step, for latents of height and width `size`."""
    unet = unet_of(model)
    levels = block_levels(unet)
    numbers = 0
    for site in sites:
        block = unet.output_blocks[site.block]
        attention = transformers_of(block)[site.index].attn1.to_q if site.kind == ATTENTION else None
        channels = attention.in_features if attention is not None else block[0].out_channels
        numbers += channels * math.prod(grid_at(size, levels["output", site.block]))
    # A node may have asked for another precision, which comes with the next run.
    return numbers * (model.get_model_object("manual_cast_dtype") or model.model.get_dtype()).itemsize


# --- capture and injection in the UNet ---


class AllCaptured(Exception):
    """Ends a call of the UNet whose result is not used."""


@dataclass(eq=False)
class Capture:
    """Collects the features at some sites when the UNet runs on the frames of a clip, or on windows of it.

    only: whether the UNet runs for nothing else. It is left with `AllCaptured` then, before the rest of the decoder.
    """

    sites: frozenset[str]
    node: type
    only: bool = False
    captured: dict[Frames, dict[str, Tensor]] = field(default_factory=dict)
    prompt: Any = None  # the uuid of the conditioning that ran

    def forget(self) -> None:
        """Drop what was captured: the next pass of the UNet is of other latents."""
        self.captured, self.prompt = {}, None

    def check(self, sigma: float) -> None:
        """Raise when a site was not visited."""
        if not self.captured or any(self.sites - features.keys() for features in self.captured.values()):
            raise skipped(sigma, self.node)

    def whole_clip(self, sigma: float) -> dict[str, Tensor]:
        """Return what was captured of the whole clip at once."""
        self.check(sigma)
        if self.captured.keys() != {None}:
            raise NodeError(
                self.node,
                "features cannot be stored with context windows, which run a frame several times. Remove the context "
                "windows from this model.",
            )
        return self.captured[None]

    def visit(self, site: Site, value: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        if str(site) in self.sites:
            self.prompt = one_prompt(transformer_options, self.prompt, self.node)
            # The first pass is the source's. Guidance such as PAG runs the UNet again with something changed in it.
            captured = self.captured.setdefault(frames_in(transformer_options), {})
            captured.setdefault(str(site), value)
            if self.only and captured.keys() == self.sites:
                raise AllCaptured
        return value


@dataclass(frozen=True, eq=False)
class Inject:
    """Replaces the features of every conditioning by the source's.

    features: of the windows that will run, or of the whole clip; by the name of their site.
    sites: the names of those that expect features.
    """

    features: Mapping[Frames, Mapping[str, Tensor]]
    levels: Mapping[tuple[str, int], int]
    sites: frozenset[str]
    node: type
    visits: Visits = field(default_factory=Visits)

    def visit(self, site: Site, value: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        if str(site) not in self.sites:
            return value
        info, uuids = run_info(transformer_options), transformer_options["uuids"]
        features = self._of_frames(site, frames_in(transformer_options))
        if features is None:
            raise skipped(info.sigma, self.node, "some frames of the source")
        self.visits.add(str(site), transformer_options)
        whole = grid_at(info.latent_size, level := self.levels["output", site.block])
        if site.kind == ATTENTION and features.shape[1] != math.prod(whole):
            raise other_tokens(f"{features.shape[1]} tokens", whole, self.node)
        rows = 1 if site.kind == ATTENTION else 2  # the axis of the height, channels last or first
        features = features.to(value.device)  # once for all conditionings
        grid = features.unflatten(1, whole) if site.kind == ATTENTION else features
        chunks = []
        for chunk, uuid in zip(value.chunk(len(uuids)), uuids, strict=True):
            area = info.area_of(uuid)
            part = grid
            if area is not None:
                height, width = grid_at(area[:2], level)
                part = part.narrow(rows, area[2] >> level, height).narrow(rows + 1, area[3] >> level, width)
            part = part.flatten(1, 2) if site.kind == ATTENTION else part
            chunks.append(inject_features(chunk, part, 1))
        return torch.cat(chunks)

    def _of_frames(self, site: Site, frames: Frames) -> Tensor | None:
        """Return features of these frames, also from those of more frames: TokenFlow may run on keyframes alone."""
        if frames is None or frames in self.features:
            return self.features.get(frames, {}).get(str(site))
        for known, features in self.features.items():
            if str(site) in features and (known is None or set(frames) <= set(known)):
                return features[str(site)][[frame if known is None else known.index(frame) for frame in frames]]
        return None


def _self_attention(query: Tensor, key: Tensor, value: Tensor, transformer_options: dict[str, Any]):
    """Patch attn1: query and key are projected from the injected features, value is not."""
    features = transformer_options.get(options.FEATURES)
    if features is None or transformer_options["block"][0] != "output":
        return query, key, value
    site = Site(ATTENTION, transformer_options["block"][1], transformer_options["block_index"])
    injected = features.visit(site, query, transformer_options)
    return (query, key, value) if injected is query else (injected, injected, value)


def _resnets(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
    """Wrap one call of the UNet: hooks at the end of every ResNet branch of the decoder."""
    features = (transformer_options or {}).get(options.FEATURES)
    with ExitStack() as hooks:
        for number, block in enumerate(executor.class_obj.output_blocks if features is not None else ()):
            if isinstance(block[0], ResBlock):
                at = partial(_at_resnet, features, Site(RESNET, number), transformer_options)
                hooks.callback(block[0].out_layers[-1].register_forward_hook(at).remove)
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def _at_resnet(
    features: Capture | Inject, site: Site, transformer_options: dict[str, Any], module, args, output: Tensor
) -> Tensor:
    return features.visit(site, output, transformer_options)


def with_sites(model):
    """Return a clone of MODEL that captures or injects features in calls whose transformer_options say so."""
    model = model.clone()
    model.set_model_attn1_patch(_self_attention)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, options.INJECTION, _resnets)
    publish_run(model)
    return model


# --- injection ---


@dataclass(frozen=True, eq=False)
class _Injection:
    """Settings of Feature Injection. Nothing in it changes in a run."""

    source: SourceBranch
    sites: tuple[Site, ...]
    steps: Mapping[str, int]  # how many of the first sampling steps, by kind of site
    levels: Mapping[tuple[str, int], int]

    def active(self, kind: str, sigma: float) -> bool:
        """Return whether a call at `sigma` belongs to the first steps of sampling, wherever the run starts."""
        steps = self.steps[kind]
        return steps > 0 and sigma >= float(self.source.inversion.sigmas[-steps]) * (1 - SIGMA_TOLERANCE)

    def stored_for(self, step: int, names: set[str]) -> Mapping[str, Tensor] | None:
        stored = self.source.inversion.features.get(step, {})
        return stored if names <= stored.keys() else None

    def needs_source(self, sample_sigmas: Tensor) -> bool:
        """Return whether some features of this run are not stored."""
        needed = {sigma: self.names_at(sigma) for sigma in map(float, sample_sigmas[:-1])}
        steps = {self.source.inversion.step_at(sigma): names for sigma, names in needed.items() if names}
        return any(self.stored_for(step, names) is None for step, names in steps.items())

    def names_at(self, sigma: float) -> set[str]:
        return {str(site) for site in self.sites if self.active(site.kind, sigma)}


def inject(model, inversion: Inversion, sites: tuple[Site, ...], shares: Mapping[str, float], conditioning, node):
    """Return a clone of MODEL that injects features of the inverted clip during the first sampling steps.

    Args:
        shares: of the sampling steps, by kind of site.
    """
    unet = unet_of(model)
    check_without(model, options.INJECTION)
    steps = {kind: inversion.schedule.share(share) for kind, share in shares.items()}
    source = SourceBranch(inversion, conditioning, options.INJECTION, node)
    injection = _Injection(source, sites, steps, block_levels(unet))
    of_frame = partial(bytes_of, model, sites)
    model = with_sites(model)
    source.load_with(model)
    if not inversion.features:  # those of the source at one step are held while the edit runs
        reserve_bytes(model, options.INJECTION, lambda shape: shape[0] * of_frame(tuple(shape[2:])))
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, options.INJECTION, partial(_check_run, injection))
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, options.INJECTION, partial(_with_source, injection))
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, options.INJECTION, partial(_run_injected, injection))
    return model


def _check_run(injection: _Injection, executor, noise: Tensor, latent_image, sampler, sigmas: Tensor, *args, **kwargs):
    """Check before a run that clip and sigmas are those of the inversion."""
    needed = [sigma for sigma in map(float, sigmas[:-1]) if injection.names_at(sigma)]
    with naming(injection.source.node):
        injection.source.check_run(executor.class_obj, noise, needed, injection.needs_source(sigmas))
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


@dataclass(eq=False)
class _Computed:
    """Source features of the current step, reused when guidance (PAG) evaluates the UNet again."""

    evaluations: Evaluations
    step: int = -1
    features: dict[Frames, dict[Frames, dict[str, Tensor]]] = field(default_factory=dict)  # by the frames of the call


def _with_source(injection: _Injection, executor, guider, sigmas, extra_args, callback, noise, latent_image, *args):
    """Wrap a run: make the source prompt ready, if needed, and watch that no evaluation is skipped."""
    injection.source.warn_of_start(guider, sigmas[0], noise, latent_image)
    evaluations = Evaluations(guider, injection.names_at, injection.source.node)
    published = options_with(extra_args["model_options"], **{options.COMPUTED: _Computed(evaluations)})
    extra_args = {**extra_args, "model_options": published}
    source = injection.source.ready(guider, extra_args, noise) if injection.needs_source(sigmas) else None
    with source or nullcontext(extra_args) as extra_args:
        return executor(evaluations, sigmas, extra_args, callback, noise, latent_image, *args)


def _run_injected(injection: _Injection, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options):
    """Wrap one evaluation of all conditionings: inject the source's features at this sigma, stored or computed."""
    transformer_options = model_options.get("transformer_options", {})
    sigma = float(timestep[0])
    names = injection.names_at(sigma)
    if transformer_options.get(options.SOURCE_RUNNING):
        return executor(model, conds, x_in, timestep, model_options)
    if not names:
        transformer_options[options.COMPUTED].features = {}  # the last step that needs them is over
        return executor(model, conds, x_in, timestep, model_options)
    step = injection.source.step_at(sigma)
    computed, node = transformer_options[options.COMPUTED], injection.source.node
    computed.evaluations.arrive()
    stored = injection.stored_for(step, names)
    if stored is None:
        frames = frames_in(transformer_options)
        if computed.step != step:
            computed.step, computed.features = step, {}
        if frames not in computed.features:
            # A second entry of the prompt must get the chance to be refused.
            capture = Capture(frozenset(names), node, only=len(injection.source.conditioning) == 1)
            published = {options.FEATURES: capture}
            with suppress(AllCaptured):
                injection.source.run(executor, model, step, x_in, timestep, model_options, **published)
            capture.check(sigma)
            computed.features[frames] = capture.captured
        features = computed.features[frames]
    else:
        features = {None: {name: stored[name] for name in names}}
    injector = Inject(features, injection.levels, frozenset(names), node)
    result = executor(model, conds, x_in, timestep, options_with(model_options, **{options.FEATURES: injector}))
    injector.visits.check(names, conds, timestep, node)
    return result


# --- capture for storing ---


@contextmanager
def capturing_features(model_options: dict[str, Any], sites: tuple[Site, ...], node) -> Iterator[Capture]:
    """Capture features in calls with these model_options while the `with` block runs."""
    capture = Capture(frozenset(map(str, sites)), node)
    model_options["transformer_options"][options.FEATURES] = capture
    try:
        yield capture
    finally:
        del model_options["transformer_options"][options.FEATURES]
