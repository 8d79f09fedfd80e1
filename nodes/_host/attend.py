"""Which of ComfyUI's attention functions patched self-attention uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy.cli_args import args
from comfy.ldm.modules import attention
from torch import Tensor


def attend_with(query: Tensor, options: dict[str, Any], jointly: int = 1) -> Callable[..., Tensor]:
    """(query, key, value, heads) -> attention, as ComfyUI has it.

    On a CPU ComfyUI falls back to sub-quadratic attention, which holds the scores of some queries at a time. `jointly`
    frames together are thousands of tokens: there torch's own, which holds none, takes half the time. Whoever asks for
    another on the command line gets it.
    """
    chosen = attention.optimized_attention
    fallback = chosen is attention.attention_sub_quad and not args.use_quad_cross_attention
    if jointly > 1 and fallback and query.device.type == "cpu":
        chosen = attention.attention_pytorch
    return partial(chosen, attn_precision=options.get("attn_precision"), transformer_options=options)
