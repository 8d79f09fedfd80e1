"""Small random models for the tests beside other packs, in the shapes and file layouts that those packs read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.inversion_helpers import UNETS


@cache
def tiny_controlnet(kind: str = "two levels", seed: int = 1):
    """Return a random ControlNet for the MODEL `tiny` of the same kind, like the host's loader."""
    import comfy.cldm.cldm
    import comfy.controlnet

    size = {"image_size": 32, "in_channels": 4, "model_channels": 32, "hint_channels": 3, "num_heads": 8}
    size |= {"use_spatial_transformer": True, "legacy": False, "dtype": torch.float32} | UNETS[kind]
    model, generator = comfy.cldm.cldm.ControlNet(**size), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                gain = 2.0 if "hint" in name else 0.5 if "zero" in name or "_out" in name else 1.0
                weight.normal_(0, gain / weight[0].numel() ** 0.5, generator=generator)
    return comfy.controlnet.ControlNet(model.eval(), load_device=torch.device("cpu"))


EMBEDDING = 48  # width of an image embedding
# Channels of the cross-attentions of `tiny("sd15")`, in the order in which an IPAdapter file counts them.
CHANNELS = (32, 32, 64, 64, 128, 128, *[128] * 3, *[64] * 3, *[32] * 3, 128)


def write_ipadapter(path: Path, seed: int = 2) -> Path:
    """Write a random IPAdapter for the MODEL `tiny("sd15")`, in the layout of `ip-adapter_sd15.safetensors`."""
    generator, context = torch.Generator().manual_seed(seed), 768

    def random(outer: int, inner: int) -> Tensor:
        return torch.randn(outer, inner, generator=generator) / inner**0.5

    tensors = {
        "image_proj.proj.weight": random(4 * context, EMBEDDING),
        "image_proj.proj.bias": torch.zeros(4 * context),
    }
    tensors |= {"image_proj.norm.weight": torch.ones(context), "image_proj.norm.bias": torch.zeros(context)}
    for index, channels in enumerate(CHANNELS):
        for kind in ("k", "v"):
            tensors[f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight"] = 3 * random(channels, context)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def tiny_clip_vision(folder: Path, seed: int = 3):
    """Return a random CLIP_VISION of the host's own class, with two narrow layers."""
    import comfy.clip_vision

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    size |= {"image_size": 224, "patch_size": 56, "projection_dim": EMBEDDING, "num_channels": 3}
    size |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip_vision_model"}
    config = folder / "clip_vision.json"
    config.write_text(json.dumps(size), encoding="utf-8")
    encoder, generator = comfy.clip_vision.ClipVisionModel(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in encoder.model.named_parameters():
            if weight.ndim == 1 and "class_embedding" not in name:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    return encoder
