"""The trained networks as one file, half precision, in Stable Diffusion's checkpoint layout: what the node loads.

Whatever a loader needs beside the weights stands in the file's metadata as JSON under "cove_demo".
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from cove.files import whole_file

from .models import Size, encode
from .words import LENGTH

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
    """Write the file in one step.

    Args:
        scale: what latents are multiplied by before the UNet sees them.
        pictures: some of the world, [n, 3, height, width] from 0 to 1; previews are fitted to them.
        steps: how many steps the UNet was trained, where a training is to start from the file.
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
    with whole_file(path) as temporary:
        save_file({name: half(value) for name, value in weights.items()}, temporary, {"cove_demo": json.dumps(facts)})


def preview_of(pictures: Tensor, latents: Tensor) -> tuple[list[list[float]], list[float]]:
    """The best linear way from a latent to its colour from -1 to 1: factors [4][3] and bias [3]."""
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
    """A parameter of diffusers' UNet2DConditionModel with one ResNet block a level, under Stable Diffusion's name."""
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
