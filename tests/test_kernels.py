"""The Triton kernel against plain loops, in Triton's interpreter or on a GPU, and the choice between it and torch."""

import math

import pytest
import torch
from torch.testing import assert_close

from cove import kernels, reference
from cove.attention import attend_to_sets, attention_sets
from cove.correspondence import find_correspondence
from cove.merging import bipartite_order, removed_tokens
from cove.refine import refine
from tests.method_helpers import half_is_as_good, randn

attend = pytest.importorskip("cove.kernels.attend", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Head widths of SD1.5 and SDXL (40, 64, 80, 160), of the demo model (32) and of a prime; members of sets of 2 to 64
# frames with K from 1 to 5, with and without the token itself.
CASES = [
    *((heads, width, 15, 0.5) for heads, width in ((2, 40), (1, 64), (1, 80), (1, 160), (2, 32), (3, 11))),
    *((2, 11, members, 0.5) for members in (1, 2, 3, 5, 16, 31, 32, 33, 64, 93, 126, 189, 315, 316)),
    *((2, 11, 15, ratio) for ratio in (0.0, 0.1, 0.25, 0.3)),
]


def random_sets(frames: int, count: int, members: int, pool: int | None = None) -> torch.Tensor:
    """Sets without a row twice, out of the first `pool` rows: rounding decides between equal similarities."""
    drawn = torch.rand((frames, count, pool or frames * count), generator=torch.Generator().manual_seed(1))
    return drawn.argsort(-1)[..., :members].int()


def by_loops(tokens, sets, heads, ratio):
    """`attend_to_sets` token by token, with the loops of `cove.reference`."""
    order = bipartite_order(sets.shape[2]).argsort()
    made = tokens[:, :, : sets.shape[1]].clone()
    for b, clip in enumerate(tokens):
        for i, rows in enumerate(sets[..., order]):
            for p, row in enumerate(rows):
                merged, _ = reference.merge_tokens(clip.flatten(0, 1)[row], ratio)
                made[b, i, p] = reference.attend(clip[i, p], merged, merged, heads)
    return made


def triton(tokens, sets, heads, ratio):
    return attend_to_sets(tokens.to(DEVICE), sets.to(DEVICE), heads, ratio, kernel="triton").cpu()


@pytest.mark.parametrize(("heads", "width", "members", "ratio"), CASES)
def test_attend_to_sets_in_triton_matches_reference(heads, width, members, ratio):
    """The sets of two queries, out of a frame of more tokens."""
    tokens, sets = randn(2, 1, members + 2, heads * width), random_sets(1, 2, members, pool=members + 2)
    found = attend.attend_to_sets(tokens.to(DEVICE), sets.to(DEVICE), heads, removed_tokens(members, ratio))
    assert_close(found[:, :, :2].cpu(), by_loops(tokens, sets, heads, ratio))


@pytest.mark.parametrize(("refined", "include_self", "frame_indices"), [(False, True, None), (True, False, [3, 0, 2])])
def test_correspondence_attention_in_triton_matches_reference(refined, include_self, frame_indices):
    features = randn(5, 3, 5, 7, seed=1)
    found = find_correspondence(features, 3, 2)
    found = refine(found, features) if refined else found
    tokens = randn(1, 3 if frame_indices else 5, 15, 22)
    sets = attention_sets(found, frame_indices, include_self)
    expected = reference.correspondence_attention(tokens, found, 2, 0.5, frame_indices, include_self)
    assert_close(triton(tokens, sets, 2, 0.5), expected)
    assert_close(attend_to_sets(tokens, sets, 2, 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_attend_to_sets_in_triton_is_as_exact_as_reference_in_half_precision(dtype, ratio):
    tokens, sets = randn(1, 2, 5, 22, dtype=dtype), random_sets(2, 5, 9)
    exact = by_loops(tokens.double(), sets, 2, ratio)
    half_is_as_good(triton(tokens, sets, 2, ratio), by_loops(tokens, sets, 2, ratio), exact)


def equal_and_opposite() -> torch.Tensor:
    token, other = torch.randint(-4, 5, (2, 22), generator=torch.Generator().manual_seed(2)).float()
    return torch.stack([token, token, -token, other, other, torch.zeros(22), other])


@pytest.mark.parametrize("members", [6, 7])
@pytest.mark.parametrize("tokens", [equal_and_opposite(), torch.eye(22)[:7]], ids=["equal and opposite", "orthogonal"])
def test_attend_to_sets_in_triton_breaks_ties_like_torch(tokens, members):
    """Whole numbers, whose similarities are equal in any order of summation; the first of equals merges."""
    tokens, sets = tokens[None, None], random_sets(1, 7, members)
    assert_close(triton(tokens, sets, 2, 0.3), attend_to_sets(tokens, sets, 2, 0.3, kernel="torch"))


def test_attend_to_sets_in_triton_keeps_its_input_and_takes_any_strides():
    tokens, sets = randn(2, 22, 5, 2).movedim(1, -1).transpose(1, 2), random_sets(2, 5, 7)
    before = tokens.clone()
    assert not tokens.is_contiguous()
    assert_close(triton(tokens, sets, 2, 0.5), attend_to_sets(tokens, sets, 2, 0.5, kernel="torch"))
    assert torch.equal(tokens, before)


def test_error_of_attend_is_within_its_limit():
    for dtype in kernels.LIMIT:
        assert kernels.error_of_attend(torch.device(DEVICE), dtype) <= kernels.LIMIT[dtype]


def test_use_triton_is_an_option():
    cpu = torch.device("cpu")
    assert kernels.use_triton("triton", cpu, torch.float32) and not kernels.use_triton("torch", cpu, torch.float32)
    assert not kernels.use_triton("auto", cpu, torch.float32)
    with pytest.raises(ValueError, match="auto, triton, torch, got 'cuda'"):
        kernels.use_triton("cuda", cpu, torch.float32)
    with pytest.raises(ValueError, match="kernel must be"):
        attend_to_sets(randn(1, 2, 3, 22), random_sets(2, 3, 2), 2, kernel="fast")


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (0.0, None),
        (1e-3, "it is off by 0.001"),
        (math.nan, "it is off by nan"),
        (ModuleNotFoundError("No module named 'triton'"), "ModuleNotFoundError: No module named 'triton'"),
        (RuntimeError("no compiler\nfound"), "RuntimeError: no compiler"),
    ],
)
def test_use_triton_falls_back_with_one_line(outcome, reason, monkeypatch, caplog):
    def error_of_attend(device, dtype):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    kernels._is_right.cache_clear()
    monkeypatch.setattr(kernels, "error_of_attend", error_of_attend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [kernels.use_triton("auto", torch.device("cuda", 0), torch.float32) for _ in range(3)]
    kernels._is_right.cache_clear()
    assert found == [reason is None] * 3
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ([] if reason is None else lines[:1]) and all(reason in line for line in lines)
    assert not kernels.use_triton("auto", torch.device("cuda", 0), torch.float64)


def test_correspondence_attention_on_a_cpu_does_not_import_triton():
    from tests.method_helpers import fresh

    code = (
        "import sys, json, torch; from cove.attention import correspondence_attention as c; from cove.correspondence "
    )
    code += "import find_correspondence as f; c(torch.rand(1, 2, 6, 4), f(torch.rand(2, 2, 3, 5), 1, 1), 2); "
    assert fresh(code + "print(json.dumps('triton' in sys.modules))") is False
