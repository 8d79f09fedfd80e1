"""Diffusion features: noise, average over draws, grid and picture."""

import pytest
import torch
from torch.testing import assert_close

from cove.features import diffusion_features, feature_picture, resample
from tests.method_helpers import randn

FRAMES, LATENT, GRID = 5, (4, 10, 14), (5, 7)
MIX = randn(11, 4)


def decode(noisy, frames=None):
    """Stand in for a decoder level: nonlinear, each position separately."""
    return torch.einsum("dc,nchw->ndhw", MIX, noisy).tanh()


def noises(ensemble=1, batch=8, seed=0, sigma=2.0):
    """Return the noise added to zero latents, in units of sigma, [draws, frames, ...]."""
    seen = []
    diffusion_features(
        lambda x, frames: seen.append(x) or x, torch.zeros(FRAMES, *LATENT), sigma, None, ensemble, batch, seed
    )
    return torch.cat(seen).view(ensemble, FRAMES, *LATENT) / sigma


def test_diffusion_features_noise_is_independent_per_frame_and_draw():
    noise = noises(ensemble=3).flatten(2).flatten(0, 1)
    assert (noise.mean().abs() < 0.05) and (noise.std() - 1).abs() < 0.05
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.2  # 560 values each: a deviation of 0.04


def test_diffusion_features_add_noise_to_the_latents():
    latents, seen = randn(FRAMES, *LATENT), []
    diffusion_features(lambda x, frames: seen.append(x) or x, latents, torch.tensor(3.0))
    assert_close(seen[0], latents + 3 * noises()[0])


def test_diffusion_features_noise_depends_on_the_seed():
    assert torch.equal(noises(seed=7), noises(seed=7))
    assert not torch.isclose(noises(seed=7), noises(seed=8)).any()


def test_diffusion_features_larger_ensemble_keeps_the_first_draws():
    assert torch.equal(noises(ensemble=3)[:2], noises(ensemble=2))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_diffusion_features_are_independent_of_batch_size(batch):
    assert torch.equal(noises(2, batch), noises(2))
    latents = randn(FRAMES, *LATENT)
    found = diffusion_features(decode, latents, 0.5, GRID, 2, batch)
    assert_close(found, diffusion_features(decode, latents, 0.5, GRID, 2))


def test_diffusion_features_keep_the_global_random_state():
    before = torch.get_rng_state()
    noises()
    assert torch.equal(torch.get_rng_state(), before)


def test_diffusion_features_are_normalised_averages_of_draws():
    latents = randn(FRAMES, *LATENT)
    found = diffusion_features(decode, latents, 0.5, ensemble=3)
    expected = torch.stack([decode(latents + 0.5 * noise) for noise in noises(ensemble=3)]).mean(0)
    assert_close(found, torch.nn.functional.normalize(expected, dim=1).permute(0, 2, 3, 1))
    assert_close(found.norm(dim=-1), torch.ones(FRAMES, 10, 14))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diffusion_features_of_half_precision_are_float32(dtype):
    def half(noisy, frames):
        assert noisy.dtype == dtype
        return noisy

    found = diffusion_features(half, randn(FRAMES, *LATENT, dtype=dtype), torch.tensor(0.5))
    assert found.dtype == torch.float32 and found.shape == (FRAMES, 10, 14, 4)
    assert_close(found.norm(dim=-1), torch.ones(FRAMES, 10, 14))


def test_diffusion_features_resample_each_draw_to_the_grid():
    latents = randn(FRAMES, *LATENT)
    found = diffusion_features(decode, latents, 0.5, GRID)
    expected = torch.nn.functional.avg_pool2d(decode(latents + 0.5 * noises()[0]), 2)
    assert_close(found, torch.nn.functional.normalize(expected, dim=1).permute(0, 2, 3, 1))


def test_resample_keeps_position_when_shrinking_and_enlarging():
    hidden = randn(3, 11, 10, 14)
    assert resample(hidden, (10, 14)) is hidden
    assert_close(resample(hidden, (5, 7)), hidden.unflatten(3, (7, 2)).unflatten(2, (5, 2)).mean((3, 5)))
    # Enlarging, even of one side only: away from the border, a ramp remains a ramp with its tokens centred.
    ramp, finer = torch.arange(7.0).expand(1, 1, 5, 7), torch.arange(12) / 2 + 0.25
    for height in (3, 5, 10):
        assert_close(resample(ramp, (height, 14))[..., 1:-1], finer.expand(1, 1, height, 12))
        assert_close(resample(ramp.mT, (14, height))[..., 1:-1, :], finer.expand(1, 1, height, 12).mT)


@pytest.mark.parametrize("wrong", [{"ensemble": 0}, {"batch": 0}])
def test_diffusion_features_refuse_zero_ensemble_and_batch(wrong):
    with pytest.raises(ValueError, match="1 or more"):
        diffusion_features(decode, randn(FRAMES, *LATENT), 0.5, **wrong)


def test_diffusion_features_progress_counts_batches():
    seen = []
    diffusion_features(
        decode, randn(FRAMES, *LATENT), 0.5, ensemble=2, batch=3, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("channels", [1, 2, 3, 11])
def test_feature_picture_is_rgb_from_0_to_1(channels):
    picture = feature_picture(randn(3, 5, 7, channels))
    assert picture.shape == (3, 5, 7, 3) and picture.dtype == torch.float32
    shown = min(channels, 3)
    flat = picture.flatten(0, 2)
    assert_close(flat.amin(0), torch.zeros(3))
    assert_close(flat.amax(0), torch.tensor([1.0] * shown + [0.0] * (3 - shown)))


@pytest.mark.parametrize("seed", range(5))
def test_feature_picture_shows_the_principal_components(seed):
    """Three patterns of decreasing strength along rotated axes become red, green and blue."""
    patterns = torch.linalg.qr(randn(105, 4) - randn(105, 4).mean(0)).Q[:, :3]
    axes = torch.linalg.qr(randn(11, 11, seed=seed)).Q[:3]
    axes = axes * torch.where(axes.sum(1) < 0, -1, 1)[:, None]
    features = (patterns * torch.tensor([9.0, 4.0, 1.0])) @ axes + 5
    expected = (patterns - patterns.amin(0)) / (patterns.amax(0) - patterns.amin(0))
    assert_close(feature_picture(features.view(3, 5, 7, 11)).flatten(0, 2), expected, atol=1e-4, rtol=1e-4)


def test_feature_picture_of_constant_features_is_black():
    assert torch.equal(feature_picture(torch.ones(3, 5, 7, 11)), torch.zeros(3, 5, 7, 3))


def test_feature_picture_of_half_precision_equals_float32():
    features = randn(3, 5, 7, 11, dtype=torch.bfloat16)
    assert torch.equal(feature_picture(features), feature_picture(features.float()))
