"""Errors and warnings about latents that were never inverted, and about other attention than in the inversion."""

import logging

import pytest
import torch
from torch import zeros_like

from tests.helpers import call, latents, prompt, refused, run_stock
from tests.inversion_helpers import ALL, flow, guide, inject, invert, sample, store, watched

CLEAN, OTHER = "not inverted noise", "other latents than the noise of this inversion"
STEPS = 5


@pytest.fixture
def warnings(caplog, nodes):
    """() -> the nodes' warnings since the last call, with the node's name."""
    names = {node.define_schema().display_name.removeprefix("COVE ") for node in nodes.values()}

    def found() -> list[str]:
        records = [record for record in caplog.records if record.levelno == logging.WARNING]
        lines = [record.getMessage() for record in records if record.getMessage().partition(": ")[0] in names]
        caplog.clear()
        return lines

    return found


def advanced(model, sampler, sigmas, latent):
    """Sample edited latents with the stock SamplerCustomAdvanced."""
    from comfy_extras import nodes_custom_sampler as custom

    (guider,) = run_stock(custom.CFGGuider, model, prompt(2), prompt(3), 2.0)
    (nothing,) = run_stock(custom.DisableNoise)
    return run_stock(custom.SamplerCustomAdvanced, nothing, guider, sampler, sigmas, latent)[0]


def edits(nodes, model, inversion):
    """Return MODEL patched by each node that runs the source, by node name."""
    return {
        "Feature Injection": inject(nodes, model, inversion, **ALL),
        "TokenFlow": flow(nodes, model, inversion),
    }


@pytest.mark.parametrize("latent", [latents(), {"samples": zeros_like(latents()["samples"])}], ids=["clip", "empty"])
def test_samplers_refuse_latents_that_were_never_inverted(small, nodes, latent):
    wrong = ("expected inverted noise", "never inverted", "Connect the `noise` output of DDIM Inversion")
    with refused("DDIM Sampler", *wrong), watched(small) as calls:
        sample(nodes, small, latent)
    with refused("DDIM Sampler (for SamplerCustomAdvanced)", *wrong):
        call(nodes["DDIMSamplerSelect"], model=small, noise=latent)
    assert not calls


@pytest.mark.parametrize("latent", [latents(), {"samples": zeros_like(latents()["samples"])}], ids=["clip", "empty"])
def test_ddim_sampler_select_warns_about_clean_latents(small, nodes, warnings, latent):
    """In the stock sampler the latents have their own input."""
    noise, inversion = invert(nodes, small, steps=STEPS)
    sampler, sigmas = call(nodes["DDIMSamplerSelect"], model=small, noise=noise)
    advanced(small, sampler, sigmas, latent)
    (line,) = warnings()
    assert line.startswith("DDIM Sampler (for SamplerCustomAdvanced): ") and CLEAN in line and "DDIM Inversion" in line
    for name, model in edits(nodes, small, inversion).items():
        advanced(model, sampler, sigmas, latent)
        assert [line for line in warnings() if line.startswith(f"{name}: ") and CLEAN in line]


@pytest.mark.parametrize("keys", ["kept", "dropped"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 31])
def test_ddim_sampler_does_not_warn_about_inverted_noise(small, nodes, warnings, keys, steps):
    """Nodes in between may drop other keys of a LATENT than its samples; the stock sampler does not need them."""
    noise, inversion = invert(nodes, small, steps=steps)
    sample(nodes, small, noise)
    sampler, sigmas = call(nodes["DDIMSamplerSelect"], model=small, noise=noise)
    noise = noise if keys == "kept" else {"samples": noise["samples"]}
    for model in edits(nodes, small, inversion).values():
        advanced(model, sampler, sigmas, noise)
    assert warnings() == []


def test_ddim_sampler_warns_about_clean_samples_with_the_keys_of_noise(small, nodes, warnings):
    noise, _ = invert(nodes, small, steps=STEPS)
    sample(nodes, small, noise | latents())
    assert [CLEAN in line for line in warnings()] == [True]


def test_feature_injection_and_token_flow_warn_about_noise_of_another_inversion(small, nodes, warnings):
    _, inversion = invert(nodes, small, steps=STEPS)
    other, _ = invert(nodes, small, latent=latents(seed=1), steps=STEPS)
    for name, model in edits(nodes, small, inversion).items():
        sample(nodes, model, other)
        (line,) = warnings()
        assert line.startswith(f"{name}: ") and OTHER in line


