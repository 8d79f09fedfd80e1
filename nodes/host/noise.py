"""Inverted noise as a LATENT: what it carries, and whether sampling can start from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...cove import ddim
from ...cove.inversion import Inversion
from ...cove.schedule import Schedule
from . import options
from .attention import guidance_differs
from .checks import check_unmasked
from .status import report_status
from .unet import sigmas_at

NEVER_INVERTED = (
    "the latents that sampling starts from are not inverted noise: they are far too clean for the first sigma. Connect "
    "the `noise` of DDIM Inversion or Load Inversion, not the latents of the clip"
)


def noise_of(model, inversion: Inversion) -> dict[str, Any]:
    """Return the LATENT that sampling starts from, with its schedule and the attention of its model.

    In float32: a sampler's result may be in half precision (`--fp16-intermediates`), from which no clip comes back.
    """
    noise = model.get_model_object("latent_format").process_out(inversion.noise)
    carried = {"samples": noise.to(comfy.model_management.intermediate_device()), options.SIGMAS: inversion.sigmas}
    return carried | {options.GUIDANCE: inversion.about["guidance"]} if "guidance" in inversion.about else carried


def sampling_sigmas(model, noise: Mapping[str, Any]) -> Tensor:
    """Return the sigmas that a LATENT with inverted noise carries, descending to 0, [steps + 1].

    Raises:
        ValueError: the LATENT carries none, has a noise mask, or was inverted with another model sampling.
    """
    check_unmasked(noise)
    if options.SIGMAS not in noise:
        raise ValueError(
            "expected inverted noise, got latents that were never inverted, or lost their schedule in another node. "
            "Connect the `noise` output of DDIM Inversion or Load Inversion."
        )
    sigmas = noise[options.SIGMAS]
    ours = torch.cat((torch.zeros(1), sigmas_at(model, Schedule(len(sigmas) - 1).sampling)))
    if not torch.allclose(sigmas, ours, rtol=1e-4, atol=0):
        raise ValueError(
            f"the inversion ended at sigma {float(sigmas[-1]):.4f}, but the same timestep of this model has sigma "
            f"{float(ours[-1]):.4f}. Sample with the checkpoint and the model sampling that inverted the clip."
        )
    return sigmas.flip(0)


def start_warnings(
    start: Tensor, sigma: float, inverted: Mapping[str, Any], model_options: Mapping[str, Any]
) -> list[str]:
    """Describe what is wrong with sampling from `start`, latents as the model sees them, at `sigma`.

    inverted: what is known of the inversion, with "guidance" as `guidance_of` describes it, if that is known.
    """
    warnings = [] if _is_noise(start, sigma) else [NEVER_INVERTED]
    differs = guidance_differs(inverted["guidance"], model_options) if "guidance" in inverted else None
    return warnings + ([differs] if differs else [])


def warn_of_start(model, noise: Mapping[str, Any], sigma: Tensor, node) -> None:
    """Warn before a run when a LATENT is no inverted noise, or that of a model with other attention."""
    start = model.model.process_latent_in(noise["samples"].float())
    inverted = {"guidance": noise[options.GUIDANCE]} if options.GUIDANCE in noise else {}
    warnings = start_warnings(start, float(sigma), inverted, model.model_options)
    if warnings:
        report_status(node, "; ".join(warnings), logging.WARNING)


def sample_from_noise(node, model, x: Tensor, sigmas: Tensor, *args, **kwargs) -> Tensor:
    """`cove.ddim.sample`, with a warning when it starts from clean latents."""
    if not _is_noise(x, float(sigmas[0])):
        report_status(node, NEVER_INVERTED, logging.WARNING)
    return ddim.sample(model, x, sigmas, *args, **kwargs)


def _is_noise(x: Tensor, sigma: float) -> bool:
    """Return whether latents, as the model sees them, are as large as noise of this level over a clip is.

    Clean latents have a standard deviation near 1. At and below that noise level both look alike: True.
    """
    return sigma < 1 or not float(x.float().std()) < 0.6 * math.hypot(1, sigma)
