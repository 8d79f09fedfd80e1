"""Pytest plugin that runs the tests' ComfyUI on the GPU, in float32: `-p benchmarks.offline.gpu_host`.

The tests were written for ComfyUI on the CPU. The plugin therefore loads every MODEL to the GPU, whatever device a test
requests, and compares tensors on the CPU. A test that itself combines tensors of two devices fails; the traceback
distinguishes such a failure from one of the pack.
"""

from __future__ import annotations

import os

os.environ["COVE_TEST_DEVICE"] = "cuda"  # read by tests/conftest.py

import pytest
import torch
from torch.utils._pytree import tree_map_only

torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def on_cpu(compare):
    def compared(actual, expected, *rest, **options):
        actual, expected = tree_map_only(torch.Tensor, torch.Tensor.cpu, (actual, expected))
        return compare(actual, expected, *rest, **options)

    return compared


torch.equal = on_cpu(torch.equal)
torch.testing.assert_close = on_cpu(torch.testing.assert_close)


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef, request):
    yield
    if fixturedef.argname == "comfy":
        import comfy.cli_args
        import comfy.model_patcher

        comfy.cli_args.args.force_fp32 = True
        make = comfy.model_patcher.ModelPatcher.__init__

        def on_gpu(self, model, load_device, offload_device, *rest, **options):
            make(self, model, torch.device("cuda"), offload_device, *rest, **options)

        comfy.model_patcher.ModelPatcher.__init__ = on_gpu
