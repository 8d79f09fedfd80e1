"""COVE: consistent text-driven video editing (arXiv 2406.08850), as ComfyUI nodes."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
