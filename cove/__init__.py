"""COVE (arXiv 2406.08850) in torch: consistent video editing by diffusion feature correspondence. No ComfyUI here."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# Public names and their modules, imported when they are first used: the method itself needs no video decoder.
_MODULES = {
    "Audio": "audio",
    "Correspondence": "correspondence",
    "Frames": "frames",
    "Inversion": "inversion",
    "Schedule": "schedule",
    "correspondence_attention": "attention",
    "diffusion_features": "features",
    "find_correspondence": "correspondence",
    "invert": "ddim",
    "merge_tokens": "merging",
    "read_frames": "frames",
    "sample": "ddim",
    "spatial_temporal_attention": "attention",
    "write_frames": "encode",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
