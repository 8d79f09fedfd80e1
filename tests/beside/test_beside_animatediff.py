"""Beside AnimateDiff-Evolved's context windows, without a motion model: Use Evolved Sampling, before and after ours."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.beside.checks import CLOSE, FRAMES, ORDERS, alone, answer, answer_of_clips, arranged
from tests.helpers import call, latents, prompt
from tests.inversion_helpers import (
    ALL,
    flow,
    guide,
    inject,
    invert,
    joint,
    part_of,
    sample,
    store_unless_recomputed,
    watched,
)

# Kind of windows -> the node of its options, settings, and the windows at the first step.
WINDOWS = {
    "static": ("ADE_StandardStaticContextOptions", {}, ([0, 1, 2], [2, 3, 4])),
    "looped": (
        "ADE_LoopedUniformContextOptions",
        {"context_stride": 1, "closed_loop": True},
        ([0, 1, 2], [2, 3, 4], [4, 0, 1]),
    ),
}


@pytest.fixture(params=WINDOWS)
def windows(request, ade):
    """Kind of windows -> a function that puts them on a MODEL and the windows themselves, of 3 frames each."""
    node, settings, listed = WINDOWS[request.param]

    def cut(model):
        (options,) = ade(node, context_length=3, context_overlap=1, fuse_method="flat", **settings)
        return ade("ADE_UseEvolvedSampling", model=model, context_options=options)[0]

    return cut, listed


def test_evolved_sampling_cuts_windows(small, nodes, windows):
    noise, _ = invert(nodes, small, latent=latents(FRAMES))
    with watched(small) as calls:
        sample(nodes, windows[0](small), noise, cfg=1.0)
    assert {len(seen.latents) for seen in calls} == {3} and len(calls) > 3


# --- independent frames: windows must not change the result ---


@ORDERS
def test_ddim_inversion_and_sampler_of_independent_frames_are_independent_of_windows(small, nodes, windows, order):
    own = partial(alone, nodes)
    noise, inversion = invert(nodes, own(small), latent=latents(FRAMES))
    model = arranged(order, small, windows[0], own)
    cut_noise, cut_inversion = invert(nodes, model, latent=latents(FRAMES))
    assert_close(cut_noise["samples"], noise["samples"], **CLOSE)
    assert_close(cut_inversion.latents, inversion.latents, **CLOSE)
    assert_close(sample(nodes, model, noise), sample(nodes, own(small), noise), **CLOSE)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_diffusion_features_are_independent_of_windows(small, nodes, windows, batch_size):
    def take(model):
        return call(nodes["DiffusionFeatures"], model=model, latent=latents(FRAMES), batch_size=batch_size)[0].tokens

    assert_close(take(windows[0](small)), take(small), **CLOSE)


@pytest.mark.parametrize("storage", ["recompute", "memory"])
@ORDERS
def test_feature_injection_is_independent_of_windows(small, nodes, windows, order, storage):
    noise, inversion = invert(nodes, small, latent=latents(FRAMES))
    inversion = store_unless_recomputed(nodes, small, inversion, storage)
    blocks = ALL if storage == "recompute" else {}  # the stored ones
    expected = sample(nodes, inject(nodes, small, inversion, **blocks), noise)
    model = arranged(order, small, windows[0], lambda model: inject(nodes, model, inversion, **blocks))
    assert_close(sample(nodes, model, noise), expected, **CLOSE)


@ORDERS
def test_feature_injection_keeps_source_prompt_rows_with_their_frames(small, nodes, windows, order):
    rows = [[torch.cat([prompt(seed)[0][0] for seed in range(FRAMES)]), {}]]
    noise, inversion = invert(nodes, small, rows, latents(FRAMES))
    expected = sample(nodes, inject(nodes, small, inversion, **ALL), noise)
    model = arranged(order, small, windows[0], lambda model: inject(nodes, model, inversion, **ALL))
    assert_close(invert(nodes, windows[0](small), rows, latents(FRAMES))[0]["samples"], noise["samples"], **CLOSE)
    assert_close(sample(nodes, model, noise), expected, **CLOSE)


# --- joint frames: a window is a separate clip ---


@ORDERS
def test_correspondence_attention_of_all_frames_treats_a_window_as_a_clip(small, nodes, windows, order):
    _, inversion = invert(nodes, small, latent=latents(FRAMES))
    cut, listed = windows
    expected = answer_of_clips(listed, lambda frames: joint(nodes, small), inversion)
    assert_close(answer(arranged(order, small, cut, lambda model: joint(nodes, model)), inversion), expected, **CLOSE)


@ORDERS
def test_correspondence_attention_treats_a_window_as_a_clip(small, nodes, windows, order):
    _, inversion = invert(nodes, small, latent=latents(FRAMES))
    features, _ = call(nodes["DiffusionFeatures"], model=small, latent=latents(FRAMES))
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)

    def patched(correspondence):
        return lambda model: call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence)[0]

    cut, listed = windows
    ascending = [sorted(frames) for frames in listed]  # the order in which matches are merged
    expected = answer_of_clips(ascending, lambda frames: patched(pairs_of(correspondence, frames))(small), inversion)
    model = arranged(order, small, cut, patched(correspondence))
    assert_close(answer(model, inversion), expected, **CLOSE)


def pairs_of(correspondence, frames):
    """Return the correspondence of some of its frames as a separate clip, with every pair followed beforehand."""
    pairs = torch.zeros(len(frames), len(frames), correspondence.height * correspondence.width, correspondence.k)
    for i, frame in enumerate(frames):
        for j, other in enumerate(frames):
            if i != j:
                pairs[i, j] = correspondence.follow(frame, [other])[:, 0]
    pairs = pairs.int()
    links = range(len(frames) - 1)
    forward, backward = (torch.stack([pairs[i + a, i + 1 - a] for i in links]) for a in (0, 1))
    return replace(correspondence, forward=forward, backward=backward, pairs=pairs)


@pytest.mark.parametrize("blend", [True, False])
@ORDERS
def test_token_flow_treats_a_window_as_a_clip(small, nodes, windows, order, blend):
    _, inversion = invert(nodes, small, latent=latents(FRAMES))
    cut, listed = windows
    expected = answer_of_clips(
        listed, lambda frames: flow(nodes, small, part_of(inversion, frames), blend_keyframes=blend), inversion
    )
    model = arranged(order, small, cut, lambda model: flow(nodes, model, inversion, blend_keyframes=blend))
    assert_close(answer(model, inversion), expected, **CLOSE)


@ORDERS
def test_feature_injection_with_attention_and_windows_is_independent_of_order(small, nodes, windows, order):
    """Windows, Correspondence Attention and Feature Injection together; the last two in both orders."""
    cut, _ = windows
    guided = guide(nodes, small, latents(FRAMES))
    noise, inversion = invert(nodes, cut(guided), latent=latents(FRAMES))
    assert inversion.latents.isfinite().all()
    edit = sample(nodes, inject(nodes, cut(guided), inversion, **ALL), noise)
    assert edit.isfinite().all()
    other = sample(nodes, cut(inject(nodes, guided, inversion, **ALL)), noise)
    assert_close(edit, other, **CLOSE)
