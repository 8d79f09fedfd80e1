"""An inversion as the host runs it: what is kept of it, where, and how it is taken up again after a break."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import folder_paths
import torch
from torch import Tensor

from ...cove import __version__, ddim
from ...cove.injection import Site
from ...cove.inversion import Inversion, UnfinishedInversion, on_disk, step_at, unfinished_in
from . import injection
from .attention import guidance_of
from .files import saving
from .frames import check_no_reference
from .identity import model_fingerprint, run_fingerprint, source_prompt
from .keyframes import Climbing, Remembered
from .sampling import GRID_KEY, GUIDANCE_KEY, check_not_compiled, is_compiled, preview, run
from .visits import Visits

KEY = "cove_inversion"

WRAPPERS = comfy.patcher_extension.WrappersMP

RECOMPUTE, MEMORY, DISK = "recompute", "memory", "disk"
STORAGES = (RECOMPUTE, MEMORY, DISK)


# --- storing features ---


@dataclass(frozen=True)
class Storage:
    """Which features an inversion keeps, and where."""

    kind: str  # of STORAGES
    sites: tuple[Site, ...] = ()
    steps: tuple[int, ...] = ()  # of the inversion, counted from 0

    def keep(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features where they stay."""
        if self.kind == DISK:
            Path(folder_paths.get_temp_directory()).mkdir(parents=True, exist_ok=True)
            return on_disk(features, folder_paths.get_temp_directory())
        return {name: tensor.to("cpu", copy=True) for name, tensor in features.items()}


def plan_storage(
    model, kind: str, sites: tuple[Site, ...], sigmas: Tensor, kept_sigmas: Tensor, shape: torch.Size, node: str
) -> tuple[Storage, str]:
    """Where features go, and a line that says how large they are; an error when they do not fit.

    Args:
        sigmas: the inversion's, ascending from 0.
        kept_sigmas: those at which features are kept, all among `sigmas`.
        shape: of the latents.
    """
    frames, _, height, width = shape
    one = frames * injection.bytes_of(model, sites, (height, width), node)
    count = len(kept_sigmas)
    size = f"{_spell(one * count)} ({count} steps x {frames} frames x {_spell(one // frames)})"
    if kind == RECOMPUTE:
        latents = _spell(4 * math.prod(shape) * len(sigmas))
        return Storage(kind), f"storage: {latents} of latents; features are computed again ({size} if stored)"
    if not sites or not count:
        raise ValueError(f"{node}: nothing to store: no blocks were named, or no steps. Set `storage` to {RECOMPUTE}.")
    check_not_compiled(model, node)
    if model.model_options.get("context_handler") is not None:
        raise ValueError(
            f"{node}: features cannot be stored with context windows, where a frame is seen several times. Set "
            f"`storage` to {RECOMPUTE}."
        )
    if model.model_options.get("disable_cfg1_optimization"):
        raise ValueError(
            f"{node}: a node on this model asks for the negative prompt at cfg 1, too, so features of one prompt "
            f"cannot be stored. Take it off for the inversion, or set `storage` to {RECOMPUTE}."
        )
    if kind == MEMORY:
        free, place = comfy.model_management.get_free_memory(torch.device("cpu")), "of memory"
    else:
        folder = Path(folder_paths.get_temp_directory())
        free, place = (
            shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free,
            "on disk",
        )
    if one * count > free:
        other = f"{DISK}, " if kind == MEMORY else ""
        raise ValueError(
            f"{node}: the features take {size}, but {_spell(free)} {place} are free. Set `storage` to {other}"
            f"{RECOMPUTE}, or take fewer `feature_steps`, blocks or frames."
        )
    steps = tuple(step_at(sigmas, sigma) for sigma in kept_sigmas.tolist())
    return Storage(kind, sites, steps), f"storage: {size} {place}, {_spell(free)} are free"


