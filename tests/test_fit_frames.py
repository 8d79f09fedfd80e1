"""Cropping, padding and resizing of frames to a size that models accept."""

import pytest
import torch
from torch.testing import assert_close

from cove.convert import FITS, MAX_SIZE
from cove.frames import fit_frames
from tests.method_helpers import picture


def fitted(images, width=0, height=0, fit="crop"):
    return fit_frames(images, 12, width=width, height=height, fit=fit).images


def random(*shape):
    return (torch.rand(shape) * 65535).round() / 65535  # the precision in which frames are kept


def test_fit_frames_keeps_frames_that_already_fit():
    images = random(3, 16, 24, 3)
    assert (fitted(images) - images).abs().max() < 1e-6
    for fit in FITS:
        assert_close(fitted(images, 24, 16, fit), images)


def test_fit_frames_crops_the_centre_for_size_zero():
    images = random(2, 19, 29, 3)
    assert_close(fitted(images), images[:, 1:17, 2:26])


@pytest.mark.parametrize("width, height, expected", [(24, 0, (16, 24)), (0, 16, (16, 24)), (8, 0, (8, 8))])
def test_fit_frames_derives_one_side_from_the_other(width, height, expected):
    images = fitted(random(2, 34, 51, 3), width, height)
    assert images.shape == (2, *expected, 3)


def test_fit_frames_crop_cuts_both_sides_and_keeps_proportions():
    images = torch.zeros(2, 16, 48, 3)
    images[:, :, 16:32] = 1  # the middle third remains
    assert torch.equal(fitted(images, 16, 16, "crop"), torch.ones(2, 16, 16, 3))
    images = images.transpose(1, 2)
    assert torch.equal(fitted(images, 16, 16, "crop"), torch.ones(2, 16, 16, 3))


def test_fit_frames_pad_adds_black_bars():
    padded = fitted(torch.ones(2, 16, 48, 3), 24, 40, "pad")
    expected = torch.zeros(2, 40, 24, 3)
    expected[:, 16:24] = 1
    assert_close(padded, expected, atol=1e-4, rtol=0)


def test_fit_frames_stretch_keeps_the_corners():
    images = picture(32, 88)
    assert_close(fitted(images, 40, 56, "stretch"), picture(56, 40), atol=0.02, rtol=0)


def test_fit_frames_shrinking_is_antialiased():
    checks = (torch.arange(40)[:, None] + torch.arange(56)) % 2
    small = fitted(checks[None, :, :, None].expand(1, 40, 56, 3).float(), 16, 8, "stretch")
    assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0)


def test_fit_frames_resizing_stays_in_range():
    images = (random(2, 16, 24, 3) > 0.5).float()
    large = fitted(images, 104, 88, "stretch")
    assert large.min() >= 0 and large.max() <= 1


def test_fit_frames_refuses_frames_below_the_minimum_size():
    with pytest.raises(ValueError, match="24 x 7 pixels"):
        fitted(random(2, 7, 24, 3))


@pytest.mark.parametrize("sizes", [{"width": MAX_SIZE}, {"height": MAX_SIZE + 8}, {"width": 8, "height": MAX_SIZE + 8}])
def test_fit_frames_refuses_sizes_beyond_the_limit(sizes):
    """The limit also applies to a side derived from the other."""
    with pytest.raises(ValueError, match=str(MAX_SIZE)):
        fitted(torch.rand(1, 24, 16, 3), **sizes)
    assert fitted(torch.rand(1, 24, 16, 3), height=24).shape == (1, 24, 16, 3)


def test_fit_frames_masks_the_bars():
    clip = fit_frames(torch.rand(2, 16, 48, 3), 12, width=24, height=40, fit="pad")
    expected = torch.ones(2, 40, 24)
    expected[:, 16:24] = 0
    assert torch.equal(clip.mask, expected)
    assert not fit_frames(torch.rand(2, 16, 48, 3), 12, width=24, height=40).mask.any()
