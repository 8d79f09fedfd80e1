"""Blocks are those that the text names, or FLATTEN's; features stand in for those of every conditioning."""

import tracemalloc

import pytest
import torch

from cove.injection import ATTENTION, RESNET, Site, choose_blocks, inject_features
from tests.method_helpers import DEVICES, randn

# SD1 and SD2: ResNets in all twelve decoder blocks, transformers from the fourth. By how often their grid is halved.
LEVELS = [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
SD = {RESNET: range(12), ATTENTION: range(3, 12)}


def test_auto_is_flatten_on_its_own_decoder():
    assert choose_blocks(RESNET, "auto", SD[RESNET], LEVELS) == (3, 4, 6)
    assert choose_blocks(ATTENTION, "auto", SD[ATTENTION], LEVELS) == (4, 5, 6, 7, 8, 9)


def test_auto_is_at_the_same_places_of_the_same_grids():
    sdxl = LEVELS[3:]  # nine blocks, transformers in the first six
    assert choose_blocks(RESNET, "auto", range(9), sdxl) == (0, 1, 3)
    assert choose_blocks(ATTENTION, "auto", range(6), sdxl) == (1, 2, 3, 4, 5)
    two_a_grid = [2, 2, 1, 1, 0, 0]  # the demo model
    assert choose_blocks(RESNET, "auto", range(6), two_a_grid) == (0, 1, 2)
    assert choose_blocks(ATTENTION, "auto", range(6), two_a_grid) == (1, 2, 3, 4)


def test_auto_leaves_out_what_the_model_lacks():
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
def test_text_names_blocks(kind, text, expected):
    assert choose_blocks(kind, text, SD[kind], LEVELS) == expected


def test_auto_in_capitals():
    assert choose_blocks(RESNET, " Auto ", SD[RESNET], LEVELS) == (3, 4, 6)


@pytest.mark.parametrize("text", ["all", "3, x", "3;4", "-1", "3--4", "3-", "1-3-5", "3.5", "auto, 3", "none 3", "²"])
def test_text_of_another_form_is_refused_with_the_forms_there_are(text):
    with pytest.raises(ValueError) as caught:
        choose_blocks(ATTENTION, text, SD[ATTENTION], LEVELS)
    message = str(caught.value)
    assert message.startswith(f"{ATTENTION} blocks")
    assert all(form in message for form in (f'"{text}"', '"3, 4, 6"', '"4-9"', '"auto"', '"none"'))


@pytest.mark.parametrize("text", ["9-4", "3, 9-4"])
def test_a_range_that_ends_before_it_begins_is_refused(text):
    with pytest.raises(ValueError, match=f'got "{text}"'):
        choose_blocks(ATTENTION, text, SD[ATTENTION], LEVELS)


@pytest.mark.parametrize("text", ["2", "3, 12", "3, 41", "0-11", "10-13", "41-43, 5"])
def test_blocks_that_are_not_there_are_refused_with_those_that_are(text):
    with pytest.raises(ValueError, match=rf'attention layers in the decoder blocks 3, 4, .*, 11; got "{text}"'):
        choose_blocks(ATTENTION, text, SD[ATTENTION], LEVELS)


def test_a_long_range_takes_no_memory():
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="attention layers in the decoder blocks"):
            choose_blocks(ATTENTION, "3-300000", SD[ATTENTION], LEVELS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # its numbers would take 10 MiB and more
    finally:
        tracemalloc.stop()


def test_no_block_in_the_text_is_refused():
    with pytest.raises(ValueError, match=r'resnet layers in the decoder blocks 0, 1, .*; got ","'):
        choose_blocks(RESNET, ",", SD[RESNET], LEVELS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 11, 5, 7), (5, 7, 13)])
@pytest.mark.parametrize("conds", [1, 2, 3])
def test_every_conditioning_gets_the_features(conds, shape, device):
    features = randn(*shape)
    into = randn(conds * shape[0], *shape[1:], seed=1).to(device)
    before = into.clone()
    found = inject_features(into, features, conds)
    assert found.shape == into.shape and found.device == into.device
    for chunk in found.cpu().chunk(conds):  # one conditioning after the other, each with all frames
        assert torch.equal(chunk, features)
    assert torch.equal(into, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_take_the_dtype_of_what_they_replace(dtype):
    features = randn(3, 11, 5, 7)
    found = inject_features(torch.zeros(6, 11, 5, 7, dtype=dtype), features, 2)
    assert found.dtype == dtype
    assert torch.equal(found[3:], features.to(dtype))


@pytest.mark.parametrize(
    ("into", "conds"),
    [((6, 7, 11), 1), ((6, 7, 11), 3), ((7, 7, 11), 2), ((6, 11, 7), 2), ((6, 7, 13), 2), ((6, 7), 2), ((3, 7, 11), 2)],
)
def test_features_of_another_shape_are_refused(into, conds):
    with pytest.raises(ValueError) as caught:
        inject_features(torch.zeros(into), randn(3, 7, 11), conds)
    assert all(part in str(caught.value) for part in ("[3, 7, 11]", str(list(into)), f"{conds} conditionings"))


def test_names_of_sites():
    assert str(Site(RESNET, 3)) == "resnet.3.0"
    assert str(Site(ATTENTION, 4, 1)) == "attention.4.1"
    assert len({Site(ATTENTION, 4, 1), Site(ATTENTION, 4, 1), Site(ATTENTION, 4)}) == 2
