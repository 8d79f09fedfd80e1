"""Conditionings and ControlNets, cut to the frames of the clip that are in a batch.

A batch holds fewer frames than the clip where ComfyUI's or AnimateDiff-Evolved's context windows cut it, and where this
pack does: Diffusion Features by `batch_size`, TokenFlow by keyframes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.conds
from torch import Tensor

from .errors import NodeError


def cut_conds(
    conds: Sequence[list[dict] | None], batch: Sequence[int], places: Sequence[int], clip: int
) -> list[list[dict] | None]:
    """Cut the conditionings of a batch to some of its frames; for ControlNets see `cut_controls`.

    Args:
        conds: prompt by prompt, as `calc_cond_batch` takes them.
        batch: the frames of the clip in the batch.
        places: those wanted, as places in `batch`.
        clip: frames of the clip. ComfyUI's windows cut some of what has as many rows and leave the rest whole.
    """
    places = list(places)
    frames = [batch[place] for place in places]

    def cut(rows: Tensor) -> Tensor:
        if len(rows) == len(batch):
            return rows if places == [*range(len(batch))] else rows[places]
        return rows[frames] if len(rows) == clip else rows

    def cut_cond(cond: dict) -> dict:
        made = {
            name: value._copy_with(cut(value.cond)) if _has_rows(value) else value
            for name, value in cond.get("model_conds", {}).items()
        }
        mask = {"mask": cut(cond["mask"])} if isinstance(cond.get("mask"), Tensor) else {}
        return {**cond, "model_conds": made, **mask}

    return [some and [cut_cond(cond) for cond in some] for some in conds]


def _has_rows(value: Any) -> bool:
    rows = getattr(value, "cond", None)
    return isinstance(rows, Tensor) and rows.ndim > 0 and not isinstance(value, comfy.conds.CONDConstant)


# --- ControlNets ---


def cut_controls(conds: Sequence[list[dict] | None], frames: Sequence[int], made: dict[int, Any]) -> list:
    """Return conditionings whose ControlNets have the hints of these frames of the clip.

    ComfyUI and its windows never cut hints: every part gets those of the first frames.

    Args:
        made: ControlNets cut to these frames, by the id of the whole one: positive and negative prompt must get the
            same object, or the host would not run them together.
    """

    def cut(cond: dict) -> dict:
        control = cond.get("control")
        return cond if control is None else {**cond, "control": _cut_control(control, list(frames), made)}

    return [some and [cut(cond) for cond in some] for some in conds]


def _cut_control(control: Any, frames: list[int], made: dict[int, Any]) -> Any:
    if id(control) not in made:
        made[id(control)] = _with_hints_of(control, frames, made)
    return made[id(control)]


def _with_hints_of(control: Any, frames: list[int], made: dict[int, Any]) -> Any:
    """Return a copy of a ControlNet with the hints of these frames, or itself if it has no hint per frame."""
    previous = getattr(control, "previous_controlnet", None)
    cut_previous = None if previous is None else _cut_control(previous, frames, made)
    hint, concats = control.cond_hint_original, list(getattr(control, "extra_concat_orig", ()))
    varies = not follows_frames(control) and any(rows_of(rows) > 1 for rows in (hint, *concats))
    if not varies and cut_previous is previous:
        return control
    # Others may hold methods that are bound to the original, as Advanced-ControlNet's do: a copy would run that one.
    if not type(control).__module__.startswith("comfy."):
        name = f"{type(control).__name__} ({type(control).__module__.partition('.')[0]})"
        raise NodeError(
            "COVE",
            f"a ControlNet of type {name} with a hint for each frame cannot run on a part of the clip. Use ComfyUI's "
            f"own Apply ControlNet, or Advanced-ControlNet's for all ControlNets of the prompt, or run all frames at "
            f"once: no context windows, a larger `batch_size`.",
        )
    part = copy.copy(control)
    part.previous_controlnet = cut_previous
    part.cond_hint = part.extra_concat = None
    part.cond_hint_original = _cut_rows(hint, frames)
    part.extra_concat_orig = [_cut_rows(rows, frames) for rows in concats]
    clones = getattr(control, "multigpu_clones", {})
    part.multigpu_clones = {device: _cut_control(clone, frames, made) for device, clone in clones.items()}
    return part


def follows_frames(control: Any) -> bool:
    """Return whether a ControlNet selects its hints by `ad_params` itself, as those of Advanced-ControlNet do."""
    return hasattr(control, "sub_idxs")


def controls_of(cond: dict) -> Iterator[Any]:
    """Yield the ControlNets of a conditioning, the last applied first."""
    control = cond.get("control")
    while control is not None:
        yield control
        control = getattr(control, "previous_controlnet", None)


def rows_of(rows: Any) -> int:
    """Return the number of rows of a tensor; 1 for other objects, such as a reference ControlNet's hint."""
    return len(rows) if isinstance(rows, Tensor) else 1


def _cut_rows(rows: Any, frames: list[int]) -> Any:
    return rows[frames] if rows_of(rows) > 1 else rows
