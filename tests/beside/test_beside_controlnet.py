"""With Advanced-ControlNet: hints, latent keyframes and timestep keyframes, with and without context windows."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.beside.checks import CLOSE, FRAMES, STEPS, alone, equal_or_refused
from tests.beside.models import tiny_controlnet
from tests.helpers import hints, latents, prompt
from tests.inversion_helpers import ALL, flow, guide, inject, invert, joint, sample, store

STRENGTHS = (1.0, 0.7, 0.0, 0.4, 0.9)  # one per frame


@pytest.fixture(scope="session")
def stock(use):
    """Conditioning and hints -> the conditioning with the host's ControlNet."""
    return partial(apply, use, "ControlNetApplyAdvanced")


@pytest.fixture(scope="session")
def advanced(acn):
    """Conditioning and hints -> the conditioning with Advanced-ControlNet's ControlNet."""
    return partial(apply, acn, "ACN_AdvancedControlNetApply_v2")


def apply(use, node, conditioning, image, **optional):
    wires = {"positive": conditioning, "negative": conditioning, "control_net": tiny_controlnet(), "image": image}
    return use(node, **wires, **optional)[0]


# --- hints ---


@pytest.mark.parametrize("images", [1, FRAMES])
def test_feature_injection_with_advanced_hints_matches_a_stock_controlnet(small, nodes, advanced, stock, images):
    guided = guide(nodes, small, latents(FRAMES))
    runs = []
    for controlled in (stock, advanced):
        source, edit = controlled(prompt(1), hints(images)), controlled(prompt(2), hints(images, seed=3))
        noise, inversion = invert(nodes, guided, source, latents(FRAMES), STEPS)
        model = inject(nodes, guided, inversion, conditioning=source, **ALL)
        runs.append((noise["samples"], sample(nodes, model, noise, edit)))
    for one, other in zip(*runs, strict=True):
        assert_close(other, one, **CLOSE)


def test_token_flow_with_advanced_hints_matches_a_stock_controlnet(small, nodes, advanced, stock):
    runs = []
    for controlled in (stock, advanced):
        source, edit = controlled(prompt(1), hints(FRAMES)), controlled(prompt(2), hints(FRAMES, seed=3))
        noise, inversion = invert(nodes, small, source, latents(FRAMES), STEPS)
        model = flow(nodes, small, inversion, conditioning=source)
        runs.append(sample(nodes, model, noise, edit))
    assert_close(runs[1], runs[0], **CLOSE)


@pytest.mark.parametrize("kind", ["stock", "advanced"])
@pytest.mark.parametrize("images", [1, FRAMES])
def test_ddim_inversion_and_sampler_keep_hints_with_their_frames_in_windows(
    small, nodes, advanced, stock, windowed, images, kind
):
    """In the inversion and the edit of independent frames."""
    controlled = stock if kind == "stock" else advanced
    source, edit = controlled(prompt(1), hints(images)), controlled(prompt(2), hints(images, seed=3))
    noise, _ = invert(nodes, small, source, latents(FRAMES), STEPS)
    model = windowed(small, partial(alone, nodes))
    equal_or_refused(lambda: invert(nodes, model, source, latents(FRAMES), STEPS)[0]["samples"], noise["samples"])
    expected = sample(nodes, alone(nodes, small), noise, edit)
    equal_or_refused(lambda: sample(nodes, model, noise, edit), expected)


@pytest.mark.parametrize("kind", ["stock", "advanced"])
@pytest.mark.parametrize("images", [1, FRAMES])
def test_feature_injection_keeps_hints_of_the_source_with_their_frames_in_windows(
    small, nodes, advanced, stock, windowed, images, kind
):
    source = (stock if kind == "stock" else advanced)(prompt(1), hints(images))
    noise, inversion = invert(nodes, small, source, latents(FRAMES), STEPS)

    def patch(model):
        return inject(nodes, model, inversion, conditioning=source, **ALL)

    expected = sample(nodes, patch(small), noise)
    equal_or_refused(lambda: sample(nodes, windowed(small, patch), noise), expected)


# --- latent keyframes ---


def keyframes(acn):
    text = ", ".join(f"{index}={strength}" for index, strength in enumerate(STRENGTHS))
    return acn("LatentKeyframeGroup", index_strengths=text)[0]


def one_by_one(nodes, small, stock, noise):
    """Return the edit of every frame alone, with a stock ControlNet of its own strength."""
    pictures, edits = hints(FRAMES, seed=3), []
    for index, strength in enumerate(STRENGTHS):
        edit = stock(prompt(2), pictures[[index]], strength=strength) if strength else prompt(2)
        edits.append(sample(nodes, small, noise | {"samples": noise["samples"][[index]]}, edit))
    return torch.cat(edits)


