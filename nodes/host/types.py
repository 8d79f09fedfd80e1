"""The types of wires that this pack adds to ComfyUI's."""

from comfy_api.v0_0_2 import io

Features = io.Custom("COVE_FEATURES")
Correspondence = io.Custom("COVE_CORRESPONDENCE")
Inversion = io.Custom("COVE_INVERSION")
