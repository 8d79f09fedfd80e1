"""Features of the source on the sampling grid, computed once and kept in memory or on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...cove.files import on_disk
from ...cove.injection import Site
from ...cove.inversion import Inversion
from . import injection
from .attention import guidance_differs
from .checks import check_not_compiled
from .files import saving
from .run import run_sampler
from .source import check_source_prompt
from .status import format_bytes, preview, report_status

MEMORY, DISK = "memory", "disk"
STORAGES = (MEMORY, DISK)


def store_features(
    model, inversion: Inversion, sites: tuple[Site, ...], steps: int, storage: str, conditioning, node
) -> Inversion:
    """Return the inversion with the source's features of the first `steps` sampling steps.

    Args:
        storage: MEMORY, or DISK: files in ComfyUI's temp folder.
        conditioning: the source prompt.
        node: the node's class; the size of the features is shown on it first.

    Raises:
        ValueError: they do not fit, nothing would be stored, or MODEL sees frames in windows.
    """
    _check_storable(model)
    check_source_prompt(inversion, conditioning)
    differs = guidance_differs(inversion.about["guidance"], model.model_options, "stored")
    if differs:
        report_status(node, f"{differs}. Connect the model of DDIM Inversion", logging.WARNING)
    report_status(node, _size_line(model, inversion, sites, steps, storage))
    first = inversion.schedule.steps - steps
    features: dict[int, Mapping[str, Tensor]] = {}

    def collect(denoise, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback, disable) -> Tensor:
        with injection.capturing_features(extra_args["model_options"], sites, node) as capture:
            for i, step in enumerate(range(inversion.schedule.steps - 1, first - 1, -1)):
                latents, sigma = inversion.latents[step].to(x), inversion.sigmas[step + 1]
                capture.forget()
                denoised = denoise(latents, sigma.to(x).expand(len(x)), **extra_args)
                with saving():
                    features[step] = _keep(capture.whole_clip(float(sigma)), storage)
                callback({"x": latents, "i": i, "sigma": sigma, "denoised": denoised})
        return x

    clip = {"samples": model.get_model_object("latent_format").process_out(inversion.clip)}
    sigmas = inversion.sigmas[first:].flip(0)
    run_sampler(injection.with_sites(model), collect, clip, sigmas, conditioning, callback=preview(model, steps))
    return replace(inversion, features=features)


def _check_storable(model) -> None:
    check_not_compiled(model)
    if model.model_options.get("context_handler") is not None:
        raise ValueError(
            "expected a model without context windows, which run a frame several times. Remove the context windows, or "
            "remove this node: Feature Injection then computes the features itself."
        )
    if model.model_options.get("disable_cfg1_optimization"):
        raise ValueError(
            "expected a model that runs one prompt at cfg 1, but a node on it requires the negative prompt as well. "
            "Remove that node from this model, or remove this one."
        )


def _size_line(model, inversion: Inversion, sites: tuple[Site, ...], steps: int, storage: str) -> str:
    """Describe how large the features are; raise when they do not fit."""
    frames, _, height, width = inversion.clip.shape
    one = frames * injection.bytes_of(model, sites, (height, width))
    if not sites or not steps:
        raise ValueError("expected at least one block and one step, got none to store. Increase `share`.")
    if storage == MEMORY:
        free, place = comfy.model_management.get_free_memory(torch.device("cpu")), "of memory"
    else:
        folder = Path(folder_paths.get_temp_directory())
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free, place = shutil.disk_usage(existing).free, "on disk"
    size = f"{format_bytes(one * steps)} ({steps} steps x {frames} frames x {format_bytes(one // frames)})"
    if one * steps > free:
        other = f" or set `storage` to {DISK}," if storage == MEMORY else ""
        raise ValueError(
            f"the features take {size}, but {format_bytes(free)} {place} are free. Reduce `share`,{other} or remove "
            "this node: Feature Injection then computes the features itself."
        )
    return f"storing {size}; {format_bytes(free)} {place} are free"


def _keep(features: Mapping[str, Tensor], storage: str) -> dict[str, Tensor]:
    if storage == DISK:
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        return on_disk(features, folder)
    return {name: tensor.to("cpu", copy=True) for name, tensor in features.items()}