def test_ddim_sampler_applies_latent_keyframes(small, nodes, acn, advanced, stock):
    noise, _ = invert(nodes, small, latent=latents(FRAMES), steps=STEPS)
    edit = advanced(prompt(2), hints(FRAMES, seed=3), latent_kf_override=keyframes(acn))
    expected = one_by_one(nodes, small, stock, noise)
    assert_close(sample(nodes, alone(nodes, small), noise, edit), expected, **CLOSE)


def test_ddim_sampler_applies_latent_keyframes_in_windows(small, nodes, acn, advanced, stock, windowed):
    noise, _ = invert(nodes, small, latent=latents(FRAMES), steps=STEPS)
    edit = advanced(prompt(2), hints(FRAMES, seed=3), latent_kf_override=keyframes(acn))
    model = windowed(small, partial(alone, nodes))
    expected = one_by_one(nodes, small, stock, noise)
    equal_or_refused(lambda: sample(nodes, model, noise, edit), expected)


@pytest.mark.parametrize("blend", [True, False])
def test_token_flow_applies_latent_keyframes(small, nodes, acn, advanced, stock, blend):
    """Equal strength for every frame equals a stock ControlNet of that strength."""
    (same,) = acn("LatentKeyframeGroup", index_strengths=", ".join(f"{index}=0.7" for index in range(FRAMES)))
    runs = []
    for controlled in (partial(advanced, latent_kf_override=same), partial(stock, strength=0.7)):
        source, edit = controlled(prompt(1), hints(FRAMES)), controlled(prompt(2), hints(FRAMES, seed=3))
        noise, inversion = invert(nodes, small, source, latents(FRAMES), STEPS)
        model = flow(nodes, small, inversion, conditioning=source, blend_keyframes=blend)
        runs.append(sample(nodes, model, noise, edit))
    assert_close(*runs, **CLOSE)


# --- timestep keyframes ---


def until_half(acn):
    """Return keyframes with full strength in the first half of sampling and none afterwards."""
    (first,) = acn("TimestepKeyframe", start_percent=0.0, strength=1.0)
    return acn("TimestepKeyframe", start_percent=0.5, strength=0.0, prev_timestep_kf=first)[0]


def test_ddim_sampler_applies_timestep_keyframes(small, nodes, acn, advanced):
    guided = joint(nodes, small)
    noise, _ = invert(nodes, guided, latent=latents(FRAMES), steps=STEPS)
    edits = [
        advanced(prompt(2), hints(FRAMES), **settings)
        for settings in ({"end_percent": 0.5}, {"timestep_kf": until_half(acn)}, {})
    ]
    stopped, keyed, whole = (sample(nodes, guided, noise, edit) for edit in edits)
    assert_close(keyed, stopped, **CLOSE)
    assert (whole - stopped).abs().max() > 1e-2


def test_ddim_inversion_applies_timestep_keyframes(small, nodes, acn, advanced):
    """Sigma rises in an inversion, but Advanced-ControlNet's keyframes only move forward."""
    stopped = advanced(prompt(1), hints(FRAMES), end_percent=0.5)
    keyed = advanced(prompt(1), hints(FRAMES), timestep_kf=until_half(acn))
    expected = invert(nodes, small, stopped, latents(FRAMES), STEPS)[0]["samples"]
    equal_or_refused(lambda: invert(nodes, small, keyed, latents(FRAMES), STEPS)[0]["samples"], expected)


@pytest.mark.parametrize("storage", ["recompute", "memory"])
def test_feature_injection_applies_timestep_keyframes_of_the_source(small, nodes, acn, advanced, storage):
    stopped = advanced(prompt(1), hints(FRAMES), end_percent=0.5)
    keyed = advanced(prompt(1), hints(FRAMES), timestep_kf=until_half(acn))
    noise, inversion = invert(nodes, small, stopped, latents(FRAMES), STEPS)

    def edit(source):
        if storage == "memory":
            return sample(nodes, inject(nodes, small, store(nodes, small, inversion, conditioning=source)), noise)
        return sample(nodes, inject(nodes, small, inversion, conditioning=source, **ALL), noise)

    assert_close(edit(keyed), edit(stopped), **CLOSE)


def test_ddim_inversion_with_other_keyframes_starts_over(small, nodes, acn, advanced):
    import comfy.model_management as management

    (weak,) = acn("TimestepKeyframe", start_percent=0.0, strength=0.2)
    one, other = advanced(prompt(1), hints(FRAMES)), advanced(prompt(1), hints(FRAMES), timestep_kf=weak)
    expected = invert(nodes, small, other, latents(FRAMES), STEPS)[0]["samples"]
    calls = []

    def break_off(*call):
        calls.append(call)
        if len(calls) > 2:
            raise management.InterruptProcessingException

    hook = small.model.diffusion_model.register_forward_pre_hook(break_off)
    with pytest.raises(management.InterruptProcessingException):
        invert(nodes, small, one, latents(FRAMES), STEPS)
    hook.remove()
    assert_close(invert(nodes, small, other, latents(FRAMES), STEPS)[0]["samples"], expected, **CLOSE)
