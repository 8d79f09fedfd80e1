"""Export the trained networks to one file, and load it: half precision, in Stable Diffusion's checkpoint layout.

Load Demo Model loads the file. Its metadata key "cove_demo" holds, as JSON, what a loader needs besides the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from cove.files import atomic_write
from demo.autoencoder import Autoencoder

from .networks import Diffusion, Size, encode
from .words import LENGTH, make_tokenizer

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def export(
    path: Path,
    size: Size,
    tokenizer: Tokenizer,
    autoencoder: nn.Module,
    diffusion: nn.Module,
    scale: float,
    pictures: Tensor,
    steps: int | None = None,
) -> None:
    """Write the file atomically.

    Args:
        scale: factor applied to latents before the UNet.
        pictures: examples from the world, [n, 3, height, width] from 0 to 1, for fitting the preview colours.
        steps: number of training steps of the UNet, if training can start from the file.
    """
    levels = len(size.unet)
    weights = {f"model.diffusion_model.{unet_name(k, levels)}": v for k, v in diffusion.unet.state_dict().items()}
    weights |= {f"first_stage_model.{name}": value for name, value in autoencoder.state_dict().items()}
    for name, value in diffusion.text.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        weights[f"cond_stage_model.transformer.{name}"] = value
    rgb, bias = preview_of(pictures, encode(autoencoder, pictures) * scale)
    facts = {
        "latent_rgb": rgb,
        "latent_rgb_bias": bias,
        "heads": size.heads,
        "latent_scale": scale,
        "picture": size.picture,
        "autoencoder": size.autoencoder,
        "text": {key: getattr(diffusion.text.config, key) for key in TEXT},
        "length": LENGTH,
        "tokenizer": tokenizer.to_str(),
        "steps": steps,
    }
    with atomic_write(path) as temporary:
        save_file({name: half(value) for name, value in weights.items()}, temporary, {"cove_demo": json.dumps(facts)})


def load_snapshot(path: Path, size: Size, words: Sequence[str]) -> tuple[Autoencoder, Diffusion, int]:
    """Return the networks of an exported file, and the number of training steps before the export."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["cove_demo"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    autoencoder, diffusion = Autoencoder(size.autoencoder), Diffusion(size, make_tokenizer(words))
    prefix = "first_stage_model."
    autoencoder.load_state_dict({name: weights[prefix + name] for name in autoencoder.state_dict()})
    levels = len(size.unet)
    names = {name: f"model.diffusion_model.{unet_name(name, levels)}" for name in diffusion.unet.state_dict()}
    diffusion.unet.load_state_dict({name: weights[there] for name, there in names.items()})
    prefix = "cond_stage_model.transformer."
    for name, value in diffusion.text.state_dict().items():
        there = prefix + (name if name.startswith("text_model.") else f"text_model.{name}")
        value.copy_(weights[there])
    return autoencoder.eval().requires_grad_(False), diffusion, facts["steps"]


def preview_of(pictures: Tensor, latents: Tensor) -> tuple[list[list[float]], list[float]]:
    """Fit a linear map from latents to colours from -1 to 1; return factors [4][3] and bias [3]."""
    small = F.adaptive_avg_pool2d(pictures, latents.shape[-2:]) * 2 - 1
    rows, colours = (rearrange(x.cpu(), "n c h w -> (n h w) c").double() for x in (latents, small))
    found = torch.linalg.lstsq(F.pad(rows, (0, 1), value=1.0), colours).solution
    return found[:-1].tolist(), found[-1].tolist()


TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("max_position_embeddings", "eos_token_id"),
)


def half(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float16 if value.is_floating_point() else value.dtype).contiguous()


def unet_name(name: str, levels: int) -> str:
    """Return Stable Diffusion's name of a UNet2DConditionModel parameter (diffusers, one ResNet block per level)."""
    module, kind = name.rsplit(".", 1)
    if module in UNET_OUTSIDE:
        return f"{UNET_OUTSIDE[module]}.{kind}"
    where, level, part, number, rest = re.match(
        r"(down_blocks|up_blocks|mid_block)\.?(\d+)?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    ).groups()
    if part == "resnets":
        rest = re.sub(r"^\w+", lambda found: RESNET[found[0]], rest)
    number = int(number)
    if where == "mid_block":
        return f"middle_block.{1 if part == 'attentions' else 2 * number}.{rest}"
    level = int(level)
    if where == "down_blocks":
        block = 1 + 2 * level
        if part == "downsamplers":
            return f"input_blocks.{block + 1}.0.{rest.replace('conv.', 'op.')}"
        return f"input_blocks.{block + number}.{int(part == 'attentions')}.{rest}"
    block = 2 * level
    if part == "upsamplers":
        return f"output_blocks.{block + 1}.2.{rest}"
    return f"output_blocks.{block + number}.{int(part == 'attentions')}.{rest}"
