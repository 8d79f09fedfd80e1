"""Diffusion Features in a real UNet: captured features, settings, interrupts and errors."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import FRAMES, HEIGHT, WIDTH, call, latents, prompt, run_stock, state_of, windowed

PLAIN = {"preset": "paper", "level": 0}


@pytest.fixture
def take(nodes):
    """MODEL and settings -> features."""

    def taken(model, latent=None, **settings):
        return call(nodes["DiffusionFeatures"], model=model, latent=latent or latents(), **PLAIN | settings)[0].tokens

    return taken


def test_diffusion_features_are_the_decoders_hidden_state_of_noised_latents(comfy, sd15, take):
    """Eq. 4, computed with the UNet directly."""
    latent, timestep = latents(), 261
    seen = []
    head = sd15.model.diffusion_model.out[0]
    generator = torch.Generator().manual_seed(7)
    with_noise = sd15.model.process_latent_in(latent["samples"])
    sigma = sd15.get_model_object("model_sampling").sigmas[timestep]
    noise = torch.stack([torch.randn(with_noise.shape[1:], generator=generator) for _ in range(FRAMES)])
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    text = prompt(1)[0][0].expand(FRAMES, -1, -1)
    sd15.model.apply_model(with_noise + sigma * noise, sigma.expand(FRAMES), c_crossattn=text)
    hook.remove()
    expected = torch.nn.functional.normalize(seen[0].movedim(1, -1), dim=-1)
    got = take(sd15, latent, timestep=timestep, seed=7, conditioning=prompt(1))
    assert got.shape == (FRAMES, HEIGHT, WIDTH, 320) and got.dtype == torch.float32
    assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_diffusion_features_depend_on_every_setting_but_batch_size(sd15, take):
    plain = take(sd15)
    assert_close(take(sd15, batch_size=2), plain, rtol=1e-4, atol=1e-5)
    for settings in ({"seed": 1}, {"ensemble": 2}, {"timestep": 30}, {"conditioning": prompt(1)}):
        assert (take(sd15, **settings) - plain).abs().max() > 0.01
    assert not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize(("level", "attention_level", "shape"), [(1, 0, (7, 13, 640)), (0, 1, (4, 7, 320))])
def test_diffusion_features_level_selects_block_and_grid(sd15, take, nodes, level, attention_level, shape):
    latent = latents(2, 7, 13)
    settings = {"level": level, "attention_level": attention_level}
    features, picture = call(nodes["DiffusionFeatures"], model=sd15, latent=latent, **settings)
    assert features.tokens.shape == (2, *shape)
    assert_close(features.tokens.norm(dim=-1), torch.ones(2, *shape[:2]))
    assert picture.shape == (2, 56, 104, 3) and 0 <= picture.min() and picture.max() <= 1


def test_diffusion_features_draw_new_noise_for_each_frame(sd15, take):
    """With shared noise, matching would compare noise instead of frames."""
    still = {"samples": latents(1)["samples"].expand(2, -1, -1, -1)}
    first, second = take(sd15, still)
    assert (first - second).abs().mean() > 1e-3


def test_diffusion_features_ignore_guidance_context_windows_and_areas(comfy, sd15, take):
    """Patches for sampling must not run the UNet twice, in windows, or on part of the picture."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    expected = take(sd15, conditioning=prompt(1))
    both_halves = sd15.clone()
    both_halves.set_model_sampler_post_cfg_function(lambda seen: seen["denoised"], disable_cfg1_optimization=True)
    for model in (
        run_stock(PerturbedAttentionGuidance, sd15, 3.0)[0],
        windowed(sd15),
        both_halves,
    ):
        assert torch.equal(take(model, conditioning=prompt(1)), expected)
    area = [*prompt(1, area=(3, 3, 0, 0), strength=2.0, start_percent=0.9), *prompt(2)]
    assert torch.equal(take(sd15, conditioning=area), expected)


def test_diffusion_features_accept_one_frame(sd15, take, nodes, found_from):
    wire = found_from(take(sd15, latents(1)))
    (correspondence,) = call(nodes["Correspondence"], features=wire, window=3)
    assert correspondence.frames == 1


class Broken(Exception):
    pass


@pytest.mark.parametrize(("end", "batch"), [("error", 2), ("interrupt", 3)])
def test_diffusion_features_leave_no_trace_after_an_error_or_interrupt(comfy, sd15, take, monkeypatch, end, batch):
    import comfy.model_management as management
    import comfy.utils

    expected, state, random = take(sd15, batch_size=1), state_of(sd15), torch.random.get_rng_state()
    reported = []

    def stop(value, total, *rest, **more):
        reported.append((value, total))
        if value == batch and end == "error":
            raise Broken
        if value == batch:
            management.interrupt_current_processing()

    with monkeypatch.context() as patched:
        patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
        with pytest.raises(Broken if end == "error" else management.InterruptProcessingException):
            take(sd15, batch_size=1)
    assert reported == [(1, 3), (2, 3), (3, 3)][:batch]
    assert state_of(sd15) == state
    assert torch.equal(take(sd15, batch_size=1), expected)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_diffusion_features_remove_the_hook_after_an_error_in_the_unet(sd15, take):
    def broken(apply_model, arguments):
        apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        raise Broken

    model = sd15.clone()
    model.set_model_unet_function_wrapper(broken)
    state = state_of(model)
    with pytest.raises(Broken):
        take(model)
    assert state_of(model) == state


def test_correspondence_refine_matches_reference(comfy, nodes, cove, found_from, monkeypatch):
    import comfy.utils

    reported = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *rest, **more: reported.append((value, total))
    )
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, HEIGHT, WIDTH, 11, generator=generator) + torch.randn(
        5, HEIGHT, WIDTH, 11, generator=generator
    )
    (plain,) = call(nodes["Correspondence"], features=found_from(features, True), window=3, refine="off")
    assert plain.pairs is None and reported == [(i, 4) for i in range(1, 5)]
    reported.clear()
    (found,) = call(nodes["Correspondence"], features=found_from(features), window=3, refine="on")
    assert found.pairs.tolist() == cove.reference.refine(plain, features)
    assert reported == [(i, 9) for i in range(1, 10)]
    (sharp,), (paper,) = (
        call(nodes["Correspondence"], features=found_from(features, refine), window=3) for refine in (True, False)
    )
    assert torch.equal(sharp.pairs, found.pairs) and paper.pairs is None


def test_diffusion_features_presets_fill_unset_values(sd15, nodes):
    """Sharp: level 1 and eight noise draws; paper: one draw. A number overrides one value of the preset."""

    def tokens(**settings):
        return call(nodes["DiffusionFeatures"], model=sd15, latent=latents(1), **settings)[0].tokens

    assert torch.equal(tokens(), tokens(preset="sharp", timestep=261, level=1, ensemble=8))
    assert torch.equal(tokens(preset="paper"), tokens(timestep=261, level=1, ensemble=1))
    assert torch.equal(tokens(preset="paper", ensemble=8), tokens())
    assert tokens(preset="paper", level=0).shape[-1] == 320 and tokens(preset="paper").shape[-1] == 640


def test_correspondence_reports_progress_and_stops_on_interrupt(comfy, nodes, found_from, monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    reported = []

    def hear(value, total, *rest, **more):
        reported.append((value, total))
        if value == 3:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hear)
    features = torch.randn(5, HEIGHT, WIDTH, 11, generator=torch.Generator().manual_seed(0))
    with pytest.raises(management.InterruptProcessingException):
        call(nodes["Correspondence"], features=found_from(features), window=3)
    assert reported == [(1, 4), (2, 4), (3, 4)]
