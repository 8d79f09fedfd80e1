"""DDIM Inversion and DDIM Sampler in a real UNet: the whole chain, stock counterparts, ControlNet, interrupts."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import HEIGHT, WIDTH, call, hints, latents, prompt, run_stock, state_of


@pytest.fixture
def guide(nodes):
    """MODEL, LATENT, attention level -> MODEL with Correspondence Attention on matches of its own features."""

    def guided(model, latent, attention_level=0):
        features, _ = call(nodes["DiffusionFeatures"], model=model, latent=latent, attention_level=attention_level)
        (correspondence,) = call(nodes["Correspondence"], features=features, window=3)
        return call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence)[0]

    return guided


@pytest.fixture
def invert(nodes):
    """MODEL, CONDITIONING, LATENT, steps -> noise."""

    def inverted(model, conditioning, latent, steps=3, **settings):
        wires = {"model": model, "conditioning": conditioning, "latent": latent}
        return call(nodes["DDIMInversion"], **wires, steps=steps, **settings)[0]

    return inverted


@pytest.fixture
def sample(nodes):
    """MODEL, positive, negative, noise, cfg -> LATENT."""

    def sampled(model, positive, negative, noise, cfg=1.0):
        wires = {"model": model, "positive": positive, "negative": negative, "noise": noise}
        return call(nodes["DDIMSampler"], **wires, cfg=cfg)[0]

    return sampled


def distance(one, other) -> float:
    """Return the root mean squared difference of two LATENTs, relative to the first's standard deviation."""
    one, other = one["samples"], other["samples"]
    return float((one - other).square().mean().sqrt() / one.std())


# --- the chain ---


