"""What sampling starts from: is it inverted noise, and of the model that samples?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...cove import ddim
from ...cove.schedule import Schedule
from .attention import guidance_differs
from .model import sigmas_at
from .sampling import GUIDANCE_KEY, SIGMAS_KEY, check_unmasked, is_noise

NEVER_INVERTED = (
    "the latents that sampling starts from are not inverted noise: they are far too clean for the first sigma. Connect "
    "the `noise` of DDIM Inversion or Load Inversion, not the latents of the clip"
)


def sampling_sigmas(model, noise: dict[str, Any], node: str) -> Tensor:
    """Return the sigmas that a LATENT with inverted noise carries, descending to 0, [steps + 1].

    Raises:
        ValueError: the LATENT carries none, has a noise mask, or was inverted with another model sampling.
    """
    check_unmasked(noise, node)
    if SIGMAS_KEY not in noise:
        raise ValueError(
            f"{node}: expected inverted noise, got latents that were never inverted, or lost their schedule in another "
            "node. Connect the `noise` output of DDIM Inversion or Load Inversion."
        )
    sigmas = noise[SIGMAS_KEY]
    ours = torch.cat((torch.zeros(1), sigmas_at(model, Schedule(len(sigmas) - 1).sampling, node)))
    if not torch.allclose(sigmas, ours, rtol=1e-4, atol=0):
        raise ValueError(
            f"{node}: the inversion ended at sigma {float(sigmas[-1]):.4f}, but the same timestep of this model has "
            f"sigma {float(ours[-1]):.4f}. Sample with the checkpoint and the model sampling that inverted the clip."
        )
    return sigmas.flip(0)


def start_warnings(
    start: Tensor, sigma: float, inverted: Mapping[str, Any], model_options: dict[str, Any]
) -> list[str]:
    """Lines on what is wrong with sampling from `start`, latents as the model sees them, at `sigma`.

    inverted: what is known of the inversion, with "guidance" as `guidance_of` describes it, if that is known.
    """
    warnings = [] if is_noise(start, sigma) else [NEVER_INVERTED]
    differs = guidance_differs(inverted["guidance"], model_options) if "guidance" in inverted else None
    return warnings + ([differs] if differs else [])


def warn_of_start(model, noise: dict[str, Any], sigma: Tensor, report: Callable[..., None]) -> None:
    """A warning before a run when a LATENT is no inverted noise, or that of a model that attends otherwise."""
    start = model.model.process_latent_in(noise["samples"].float())
    inverted = {"guidance": noise[GUIDANCE_KEY]} if GUIDANCE_KEY in noise else {}
    warnings = start_warnings(start, float(sigma), inverted, model.model_options)
    if warnings:
        report("; ".join(warnings), logging.WARNING)


def sample_from_noise(report: Callable[..., None], model, x: Tensor, sigmas: Tensor, *args, **kwargs) -> Tensor:
    """`cove.ddim.sample`, with a warning when it starts from clean latents."""
    if not is_noise(x, float(sigmas[0])):
        report(NEVER_INVERTED, logging.WARNING)
    return ddim.sample(model, x, sigmas, *args, **kwargs)
