"""Choice of decoder blocks, by text or as in FLATTEN, and replacement of features in every conditioning."""

import tracemalloc

import pytest
import torch

from cove.injection import ATTENTION, RESNET, Site, choose_blocks, inject_features
from tests.method_helpers import DEVICES, randn

# SD1 and SD2: ResNets in all twelve decoder blocks, transformers from the fourth; levels count halvings of the grid.
LEVELS = [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
SD = {RESNET: range(12), ATTENTION: range(3, 12)}


def test_choose_blocks_auto_matches_flatten_on_sd():
    assert choose_blocks(RESNET, "auto", SD[RESNET], LEVELS) == (3, 4, 6)
    assert choose_blocks(ATTENTION, "auto", SD[ATTENTION], LEVELS) == (4, 5, 6, 7, 8, 9)


def test_choose_blocks_auto_selects_the_same_grids_in_other_decoders():
    sdxl = LEVELS[3:]  # nine blocks, transformers in the first six
    assert choose_blocks(RESNET, "auto", range(9), sdxl) == (0, 1, 3)
    assert choose_blocks(ATTENTION, "auto", range(6), sdxl) == (1, 2, 3, 4, 5)
    two_a_grid = [2, 2, 1, 1, 0, 0]  # the demo model
    assert choose_blocks(RESNET, "auto", range(6), two_a_grid) == (0, 1, 2)
    assert choose_blocks(ATTENTION, "auto", range(6), two_a_grid) == (1, 2, 3, 4)


def test_choose_blocks_auto_omits_missing_blocks():
    assert choose_blocks(RESNET, "auto", range(5), [3, 3, 3, 0, 0]) == ()
    assert choose_blocks(RESNET, "auto", range(5), [1, 1, 1, 0, 0]) == (0,)
    assert choose_blocks(ATTENTION, "auto", (5, 7, 11), LEVELS) == (5, 7)
    assert choose_blocks(ATTENTION, "auto", (), LEVELS) == ()


@pytest.mark.parametrize("kind", [RESNET, ATTENTION])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", (5,)),
        ("3, 4, 6", (3, 4, 6)),
        ("6,3,  4", (3, 4, 6)),
        ("3 4\t6\n", (3, 4, 6)),
        (",3,,4,", (3, 4)),
        ("4-9", (4, 5, 6, 7, 8, 9)),
        ("4 - 6, 11", (4, 5, 6, 11)),
        ("4-6 5-7, 6", (4, 5, 6, 7)),
        ("7-7", (7,)),
        ("none", ()),
        ("  NONE ", ()),
        ("", ()),
        ("  ", ()),
    ],
)
def test_choose_blocks_parses_numbers_and_ranges(kind, text, expected):
    assert choose_blocks(kind, text, SD[kind], LEVELS) == expected


def test_choose_blocks_auto_ignores_case():
    assert choose_blocks(RESNET, " Auto ", SD[RESNET], LEVELS) == (3, 4, 6)


@pytest.mark.parametrize("text", ["all", "3, x", "3;4", "-1", "3--4", "3-", "1-3-5", "3.5", "auto, 3", "none 3", "²"])
def test_choose_blocks_refuses_other_text_and_lists_the_forms(text):
    with pytest.raises(ValueError) as caught:
        choose_blocks(ATTENTION, text, SD[ATTENTION], LEVELS)
    message = str(caught.value)
    assert message.startswith(f"{ATTENTION} blocks")
    assert all(form in message for form in (f'"{text}"', '"3, 4, 6"', '"4-9"', '"auto"', '"none"'))


@pytest.mark.parametrize("text", ["9-4", "3, 9-4"])
def test_choose_blocks_refuses_a_descending_range(text):
    with pytest.raises(ValueError, match=f'got "{text}"'):
        choose_blocks(ATTENTION, text, SD[ATTENTION], LEVELS)


@pytest.mark.parametrize("text", ["2", "3, 12", "3, 41", "0-11", "10-13", "41-43, 5"])
def test_choose_blocks_refuses_missing_blocks_and_lists_existing_ones(text):
    with pytest.raises(ValueError, match=rf'attention layers in the decoder blocks 3, 4, .*, 11; got "{text}"'):
        choose_blocks(ATTENTION, text, SD[ATTENTION], LEVELS)


def test_choose_blocks_refuses_a_long_range_without_allocating_it():
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="attention layers in the decoder blocks"):
            choose_blocks(ATTENTION, "3-300000", SD[ATTENTION], LEVELS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # the numbers would take more than 10 MiB
    finally:
        tracemalloc.stop()


def test_choose_blocks_refuses_text_without_a_block():
    with pytest.raises(ValueError, match=r'resnet layers in the decoder blocks 0, 1, .*; got ","'):
        choose_blocks(RESNET, ",", SD[RESNET], LEVELS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 11, 5, 7), (5, 7, 13)])
@pytest.mark.parametrize("conds", [1, 2, 3])
def test_inject_features_replaces_every_conditioning(conds, shape, device):
    features = randn(*shape)
    into = randn(conds * shape[0], *shape[1:], seed=1).to(device)
    before = into.clone()
    found = inject_features(into, features, conds)
    assert found.shape == into.shape and found.device == into.device
    for chunk in found.cpu().chunk(conds):  # all frames of one conditioning, then of the next
        assert torch.equal(chunk, features)
    assert torch.equal(into, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inject_features_keeps_the_dtype(dtype):
    features = randn(3, 11, 5, 7)
    found = inject_features(torch.zeros(6, 11, 5, 7, dtype=dtype), features, 2)
    assert found.dtype == dtype
    assert torch.equal(found[3:], features.to(dtype))


@pytest.mark.parametrize(
    ("into", "conds"),
    [((6, 7, 11), 1), ((6, 7, 11), 3), ((7, 7, 11), 2), ((6, 11, 7), 2), ((6, 7, 13), 2), ((6, 7), 2), ((3, 7, 11), 2)],
)
def test_inject_features_refuses_other_shapes(into, conds):
    with pytest.raises(ValueError) as caught:
        inject_features(torch.zeros(into), randn(3, 7, 11), conds)
    assert all(part in str(caught.value) for part in ("[3, 7, 11]", str(list(into)), f"{conds} conditionings"))


def test_site_names_are_unique():
    assert str(Site(RESNET, 3)) == "resnet.3.0"
    assert str(Site(ATTENTION, 4, 1)) == "attention.4.1"
    assert len({Site(ATTENTION, 4, 1), Site(ATTENTION, 4, 1), Site(ATTENTION, 4)}) == 2
