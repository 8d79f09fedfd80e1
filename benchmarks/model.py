"""A real ComfyUI in this process, and what benchmarks run on: the demo model, or SD1.5's shape with random weights."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def digest_of(file: str = "shapes.safetensors") -> str:
    """Of a demo model: what was measured on another is measured anew."""
    return hashlib.sha256((ROOT / "demo" / file).read_bytes()).hexdigest()[:12]


def start(host: Path, torch_attention: bool = False):
    """The pack as a module, in a ComfyUI that lives in this process and keeps nothing of it.

    torch_attention: as `--use-pytorch-cross-attention` of ComfyUI, which has something slower for CPUs.

    From then on `import nodes` is ComfyUI's file: what is needed from the root of the repository comes in before.
    """
    import importlib.util

    sys.path.insert(0, str(host))
    sys.path.remove(str(ROOT))  # the pack's `nodes` would hide ComfyUI's
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = torch_attention
    import comfy.model_management
    import folder_paths

    folder_paths.set_user_directory(tempfile.mkdtemp())  # no inversion goes on where another run was broken off

    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_demo(host: Path, file: str = "shapes.safetensors"):
    """The demo model's MODEL, CLIP and VAE, and the pack's nodes by id without the leading Cove.

    Attention is torch's everywhere, so that seconds compare what is done and not who does it.
    """
    import asyncio

    pack = start(host, torch_attention=True)
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = {node.define_schema().node_id.removeprefix("Cove"): node for node in asyncio.run(extension.get_node_list())}
    return *nodes["LoadDemoModel"].execute(file).args, nodes


def load(host: Path):
    """A MODEL of SD1.5's shape with random weights, and the pack's `nodes._host`."""
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