def test_ddim_sampler_select_does_not_warn_about_the_second_half_of_a_run(small, nodes, warnings):
    noise, inversion = invert(nodes, small, steps=STEPS)
    sampler, sigmas = call(nodes["DDIMSamplerSelect"], model=small, noise=noise)
    for model in edits(nodes, small, inversion).values():
        middle = advanced(model, sampler, sigmas[:3], noise)
        advanced(model, sampler, sigmas[2:], middle)
    assert warnings() == []


# --- Correspondence Attention ---


def test_samplers_and_injection_warn_about_other_guidance_than_in_inversion(small, nodes, warnings, tmp_path):
    guided, plain = guide(nodes, small), "without Correspondence Attention"
    joint = call(nodes["CorrespondenceAttention"], model=small, start_percent=0.25, include_self=True)[0]
    weaker = guide(nodes, small, merge_ratio=0.25, spatial_temporal="own frame")
    elsewhere = guide(nodes, small, latents(seed=1))
    names = {
        "guided": "with Correspondence Attention (window 3, K 3, merge 0.5)",
        "plain": plain,
        "joint": "with Correspondence Attention (no correspondence, include_self, sigma ",
        "weaker": "with Correspondence Attention (window 3, K 3, merge 0.25, own frame)",
        "elsewhere": "with another correspondence of the same settings",
    }
    models = {"guided": guided, "plain": small, "joint": joint, "weaker": weaker, "elsewhere": elsewhere}
    for inverted, sampled in [
        ("guided", "plain"), ("plain", "guided"), ("joint", "weaker"), ("guided", "elsewhere"), ("weaker", "joint"),
    ]:  # fmt: skip
        noise, inversion = invert(nodes, models[inverted], steps=STEPS)
        expected = [f"inverted {names[inverted]}", f", sampled {names[sampled]}"]
        sample(nodes, models[sampled], noise)
        call(nodes["DDIMSamplerSelect"], model=models[sampled], noise=noise)
        unknown = {name: value for name, value in noise.items() if name != "cove_guidance"}
        sample(nodes, inject(nodes, models[sampled], inversion, **ALL), unknown)
        lines = warnings()
        assert [line.partition(": ")[0] for line in lines] == [
            "DDIM Sampler", "DDIM Sampler (for SamplerCustomAdvanced)", "Feature Injection",
        ]  # fmt: skip
        assert all(piece in line for line in lines for piece in expected), lines
        assert "guidance" in inversion.about


def test_store_features_warns_about_other_guidance(small, nodes, warnings):
    guided = guide(nodes, small)
    _, inversion = invert(nodes, guided, steps=STEPS)
    store(nodes, guided, inversion)
    assert warnings() == []
    store(nodes, small, inversion)
    (line,) = warnings()
    assert line.startswith("Store Features: inverted with Correspondence Attention (window 3, K 3, merge 0.5), stored ")
    assert "stored without Correspondence Attention" in line and "Connect the model of DDIM Inversion" in line


def test_feature_injection_does_not_warn_about_equal_guidance(small, nodes, warnings):
    noise, inversion = invert(nodes, guide(nodes, small), steps=STEPS)
    model = inject(nodes, guide(nodes, small), inversion, **ALL)
    assert sample(nodes, model, noise).isfinite().all() and warnings() == []


def test_token_flow_warns_about_an_inversion_with_correspondence_attention(small, nodes, warnings):
    noise, inversion = invert(nodes, guide(nodes, small), steps=STEPS)
    del noise["cove_guidance"]
    sample(nodes, flow(nodes, small, inversion), noise)
    (line,) = warnings()
    assert line.startswith("TokenFlow: ") and "sampled without Correspondence Attention" in line


def test_load_inversion_restores_the_guidance(small, nodes, warnings, base):
    _, inversion = invert(nodes, guide(nodes, small), steps=STEPS)
    call(nodes["SaveInversion"], inversion=inversion, filename_prefix="start/clip")
    (file,) = (base / "output" / "start").glob("*.inversion.safetensors")
    noise, loaded = call(nodes["LoadInversion"], file=f"start/{file.name} [output]", model=small)
    file.unlink()
    sample(nodes, small, noise)
    assert ["without Correspondence Attention" in line for line in warnings()] == [True]
    assert loaded.about == inversion.about
    # A file saved before inversions recorded guidance causes no warning.
    old = {name: value for name, value in noise.items() if name != "cove_guidance"}
    sample(nodes, small, old)
    assert warnings() == []


def test_ddim_sampler_output_has_no_keys_of_the_noise(small, nodes):
    noise, _ = invert(nodes, guide(nodes, small), steps=1)
    wires = {"model": small, "noise": noise, "positive": prompt(2), "negative": prompt(3)}
    assert set(call(nodes["DDIMSampler"], **wires, cfg=1.0)[0]) == {"samples"}
    assert torch.is_tensor(noise["samples"])
