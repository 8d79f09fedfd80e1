"""Bad input: every error names the node, the expected and the received value, and the remedy."""

import asyncio

import pytest
import torch

from tests.helpers import FRAMES, call, hints, latents, predict, prompt, refused, run_stock, transformer

ATTENTION = "Correspondence Attention"


@pytest.fixture
def correspondence(cove):
    """(frames, height, width) -> a correspondence of tokens that do not move."""

    def still(frames=FRAMES, height=5, width=7):
        links = torch.arange(height * width, dtype=torch.int32)[None, :, None].expand(frames - 1, -1, -1)
        return cove.correspondence.Correspondence(links, links.clone(), height, width, 1)

    return still


@pytest.fixture
def guide(nodes, correspondence):
    """MODEL -> MODEL patched by Correspondence Attention."""
    return lambda model, found=None: call(
        nodes["CorrespondenceAttention"], model=model, correspondence=found or correspondence()
    )[0]


@pytest.fixture
def invert(nodes):
    """MODEL and settings -> noise."""

    def inverted(model, latent=None, conditioning=None, steps=2, multiple=1, refinements=0):
        wires = {"model": model, "conditioning": conditioning or prompt(1), "latent": latent or latents()}
        numbers = {"steps": steps, "multiple": multiple, "refinements": refinements}
        return call(nodes["DDIMInversion"], **wires, **numbers)[0]

    return inverted


@pytest.fixture
def sample(nodes):
    """MODEL, noise and settings -> LATENT."""

    def sampled(model, noise, positive=None, cfg=1.0):
        wires = {"model": model, "noise": noise, "positive": positive or prompt(1), "negative": prompt(2)}
        return call(nodes["DDIMSampler"], **wires, cfg=cfg)[0]

    return sampled


@pytest.fixture(scope="session")
def extra(comfy, host):
    """File and class of an extra node of the host -> the class, loaded like in the server."""
    import nodes

    def loaded(file: str, name: str):
        path = str(host / "comfy_extras" / f"{file}.py")
        assert asyncio.run(nodes.load_custom_node(path, module_parent="comfy_extras"))
        return nodes.NODE_CLASS_MAPPINGS[name]

    return loaded


def applied(node, *arguments):
    """Return MODEL patched by an extra node of the host."""
    return run_stock(node, *arguments)[0]


# --- models ---


def test_nodes_refuse_a_transformer_model(comfy, nodes, correspondence):
    model = transformer()
    latent = {"samples": torch.zeros(FRAMES, 16, 5, 7)}
    wrong = ("Flux", "expected a Stable Diffusion UNet", "Load such a checkpoint")
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=model, latent=latent)
    with refused(ATTENTION, *wrong):
        call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence())
    with refused("DDIM Inversion", *wrong):
        call(nodes["DDIMInversion"], model=model, conditioning=prompt(), latent=latent)
    with refused("DDIM Sampler", *wrong):
        call(nodes["DDIMSampler"], model=model, positive=prompt(), negative=prompt(), noise=latent)
    with refused("DDIM Sampler (for SamplerCustomAdvanced)", *wrong):
        call(nodes["DDIMSamplerSelect"], model=model, noise=latent)
    for name, node in (("Feature Injection", "FeatureInjection"), ("Store Features", "StoreFeatures")):
        with refused(name, *wrong):
            call(nodes[node], model=model, inversion=None)


def test_diffusion_features_refuse_a_model_with_correspondence_attention(sd15, nodes, guide):
    with refused("Diffusion Features", "without Correspondence Attention", "Connect the model from before that node"):
        call(nodes["DiffusionFeatures"], model=guide(sd15), latent=latents())


@pytest.mark.parametrize("name", ["level", "attention_level"])
def test_diffusion_features_refuse_a_level_the_model_lacks(sd15, nodes, name):
    with refused("Diffusion Features", f"`{name}` must be 0 to 1"):
        call(nodes["DiffusionFeatures"], model=sd15, latent=latents(), **{name: 2})


def test_correspondence_attention_refuses_attention_replaced_by_another_node(comfy, sd15, guide, extra):
    guidance = extra("nodes_sag", "SelfAttentionGuidance")
    wrong = ("already replaced by", "remove the other")
    with refused(ATTENTION, *wrong, "second Correspondence Attention"):
        guide(guide(sd15))
    with refused(ATTENTION, *wrong, "block middle 0", "nodes_sag"):
        guide(applied(guidance, sd15, 0.5, 2.0))
    with refused(ATTENTION, *wrong, "block middle 0", "nodes_sag"):
        predict(applied(guidance, guide(sd15), 0.5, 2.0), latents(), prompt(1))
    overwritten = guide(sd15)
    overwritten.set_model_attn1_replace(lambda query, key, value, options: value, "output", 2)
    with refused(ATTENTION, *wrong, "block output 2"):
        predict(overwritten, latents(), prompt(1))


