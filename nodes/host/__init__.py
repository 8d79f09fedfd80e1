"""What the pack knows about ComfyUI. `tests/host_contract.py` lists every name that it uses.

Nothing of ComfyUI's is changed outside of clones.
"""

from . import (
    attention,
    checks,
    errors,
    files,
    identity,
    injection,
    inversion,
    noise,
    options,
    run,
    status,
    storage,
    tokenflow,
    types,
    unet,
)

__all__ = [
    "attention",
    "checks",
    "errors",
    "files",
    "identity",
    "injection",
    "inversion",
    "noise",
    "options",
    "run",
    "status",
    "storage",
    "tokenflow",
    "types",
    "unet",
]
