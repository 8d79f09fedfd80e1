"""PSNR and SSIM against scikit-image and known answers at the limits."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.testing import assert_close

from cove.metrics import psnr, ssim
from tests.method_helpers import DEVICES, randn

SHAPE = FRAMES, HEIGHT, WIDTH, CHANNELS = 5, 13, 17, 3


def clip(seed=0, shape=SHAPE):
    """Return a clip of values in 0..1, with edges and uniform areas."""
    noise = randn(*shape, seed=seed)
    noise[:, :, :7] *= 0.01
    return (0.5 + 0.3 * noise).clamp(0, 1)


def pair(strength=0.1, shape=SHAPE):
    """Return a clip, and the clip with noise that grows from frame to frame."""
    one = clip(shape=shape)
    steps = torch.arange(len(one)).view(-1, 1, 1, 1)
    return one, (one + strength * steps * randn(*shape, seed=1)).clamp(0, 1)


def structural_similarity_of_wang(one, other):
    """Return scikit-image's SSIM with the settings of Wang et al.

    The window ends 3.5 sigmas from the middle and is 11 pixels wide; the mean excludes the 5 pixels at the border where
    the window would reach outside.
    """
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1)
    return structural_similarity(one.double().numpy(), other.double().numpy(), **settings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strength", [0.01, 0.1, 1])
@pytest.mark.parametrize("shape", [SHAPE, (2, 31, 23, 5), (2, 11, 13, 1)])
def test_ssim_matches_scikit_image(shape, strength, device):
    one, other = pair(strength, shape)
    found = ssim(one.to(device), other.to(device))
    expected = [structural_similarity_of_wang(*frames) for frames in zip(one, other, strict=True)]
    assert found.dtype == torch.float64 and found.device.type == device
    assert_close(found.cpu(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
def test_psnr_matches_scikit_image(device):
    one, other = pair()
    one = 1 - one  # no frame is equal
    found = psnr(one.to(device), other.to(device))
    expected = [
        peak_signal_noise_ratio(x.double().numpy(), y.double().numpy(), data_range=1)
        for x, y in zip(one, other, strict=True)
    ]
    assert found.dtype == torch.float64 and found.device.type == device
    assert_close(found.cpu(), torch.tensor(expected, dtype=torch.float64))


def test_ssim_of_a_single_window_matches_the_formula():
    """11x11 pixels: one window, with Gaussian weights around the middle."""
    x, y = clip(shape=(11, 11, 11, 1))[7, ..., 0].double(), clip(1, shape=(11, 11, 11, 1))[7, ..., 0].double()
    weights = torch.tensor(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    ).double()
    weights /= weights.sum()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    expected = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    expected *= (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    # torch.tensor makes float32 weights
    assert_close(ssim(x[None, ..., None], y[None, ..., None])[0], expected, atol=1e-6, rtol=1e-6)


def test_psnr_and_ssim_of_equal_clips_are_maximal():
    assert psnr(clip(), clip()).tolist() == [math.inf] * FRAMES
    assert_close(ssim(clip(), clip()), torch.ones(FRAMES, dtype=torch.float64))


@pytest.mark.parametrize(("offset", "decibels"), [(0.1, 20), (-0.1, 20), (0.01, 40), (1, 0)])
def test_psnr_of_a_constant_offset_is_known(offset, decibels):
    one = clip().double()
    assert_close(psnr(one, one + offset), torch.full((FRAMES,), float(decibels), dtype=torch.float64))


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.7), (0, 1), (0.5, 0.5)])
def test_ssim_of_uniform_frames_depends_on_means_only(a, b):
    """Without variance only the means count."""
    expected = (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    found = ssim(torch.full(SHAPE, a).double(), torch.full(SHAPE, b).double())
    assert_close(found, torch.full((FRAMES,), expected, dtype=torch.float64))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_psnr_and_ssim_compare_frame_by_frame(metric):
    one, other = pair()
    found = metric(one, other)
    assert_close(found, torch.cat([metric(x[None], y[None]) for x, y in zip(one, other, strict=True)]))
    assert_close(found, metric(other, one))
    assert (found.diff() < 0).all()  # more noise is less similar


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_psnr_and_ssim_compute_in_double_precision(dtype):
    one, other = (x.to(dtype) for x in pair())
    for metric in (psnr, ssim):
        assert torch.equal(metric(one, other), metric(one.double(), other.double()))


def test_psnr_accepts_frames_of_any_shape():
    """Frames of any shape."""
    one = randn(3, 2, 5, 7, 11)
    assert_close(psnr(one, one + 0.1), torch.full((3,), 20.0).double(), atol=1e-4, rtol=0)  # rounding of float32


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("other", [(1, 13, 17, 3), (5, 17, 13, 3), (5, 13, 17, 1), (13, 17, 3)])
def test_psnr_and_ssim_refuse_clips_of_different_shape(metric, other):
    with pytest.raises(ValueError, match="same shape") as caught:
        metric(torch.zeros(SHAPE), torch.zeros(other))
    assert str(list(SHAPE)) in str(caught.value) and str(list(other)) in str(caught.value)


@pytest.mark.parametrize("shape", [(5, 10, 17, 3), (5, 17, 10, 3), (17, 19, 23), (2, 17, 19, 23, 3)])
def test_ssim_refuses_other_shapes_and_small_frames(shape):
    with pytest.raises(ValueError, match="11x11") as caught:
        ssim(torch.zeros(shape), torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)