def test_correspondence_attention_refuses_tome_and_hypertile(comfy, sd15, guide, extra):
    for node, settings, title in (
        (extra("nodes_tomesd", "TomePatchModel"), (0.3,), "Patch ToMe"),
        (extra("nodes_hypertile", "HyperTile"), (256, 2, 0, False), "HyperTile"),
    ):
        wrong = (ATTENTION, title, "changes the number of tokens", "Remove it from this model")
        with refused(*wrong):
            guide(applied(node, sd15, *settings))
        with refused(*wrong):
            predict(applied(node, guide(sd15), *settings), latents(), prompt(1))


def test_correspondence_attention_refuses_a_changed_number_of_tokens(comfy, sd15, guide, extra):
    dropping = guide(sd15)
    dropping.set_model_attn1_patch(lambda query, key, value, options: (query[:, 1:], key, value))
    with refused(ATTENTION, "expected a grid of 5x7 tokens, got 34 tokens", "Remove it"):
        predict(dropping, latents(), prompt(1))
    shrink = extra("nodes_model_downscale", "PatchModelAddDownscale")
    for block, after_skip, got in ((1, False, "1x2"), (2, True, "2x2")):  # all grids, or only coarser ones
        shrunk = applied(shrink, guide(sd15), block, 2.0, 0.0, 1.0, after_skip, "bicubic", "bicubic")
        with refused(ATTENTION, f"expected a grid of 3x4 tokens, got {got}", "Deep Shrink", "Remove it"):
            predict(shrunk, latents(), prompt(1))


def test_correspondence_attention_refuses_a_cut_batch(sd15, guide):
    def first_frame(apply_model, arguments):
        return apply_model(arguments["input"][:1], arguments["timestep"][:1], **arguments["c"])

    model = guide(sd15)
    model.set_model_unet_function_wrapper(first_frame)
    with refused(ATTENTION, "expected 3 frames for each of 1 conditionings", "got a batch of 1", "Remove"):
        predict(model, latents(), prompt(1))


# --- mismatched clips ---


@pytest.mark.parametrize(("window", "k", "wrong"), [(4, 3, ("odd", "got 4")), (3, 5, ("smallest", "4", "5"))])
def test_correspondence_refuses_invalid_window_and_k(nodes, found_from, window, k, wrong):
    features = torch.randn(FRAMES, 5, 7, 11)
    with refused("Correspondence", *wrong):
        call(nodes["Correspondence"], features=found_from(features), window=window, k=k)


def test_correspondence_attention_refuses_latents_of_other_frames_or_size(sd15, guide, correspondence, invert):
    with refused(ATTENTION, "of 3 frames", "got 4", "same frames"):
        invert(guide(sd15), latents(4))
    with refused(ATTENTION, "grid of 5x7 tokens", "latents of 7x5", "7x5, 4x3", "latents of the same size"):
        invert(guide(sd15), latents(FRAMES, 7, 5))
    with refused(ATTENTION, "grid of 10x14 tokens", "latents of 5x7"):
        predict(guide(sd15, correspondence(FRAMES, 10, 14)), latents(), prompt(1))


def test_ddim_inversion_and_features_refuse_latents_of_another_model(sd15, invert, nodes):
    for samples in (torch.randn(FRAMES, 16, 5, 7), torch.randn(1, 4, FRAMES, 5, 7)):
        wrong = ("expected latents [frames, 4, height, width]", str(list(samples.shape)), "VAE of the same checkpoint")
        with refused("DDIM Inversion", *wrong):
            invert(sd15, {"samples": samples})
        with refused("Diffusion Features", *wrong):
            call(nodes["DiffusionFeatures"], model=sd15, latent={"samples": samples})


def test_nodes_refuse_hints_of_other_frames(sd15, guide, control, invert, sample):
    wrong = ("2 hint images for 3 frames", "one image, or one for each frame")
    two = control(prompt(1), hints(2))
    with refused("DDIM Inversion", *wrong):
        invert(sd15, conditioning=two)
    noise = invert(sd15)
    with refused("DDIM Sampler", *wrong):
        sample(sd15, noise, two)
    with refused(ATTENTION, *wrong):  # in a stock sampler
        predict(guide(sd15), latents(), prompt(1), [*prompt(2), *two], cfg=2.0)
    three_before_two = control(control(prompt(1), hints(2)), hints(3))
    with refused("DDIM Inversion", *wrong):
        invert(sd15, conditioning=three_before_two)


