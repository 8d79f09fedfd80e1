"""Token merging: bipartite soft matching (ToMe, arXiv 2210.09461, section 3) inside each token's temporal set.

COVE (arXiv 2406.08850), section 3.3, Eq. 12.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge_tokens(tokens: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Average the most similar tokens of each set into one another.

    Even positions form A, odd positions B. Every A token is tied to the B token nearest in cosine similarity, and the
    r = floor(ratio * M) A tokens with the strongest ties are averaged into theirs. Among equals the earlier wins.

    Args:
        tokens: sets of M tokens, [..., M, channels], any float dtype; compared in float32.
        ratio: share of the tokens that goes, from 0 to 0.5.

    Returns:
        merged: unmerged A in order, then B in order, [..., M - r, channels].
        sizes: how many tokens each one is the average of, int64 [..., M - r].
    """
    removed = removed_tokens(tokens.shape[-2], ratio)
    metric = F.normalize(tokens.float(), dim=-1)
    similarity = metric[..., 0::2, :] @ metric[..., 1::2, :].transpose(-1, -2)
    share = merge_weights(similarity, removed)
    order = bipartite_order(tokens.shape[-2], tokens.device)
    return share.to(tokens.dtype) @ tokens[..., order, :], (share > 0).sum(-1)


def merge_weights(similarity: Tensor, removed: int) -> Tensor:
    """Return the weight of each token in each merged token.

    Args:
        similarity: of every A token with every B token, [..., A, B].
        removed: how many A tokens are averaged into their nearest B token.

    Returns:
        [..., A - removed + B, A + B], to be multiplied with the tokens in the order A, B. A row holds 1 / size at the
        tokens that it averages and 0 elsewhere.
    """
    *sets, sources, targets = similarity.shape
    share = similarity.new_zeros((*sets, sources - removed + targets, sources + targets))
    unmerged, averaged = share[..., : sources - removed, :sources], share[..., sources - removed :, :]
    averaged[..., sources:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    if targets == 0:  # a single token has nobody to go to
        return torch.ones_like(share)
    tie, nearest = similarity.max(-1)
    averaged.scatter_(-2, nearest[..., None, :], 1.0)
    if removed < sources:
        rank = tie.sort(dim=-1, descending=True, stable=True).indices
        kept = rank[..., removed:].sort(-1).values
        averaged.scatter_(-1, kept[..., None, :].expand(*sets, targets, -1), 0.0)
        unmerged.scatter_(-1, kept[..., None], 1.0)
    averaged /= averaged.sum(-1, keepdim=True)
    return share


def bipartite_order(count: int, device: torch.device | str | None = None) -> Tensor:
    """Return the positions of the A tokens (even), then of the B tokens (odd), int64 [count]."""
    positions = torch.arange(count, device=device)
    return torch.cat((positions[0::2], positions[1::2]))


def removed_tokens(count: int, ratio: float) -> int:
    """Return r = floor(ratio * M), the number of tokens that merging removes from `count`."""
    if not 0 <= ratio <= 0.5:
        raise ValueError(f"merge ratio must be from 0 to 0.5 (half of the tokens can find a partner), got {ratio}")
    return int(ratio * count)
