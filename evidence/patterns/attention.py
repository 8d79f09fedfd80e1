"""Attention processors for training, and for replacing self-attention with its mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor


class Attention:
    """Attention processor for diffusers that computes attention in float32.

    On a CPU with autocast, the backward pass of attention in bfloat16 takes twice as long as in float32.
    """

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for x in projected)
        with torch.autocast(query.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


class MeanAttention:
    """Attention processor that returns the mean of all values for every token."""

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_) -> Tensor:
        value = attn.to_v(hidden_states)
        return attn.to_out[0](value.mean(1, keepdim=True).expand_as(value))


SHARPNESS = 2.0  # factor on the initial weights of queries and keys


@torch.no_grad()
def begin_with_similar(unet: UNet2DConditionModel) -> None:
    """Initialize self-attention so that tokens attend to similar tokens.

    With independent random queries and keys, attention is nearly uniform over the picture, and many hundreds of steps
    pass before it helps. With equal ones, it finds repeats from the start, and training only has to refine it.
    """
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.to_q.weight.mul_(SHARPNESS)
            module.to_k.weight.copy_(module.to_q.weight)


@contextmanager
def mean_attention(unet: UNet2DConditionModel) -> Iterator[None]:
    """Replace the finest self-attention of encoder and decoder with its mean inside the context."""
    processors = unet.attn_processors
    finest = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    mean = MeanAttention()
    unet.set_attn_processor(
        {
            name: mean if name.startswith(finest) and ".attn1." in name else processor
            for name, processor in processors.items()
        }
    )
    try:
        yield
    finally:
        unet.set_attn_processor(processors)