def _spell(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# --- the run ---


def invert(
    model,
    conditioning,
    latent: dict[str, Any],
    sigmas: Tensor,
    refinements: int,
    storage: Storage,
    *,
    node: str,
    line: str,
    tell: Callable[..., None],
) -> tuple[dict[str, Any], Inversion]:
    """The noise as a LATENT, and the inversion. Goes on where the same inversion was broken off before.

    `tell` shows a line to the user, as `say` does: first `line`, with what is kept of the run while it is unfinished.
    """
    if storage.sites:
        check_no_reference(comfy.sampler_helpers.convert_cond(conditioning), node)
    remembered = Remembered(conditioning, model)
    unfinished = UnfinishedInversion(
        _unfinished_folder(), run_fingerprint(model, conditioning, latent["samples"], sigmas, refinements)
    )
    steps, count = unfinished.steps(), len(sigmas) - 1
    resumed = f"going on after step {len(steps)} of {count}, where this inversion was broken off; " if steps else ""
    kept, room = _make_room(unfinished, unfinished.size_of(count, latent["samples"].shape))
    tell(f"{resumed}{line}; {room}")
    recorder = _Recorder(storage, refinements, unfinished if kept else None, steps, node, tell)
    patched = injection.with_sites(model) if storage.sites else model.clone()
    if not is_compiled(patched):
        # Last, so that it is called inside of every other wrapper, and only when the UNet is.
        patched.add_wrapper_with_key(WRAPPERS.DIFFUSION_MODEL, KEY, recorder.visit)
    try:
        show = preview(model, len(sigmas) - 1)
        result = run(patched, recorder, latent, sigmas, conditioning, node=node, callback=show)
    finally:
        remembered.put_back()  # so that a run that goes on after a break finds them as this one did
    tensors, values = source_prompt(conditioning) or ({}, None)
    about = {"model": model_fingerprint(model), "pack": __version__, "refinements": refinements, "prompt": values}
    about["guidance"] = guidance_of(model.model_options)
    inversion = Inversion(
        clip=recorder.clip,
        noise=recorder.noise,
        sigmas=sigmas,
        guesses=torch.stack([step["guess"] for step in recorder.steps]),
        residuals=torch.stack([step["residual"] for step in recorder.steps]),
        grew=torch.stack([step["grew"] for step in recorder.steps]),
        conditioning=tensors,
        about=about,
        features=recorder.features,
    )
    unfinished.discard()
    return result | noise_of(model, inversion), inversion


def noise_of(model, inversion: Inversion) -> dict[str, Any]:
    """The noise of an inversion as a LATENT, with what it carries beside it.

    In float32: a sampler's result may be in half precision (`--fp16-intermediates`), from which no clip comes back.
    """
    noise = model.get_model_object("latent_format").process_out(inversion.noise)
    carried = {"samples": noise.to(comfy.model_management.intermediate_device()), GRID_KEY: inversion.sigmas}
    return carried | {GUIDANCE_KEY: inversion.about["guidance"]} if "guidance" in inversion.about else carried


def _unfinished_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "cove" / "unfinished"


def _make_room(unfinished: UnfinishedInversion, size: int) -> tuple[bool, str]:
    """Whether an inversion of `size` bytes is kept while it is unfinished, and a line that says how large all are."""
    kept, limit, others = unfinished.make_room(size), _spell(unfinished.LIMIT), unfinished.others()
    if kept:
        return kept, f"unfinished inversions use up to {_spell(others + size)} of {limit} in user/cove"
    return kept, (
        f"steps are not kept for resuming: {_spell(size)} and {_spell(others)} of other unfinished inversions exceed "
        f"{limit} in user/cove"
    )


def left_unfinished() -> list[str]:
    """A line that says how large the unfinished inversions are, when there are any."""
    size, limit = sum(unfinished_in(_unfinished_folder()).values()), UnfinishedInversion.LIMIT
    return [f"unfinished inversions use {_spell(size)} of {_spell(limit)} in user/cove"] if size else []


@dataclass(eq=False)
class _Recorder:
    """`cove.ddim.invert` as a sampler function of one run, which keeps what the run leaves behind."""

    storage: Storage
    refinements: int
    unfinished: UnfinishedInversion | None  # None when its steps are too large to be kept
    steps: list[dict[str, Tensor]]  # finished ones
    node: str
    tell: Callable[..., None]
    visits: Visits = field(default_factory=Visits)
    features: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def visit(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        """Around each call of the UNet."""
        self.visits.add(KEY, transformer_options)
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def __call__(self, denoise, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback, disable) -> Tensor:
        self.clip = x.cpu()
        climbing = Climbing(denoise.inner_model, extra_args["model_options"])
        wrappers = extra_args["model_options"]["transformer_options"]["wrappers"]
        counted = KEY in wrappers.get(WRAPPERS.DIFFUSION_MODEL, {})
        with injection.taking_features(extra_args["model_options"], self.storage.sites, self.node) as taking:
            asked = None

            def model(guess: Tensor, sigma: Tensor, **arguments) -> Tensor:
                nonlocal asked
                asked = guess
                taking.forget()
                self.visits.seen.clear()
                arguments["model_options"] = climbing.at(sigma[0], arguments["model_options"])
                denoised = denoise(guess, sigma, **arguments)
                if counted:
                    self.visits.check([KEY], [denoise.inner_model.conds["positive"]], sigma, self.node)
                return denoised

            def keep_features(i: int, guess: Tensor) -> None:
                if i not in self.storage.steps:
                    return
                if asked is None or not torch.equal(asked, guess):
                    model(guess, sigmas[i + 1].expand(len(guess)), **extra_args)
                with saving(self.node):
                    self.features[i] = self.storage.keep(taking.of_clip(float(sigmas[i + 1])))

            def after_step(found: dict[str, Any]) -> None:
                keep_features(found["i"], found["guess"])
                numbers = {name: torch.tensor(found[name], dtype=dtype) for name, dtype in _NUMBERS.items()}
                self.steps.append({"x": found["x"].cpu(), "guess": found["guess"].cpu()} | numbers)
                try:
                    if self.unfinished is not None:
                        self.unfinished.add(found["i"], self.steps[-1])
                except OSError as error:
                    logging.warning("%s: this step could not be kept for going on after a break: %s", self.node, error)
                if self.refinements:
                    line = f"step {found['i'] + 1} of {len(sigmas) - 1}: residual {found['residual']:.1e}"
                    self.tell(line + ", refining stopped there" * found["grew"], logging.DEBUG)
                callback(found)

            # Features of steps finished before a break went with it; the guesses say where to take them again.
            for i, step in enumerate(self.steps):
                keep_features(i, step["guess"].to(x))
                comfy.model_management.throw_exception_if_processing_interrupted()
            done = len(self.steps)
            start = self.steps[-1]["x"].to(x) if done else x
            options = {"extra_args": extra_args, "callback": after_step, "done": done}
            noise = ddim.invert(model, start, sigmas, self.refinements, **options)
        self.noise = noise.cpu()
        return noise


_NUMBERS = {"residual": torch.float64, "grew": torch.bool}
