"""COVE (arXiv 2406.08850) in torch: consistent video editing by diffusion feature correspondence. No ComfyUI here."""

__version__ = "0.1.0"
