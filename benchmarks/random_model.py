"""A MODEL of SD1.5's shape with random weights, in a real ComfyUI in this process: what benchmarks of time run on."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.in_process import start


def load(host: Path):
    """Return the MODEL and the pack's `nodes._host`."""
    start(host)
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    shape = comfy.supported_models.SD15.unet_config | {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "num_heads": 8,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }
    config = comfy.supported_models.SD15(shape)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 10_000
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu")), sys.modules["pack.nodes._host"]
