"""Noise levels with every model sampling that the host can set on a UNet."""

import math

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import call, latents, prompt, refused
from tests.inversion_helpers import invert, tiny

STEPS = 7
SPREAD = 2.0  # standard deviation of the clip, in the model's own scale, relative to its sigma_data


def samplings(model) -> dict:
    """Return functions by name that set a model sampling on MODEL with the host's stock nodes."""
    from comfy_extras import nodes_model_advanced as advanced

    def patched(node, **settings):
        inputs = node.INPUT_TYPES()["required"]
        defaults = {name: spec[1]["default"] for name, spec in inputs.items() if "default" in (*spec, {})[1]}
        return lambda: getattr(node(), node.FUNCTION)(model, **defaults | settings)[0]

    made = {"as loaded": lambda: model}
    for node in (
        advanced.ModelSamplingDiscrete,
        advanced.ModelSamplingContinuousEDM,
        advanced.ModelSamplingContinuousV,
    ):
        for sampling in node.INPUT_TYPES()["required"]["sampling"][0]:
            made[f"{node.__name__} {sampling}"] = patched(node, sampling=sampling)
    for sampling in ("eps", "v_prediction", "lcm"):
        made[f"zsnr {sampling}"] = patched(advanced.ModelSamplingDiscrete, sampling=sampling, zsnr=True)
    for name in ("StableCascade", "SD3", "AuraFlow", "Flux"):
        made[f"ModelSampling{name}"] = patched(getattr(advanced, f"ModelSampling{name}"))
    return made


DISCRETE = [
    "as loaded",
    "ModelSamplingDiscrete eps",
    "ModelSamplingDiscrete v_prediction",
    "ModelSamplingDiscrete lcm",
    "ModelSamplingDiscrete x0",
    "zsnr eps",
    "zsnr v_prediction",
    "zsnr lcm",
]
CONTINUOUS = [
    "ModelSamplingContinuousEDM v_prediction",
    "ModelSamplingContinuousEDM edm",
    "ModelSamplingContinuousEDM edm_playground_v2.5",
    "ModelSamplingContinuousEDM eps",
    "ModelSamplingContinuousEDM cosmos_rflow",
    "ModelSamplingContinuousV v_prediction",
    "ModelSamplingStableCascade",
]
NEWER = "ModelSamplingDiscrete img_to_img_flow"  # not in 0.3.75
REFUSED = {
    "ModelSamplingDiscrete img_to_img": "IMG_TO_IMG",
    NEWER: "IMG_TO_IMG_FLOW",
    "ModelSamplingSD3": "CONST",
    "ModelSamplingAuraFlow": "CONST",
    "ModelSamplingFlux": "ModelSamplingFlux and CONST",
}


@pytest.fixture
def sampled(small):
    """Name of a model sampling -> MODEL."""
    return lambda name: samplings(small)[name]()


def test_samplings_lists_every_model_sampling_of_the_host(small):
    known, found = {*DISCRETE, *CONTINUOUS, *REFUSED}, set(samplings(small))
    assert found <= known and known - found <= {NEWER}


def timestep_sigma(nodes, model, timestep: int, latent=None) -> float:
    """Return the sigma at which Diffusion Features runs the UNet."""
    import comfy.patcher_extension

    seen, model = [], model.clone()

    def see(executor, x, t, *args, **kwargs):
        seen.append(float(t[0]))
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", see)
    call(nodes["DiffusionFeatures"], model=model, latent=latent or latents(), timestep=timestep)
    (sigma,) = set(seen)
    return sigma


def sd_sigma(timestep: int) -> float:
    """Return the sigma of Stable Diffusion's schedule: betas with evenly spaced roots from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = math.prod((1 - betas[: timestep + 1]).tolist())
    return math.sqrt((1 - kept) / kept)


@pytest.mark.parametrize("name", DISCRETE)
def test_sigmas_at_matches_the_models_own_timesteps(sampled, nodes, name):
    model = sampled(name)
    sampling = model.get_model_object("model_sampling")
    for timestep in (37, 261, 999):
        sigma = timestep_sigma(nodes, model, timestep)
        assert_close(sigma, float(sampling.sigma(torch.tensor(timestep))), rtol=1e-6, atol=0)
        if "zsnr" not in name:  # LCM interpolates between every twentieth timestep
            assert_close(sigma, sd_sigma(timestep), rtol=1e-2 if "lcm" in name else 1e-4, atol=0)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sigmas_at_keeps_the_signal_to_noise_ratio_of_sd_without_timesteps(sampled, nodes, name):
    """Sigma is 0.72 at timestep 261. EDM expects latents of half SD's standard deviation, hence half the noise."""
    model = sampled(name)
    for timestep in (37, 261, 999):
        expected = sd_sigma(timestep) * (0.5 if " edm" in name else 1.0)
        assert_close(timestep_sigma(nodes, model, timestep), expected, rtol=1e-4, atol=0)
    assert abs(sd_sigma(261) - 0.72) < 0.01


