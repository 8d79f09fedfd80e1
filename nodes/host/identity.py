"""What an inversion belongs to: the model, the clip, the prompt, and everything else that decides it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...cove import __version__
from ...cove.fingerprint import fingerprint
from ...cove.inversion import INVERSION_FORMAT, Inversion
from .checks import check_channels
from .unet import sampling_name


def model_fingerprint(model) -> str:
    """Fingerprint the UNet's shapes and a sample of its weights as loaded, whatever LoRA is on it now."""
    weights = dict(model.model.diffusion_model.named_parameters())
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    sample = {}
    for name in sorted(weights)[:: max(1, len(weights) // 64)]:
        backup = model.backup.get(f"diffusion_model.{name}")
        weight = weights[name] if backup is None else backup.weight
        sample[name] = weight.detach().flatten()[:256].to("cpu", torch.float16)
    return fingerprint(sampling_name(model.get_model_object("model_sampling")), shapes, sample)


def run_fingerprint(model, conditioning, samples: Tensor, sigmas: Tensor, refinements: int) -> str:
    """Fingerprint everything that decides the latents of an inversion.

    An object that cannot be read never has the same fingerprint twice, so that its inversion is not resumed.
    """
    things = (
        model_fingerprint(model),
        model,
        conditioning,
        samples,
        sigmas,
        refinements,
        __version__,
        INVERSION_FORMAT,
    )
    try:
        return fingerprint(*things, known=_Contents(model))
    except Exception as error:  # objects of other packs raise what they like when they are read
        logging.warning("What is on the model cannot be read (%r): after a break, this inversion begins anew", error)
        return uuid.uuid4().hex


# What the host's own ControlNets keep for as long as a run lasts.
OF_A_RUN = {"cond_hint", "extra_concat", "timestep_range", "model_sampling_current", "control_input"}

# Of a MODEL: all that nodes can put on it.
PUT_ON_MODELS = ("patches", "object_patches", "weight_wrapper_patches", "model_options", "wrappers", "callbacks")
PUT_ON_MODELS += ("injections", "hook_patches", "forced_hooks", "attachments", "additional_models")
PUT_ON_MODELS += ("force_cast_weights",)

# What the host sets on the networks that it loads.
SET_BY_LOADING = {"device", "current_patcher", "current_weight_patches_uuid"}
LOADING = ("comfy_", "prev_comfy_", "model_", "lowvram_", "weight_", "bias_", "dynamic_")

MOST = 10_000  # objects, a few seconds; an SDXL MODEL with a ControlNet holds some dozens. What holds more is not read


class _Contents:
    """A hashable stand-in for an object: its content if readable, else a unique id."""

    def __init__(self, model):
        self.count = 0
        # Weights of MODEL as they were loaded, whatever LoRA is in them now.
        weights = dict(model.model.named_parameters())
        self.unpatched = {id(weights[name]): held.weight for name, held in model.backup.items() if name in weights}

    def __call__(self, thing: Any) -> Any:
        self.count += 1
        if self.count > MOST:
            return uuid.uuid4().hex
        if isinstance(thing, torch.dtype | torch.device):
            return str(thing)
        if isinstance(thing, type):
            return "class", [f"{base.__module__}.{base.__qualname__}" for base in thing.__mro__]
        if isinstance(thing, ModuleType):
            return "module", thing.__name__
        if isinstance(thing, ModelPatcher):
            put = {name: getattr(thing, name, None) for name in PUT_ON_MODELS}
            return type(thing), put, thing.model, str(thing.model_dtype()), str(thing.load_device)
        if isinstance(thing, torch.nn.Module):
            return self._network(thing)
        if isinstance(thing, FunctionType):
            return self._function(thing)
        if isinstance(thing, CodeType):
            return thing.co_code, thing.co_consts, thing.co_names, thing.co_varnames, thing.co_freevars
        if isinstance(thing, MethodType):
            return "method", thing.__func__, thing.__self__
        if isinstance(thing, set | frozenset):
            return type(thing), sorted(fingerprint(item, known=self) for item in thing), vars_of(thing)
        if isinstance(thing, ControlBase):
            return type(thing), {name: value for name, value in vars(thing).items() if name not in OF_A_RUN}
        return self._parts(thing)

    def _parts(self, thing: Any) -> Any:
        """Return what pickling would save of an object, and its attributes."""
        try:
            made = thing.__reduce_ex__(4)
        except Exception:  # whatever it raises: it says that it cannot be taken apart
            return uuid.uuid4().hex
        if isinstance(made, str):
            return type(thing), made
        how, arguments, state, items, pairs = (*made, None, None, None)[:5]
        return type(thing), how, arguments, state, list(items or ()), list(pairs or ()), vars_of(thing)

    def _function(self, function: FunctionType) -> Any:
        """Return its code, its closure, and the plain values of its module that it reads."""
        reads = {name: function.__globals__.get(name) for name in function.__code__.co_names}
        plain = {name: value for name, value in reads.items() if isinstance(value, bool | int | float | str | Tensor)}
        held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        name = f"{function.__module__}.{function.__qualname__}"
        return name, function.__code__, function.__defaults__, function.__kwdefaults__, held, plain, vars_of(function)

    def _network(self, network: torch.nn.Module) -> Any:
        """Return its classes, a sample of its weights, and the settings of its modules that are not the host's."""
        sample = {}
        for name, weight in (*network.named_parameters(), *network.named_buffers()):
            weight = self.unpatched.get(id(weight), weight)
            some = weight.detach().flatten()
            some = some if len(some) <= 4 * SAMPLE else torch.cat((some[:SAMPLE], some[-SAMPLE:]))
            sample[name] = list(weight.shape), some.cpu()
        bare = not any(True for _ in network.parameters())  # a schedule, for instance: it is its settings
        parts = {}
        for name, part in network.named_modules():
            own = bare or type(part).__module__.partition(".")[0] not in ("torch", "comfy")
            parts[name] = type(part), _settings(part) if own else None
        return sample, parts


SAMPLE = 256  # numbers at either end of a weight


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith(("_", *LOADING)) and name not in SET_BY_LOADING and name != "training"
    }


def vars_of(thing: Any) -> dict[str, Any]:
    return dict(getattr(thing, "__dict__", {}))


def source_prompt(conditioning) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return a CONDITIONING as tensors and plain values; None if it has several entries, areas or a ControlNet."""
    if len(conditioning) != 1:
        return None
    text, extras = conditioning[0]
    extras = {name: value for name, value in extras.items() if value is not None}
    tensors = {"cond": text} | {name: value for name, value in extras.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in extras.items() if not isinstance(value, Tensor)}
    limited = {"area", "mask", "start_percent", "end_percent"} & extras.keys()
    if limited or not all(isinstance(value, bool | int | float | str) for value in values.values()):
        return None
    return tensors, values


def conditioning_of(inversion: Inversion) -> list | None:
    """Return the source prompt that an inversion holds, as a CONDITIONING; None if it holds none."""
    if "cond" not in inversion.conditioning:
        return None
    extras = {name: tensor for name, tensor in inversion.conditioning.items() if name != "cond"}
    return [[inversion.conditioning["cond"], {**extras, **inversion.about["prompt"]}]]


def check_fits(inversion: Inversion, model, latent: Mapping[str, Any] | None = None) -> None:
    """Raise when an inversion was made with another model, or of another clip than the one given."""
    check_channels(model, inversion.clip)
    if inversion.about.get("model") != model_fingerprint(model):
        raise ValueError(
            "this inversion was made with another checkpoint than the one connected (or with another model sampling, "
            "or in another precision, bf16 or fp16). Load the checkpoint as it was then, or invert the clip again."
        )
    if latent is None:
        return
    clip = model.get_model_object("latent_format").process_in(latent["samples"].float().cpu())
    if clip.shape != inversion.clip.shape:
        raise ValueError(
            f"this inversion is of latents {list(inversion.clip.shape)}, but the clip connected has "
            f"{list(clip.shape)}. Load the same frames at the same size."
        )
    # An autoencoder in half precision does not give the same twice on every machine.
    changed = (clip - inversion.clip).flatten(1).norm(dim=1) > 0.05 * inversion.clip.flatten(1).norm(dim=1)
    if changed.any():
        raise ValueError(
            f"this inversion is of another clip: frames {changed.nonzero().flatten().tolist()[:8]} differ. "
            f"Load the same frames, or invert the clip again."
        )
