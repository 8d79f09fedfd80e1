"""Which frames of the clip are in a batch, and everything that goes with frames, cut to them.

A batch holds fewer frames than the clip where core's or AnimateDiff-Evolved's context windows cut it, and where this
pack does: Diffusion Features by `batch_size`, TokenFlow by keyframes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Frames of the clip that this pack cut out, published where core publishes its context window."""

    index_list: list[int]


def frames_in(options: dict[str, Any]) -> tuple[int, ...] | None:
    """The frames of the clip in the batch, in its order; None for the whole clip.

    A core window may run with the frame before it in front (`causal_window_fix`, since 0.21), which core cuts away
    afterwards.
    """
    window = options.get("context_window")
    if window is not None:
        anchor = getattr(window, "causal_anchor_index", None)
        return (*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list)
    frames = (options.get("ad_params") or {}).get("sub_idxs")
    return None if frames is None else tuple(frames)


def ad_params_of(options: dict[str, Any], frames: Sequence[int] | None, clip: int) -> dict[str, Any]:
    """AnimateDiff-Evolved's `ad_params` for these frames, which Advanced-ControlNet and IPAdapter go by.

    Advanced-ControlNet keeps what it read last, so the whole clip is published, too.
    """
    return {
        **(options.get("ad_params") or {}),
        "full_length": clip,
        "context_length": clip if frames is None else len(frames),
        "sub_idxs": None if frames is None else list(frames),
    }


def cut_conds(
    conds: Sequence[list[dict] | None], batch: Sequence[int], places: Sequence[int], clip: int
) -> list[list[dict] | None]:
    """Conditionings of a batch, cut to some of its frames; ControlNets stay whole, see `cut_controls`.

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
    """Conditionings whose ControlNets have the hints of these frames of the clip.

    The host and its windows never cut hints, and give every part those of the first frames.

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
    """A ControlNet for these frames: a copy that shares its weights, or itself when nothing in it goes by frames."""
    previous = getattr(control, "previous_controlnet", None)
    cut_previous = None if previous is None else _cut_control(previous, frames, made)
    hint, concats = control.cond_hint_original, list(getattr(control, "extra_concat_orig", ()))
    varies = not follows_frames(control) and any(_rows_of(rows) > 1 for rows in (hint, *concats))
    if not varies and cut_previous is previous:
        return control
    # Others may hold methods that are bound to the original, as Advanced-ControlNet's do: a copy would run that one.
    if not type(control).__module__.startswith("comfy."):
        name = f"{type(control).__name__} ({type(control).__module__.partition('.')[0]})"
        raise ValueError(
            f"A ControlNet of type {name} cannot be run on a part of the clip together with a hint for each frame. "
            f"Use ComfyUI's own Apply ControlNet, or Advanced-ControlNet's for all ControlNets of the prompt, or run "
            f"all frames at once: no context windows, a larger `batch_size`."
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
    """Whether a ControlNet goes by `ad_params` itself, as those of Advanced-ControlNet do."""
    return hasattr(control, "sub_idxs")


def controls_of(cond: dict) -> Iterator[Any]:
    """The ControlNets of a conditioning, the last applied first."""
    control = cond.get("control")
    while control is not None:
        yield control
        control = getattr(control, "previous_controlnet", None)


def _rows_of(rows: Any) -> int:
    """Reference ControlNets hold other things than pictures as their hint."""
    return len(rows) if isinstance(rows, Tensor) else 1


def _cut_rows(rows: Any, frames: list[int]) -> Any:
    return rows[frames] if _rows_of(rows) > 1 else rows


# --- one, or one for each frame ---

# What a conditioning may hold for each frame, and what users call it.
PER_FRAME = {
    "cross_attn": "the prompt",
    "pooled_output": "the pooled prompt",
    "mask": "the mask of a prompt",
    "concat_latent_image": "the picture of InstructPixToPixConditioning or InpaintModelConditioning",
    "concat_mask": "the mask of InpaintModelConditioning",
    "concat_image": "the picture of an upscaling model",
}


def check_rows(conds: Iterable[dict], frames: int, node: str) -> None:
    """Raise when a conditioning holds neither one of something nor one for each frame.

    Args:
        conds: conditionings as the host makes them from CONDITIONING (`convert_cond`).
        frames: of the clip.
    """
    for cond in conds:
        for name, what in PER_FRAME.items():
            if _rows_of(cond.get(name)) not in (1, frames):
                raise ValueError(
                    f"{node}: {what} has {len(cond[name])} rows for {frames} frames. Give it one, or one for each "
                    f"frame."
                )
        for control in controls_of(cond):
            rows = 1 if follows_frames(control) else _rows_of(control.cond_hint_original)
            if rows not in (1, frames):
                raise ValueError(
                    f"{node}: a ControlNet has {rows} hint images for {frames} frames. Give it one image, or one for "
                    f"each frame: make the hints from the same frames, with the same start, count and stride."
                )


def check_no_reference(conds: Iterable[dict], node: str) -> None:
    """Raise when a reference ControlNet is in a conditioning.

    Advanced-ControlNet's runs parts of the batch through self-attention by themselves, with the reference's tokens
    beside theirs, so it is unknown which frames they are. Its hint is no picture until a run has begun.
    """
    for control in (control for cond in conds for control in controls_of(cond)):
        hint = control.cond_hint_original
        if hasattr(control, "ref_opts") or not isinstance(hint, Tensor | None):
            raise ValueError(
                f"{node}: expected ControlNets that take a picture as their hint, got {type(control).__name__}, which "
                f"changes self-attention. Remove the reference ControlNet from the prompts."
            )