def gaussian(model):
    """Return MODEL with the ideal denoiser for a clip of independent Gaussian numbers, and their spread.

    Denoised is x * spread^2 / (spread^2 + sigma^2), solved for the UNet's output.
    """
    import comfy.patcher_extension

    prediction, model = model.get_model_object("model_sampling"), model.clone()
    spread = SPREAD * prediction.sigma_data

    def answer(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        # Nodes detect a UNet that is skipped, so it runs on a few tokens.
        executor(x[:1, :, :3, :3], timesteps[:1], context[:1], y, control, transformer_options, **kwargs)
        sigmas = transformer_options["sigmas"]
        sigma = sigmas.view(-1, 1, 1, 1)
        noisy = x * sigma / prediction.calculate_input(sigma[:1], sigma[:1])
        denoised = noisy * spread**2 / (spread**2 + sigma**2)
        # Every prediction is affine in the UNet's output.
        none, one = (prediction.calculate_denoised(sigmas, torch.full_like(x, value), noisy) for value in (0.0, 1.0))
        return (denoised - none) / (one - none)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", answer)
    return model, spread


@pytest.mark.parametrize("name", DISCRETE + CONTINUOUS)
def test_ddim_inversion_matches_the_closed_form_of_a_gaussian_clip(sampled, nodes, name):
    """The flow scales a Gaussian by sqrt(1 + (sigma / spread)^2); Euler's error shrinks with the steps."""
    model, spread = gaussian(sampled(name))
    generator = torch.Generator().manual_seed(0)
    clip = model.get_model_object("latent_format").process_out(spread * torch.randn(3, 4, 5, 7, generator=generator))
    error = []
    for steps in (STEPS, 4 * STEPS):
        noise, inversion = invert(nodes, model, latent={"samples": clip}, steps=steps, refinements=2)
        exact = inversion.clip * (1 + (inversion.sigmas[-1] / spread) ** 2).sqrt()
        error.append(float((inversion.noise - exact).norm() / exact.norm()))
        back = call(nodes["DDIMSampler"], model=model, noise=noise, positive=prompt(1), negative=prompt(1), cfg=1.0)[0][
            "samples"
        ]
        # Sampling reverses the inversion with any model sampling.
        assert (back - clip).norm() < 0.05 * (clip - clip.mean((0, 2, 3), keepdim=True)).norm()
    # First order: four times the steps leave a quarter of the error.
    assert error[1] < 0.3 * error[0] and error[1] < 0.1, error


def everywhere(nodes, model):
    """Return a call of every node with MODEL by node name; other inputs come from a plain MODEL."""
    plain = tiny()
    noise, inversion = invert(nodes, plain)
    wires = {"positive": prompt(1), "negative": prompt(2), "noise": noise}
    return {
        "Diffusion Features": lambda: call(nodes["DiffusionFeatures"], model=model, latent=latents()),
        "Correspondence Attention": lambda: call(nodes["CorrespondenceAttention"], model=model),
        "DDIM Inversion": lambda: invert(nodes, model),
        "DDIM Sampler": lambda: call(nodes["DDIMSampler"], model=model, **wires),
        "DDIM Sampler (for SamplerCustomAdvanced)": lambda: call(nodes["DDIMSamplerSelect"], model=model, noise=noise),
        "Feature Injection": lambda: call(nodes["FeatureInjection"], model=model, inversion=inversion),
        "Store Features": lambda: call(nodes["StoreFeatures"], model=model, inversion=inversion),
        "TokenFlow": lambda: call(nodes["TokenFlow"], model=model, inversion=inversion),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_unet_of_refuses_other_models_than_latents_plus_noise(small, sampled, nodes, name):
    if name not in samplings(small):
        pytest.skip("not in this host")
    for node, run in everywhere(nodes, sampled(name)).items():
        with refused(node, REFUSED[name], "latents + sigma * noise", "Remove the node that set this model sampling"):
            run()


@pytest.mark.parametrize("name", ["ModelSamplingDiscrete lcm", "zsnr lcm"])
def test_sigmas_at_refuses_more_steps_than_a_distilled_model_allows(sampled, nodes, name):
    """LCM keeps every twentieth timestep; with more than 52 steps the first two coincide."""
    model, clip = sampled(name), latents(1)
    wires = {"positive": prompt(1), "negative": prompt(2)}
    noises = {steps: invert(nodes, tiny(), steps=steps, latent=clip)[0] for steps in (53, 100)}
    for node, run in {
        "DDIM Inversion": lambda steps: invert(nodes, model, steps=steps, latent=clip),
        "DDIM Sampler": lambda steps: call(nodes["DDIMSampler"], model=model, noise=noises[steps], **wires),
        "DDIM Sampler (for SamplerCustomAdvanced)": lambda steps: call(
            nodes["DDIMSamplerSelect"], model=model, noise=noises[steps]
        ),
    }.items():
        with refused(node, "at most 52 steps (its `steps` times `multiple`)", "ModelSamplingDiscreteDistilled and LCM"):
            run(100)
        with refused(node, "at most 52 steps"):
            run(53)
    with refused("DDIM Inversion", "at most 52 steps"):
        invert(nodes, model, steps=27, multiple=2, latent=clip)
    for steps, multiple in ((52, 1), (26, 2)):
        noise, _ = invert(nodes, model, steps=steps, multiple=multiple, latent=clip)
        _, sigmas = call(nodes["DDIMSamplerSelect"], model=model, noise=noise)
        assert len(sigmas) == steps + 1 and (sigmas[:-1] > sigmas[1:]).all()


def test_load_inversion_uses_the_latent_format_of_its_model(sampled, small, nodes):
    """Playground's latents have a mean and scale per channel, unlike those of the last model that ran."""
    model = sampled("ModelSamplingContinuousEDM edm_playground_v2.5")
    noise, inversion = invert(nodes, model)
    call(nodes["SaveInversion"], inversion=inversion, filename_prefix="cove/playground")
    loader = nodes["LoadInversion"]
    (file, *_) = loader.define_schema().inputs
    (name,) = (option for option in file.options if "playground" in option)
    call(nodes["DiffusionFeatures"], model=small, latent=latents())
    loaded, _ = call(loader, file=name, model=model, latent=latents())
    assert_close(loaded["samples"], noise["samples"], rtol=1e-4, atol=1e-4)
