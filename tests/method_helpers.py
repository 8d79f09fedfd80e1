"""Shared by the tests of `cove/`: seeded tensors, pictures, devices, a full disk, a fresh interpreter, memory."""

import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# Bit-identical, with NaN equal to NaN.
assert_same = partial(assert_close, rtol=0, atol=0, equal_nan=True)

# Prefix of code for `fresh`: peak() is the largest resident size so far, in bytes. On Linux it is read from /proc,
# because `ru_maxrss` starts there from the size of the parent process and would hide smaller peaks.
PEAK = """
import resource, sys
from pathlib import Path
def peak():
    if sys.platform == "linux":
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(height=24, width=40, count=1):
    """Return a smooth clip that H.264 keeps and that varies along every axis, so that a flip or a swap shows."""
    f, y, x = torch.meshgrid(*(torch.linspace(0, 1, size) for size in (count, height, width)), indexing="ij")
    return torch.stack([x, 0.7 * y + 0.1 * f, 0.8 - 0.6 * x * y], -1)


def fresh(code):
    """Run `code` in a fresh interpreter and return its last line, parsed as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def full_disk(tensors, path, metadata=None):
    """Stand in for `save_file` on a full disk: write half a file, then raise safetensors' error."""
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


def half_is_as_good(fast, plain, exact):
    """Check that the error in half precision is at most twice that of the plain version in the same dtype."""
    assert fast.dtype == plain.dtype
    assert (fast.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()


class Held(TorchDispatchMode):
    """Count the bytes of live tensors created inside, on any device or on devices of one type."""

    def __init__(self, device: str | None = None):
        super().__init__()
        self.now = self.peak = 0
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            counts = isinstance(x, torch.Tensor) and self.device in (None, x.device.type)
            if counts and x.untyped_storage()._cdata not in inputs:
                self.hold(x.untyped_storage())
        return result

    def hold(self, storage):
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size):
        self.now -= size
