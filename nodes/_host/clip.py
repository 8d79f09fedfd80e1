"""What CLIP makes of pictures and of words, as unit vectors that can be compared."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, cat

BATCH = 8


def image_embeddings(clip_vision, images: Tensor, progress: Callable[[int, int], None]) -> Tensor:
    """Of each frame, [frames, d], float32; of its middle square, as CLIP was trained and as papers report it."""
    found = []
    for start in range(0, len(images), BATCH):
        found.append(clip_vision.encode_image(images[start : start + BATCH])["image_embeds"].float().cpu())
        progress(min(start + BATCH, len(images)), len(images))
    return F.normalize(cat(found), dim=-1)


def text_embedding(clip, prompt: str, node: str) -> Tensor:
    """Of the prompt, [d], float32. An error when the text encoder's answer is not projected to where pictures are.

    ComfyUI leaves the projection out for CLIP-L, whose files may lack it.
    """
    towers = clip.cond_stage_model
    encoder = getattr(towers, "clip_g", None) or getattr(towers, getattr(towers, "clip", ""), None)
    if encoder is None or not getattr(encoder, "return_projected_pooled", False):
        raise ValueError(
            f"{node}: expected the `clip` of an SD2.x checkpoint (with CLIP-ViT-H as `clip_vision`) or of an SDXL one "
            f"(with CLIP-ViT-bigG), got {type(towers).__name__}, whose words cannot be compared with pictures. Connect "
            f"one of those, or leave `clip` open."
        )
    _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return F.normalize(pooled[0].float().cpu(), dim=-1)


def check_same_space(images: Tensor, words: Tensor, node: str) -> None:
    """An error when the two come from different CLIPs."""
    if images.shape[-1] != len(words):
        raise ValueError(
            f"{node}: `clip_vision` gives {images.shape[-1]} numbers a frame and `clip` {len(words)} for the prompt: "
            f"they are halves of different CLIPs. Load two that go together: CLIP-ViT-H and the clip of an SD2.x "
            f"checkpoint, or CLIP-ViT-bigG and that of an SDXL one."
        )
