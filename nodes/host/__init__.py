"""What the pack knows about ComfyUI. `tests/host_contract.py` lists every name that it uses.

Nothing of ComfyUI's is changed outside of clones.
"""

from . import (  # noqa: F401
    attention,
    checks,
    errors,
    files,
    identity,
    injection,
    inversion,
    memory,
    noise,
    options,
    run,
    status,
    storage,
    tokenflow,
    unet,
    wires,
)
