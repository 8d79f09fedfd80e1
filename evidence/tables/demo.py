"""Load the demo model in a ComfyUI in this process; every table is measured on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from scripts.host import PACK, provide_host
from scripts.in_process import nodes_of, start


def digest_of(file: str = "shapes.safetensors") -> str:
    """Return a digest of a demo model's file; tables ignore records of other models."""
    return hashlib.sha256((PACK / "demo" / file).read_bytes()).hexdigest()[:12]


def load_demo(file: str = "shapes.safetensors", host: Path | None = None):
    """Return the demo model's MODEL, CLIP and VAE, and the pack's nodes by id without the leading Cove.

    All attention is torch's, so that timings compare methods, not implementations of attention.
    """
    nodes = nodes_of(start(host or provide_host(), use_pytorch_cross_attention=True))
    return *nodes["LoadDemoModel"].execute(file).args, nodes
