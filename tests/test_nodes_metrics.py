"""Reconstruction quality after inversion and sampling, and the report of Reconstruction Check."""

import math
import re
import sys
from dataclasses import replace

import pytest
import torch

from tests.helpers import FRAMES, HEIGHT, WIDTH, call, prompt, refused
from tests.inversion_helpers import guide, invert, sample


@pytest.fixture(scope="module")
def vae(comfy, base, models):
    """The autoencoder of the random checkpoint, which averages and enlarges pixels."""
    import comfy.sd

    path = str(base / "models/checkpoints" / models["sd15"])
    return comfy.sd.load_checkpoint_guess_config(path, output_clip=False, output_model=False)[2]


def pictures(seed=0, frames=FRAMES):
    """Return frames of 8x8 squares in random colours."""
    colours = torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(seed))
    return colours.repeat_interleave(8, 1).repeat_interleave(8, 2)


# --- reconstruction quality ---


@pytest.mark.parametrize(
    ("guided", "dtype", "least"), [(False, None, 45), (True, None, 45), (True, torch.bfloat16, 50)]
)
def test_reconstruction_check_psnr_of_fifty_steps_with_two_refinements(small, nodes, vae, guided, dtype, least):
    source = pictures()
    latent = {"samples": vae.encode(source)}
    model = small.clone()
    if dtype is not None:
        model.set_model_compute_dtype(dtype)
    model = guide(nodes, model, latent) if guided else model
    noise, inversion = invert(nodes, model, latent=latent, steps=50, refinements=2)
    back = vae.decode(sample(nodes, model, noise, prompt(1), cfg=1.0))
    clips = {"source": source, "vae_only": vae.decode(latent["samples"]), "reconstruction": back}
    _, report = call(nodes["ReconstructionCheck"], **clips, inversion=inversion)
    lowest = float(re.search(r"Lowest PSNR ([\d.]+) dB", report)[1])
    print(f"50 steps, 2 refinements, {dtype or 'float32'}, {'guided' if guided else 'plain'}: {lowest:.1f} dB")
    assert lowest >= least


def test_reconstruction_check_psnr_rises_with_refinements(small, nodes, vae):
    source = pictures()
    latent = {"samples": vae.encode(source)}
    lowest = []
    for refinements in (0, 1, 3):
        noise, inversion = invert(nodes, small, latent=latent, steps=5, refinements=refinements)
        back = vae.decode(sample(nodes, small, noise, prompt(1), cfg=1.0))
        clips = {"source": source, "vae_only": vae.decode(latent["samples"]), "reconstruction": back}
        _, report = call(nodes["ReconstructionCheck"], **clips, inversion=inversion)
        lowest.append(float(re.search(r"Lowest PSNR ([\d.]+) dB", report)[1]))
        assert inversion.quality() in report
    assert lowest[0] + 3 < lowest[1] < lowest[2] - 3


# --- Reconstruction Check ---


def loss(clip, frame, size):
    """Return the clip with one frame offset by `size` dB below full scale."""
    changed = clip.clone()
    changed[frame] += 10 ** (-size / 20)
    return changed


@pytest.mark.parametrize(
    ("decibels", "verdict", "advice"),
    [(40.0, "Good", None), (27.0, "Fair", "more refinements"), (13.0, "Poor", "more refinements")],
)
def test_reconstruction_check_verdict_follows_the_worst_frame(small, nodes, lines, decibels, verdict, advice):
    source = pictures()
    back = loss(loss(source, 1, decibels), 2, 60.0)
    sheet, report = call(nodes["ReconstructionCheck"], source=source, reconstruction=back)
    assert report.startswith(verdict) and f"Lowest PSNR {decibels:.1f} dB against the source, frame 1." in report
    assert (advice or "Edit on this inversion") in report
    head, *table, means = report.split("\n\n")[1].splitlines()
    assert head.split() == ["frame", "reconstruction", "PSNR", "reconstruction", "SSIM"] and len(table) == FRAMES
    assert means.split()[0] == "mean"
    numbers = [line.split() for line in table]
    assert [row[0] for row in numbers] == ["0", "1", "2"]
    assert [row[1] for row in numbers] == ["inf", f"{decibels:.1f}", "60.0"] and numbers[0][2] == "1.0000"
    assert report in "\n".join(lines())
    assert torch.equal(sheet, torch.cat((source, back), 2))


