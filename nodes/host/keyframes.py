"""Timestep keyframes of other nodes during an inversion, where sigma rises.

ComfyUI's hook keyframes, Advanced-ControlNet's timestep keyframes and similar objects remember their current keyframe
and look for the next one as sigma falls. In an inversion they would jump to their last keyframe at the first step and
stay there. So their state is restored before each noise level, and each evaluation is the first of a run that begins at
that level: they then find the keyframe that is valid there, as they do when sampling begins halfway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .options import options_with

DEPTH = 16  # objects within objects that are looked at


class Remembered:
    """The state of objects that remember a keyframe, to be restored.

    These are all ControlNets that are not the host's own, with the objects in them, and every object that holds a list
    of objects with a `start_percent`, itself or in an attribute.
    """

    def __init__(self, *roots: Any):
        self._held: dict[int, tuple[Any, Any]] = {}  # by id: the object or container, and a copy of what it holds
        self._seen: dict[int, Any] = {}
        for root in roots:
            self._look(root, False, DEPTH)

    def __bool__(self) -> bool:
        return bool(self._held)

    def restore(self) -> None:
        for thing, held in self._held.values():
            if isinstance(thing, list):
                thing[:] = held
            else:
                inside = thing if isinstance(thing, dict) else vars(thing)
                inside.clear()
                inside.update(held)

    def _look(self, thing: Any, whole: bool, depth: int) -> None:
        """whole: keep the state of every object in it."""
        if depth == 0 or id(thing) in (self._held if whole else self._seen):
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, ControlBase):
            whole = type(thing).__module__ != ControlBase.__module__
        elif _is_hosts(thing):
            whole = False
        if not isinstance(thing, _CLOSED) and (whole or _has_schedule(thing) or _is_keyframe(thing)):
            self._keep(thing)
        for inside in _inside(thing):
            self._look(inside, whole, depth - 1)

    def _keep(self, thing: Any) -> None:
        if isinstance(thing, list):
            self._held[id(thing)] = thing, list(thing)
        elif isinstance(thing, dict):
            self._held[id(thing)] = thing, dict(thing)
        elif hasattr(thing, "__dict__"):
            self._held[id(thing)] = thing, dict(vars(thing))


def _is_hosts(thing: Any) -> bool:
    """Return whether an object is one of ComfyUI's own, such as a VAE, which keeps no state of a run."""
    return type(thing).__module__.partition(".")[0] == "comfy"


def _has_schedule(thing: Any, remove: int = 1) -> bool:
    """Return whether an object holds a list of objects with a `start_percent`, itself or in an attribute."""
    if isinstance(thing, _CLOSED) or not hasattr(thing, "__dict__"):
        return False
    for value in vars(thing).values():
        if isinstance(value, list | tuple) and value and all(map(_is_keyframe, value)):
            return True
        if remove and _has_schedule(value, 0):
            return True
    return False


def _is_keyframe(thing: Any) -> bool:
    return hasattr(thing, "start_percent")


# Not searched for objects that remember; of a ModelPatcher only the attachments are.
_CLOSED = (Tensor, torch.nn.Module, ModelPatcher, ModuleType, FunctionType, MethodType, partial, type)


def _inside(thing: Any) -> Iterator[Any]:
    """Yield the objects that an object, a container or a function holds."""
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, FunctionType):
        yield from thing.__closure__ or ()
    elif isinstance(thing, CellType):
        try:
            yield thing.cell_contents
        except ValueError:  # a name that has no value yet
            return
    elif isinstance(thing, MethodType):
        yield thing.__self__
    elif isinstance(thing, partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, ModelPatcher):
        yield from (thing.attachments, thing.additional_models)
    elif not isinstance(thing, _CLOSED) and hasattr(thing, "__dict__"):
        yield from vars(thing).values()


class Climbing:
    """Sets every keyframe schedule of a run to the noise level of each evaluation, while sigma rises.

    Create it when the run is ready for its first evaluation.
    """

    def __init__(self, guider, model_options: dict[str, Any]):
        patcher = guider.model_patcher
        self._patcher = patcher
        self._remembered = Remembered(guider.conds, model_options, patcher)
        groups = [cond["hooks"] for some in guider.conds.values() for cond in some if cond.get("hooks") is not None]
        self._hooks = {id(hook.hook_keyframe): hook.hook_keyframe for group in groups for hook in group.hooks}.values()
        self._sigma: float | None = None

    def at(self, sigma: Tensor, model_options: dict[str, Any]) -> dict[str, Any]:
        """Return the model_options for an evaluation at `sigma`, a scalar tensor."""
        if not self._remembered:
            return model_options
        run = model_options["transformer_options"]["sample_sigmas"]
        begun = options_with(model_options, sample_sigmas=run.clamp(max=sigma))
        if float(sigma) != self._sigma:
            self._sigma = float(sigma)
            before = [hook.strength for hook in self._hooks]
            self._remembered.restore()
            for hook in self._hooks:
                # A hook takes a level for the one it is at already if it was the last of another run.
                for level in (sigma.new_tensor(math.inf), sigma):
                    hook.prepare_current_keyframe(level, begun["transformer_options"])
            if before != [hook.strength for hook in self._hooks]:
                self._patcher.clear_cached_hook_weights()
        return begun
