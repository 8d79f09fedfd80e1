"""COVE: consistent text-driven video editing (arXiv 2406.08850), as ComfyUI nodes."""

import re

OLDEST = "0.3.60"  # The attention functions of older ones take no transformer_options.

try:
    from comfyui_version import __version__ as _version
except ImportError:
    _version = "none that states its version"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if _numbers(_version) < _numbers(OLDEST):
    raise ImportError(f"COVE needs ComfyUI {OLDEST} or newer, found {_version}. Update ComfyUI, then restart it.")

from .nodes import comfy_entrypoint  # noqa: E402

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
