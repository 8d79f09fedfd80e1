"""DDIM inversion in a run of ComfyUI's sampler: recorded step by step, and resumed after an interruption."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...cove import __version__, ddim
from ...cove.inversion import Inversion
from ...cove.schedule import Schedule
from . import options
from .attention import guidance_of
from .checks import is_compiled
from .identity import model_fingerprint, run_fingerprint, source_prompt
from .keyframes import Climbing, Remembered
from .noise import noise_of
from .run import run_sampler
from .status import format_bytes, preview, report_status
from .unet import sigmas_at
from .unfinished import UnfinishedInversion, unfinished_in
from .visits import Visits


def invert(
    model, conditioning, latent: dict[str, Any], schedule: Schedule, refinements: int, node
) -> tuple[dict[str, Any], Inversion]:
    """Return the noise as a LATENT, and the inversion. Resumes the same inversion where it was interrupted before.

    First the node shows what is kept of the run while it is unfinished, and last how exact the inversion is.
    """
    sigmas = torch.cat((torch.zeros(1), sigmas_at(model, schedule.inversion)))
    remembered = Remembered(conditioning, model)
    unfinished = UnfinishedInversion(
        _unfinished_folder(), run_fingerprint(model, conditioning, latent["samples"], sigmas, refinements)
    )
    steps, count = unfinished.steps(), len(sigmas) - 1
    resumed = f"resuming after step {len(steps)} of {count}, where this inversion was interrupted; " if steps else ""
    kept, room = _make_room(unfinished, unfinished.size_of(count, latent["samples"].shape))
    report_status(node, f"{resumed}{room}")
    recorder = _Recorder(refinements, unfinished if kept else None, steps, node)
    patched = model.clone()
    if not is_compiled(patched):
        # Last, so that it is called inside of every other wrapper, and only when the UNet is.
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, options.INVERSION, recorder.visit)
    try:
        result = run_sampler(patched, recorder, latent, sigmas, conditioning, callback=preview(model, count))
    finally:
        remembered.restore()  # so that a run that resumes after an interruption finds them as this one did
    tensors, values = source_prompt(conditioning) or ({}, None)
    about = {"model": model_fingerprint(model), "pack": __version__, "refinements": refinements, "prompt": values}
    about["guidance"] = guidance_of(model.model_options)
    columns = {name: [step[name] for step in recorder.steps] for name in recorder.steps[0]}
    facts = {"residuals": torch.stack(columns["residual"]), "stopped": torch.stack(columns["stopped"])}
    facts |= {"conditioning": tensors, "about": about}
    inversion = Inversion.of_steps(schedule, recorder.clip, columns["x"], sigmas, **facts)
    unfinished.discard()
    report_status(node, "; ".join([inversion.quality(), *_left_unfinished()]))
    return result | noise_of(model, inversion), inversion


def _unfinished_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "cove" / "unfinished"


def _make_room(unfinished: UnfinishedInversion, size: int) -> tuple[bool, str]:
    """Return whether an inversion of `size` bytes is kept while it is unfinished, and a line on the size of all."""
    kept, limit, others = unfinished.make_room(size), format_bytes(unfinished.LIMIT), unfinished.others()
    if kept:
        return kept, f"unfinished inversions use up to {format_bytes(others + size)} of {limit} in user/cove"
    return kept, (
        f"steps are not kept for resuming: {format_bytes(size)} and {format_bytes(others)} of other unfinished "
        f"inversions exceed {limit} in user/cove"
    )


def _left_unfinished() -> list[str]:
    """Describe in a line how large the unfinished inversions are, if there are any."""
    size, limit = sum(unfinished_in(_unfinished_folder()).values()), UnfinishedInversion.LIMIT
    return [f"unfinished inversions use {format_bytes(size)} of {format_bytes(limit)} in user/cove"] if size else []


@dataclass(eq=False)
class _Recorder:
    """A sampler function for one run that inverts and records every step."""

    refinements: int
    unfinished: UnfinishedInversion | None  # None when its steps are too large to be kept
    steps: list[dict[str, Tensor]]  # finished ones
    node: type
    visits: Visits = field(default_factory=Visits)

    def visit(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs
    ):
        """Wrap each call of the UNet."""
        self.visits.add(options.INVERSION, transformer_options)
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def __call__(self, denoise, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback, disable) -> Tensor:
        self.clip = x.cpu()
        climbing = Climbing(denoise.inner_model, extra_args["model_options"])
        wrappers = extra_args["model_options"]["transformer_options"]["wrappers"]
        counted = options.INVERSION in wrappers.get(WrappersMP.DIFFUSION_MODEL, {})

        def model(guess: Tensor, sigma: Tensor, **arguments) -> Tensor:
            self.visits.seen.clear()
            arguments["model_options"] = climbing.at(sigma[0], arguments["model_options"])
            denoised = denoise(guess, sigma, **arguments)
            if counted:
                self.visits.check([options.INVERSION], [denoise.inner_model.conds["positive"]], sigma, self.node)
            return denoised

        trajectory = [x, *(step["x"].to(x) for step in self.steps[-2:])]
        done, before = len(self.steps), trajectory[-2] if self.steps else None
        noise = trajectory[-1]
        for taken in ddim.inversion_steps(model, noise, sigmas, self.refinements, extra_args, done, before):
            self._record(taken, len(sigmas) - 1)
            callback(taken._asdict())
            noise = taken.x
        return noise

    def _record(self, taken: ddim.InversionStep, count: int) -> None:
        numbers = {name: torch.tensor(getattr(taken, name), dtype=dtype) for name, dtype in _NUMBERS.items()}
        self.steps.append({"x": taken.x.cpu(), **numbers})
        try:
            if self.unfinished is not None:
                self.unfinished.add(taken.i, self.steps[-1])
        except OSError as error:
            report_status(self.node, f"this step could not be kept for resuming: {error}", logging.WARNING)
        line = f"step {taken.i + 1} of {count}: residual {taken.residual:.1e}"
        report_status(self.node, line + ", refining stopped" * taken.stopped, logging.DEBUG)


_NUMBERS = {"residual": torch.float64, "stopped": torch.bool}
