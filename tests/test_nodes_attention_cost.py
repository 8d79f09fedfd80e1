"""Operators and copies of guided attention on tensors without data, as on a GPU: once a run, and at each call."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

HEIGHT, WIDTH, CHANNELS, HEADS = 5, 7, 22, 2
AREA = (3, 5, 1, 2)  # height, width, top and left


class Count(TorchDispatchMode):
    """Count operators but views, and copies between devices, each of which waits for all earlier work of a GPU."""

    def __init__(self):
        super().__init__()
        self.operators = self.copies = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        self.operators += operation.namespace == "aten" and not operation.is_view
        devices = {one.device.type for one in (*args, result) if isinstance(one, torch.Tensor) and one.ndim}
        self.copies += len(devices) > 1 or operation.overloadpacket is torch.ops.aten._local_scalar_dense
        return result


@pytest.fixture
def attention(nodes, monkeypatch):
    """The pack's module, with the attention that ComfyUI chooses on a GPU."""
    module = sys.modules[nodes["CorrespondenceAttention"].__module__].host.attention
    monkeypatch.setattr(module.attention, "optimized_attention", module.attention.attention_pytorch)
    return module


class Run:
    """Calls of one block in one run, without data."""

    def __init__(self, attention, cove, frames, refined, areas, **settings):
        found = cove.correspondence.find_correspondence(torch.empty(frames, HEIGHT, WIDTH, 11), 3, 3)
        if refined:
            found = sys.modules[cove.correspondence.__package__ + ".refine"].refine(
                found, torch.empty(frames, HEIGHT, WIDTH, 11)
            )
        defaults = {"merge_ratio": 0.5, "stride": None, "sigma_start": 99.0, "sigma_end": 0.0}
        defaults |= {"include_self": False, "level": 0, "node": SimpleNamespace, "kernel": "torch"}
        self.patch = attention.GuidedSelfAttention(found, **defaults | settings)
        self.attention, self.frames, self.areas, self.kept = attention, frames, areas, {}

    def __call__(self) -> Count:
        """One call with prompt and negative prompt, counted."""
        uuids = ["positive", "negative"]
        areas = {name: area for name, area in zip(uuids, self.areas, strict=True) if area is not None}
        grid = next(iter(areas.values()))[:2] if areas else (HEIGHT, WIDTH)
        info = self.attention.RunInfo(1.0, (HEIGHT, WIDTH), areas, tuple(range(self.frames)), self.kept)
        options = {
            self.attention.options.RUN: info,
            "n_heads": HEADS,
            "uuids": uuids,
            "cond_or_uncond": [0, 1],
            "activations_shape": [2 * self.frames, CHANNELS, *grid],
        }
        query = torch.empty((2 * self.frames, grid[0] * grid[1], CHANNELS), device="cuda")
        with Count() as count:
            assert self.patch(query, query, query, options).shape == query.shape
        return count


@pytest.mark.parametrize("areas", [(None, None), (AREA, AREA), (AREA, (*AREA[:2], 0, 1))])
@pytest.mark.parametrize("refined", [False, True])
def test_guided_attention_operators_are_linear_in_frames(attention, cove, refined, areas):
    with FakeTensorMode():
        first, later = {}, {}
        for frames in (2, 8, 16):  # with a token left in A after merging
            run = Run(attention, cove, frames, refined, areas)
            first[frames], later[frames] = run(), run()
    print({frames: count.operators for frames, count in later.items()})
    steps = [(later[b].operators - later[a].operators) / (b - a) for a, b in ((2, 8), (8, 16))]
    assert steps[0] == steps[1] > 0
    assert all(count.copies == len(set(areas)) for count in first.values())
    assert all(count.copies == 0 for count in later.values())


def test_guided_attention_runs_conditionings_of_one_area_as_one_batch(attention, cove):
    with FakeTensorMode():
        runs = [Run(attention, cove, 7, False, areas) for areas in ((None, None), (AREA, AREA), (AREA, (3, 5, 0, 1)))]
        alone, together, apart = ([run(), run()][1].operators for run in runs)
    assert alone == together < 0.6 * apart


def test_guided_attention_with_the_kernel_launches_it_once(attention, cove, monkeypatch):
    """Stands in for the launch, which needs data; the number of operators beside it does not depend on frames."""
    launched = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **settings: launched.append(grid)

    kernel = pytest.importorskip(attention.attend_to_sets.__module__.replace("attention", "kernels.attend"))
    monkeypatch.setattr(kernel, "_attend", Launch())
    operators = []
    with FakeTensorMode():
        for frames in (3, 16):
            run = Run(attention, cove, frames, True, (None, None), kernel="triton")
            run()
            operators.append(run().operators)
            assert launched[-2:] == [(frames * HEIGHT * WIDTH, 2)] * 2
    assert len(launched) == 4 and operators[0] == operators[1] < 40


def test_correspondence_attention_refuses_an_unknown_kernel(small, nodes, monkeypatch):
    monkeypatch.setenv("COVE_KERNEL", "cuda")
    with pytest.raises(Exception, match="COVE_KERNEL must be auto, triton, torch or unset, got 'cuda'"):
        nodes["CorrespondenceAttention"].execute(small, 0.5, "own frame", 0.0, 1.0, False)
