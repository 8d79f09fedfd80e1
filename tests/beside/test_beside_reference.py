"""With Advanced-ControlNet's Reference ControlNet, which runs the UNet on a reference before the clip."""

import pytest
import torch

from tests.helpers import hints, latents, prompt, refused
from tests.inversion_helpers import flow, guide, inject, invert, joint, sample, store, tiny
from tests.random_models import vae_weights

FRAMES, STEPS = 3, 3


@pytest.fixture(scope="module")
def model(comfy):
    """A tiny MODEL in the shape of SD1.5, not shared because its blocks keep a patched `forward`."""
    with torch.inference_mode():
        yield tiny("sd15", seed=1)


@pytest.fixture(scope="session")
def referring(acn):
    """Positive, negative, kind -> both conditionings with a Reference ControlNet."""
    import comfy.sd

    vae = comfy.sd.VAE(sd={name: weight.clone() for name, weight in vae_weights(0.18215).items()})

    def with_reference(positive, negative, kind):
        (net,) = acn("ACN_ReferenceControlNet", reference_type=kind)
        (image,) = acn("ACN_ReferencePreprocessor", image=hints(1, seed=5), vae=vae, latent_size=latents(FRAMES))
        wires = {"positive": positive, "negative": negative, "control_net": net, "image": image}
        return acn("ACN_AdvancedControlNetApply_v2", **wires)

    return with_reference


@pytest.fixture(params=["reference_attn", "reference_adain", "reference_attn+adain"])
def kind(request):
    return request.param


@torch.inference_mode()
def test_ddim_inversion_sampler_and_injection_run_with_a_reference(model, nodes, referring, kind):
    """The reference draws unseeded noise, so runs differ."""
    source, _ = referring(prompt(1), prompt(3), kind)
    edits = referring(prompt(2), prompt(3), kind)
    noise, inversion = invert(nodes, model, latent=latents(FRAMES), steps=STEPS)
    referred, _ = invert(nodes, model, source, latents(FRAMES), STEPS)
    assert (referred["samples"] - noise["samples"]).abs().max() > 0.1
    for patched in (model, inject(nodes, model, inversion)):
        edit = sample(nodes, patched, noise, *edits)
        assert (edit - sample(nodes, patched, noise)).abs().max() > 0.1


@torch.inference_mode()
def test_feature_injection_and_token_flow_refuse_a_reference_of_the_source(model, nodes, referring, kind):
    """Only the sampler's prompts reach the reference."""
    source, _ = referring(prompt(1), prompt(3), kind)
    noise, inversion = invert(nodes, model, source, latents(FRAMES), STEPS)
    for name, patched in {"Feature Injection": inject, "TokenFlow": flow}.items():
        with refused(name, "reference ControlNet"):
            sample(nodes, patched(nodes, model, inversion, conditioning=source), noise)


@torch.inference_mode()
def test_store_features_refuses_a_reference_controlnet(model, nodes, referring, kind):
    """The first pass of the UNet is the reference's, whose features would be stored."""
    source, _ = referring(prompt(1), prompt(3), kind)
    _, inversion = invert(nodes, model, latent=latents(FRAMES), steps=STEPS)
    for _ in range(2):
        with refused("Store Features", "reference ControlNet"):
            store(nodes, model, inversion, conditioning=source)
        _, inversion = invert(nodes, model, source, latents(FRAMES), STEPS)


@pytest.mark.parametrize("used", [False, True])
@torch.inference_mode()
def test_correspondence_attention_and_token_flow_refuse_a_reference_of_the_edit(model, nodes, referring, kind, used):
    """The reference calls self-attention with parts of the batch, and adds its tokens to the keys."""
    noise, inversion = invert(nodes, model, latent=latents(FRAMES), steps=STEPS)
    edits = referring(prompt(2), prompt(3), kind)
    if used:  # as in a second run of a workflow, when its hint is a tensor
        sample(nodes, model, noise, *edits)
    for name, patched in {
        "Correspondence Attention": guide(nodes, model, latents(FRAMES)),
        "Correspondence Attention ": joint(nodes, model),
        "TokenFlow": flow(nodes, model, inversion),
    }.items():
        with refused(name.strip(), "reference ControlNet"):
            sample(nodes, patched, noise, *edits)
