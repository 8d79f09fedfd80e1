"""What an inversion belongs to: the model, the clip, the prompt, and all else that decides it."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...cove import __version__
from ...cove.fingerprint import fingerprint
from ...cove.inversion import Inversion
from .sampling import check_channels

# Things whose content is not known count as themselves, as long as they live: addresses are used again.
_NAMES: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def model_fingerprint(model) -> str:
    """Of the UNet's shape and a sample of its weights as they were loaded, whatever LoRA is on it now."""
    weights = dict(model.model.diffusion_model.named_parameters())
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    sample = {}
    for name in sorted(weights)[:: max(1, len(weights) // 64)]:
        backup = model.backup.get(f"diffusion_model.{name}")
        weight = weights[name] if backup is None else backup.weight
        sample[name] = weight.detach().flatten()[:256].to("cpu", torch.float16)
    return fingerprint(model.model.model_type.name, shapes, sample)


def run_fingerprint(model, conditioning, samples: Tensor, sigmas: Tensor, refinements: int) -> str:
    """Of everything that decides the latents of an inversion."""
    options = model.model_options
    patches = {**options.get("transformer_options", {}), "wrappers": None, "callbacks": None}
    wrappers = {
        kind: {key: made for key, made in some.items() if not str(key).startswith("cove")}
        for kind, some in model.wrappers.items()
    }
    others = {name: value for name, value in options.items() if name != "transformer_options"}
    return fingerprint(
        *(model_fingerprint(model), dict(model.patches), patches, others, wrappers, dict(model.object_patches)),
        *(dict(model.injections), dict(model.hook_patches), model.forced_hooks),
        *(
            str(model.model.get_dtype()),
            str(model.load_device),
            conditioning,
            samples,
            sigmas,
            refinements,
            __version__,
        ),
        known=_content,
    )


def _content(thing: Any) -> Any:
    """What stands for a thing of the host's: its content where that is known, else a name nothing else ever has."""
    if isinstance(thing, torch.dtype | torch.device):
        return str(thing)
    if isinstance(thing, WeightAdapterBase):
        return type(thing).__qualname__, thing.weights
    if isinstance(thing, ControlBase):
        net = getattr(thing, "control_model", None)
        weights = [weight.detach().flatten()[:256].cpu() for weight in net.parameters()][::16] if net else None
        hint = getattr(thing, "cond_hint_original", None)
        settings = (thing.strength, thing.timestep_percent_range, thing.global_average_pooling, thing.extra_args)
        more = (thing.extra_concat_orig, thing.vae)
        if weights is not None:
            return type(thing).__qualname__, settings, more, hint, weights, thing.previous_controlnet
    name = uuid.uuid4().hex
    try:
        return _NAMES.setdefault(thing, name)
    except TypeError:  # it cannot be told from its like, so it is never taken for what it was before
        return name


def source_prompt(conditioning) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A CONDITIONING as tensors and plain values; None when it holds more: several entries, areas, a ControlNet."""
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
    """The source prompt that an inversion holds, as a CONDITIONING; None when it holds none."""
    if "cond" not in inversion.conditioning:
        return None
    extras = {name: tensor for name, tensor in inversion.conditioning.items() if name != "cond"}
    return [[inversion.conditioning["cond"], {**extras, **inversion.about["prompt"]}]]


def check_fits(inversion: Inversion, model, node: str, latent: Mapping[str, Any] | None = None) -> None:
    """An error when an inversion was made with another model, or of another clip than the one given."""
    check_channels(model, inversion.clip, node)
    if inversion.about.get("model") != model_fingerprint(model):
        raise ValueError(
            f"{node}: this inversion was made with another checkpoint than the one connected (or in another precision, "
            f"bf16 or fp16). Load the checkpoint as it was then, or invert the clip again."
        )
    if latent is None:
        return
    clip = model.get_model_object("latent_format").process_in(latent["samples"].float().cpu())
    if clip.shape != inversion.clip.shape:
        raise ValueError(
            f"{node}: this inversion is of latents {list(inversion.clip.shape)}, but the clip connected has "
            f"{list(clip.shape)}. Load the same frames at the same size."
        )
    # An autoencoder in half precision does not give the same twice on every machine.
    changed = (clip - inversion.clip).flatten(1).norm(dim=1) > 0.05 * inversion.clip.flatten(1).norm(dim=1)
    if changed.any():
        raise ValueError(
            f"{node}: this inversion is of another clip: frames {changed.nonzero().flatten().tolist()[:8]} differ. "
            f"Load the same frames, or invert the clip again."
        )