def test_reconstruction_check_separates_the_loss_of_the_vae(small, nodes):
    source = pictures()
    vae_only = loss(source, 0, 20.0)
    back = loss(vae_only, 0, 35.0)
    sheet, report = call(nodes["ReconstructionCheck"], source=source, reconstruction=back, vae_only=vae_only)
    assert (
        report.startswith("Good")
        and "The VAE alone loses much" in report
        and "Lowest PSNR 35.0 dB against what the VAE" in report
    )
    head, first, *_ = report.split("\n\n")[1].splitlines()
    assert head.split("  ") == ["frame", "reconstruction PSNR", "reconstruction SSIM", "vae_only PSNR", "vae_only SSIM"]
    assert first.split()[3] == "20.0" and float(first.split()[1]) < 20
    assert torch.equal(sheet, torch.cat((source, vae_only, back), 2))
    alone = call(nodes["ReconstructionCheck"], source=source, reconstruction=back)[1]
    assert alone.startswith("Poor") and "The VAE" not in alone


def test_reconstruction_check_advice_depends_on_the_inversion(small, nodes):
    source = pictures()
    back = loss(source, 0, 20.0)
    _, one = invert(nodes, small, steps=2, refinements=1)
    _, two = invert(nodes, small, steps=2, refinements=2)
    stopped, residuals = torch.tensor([False, True]), torch.tensor([0.1, 0.2], dtype=torch.float64)
    worse = replace(one, stopped=stopped, residuals=residuals)
    _, finer = invert(nodes, small, steps=2, refinements=2, multiple=2)
    advices = (one, "more refinements"), (two, "more steps"), (worse, "more steps"), (finer, "multiple 1")
    for inversion, advice in advices:
        report = call(nodes["ReconstructionCheck"], source=source, reconstruction=back, inversion=inversion)[1]
        assert f"Set {advice} in DDIM Inversion" in report and inversion.quality() in report
    assert "refining diverged in 1 steps, first in step 2" in worse.quality()


def test_reconstruction_check_refuses_other_sizes_and_ignores_alpha(nodes):
    source = pictures()
    for name in ("reconstruction", "vae_only"):
        for other in (pictures(frames=2), source[:, :16], source[:, :, :24]):
            spelled = f"{len(other)} frames of {other.shape[2]}x{other.shape[1]}"
            clips = {"source": source, "reconstruction": source} | {name: other}
            with refused("Reconstruction Check", "source is 3 frames of 56x40", f"{name} is {spelled}", "same frames"):
                call(nodes["ReconstructionCheck"], **clips)
    # Alpha is not compared.
    alpha = torch.cat((source, torch.rand(*source.shape[:3], 1)), 3)
    assert call(nodes["ReconstructionCheck"], source=alpha, reconstruction=source)[1].startswith("Good")


# --- verdict ---


@pytest.fixture(scope="module")
def verdict(nodes):
    return sys.modules[nodes["ReconstructionCheck"].__module__].verdict


@pytest.mark.parametrize(
    ("decibels", "word"),
    [(math.inf, "Good"), (45, "Good"), (30, "Good"), (29.9, "Fair"), (25, "Fair"), (24.9, "Poor"), (3, "Poor")],
)
def test_verdict_rates_the_psnr(verdict, decibels, word):
    text = verdict(decibels)
    assert text.startswith(f"{word}: ")
    assert ("Edit on this inversion" in text) == (word == "Good")
    assert ("Set more" in text) == (word != "Good")


def test_verdict_advises_against_a_multiple(verdict):
    for refinements, diverged in ((0, False), (1, True), (3, False)):
        assert "Set multiple 1 in DDIM Inversion" in verdict(20, refinements, diverged, 2)
        assert "multiple" not in verdict(20, refinements, diverged, 1)


@pytest.mark.parametrize("decibels", [27, 20])
@pytest.mark.parametrize(
    ("refinements", "diverged", "more"),
    [
        (None, False, "refinements"),
        (0, False, "refinements"),
        (1, False, "refinements"),
        (2, False, "steps"),
        (5, False, "steps"),
        (1, True, "steps"),  # more refinements would diverge as well
        (None, True, "steps"),
    ],
)
def test_verdict_names_the_setting_to_raise(verdict, decibels, refinements, diverged, more):
    text = verdict(decibels, refinements, diverged)
    assert f"Set more {more} in DDIM Inversion" in text
    assert "source prompt, cfg 1, and the same model" in text


@pytest.mark.parametrize("decibels", [40, 27, 20])
@pytest.mark.parametrize(("vae", "reported"), [(None, False), (40, False), (25, False), (24.9, True), (10, True)])
def test_verdict_mentions_a_high_loss_of_the_vae(verdict, decibels, vae, reported):
    assert ("VAE alone loses much" in verdict(decibels, vae=vae)) == reported
    assert verdict(decibels, vae=vae).startswith(verdict(decibels))
