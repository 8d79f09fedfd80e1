"""Frames of any size become frames of a size that models take."""

import pytest
import torch
from torch.testing import assert_close

from cove import frames
from cove.frames import fit_frames
from tests.method_helpers import picture


def test_nothing_to_fit_is_left_alone():
    images = torch.rand(3, 16, 24, 3)
    assert torch.equal(fit_frames(images), images)
    for fit in frames.FITS:
        assert torch.equal(fit_frames(images, 24, 16, fit), images)


def test_size_zero_cuts_out_the_centre():
    images = torch.rand(2, 19, 29, 3)
    assert torch.equal(fit_frames(images), images[:, 1:17, 2:26])


@pytest.mark.parametrize("width, height, expected", [(24, 0, (16, 24)), (0, 16, (16, 24)), (8, 0, (8, 8))])
def test_one_size_follows_from_the_other(width, height, expected):
    images = fit_frames(torch.rand(2, 34, 51, 3), width, height)
    assert images.shape == (2, *expected, 3)


def test_crop_cuts_both_sides_and_keeps_proportions():
    images = torch.zeros(2, 16, 48, 3)
    images[:, :, 16:32] = 1  # the middle third is what is left
    assert torch.equal(fit_frames(images, 16, 16, "crop"), torch.ones(2, 16, 16, 3))
    images = images.transpose(1, 2)
    assert torch.equal(fit_frames(images, 16, 16, "crop"), torch.ones(2, 16, 16, 3))


def test_pad_shows_everything_between_black_bars():
    padded = fit_frames(torch.ones(2, 16, 48, 3), 24, 40, "pad")
    expected = torch.zeros(2, 40, 24, 3)
    expected[:, 16:24] = 1
    assert_close(padded, expected)


def test_stretch_keeps_the_corners():
    images = picture(32, 88)
    assert_close(fit_frames(images, 40, 56, "stretch"), picture(56, 40), atol=0.02, rtol=0)


def test_shrinking_is_antialiased():
    checks = (torch.arange(40)[:, None] + torch.arange(56)) % 2
    small = fit_frames(checks[None, :, :, None].expand(1, 40, 56, 3).float(), 16, 8, "stretch")
    assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0)


def test_resizing_stays_in_range():
    images = (torch.rand(2, 16, 24, 3) > 0.5).float()
    large = fit_frames(images, 104, 88, "stretch")
    assert large.min() >= 0 and large.max() <= 1


def test_frames_too_small_to_keep():
    with pytest.raises(ValueError, match="24 x 7 pixels"):
        fit_frames(torch.rand(2, 7, 24, 3))
