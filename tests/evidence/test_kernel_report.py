"""The Triton kernel compiles to machine code for five architectures without a GPU, and its costs are counted."""

import pytest
import torch

from benchmarks.kernel_report import CONDS, TARGETS, TOKENS, Call, Variant
from tests.method_helpers import fresh

pytest.importorskip("triton")

REPORT = """
import json, os
os.environ.pop("TRITON_INTERPRET", None)
from benchmarks.kernel_report import Variant, report
print(json.dumps([report(Variant(**{settings}), target) for target in {targets}]))
"""


@pytest.mark.parametrize(
    "settings", [{}, {"merge_ratio": 0.0}, {"dtype": "bfloat16", "heads": 10, "width": 64}, {"frames": 64, "k": 5}]
)
def test_kernel_compiles_for_every_target(settings):
    reports = fresh(REPORT.format(settings=settings, targets=TARGETS))
    assert len(reports) == len(TARGETS)
    for target, found in zip(TARGETS, reports, strict=True):
        assert 0 < found["registers"] <= 255 and found["shared"] <= 64 << 10  # all that Turing has
        if target >= 80 and settings.get("frames", 32) <= 32:
            assert found["spilled"] == 0


def test_call_counts_what_a_kernel_without_merging_moves():
    variant = Variant(heads=2, width=16, frames=3, k=2, merge_ratio=0.0, dtype="float32")
    call, queries = Call.of(variant), CONDS * 3 * TOKENS
    tokens = torch.empty(CONDS, 3, TOKENS, 32)
    sets = torch.empty(3, TOKENS, 4, dtype=torch.int32)
    assert call.memory == 2 * tokens.nbytes + sets.nbytes + 4 * queries
    assert call.gathered == queries * 2 * 4 * 32 * 4 and call.products == 0
    assert call.single == queries * 32 * (16 + 16) * 4  # padded to 16, a multiplication and a sum, twice


def test_call_with_merging_gathers_the_sets_once_more():
    plain, merged = (Call.of(Variant(merge_ratio=ratio)) for ratio in (0.0, 0.5))
    assert merged.gathered * 2 == plain.gathered * 3 and merged.memory == plain.memory
    assert merged.products == CONDS * 32 * TOKENS * 2 * 64 * 64 * 320
