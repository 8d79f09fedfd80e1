"""The types of wires that this pack adds to ComfyUI's, and how its nodes declare whole numbers."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

Features = io.Custom("COVE_FEATURES")
Correspondence = io.Custom("COVE_CORRESPONDENCE")
Inversion = io.Custom("COVE_INVERSION")

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


def integer(name: str, default: int, lowest: int, highest: int, tooltip: str, step: int = 1) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=lowest, max=highest, step=step, tooltip=tooltip)
