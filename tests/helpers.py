"""Shared by the tests of the nodes: small inputs, one model evaluation, node calls, expected errors.

Frames, height and width are different primes; 5x7 and 7x13 latents are 3x4 and 4x7 one level down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 3, 5, 7
TEXT = {"sd15": (768, None), "sd21": (1024, None), "sd21v": (1024, None), "sdxl": (2048, 1280)}

# Settings of core's context windows.
WINDOWS = {"context_length": 2, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1}
WINDOWS |= {"closed_loop": False, "fuse_method": "flat", "dim": 0}


def call(node, **inputs) -> tuple:
    """Return the outputs of a node for these inputs and its own defaults."""
    defaults = {
        slot.id: slot.default for slot in node.define_schema().inputs if getattr(slot, "default", None) is not None
    }
    return node.execute(**defaults | inputs).args


def run_stock(node, *inputs) -> tuple:
    """Return the outputs of a stock node, in the V3 form or the V1 form of older hosts."""
    made = node.execute(*inputs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*inputs)
    return getattr(made, "args", made)  # V1 nodes return a tuple


def windowed(model, **settings):
    """Return MODEL with core's context windows: `WINDOWS` with `settings`, else the node's defaults.

    Settings that the host's node lacks are ignored.
    """
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    stock = {slot.id for slot in ContextWindowsManualNode.define_schema().inputs}
    wanted = {name: value for name, value in (WINDOWS | settings).items() if name in stock}
    return call(ContextWindowsManualNode, model=model, **wanted)[0]


def set_free_memory(monkeypatch, size: int) -> None:
    """Make the host see `size` bytes of free memory when it chooses how many conditionings run at once."""
    import comfy.model_patcher
    import comfy.samplers

    if hasattr(comfy.model_patcher.ModelPatcher, "get_free_memory"):
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: size)
    else:
        monkeypatch.setattr(comfy.samplers, "model_management", SimpleNamespace(get_free_memory=lambda device: size))


def latents(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """Return a LATENT of random numbers on the scale of VAE-encoded frames."""
    return {"samples": 5 * torch.randn(frames, 4, height, width, generator=torch.Generator().manual_seed(seed))}


def prompt(seed: int = 0, kind: str = "sd15", **extras) -> list:
    """Return a CONDITIONING of random numbers; different seeds are unrelated prompts."""
    width, pooled = TEXT[kind]
    generator = torch.Generator().manual_seed(seed)
    vector = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
    return [[5 * torch.randn(1, 77, width, generator=generator), vector | extras]]


def hints(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Return random ControlNet hints for latents of this size."""
    return torch.rand(frames, 8 * height, 8 * width, 3, generator=torch.Generator().manual_seed(seed))


def predict(model, latent: dict[str, Tensor], positive, negative=None, cfg: float = 1.0, sigma: float = 3.0) -> Tensor:
    """Return the denoised latents at one sigma, evaluated the way a stock sampler does."""
    import comfy.sample
    import comfy.samplers

    def once(denoise, x, sigmas, extra_args, callback, disable):
        return denoise(x, sigmas[0].expand(len(x)), **extra_args)

    samples = latent["samples"]
    # One sigma per frame: core's context windows (0.3.75) compare them one by one.
    sigmas = sigma * torch.eye(max(2, len(samples)))[0]
    negative = positive if negative is None else negative
    sampler = comfy.samplers.KSAMPLER(once)
    noise = torch.zeros_like(samples)
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, samples, disable_pbar=True
    )


def state_of(model) -> dict[str, Any]:
    """Return everything in a MODEL that a node could change without owning it, in comparable form."""

    def spelled(value):
        if isinstance(value, dict):
            return {key: spelled(item) for key, item in value.items()}
        return [spelled(item) for item in value] if isinstance(value, list | tuple) else id(value)

    unet = model.model.diffusion_model
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())
    names = ("model_options", "wrappers", "callbacks", "injections", "object_patches", "attachments", "patches")
    return {name: spelled(getattr(model, name)) for name in names} | {
        "hooks": hooks,
        "forwards": [name for name, module in unet.named_modules() if "forward" in vars(module)],
    }


@contextmanager
def refused(*pieces: str, error: type = ValueError) -> Iterator[None]:
    """Expect an error whose message begins with the first piece and contains all others."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(f"{pieces[0]}: ")
    for piece in pieces[1:]:
        assert piece in message, message


def transformer():
    """Return a tiny MODEL that is not a UNet: Flux."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    size = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 16}
    size |= {"mlp_ratio": 1.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [2, 2, 4]}
    size |= {"theta": 100, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "dtype": torch.float32}
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:
        size |= {"txt_ids_dims": []}
    config = comfy.supported_models.Flux({"image_model": "flux", **size})
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}), cpu, cpu)