@pytest.mark.parametrize(
    ("kind", "size", "attention_level"),
    [("sd15", (13, 7), 1), ("sd21", (5, 7), 0), ("sd21v", (7, 5), 0), ("sdxl", (7, 13), 0)],
)
def test_ddim_sampler_runs_the_whole_chain_on_every_family(load, guide, invert, sample, kind, size, attention_level):
    with torch.inference_mode():
        model, latent = load(kind), latents(2, *size)
        state = state_of(model)
        guided = guide(model, latent, attention_level)
        correspondence = next(iter(guided.model_options["transformer_options"]["patches_replace"]["attn1"].values()))
        height, width = size
        half = kind == "sdxl" or attention_level == 1
        grid = (correspondence.correspondence.height, correspondence.correspondence.width)
        assert grid == ((-(-height // 2), -(-width // 2)) if half else size)
        source, edit = prompt(1, kind), prompt(2, kind)
        noise = invert(guided, source, latent, 2, refinements=0)
        edited = sample(guided, edit, source, noise, cfg=2.0)["samples"]
        plain = sample(model, edit, source, noise, cfg=2.0)["samples"]
        assert edited.shape == latent["samples"].shape and edited.isfinite().all()
        assert (edited - plain).abs().mean() > 1e-3
        assert state_of(model) == state


def test_ddim_sampler_reconstructs_the_inverted_clip(sd15, guide, invert, sample):
    """Every refinement reduces the error."""
    latent = latents()
    guided = guide(sd15, latent)
    lost = []
    for refinements in (0, 1, 3):
        noise = invert(guided, prompt(1), latent, 5, refinements=refinements)
        assert noise["samples"].std() > 20  # the scale of initial noise, in the autoencoder's units
        lost.append(distance(latent, sample(guided, prompt(1), prompt(2), noise)))
    assert lost[1] < lost[0] / 2 and lost[2] < lost[1] / 2 and lost[2] < 0.05


def test_ddim_sampler_starts_at_the_end_of_a_finer_inversion(sd15, invert, sample):
    """The error is larger than after an inversion with the steps of sampling."""
    latent, lost = latents(), []
    for multiple in (1, 3):
        noise = invert(sd15, prompt(1), latent, 3, multiple=multiple, refinements=3)
        assert len(noise["cove_sigmas"]) == 4
        lost.append(distance(latent, sample(sd15, prompt(1), prompt(2), noise)))
    assert 3 * lost[0] < lost[1] < 1


# --- the stock counterparts ---


def test_ddim_sampler_matches_ddim_sampler_select_and_cores_euler(comfy, sd15, nodes, guide, invert, sample):
    from comfy_extras import nodes_custom_sampler as custom

    latent = latents()
    guided = guide(sd15, latent)
    noise = invert(guided, prompt(1), latent, refinements=0)
    expected = sample(guided, prompt(2), prompt(3), noise, cfg=3.0)
    sampler, sigmas = call(nodes["DDIMSamplerSelect"], model=guided, noise=noise)

    def advanced(sampler):
        (guider,) = run_stock(custom.CFGGuider, guided, prompt(2), prompt(3), 3.0)
        (nothing,) = run_stock(custom.DisableNoise)
        return run_stock(custom.SamplerCustomAdvanced, nothing, guider, sampler, sigmas, noise)[0]

    assert torch.equal(advanced(sampler)["samples"], expected["samples"])
    (euler,) = run_stock(custom.KSamplerSelect, "euler")
    assert_close(advanced(euler)["samples"], expected["samples"], rtol=1e-4, atol=1e-3)
    # The sigmas are the model's own at timesteps 1, 334, 667.
    assert_close(sigmas, torch.cat((sd15.get_model_object("model_sampling").sigmas[[667, 334, 1]], torch.zeros(1))))


def test_ddim_inversion_and_sampler_are_deterministic_and_keep_the_random_state(sd15, guide, invert, sample):
    random = torch.random.get_rng_state()
    latent = latents()

    def run():
        guided = guide(sd15, latent)
        return sample(guided, prompt(2), prompt(3), invert(guided, prompt(1), latent, 2), cfg=2.0)["samples"]

    assert torch.equal(run(), run())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(latent["samples"], latents()["samples"])


def test_ddim_inversion_and_sampler_keep_other_keys_of_a_latent(sd15, invert, sample):
    latent = latents() | {"batch_index": [4, 5, 6]}
    noise = invert(sd15, prompt(1), latent, 1, refinements=0)
    assert noise["batch_index"] == [4, 5, 6]
    assert set(sample(sd15, prompt(1), prompt(1), noise)) == {"samples", "batch_index"}
    assert set(latent) == {"samples", "batch_index"}


# --- ControlNet ---


def test_ddim_inversion_and_sampler_apply_controlnet_hints_per_frame(sd15, guide, invert, sample, control):
    latent = latents()
    guided = guide(sd15, latent)

    def edit(source, target):
        return sample(guided, target, prompt(3), invert(guided, source, latent, 2, refinements=0), cfg=2.0)

    plain = edit(prompt(1), prompt(2))
    in_inversion = edit(control(prompt(1), hints()), prompt(2))
    in_sampling = edit(prompt(1), control(prompt(2), hints()))
    assert distance(plain, in_inversion) > 0.01 and distance(plain, in_sampling) > 0.01

    permuted = edit(prompt(1), control(prompt(2), hints()[[1, 2, 0]]))
    assert distance(in_sampling, permuted) > 0.01
    zero = edit(control(prompt(1), hints(), 0.0), control(prompt(2), hints(), 0.0))
    assert torch.equal(zero["samples"], plain["samples"])


# --- progress and interrupts ---


def test_ddim_inversion_and_sampler_report_progress_and_preview_at_every_step(comfy, sd15, invert, sample, monkeypatch):
    import comfy.utils
    import latent_preview

    reported, pictures = [], []

    def hear(value, total, preview, **more):
        reported.append((value, total))
        pictures.append(preview[1].size)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hear)
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    noise = invert(sd15, prompt(1), latents(1), 2, multiple=2)
    # Timesteps 1, 251, 501; sampling with 2 steps starts at 501.
    assert reported == [(1, 3), (2, 3), (3, 3)]
    reported.clear()
    sample(sd15, prompt(1), prompt(1), noise)
    assert reported == [(1, 2), (2, 2)]
    assert pictures == [(WIDTH, HEIGHT)] * 5


@pytest.mark.parametrize(("node", "step"), [("inversion", 3), ("sampler", 2)])
def test_ddim_inversion_and_sampler_leave_no_trace_after_an_interrupt(
    comfy, sd15, guide, invert, sample, monkeypatch, node, step
):
    import comfy.model_management as management
    import comfy.utils

    latent = latents(2)
    guided = guide(sd15, latent)
    noise = invert(guided, prompt(1), latent, refinements=0)
    runs = {
        "inversion": lambda: invert(guided, prompt(1), latent, refinements=0),
        "sampler": lambda: sample(guided, prompt(1), prompt(2), noise, cfg=2.0),
    }
    expected, state, reported = runs[node]()["samples"], state_of(guided), []

    def interrupt(value, total, *rest, **more):
        reported.append(value)
        if value == step:
            management.interrupt_current_processing()

    with monkeypatch.context() as patched:
        patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupt)
        with pytest.raises(management.InterruptProcessingException):
            runs[node]()
    assert reported == [1, 2, 3][:step]
    assert state_of(guided) == state
    assert torch.equal(runs[node]()["samples"], expected)