def test_diffusion_features_refuse_motion_modules(sd15, nodes):
    model = sd15.clone()
    model.set_model_forward_timestep_embed_patch([object, lambda layer, x, *_: layer(x)])
    with refused("Diffusion Features", "without motion modules (AnimateDiff)", "Connect the checkpoint's MODEL"):
        call(nodes["DiffusionFeatures"], model=model, latent=latents())


# --- mismatched inversion and sampling ---


@pytest.mark.parametrize(("steps", "multiple"), [(1000, 1), (500, 2), (50, 20)])
def test_ddim_inversion_refuses_more_steps_than_timesteps(sd15, invert, steps, multiple):
    with refused("DDIM Inversion", "together at most 999 steps", f"got {steps} steps times {multiple}"):
        invert(sd15, steps=steps, multiple=multiple)


def test_samplers_refuse_noise_of_another_model_sampling(comfy, sd15, nodes, invert, sample):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    rescaled = run_stock(ModelSamplingDiscrete, sd15, "eps", True)[0]
    sigmas = [float(model.get_model_object("model_sampling").sigmas[501]) for model in (sd15, rescaled)]
    for one, other, inverted, sampled in ((sd15, rescaled, *sigmas), (rescaled, sd15, *sigmas[::-1])):
        noise = invert(one)
        wrong = (
            f"the inversion ended at sigma {inverted:.4f}",
            f"the same timestep of this model has sigma {sampled:.4f}",
            "Sample with the checkpoint and the model sampling that inverted the clip",
        )
        with refused("DDIM Sampler", *wrong):
            sample(other, noise)
        with refused("DDIM Sampler (for SamplerCustomAdvanced)", *wrong):
            call(nodes["DDIMSamplerSelect"], model=other, noise=noise)
        call(nodes["DDIMSamplerSelect"], model=one, noise=noise)


def test_nodes_refuse_a_noise_mask(sd15, invert, sample, nodes):
    mask = {"noise_mask": torch.ones(1, 40, 56)}
    wrong = ("expected latents without a noise mask", "Remove the mask", "ImageCompositeMasked")
    with refused("DDIM Inversion", *wrong):
        invert(sd15, latents() | mask)
    noise = invert(sd15) | mask
    with refused("DDIM Sampler", *wrong):
        sample(sd15, noise)
    with refused("DDIM Sampler (for SamplerCustomAdvanced)", *wrong):
        call(nodes["DDIMSamplerSelect"], model=sd15, noise=noise)


# --- NaN ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nodes_refuse_latents_that_are_not_finite(sd15, nodes, invert, sample, value):
    noise, broken = invert(sd15), latents()
    broken["samples"][1, 2, 3, 4] = value
    wrong = ("expected finite numbers", "NaN or Inf in the latents that came in, frames [1]", "Look at the node before")
    with refused("DDIM Inversion", *wrong):
        invert(sd15, broken)
    with refused("DDIM Sampler", *wrong):
        sample(sd15, noise | broken)
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=sd15, latent=broken)


def test_ddim_inversion_and_sampler_stop_at_the_step_of_a_nan(comfy, sd15, guide, invert, sample):
    steps = []

    def break_second_step(seen):
        steps.append(float(seen["sigma"][0]))
        return seen["denoised"] * (torch.nan if len(steps) == 2 else 1.0)

    noise = invert(guide(sd15), steps=3)
    model = guide(sd15)
    model.set_model_sampler_post_cfg_function(break_second_step)
    with refused("DDIM Inversion", "inversion step 2 of 3 (sigma ", "fp32"):
        invert(model, steps=3)
    assert len(steps) == 2
    steps.clear()
    with refused("DDIM Sampler", "NaN or Inf", "sampling step 2 of 3", "frames [0, 1, 2]"):
        sample(model, noise)
    assert len(steps) == 2


def test_diffusion_features_refuse_nan(sd15, nodes):
    def broken(apply_model, arguments):
        return apply_model(arguments["input"] * torch.nan, arguments["timestep"], **arguments["c"])

    model = sd15.clone()
    model.set_model_unet_function_wrapper(broken)
    with refused("Diffusion Features", "NaN or Inf in the features, frames [0, 1, 2]", "fp32"):
        call(nodes["DiffusionFeatures"], model=model, latent=latents())
