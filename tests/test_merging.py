"""Bipartite soft matching against plain loops: merged tokens and their sizes."""

import pytest
import torch
from torch.testing import assert_close

from cove import reference
from cove.merging import bipartite_order, merge_tokens, removed_tokens
from tests.method_helpers import DEVICES, half_is_as_good, randn

RATIOS = [0, 0.25, 0.3, 0.5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13])
def test_merge_tokens_matches_reference(count, ratio, device):
    tokens = randn(3, 5, count, 11)
    merged, sizes = merge_tokens(tokens.to(device), ratio)
    assert sizes.dtype == torch.int64 and merged.shape == (3, 5, count - int(ratio * count), 11)
    for i in range(3):
        for j in range(5):
            expected, expected_sizes = reference.merge_tokens(tokens[i, j], ratio)
            assert_close(merged[i, j].cpu(), expected)
            assert sizes[i, j].tolist() == expected_sizes


def test_merge_tokens_matches_a_worked_example():
    """A: rows 0, 2, 4; B: rows 1, 3. Row 2 is parallel to row 3, row 4 is close to row 1, row 0 is far from both."""
    tokens = torch.tensor([[-1.0, 1], [4, 0], [0, 2], [0, 6], [2, 1]])
    merged, sizes = merge_tokens(tokens, 0.2)
    assert merged.tolist() == [[-1, 1], [2, 1], [4, 0], [0, 4]] and sizes.tolist() == [1, 1, 1, 2]
    merged, sizes = merge_tokens(tokens, 0.4)
    assert merged.tolist() == [[-1, 1], [3, 0.5], [0, 4]] and sizes.tolist() == [1, 2, 2]


def test_merge_tokens_prefers_the_earlier_of_equal_tokens():
    merged, sizes = merge_tokens(torch.tensor([[0.0, 1]] * 7), 0.3)
    assert sizes.tolist() == [1, 1, 3, 1, 1] and torch.equal(merged, torch.tensor([[0.0, 1]] * 5))
    merged, sizes = merge_tokens(torch.tensor([[1.0, 0], [2, 0], [3, 0], [0, 5], [0, 7]]), 0.2)
    assert merged.tolist() == [[3, 0], [0, 7], [1.5, 0], [0, 5]] and sizes.tolist() == [1, 1, 2, 1]


def test_merge_tokens_with_ratio_zero_only_reorders():
    tokens = randn(3, 7, 11)
    merged, sizes = merge_tokens(tokens, 0)
    assert torch.equal(merged, torch.cat((tokens[:, 0::2], tokens[:, 1::2]), 1)) and (sizes == 1).all()
    assert bipartite_order(7).tolist() == [0, 2, 4, 6, 1, 3, 5]


@pytest.mark.parametrize("ratio", RATIOS)
def test_merge_tokens_keeps_the_weighted_sum(ratio):
    tokens = randn(5, 13, 11)
    merged, sizes = merge_tokens(tokens, ratio)
    assert_close((merged * sizes[..., None]).sum(-2), tokens.sum(-2))
    assert (sizes.sum(-1) == 13).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_tokens_in_half_precision_is_as_exact_as_reference(dtype):
    tokens = randn(13, 11, dtype=dtype)
    merged, sizes = merge_tokens(tokens, 0.3)
    exact, expected_sizes = reference.merge_tokens(tokens.double(), 0.3)
    assert sizes.tolist() == expected_sizes
    half_is_as_good(merged, reference.merge_tokens(tokens, 0.3)[0], exact)


def test_merge_tokens_compares_half_precision_in_float32():
    """The third token's similarities to the second and fourth differ by less than half precision resolves."""
    near, far = [1.0, 0.04], [1.0, 0.05]
    tokens = torch.tensor([[-1.0, 0], far, [1, 0], near], dtype=torch.bfloat16)
    assert merge_tokens(tokens, 0.25)[1].tolist() == [1, 1, 2]


@pytest.mark.parametrize("ratio", [-0.1, 0.51, float("nan")])
def test_merge_tokens_refuses_ratios_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"from 0 to 0\.5"):
        merge_tokens(randn(4, 2), ratio)


def test_removed_tokens_is_the_floor_of_ratio_times_count():
    assert [removed_tokens(count, 0.5) for count in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [removed_tokens(count, 0.3) for count in (3, 4, 6, 7)] == [0, 1, 1, 2]
