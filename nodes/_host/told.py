"""What a patch inside the UNet is told of the run around it: sigma, the frames in the batch, areas of conditionings."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
from torch import Tensor

KEY = "cove"


def window_of(options: dict[str, Any]) -> list[int] | None:
    """The frames in the batch when a context window is at work: core's, or AnimateDiff-Evolved's."""
    window = options.get("context_window")
    if window is not None:
        return list(window.index_list)
    return (options.get("ad_params") or {}).get("sub_idxs")


def tell_areas(model) -> None:
    """Have what is run with this clone of MODEL tell its blocks sigma, the size of the whole latents and the areas."""
    wrappers = comfy.patcher_extension.WrappersMP
    if not model.get_wrappers(wrappers.CALC_COND_BATCH, KEY):
        model.add_wrapper_with_key(wrappers.CALC_COND_BATCH, KEY, _tell_areas)


def area_of(options: dict[str, Any], uuid) -> tuple[int, int, int, int] | None:
    """Height, width, top and left, in latents, of what this conditioning is run on; None for all of it."""
    return options[KEY]["areas"].get(uuid)


def latent_size(options: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the whole latents."""
    return options[KEY]["latent_size"]


def sigma_of(options: dict[str, Any]) -> float:
    """The noise level. Read from a tensor, it would keep a GPU waiting in every block."""
    return options[KEY]["sigma"]


def told_of(conds, x_in: Tensor, timestep: Tensor) -> dict[str, Any]:
    """What the blocks are told when these conditionings run on `x_in` at `timestep`, which is sigma."""
    size = tuple(x_in.shape[-2:])

    def inside(height: int, width: int, top: int, left: int) -> tuple[int, int, int, int]:
        """As the host cuts an area that reaches past the picture."""
        return min(height, size[0] - top), min(width, size[1] - left), top, left

    areas = {cond["uuid"]: inside(*cond["area"]) for some in conds for cond in some or [] if "area" in cond}
    return {"latent_size": size, "areas": areas, "sigma": float(timestep[0])}


def _tell_areas(executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]):
    options = {**model_options.get("transformer_options", {}), KEY: told_of(conds, x_in, timestep)}
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})
