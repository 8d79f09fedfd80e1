"""An inversion as the host runs it: what is recorded of it, and how it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import folder_paths
import torch
from torch import Tensor

from ...cove import __version__, ddim
from ...cove.inversion import Inversion, UnfinishedInversion, unfinished_in
from ...cove.schedule import Schedule
from .attention import guidance_of
from .format import format_bytes
from .identity import model_fingerprint, run_fingerprint, source_prompt
from .keyframes import Climbing, Remembered
from .model import sigmas_at
from .sampling import GUIDANCE_KEY, SIGMAS_KEY, is_compiled, preview, run
from .visits import Visits

KEY = "cove_inversion"

WRAPPERS = comfy.patcher_extension.WrappersMP


def invert(
    model,
    conditioning,
    latent: dict[str, Any],
    schedule: Schedule,
    refinements: int,
    *,
    node: str,
    report: Callable[..., None],
) -> tuple[dict[str, Any], Inversion]:
    """Return the noise as a LATENT, and the inversion. Resumes the same inversion where it was interrupted before.

    `report` shows a line to the user, as `report_status` does: first what is kept of the run while it is unfinished.
    """
    sigmas = torch.cat((torch.zeros(1), sigmas_at(model, schedule.inversion, node)))
    remembered = Remembered(conditioning, model)
    unfinished = UnfinishedInversion(
        _unfinished_folder(), run_fingerprint(model, conditioning, latent["samples"], sigmas, refinements)
    )
    steps, count = unfinished.steps(), len(sigmas) - 1
    resumed = f"resuming after step {len(steps)} of {count}, where this inversion was interrupted; " if steps else ""
    kept, room = _make_room(unfinished, unfinished.size_of(count, latent["samples"].shape))
    report(f"{resumed}{room}")
    recorder = _Recorder(refinements, unfinished if kept else None, steps, node, report)
    patched = model.clone()
    if not is_compiled(patched):
        # Last, so that it is called inside of every other wrapper, and only when the UNet is.
        patched.add_wrapper_with_key(WRAPPERS.DIFFUSION_MODEL, KEY, recorder.visit)
    try:
        show = preview(model, count)
        result = run(patched, recorder, latent, sigmas, conditioning, node=node, callback=show)
    finally:
        remembered.put_back()  # so that a run that resumes after an interruption finds them as this one did
    tensors, values = source_prompt(conditioning) or ({}, None)
    about = {"model": model_fingerprint(model), "pack": __version__, "refinements": refinements, "prompt": values}
    about["guidance"] = guidance_of(model.model_options)
    columns = {name: [step[name] for step in recorder.steps] for name in recorder.steps[0]}
    inversion = Inversion.of_steps(
        schedule,
        recorder.clip,
        columns["x"],
        sigmas,
        residuals=torch.stack(columns["residual"]),
        stopped=torch.stack(columns["stopped"]),
        conditioning=tensors,
        about=about,
    )
    unfinished.discard()
    return result | noise_of(model, inversion), inversion


def noise_of(model, inversion: Inversion) -> dict[str, Any]:
    """The noise of an inversion as a LATENT, with what it carries beside it.

    In float32: a sampler's result may be in half precision (`--fp16-intermediates`), from which no clip comes back.
    """
    noise = model.get_model_object("latent_format").process_out(inversion.noise)
    carried = {"samples": noise.to(comfy.model_management.intermediate_device()), SIGMAS_KEY: inversion.sigmas}
    return carried | {GUIDANCE_KEY: inversion.about["guidance"]} if "guidance" in inversion.about else carried


def _unfinished_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "cove" / "unfinished"


def _make_room(unfinished: UnfinishedInversion, size: int) -> tuple[bool, str]:
    """Whether an inversion of `size` bytes is kept while it is unfinished, and a line that says how large all are."""
    kept, limit, others = unfinished.make_room(size), format_bytes(unfinished.LIMIT), unfinished.others()
    if kept:
        return kept, f"unfinished inversions use up to {format_bytes(others + size)} of {limit} in user/cove"
    return kept, (
        f"steps are not kept for resuming: {format_bytes(size)} and {format_bytes(others)} of other unfinished "
        f"inversions exceed {limit} in user/cove"
    )


def left_unfinished() -> list[str]:
    """A line that says how large the unfinished inversions are, when there are any."""
    size, limit = sum(unfinished_in(_unfinished_folder()).values()), UnfinishedInversion.LIMIT
    return [f"unfinished inversions use {format_bytes(size)} of {format_bytes(limit)} in user/cove"] if size else []


@dataclass(eq=False)
class _Recorder:
    """A sampler function for one run that inverts, and records every step."""

    refinements: int
    unfinished: UnfinishedInversion | None  # None when its steps are too large to be kept
    steps: list[dict[str, Tensor]]  # finished ones
    node: str
    report: Callable[..., None]
    visits: Visits = field(default_factory=Visits)

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

        def model(guess: Tensor, sigma: Tensor, **arguments) -> Tensor:
            self.visits.seen.clear()
            arguments["model_options"] = climbing.at(sigma[0], arguments["model_options"])
            denoised = denoise(guess, sigma, **arguments)
            if counted:
                self.visits.check([KEY], [denoise.inner_model.conds["positive"]], sigma, self.node)
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
            logging.warning("%s: this step could not be kept for resuming: %s", self.node, error)
        line = f"step {taken.i + 1} of {count}: residual {taken.residual:.1e}"
        self.report(line + ", refining stopped" * taken.stopped, logging.DEBUG)


_NUMBERS = {"residual": torch.float64, "stopped": torch.bool}
