"""Make a MODEL of SD1.5's or SDXL's shape with random weights, in a real ComfyUI in this process."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.in_process import nodes_of, start

SHARED = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False}
SHAPES = {
    "sd15": SHARED
    | {
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "num_heads": 8,
        "num_head_channels": -1,
    },
    "sdxl": SHARED
    | {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "num_heads": -1,
        "num_head_channels": 64,
        "num_classes": "sequential",
    },
}
CONTEXT = {"sd15": (768, None), "sdxl": (2048, 1280)}  # channels of the prompt, and of its pooled output
FINEST = {"sd15": 1, "sdxl": 2}  # side of a token of the finest self-attention, in latents


def load(host: Path, family: str = "sd15", dtype: str = "float32", **changes):
    """Return the MODEL, the pack's nodes by id without the leading Cove, and its `nodes.host`.

    Args:
        family: one of `SHAPES`.
        dtype: dtype of weights and computation.
        changes: changes to the shape, for a smaller model.
    """
    nodes = nodes_of(start(host))
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    kind = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family]
    precision = getattr(torch, dtype)
    config = kind(kind.unet_config | SHAPES[family] | {"dtype": precision} | changes)
    config.set_inference_dtype(precision, None)
    device = comfy.model_management.get_torch_device()
    model = config.get_model({}, "", device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            fan_in = max(1, weight[0].numel()) if weight.ndim > 1 else 10_000
            weight.copy_(torch.randn(weight.shape, generator=generator, device=weight.device) / fan_in**0.5)
    patcher = comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu"))
    return patcher, nodes, sys.modules["pack.nodes.host"]
