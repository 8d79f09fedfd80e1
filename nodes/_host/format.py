"""How numbers are written in messages."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def format_sigmas(sigmas: Sequence[float]) -> str:
    texts = [f"{sigma:.4g}" for sigma in sigmas]
    steps = "1 step" if len(texts) == 1 else f"{len(texts)} steps"
    return f"{steps}, sigma {', '.join(texts if len(texts) < 7 else [*texts[:3], '...', *texts[-2:]])}"
