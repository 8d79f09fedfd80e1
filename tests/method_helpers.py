"""What the tests of `cove/` share: seeded tensors, devices, and a fresh interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# Prefix of code for `fresh`: peak() is the largest resident size so far, in bytes.
PEAK = """
import resource, sys
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fresh(code):
    """What `code`, in an interpreter of its own, prints last, read as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def half_is_as_good(fast, plain, exact):
    """In half precision: an error at most twice that of the plain version in the same dtype."""
    assert fast.dtype == plain.dtype
    assert (fast.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()
