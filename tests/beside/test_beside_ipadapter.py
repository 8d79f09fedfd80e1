"""With IPAdapter: one image for all frames, one for each frame, and a mask for each frame."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.beside.checks import (
    CLOSE,
    FRAMES,
    ORDERS,
    STEPS,
    alone,
    answer,
    answer_of_clips,
    arranged,
    equal_or_refused,
)
from tests.beside.models import tiny_clip_vision, write_ipadapter
from tests.helpers import call, hints, latents, prompt, state_of
from tests.inversion_helpers import ask, down, flow, guide, inject, invert, noise_like, part_of, sample, tiny


@pytest.fixture
def model(comfy):
    """A tiny MODEL in the shape of SD1.5, which tests must not change."""
    model = tiny("sd15")
    before = state_of(model)
    with torch.inference_mode():
        yield model
    assert state_of(model) == before


@pytest.fixture(scope="session")
def prompted(ipa, base, tmp_path_factory):
    """MODEL, images by input name -> MODEL with an image prompt; each input has one image or one per frame."""
    name = write_ipadapter(base / "models/ipadapter/ip-adapter_sd15.safetensors").name
    (adapter,) = ipa("IPAdapterModelLoader", ipadapter_file=name)
    wires = {"ipadapter": adapter, "clip_vision": tiny_clip_vision(tmp_path_factory.mktemp("clip_vision"))}

    def with_images(model, images):
        node = "IPAdapterAdvanced" if len(images["image"]) == 1 else "IPAdapterBatch"
        return ipa(node, model=model, **images, **wires)[0]

    return with_images


def pictures(count):
    generator = torch.Generator().manual_seed(9)
    return torch.rand(count, 1, 1, 3, generator=generator).expand(count, 32, 32, 3).contiguous()


def some(images, frames):
    """Return the images of some of the frames."""
    return {name: rows if len(rows) == 1 else rows[frames] for name, rows in images.items()}


def each(noise):
    """Return the frames of a LATENT, one by one."""
    return [noise | {"samples": frame[None]} for frame in noise["samples"]]


KINDS = {
    "one image": {"image": pictures(1)},
    "one a frame": {"image": pictures(FRAMES)},
    "a mask a frame": {"image": pictures(1), "attn_mask": hints(FRAMES)[..., 0].round()},
}
IMAGES = pytest.mark.parametrize("images", KINDS.values(), ids=KINDS)


# --- independent frames: the clip equals its frames one by one ---


@ORDERS
@IMAGES
def test_ddim_inversion_and_sampler_keep_image_prompts_with_their_frames(model, nodes, prompted, images, order):
    clip = arranged(order, model, lambda model: prompted(model, images), partial(alone, nodes))
    noise, _ = invert(nodes, clip, latent=latents(FRAMES), steps=STEPS)
    edit = sample(nodes, clip, noise)
    assert (edit - sample(nodes, model, noise)).abs().max() > 0.1
    for frame in range(FRAMES):
        lone = prompted(model, some(images, [frame]))
        found = invert(nodes, lone, latent=each(latents(FRAMES))[frame], steps=STEPS)[0]["samples"]
        assert_close(noise["samples"][[frame]], found, **CLOSE)
        assert_close(edit[[frame]], sample(nodes, lone, each(noise)[frame]), **CLOSE)


@pytest.mark.parametrize("batch_size", [2, 3])
@IMAGES
def test_diffusion_features_keep_image_prompts_with_their_frames_in_batches(model, nodes, prompted, images, batch_size):
    def take(model, batch_size):
        return call(nodes["DiffusionFeatures"], model=model, latent=latents(FRAMES), batch_size=batch_size)[0].tokens

    expected = take(prompted(model, images), FRAMES)
    assert (expected - take(model, FRAMES)).abs().max() > 1e-2
    equal_or_refused(lambda: take(prompted(model, images), batch_size), expected, "`batch_size`")


@ORDERS
@IMAGES
def test_feature_injection_keeps_image_prompts_with_their_frames(model, nodes, prompted, images, order):
    noise, inversion = invert(nodes, prompted(model, images), latent=latents(FRAMES), steps=STEPS)
    ours = partial(inject, nodes, inversion=inversion)
    edit = sample(nodes, arranged(order, model, lambda model: prompted(model, images), ours), noise)
    for frame in range(FRAMES):
        lone = inject(nodes, prompted(model, some(images, [frame])), part_of(inversion, [frame]))
        assert_close(edit[[frame]], sample(nodes, lone, each(noise)[frame]), **CLOSE)


# --- joint frames ---


@IMAGES
def test_correspondence_attention_with_image_prompts_is_independent_of_order(model, nodes, prompted, images):
    after = prompted(guide(nodes, model, latents(FRAMES)), images)
    features, _ = call(nodes["DiffusionFeatures"], model=model, latent=latents(FRAMES))
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)
    before = call(nodes["CorrespondenceAttention"], model=prompted(model, images), correspondence=correspondence)[0]
    noise, _ = invert(nodes, after, latent=latents(FRAMES), steps=STEPS)
    assert torch.equal(sample(nodes, after, noise), sample(nodes, before, noise))


@pytest.mark.parametrize("blend", [True, False])
@ORDERS
@IMAGES
def test_token_flow_keeps_image_prompts_with_their_frames(model, nodes, prompted, images, order, blend):
    """Keyframes run in a pass of their own, unless the prompt has a row for each frame."""
    _, inversion = invert(nodes, prompted(model, images), latent=latents(FRAMES), steps=STEPS)
    ours = partial(flow, nodes, inversion=inversion, blend_keyframes=blend)
    clip = arranged(order, model, lambda model: prompted(model, images), ours)
    rows = [[prompt(2)[0][0].expand(FRAMES, -1, -1).contiguous(), {}]]
    expected = ask(clip, noise_like(inversion), down(inversion), -2 - 1, rows, prompt(3), 2.0)
    equal_or_refused(lambda: answer(clip, inversion), expected)


# --- context windows ---


@IMAGES
def test_correspondence_attention_keeps_image_prompts_in_windows(model, nodes, prompted, windowed, images):
    noise, _ = invert(nodes, prompted(model, images), latent=latents(FRAMES), steps=STEPS)
    for patch in (
        lambda model: prompted(alone(nodes, model), images),
        lambda model: alone(nodes, prompted(model, images)),
    ):
        expected = sample(nodes, patch(model), noise)
        equal_or_refused(lambda patch=patch: sample(nodes, windowed(model, patch), noise), expected)


@IMAGES
def test_diffusion_features_keep_image_prompts_in_windows(model, nodes, prompted, windowed, images):
    def take(model):
        return call(nodes["DiffusionFeatures"], model=model, latent=latents(FRAMES))[0].tokens

    expected = take(prompted(model, images))
    equal_or_refused(lambda: take(windowed(model, lambda model: prompted(model, images))), expected)


@IMAGES
def test_feature_injection_keeps_image_prompts_in_windows(model, nodes, prompted, windowed, images):
    noise, inversion = invert(nodes, prompted(model, images), latent=latents(FRAMES), steps=STEPS)

    def patch(model):
        return inject(nodes, prompted(model, images), inversion)

    expected = sample(nodes, patch(model), noise)
    equal_or_refused(lambda: sample(nodes, windowed(model, patch), noise), expected)


@IMAGES
def test_token_flow_keeps_image_prompts_in_windows(model, nodes, prompted, windowed, images):
    _, inversion = invert(nodes, prompted(model, images), latent=latents(FRAMES), steps=STEPS)
    rows = [[prompt(2)[0][0].expand(3, -1, -1).contiguous(), {}]]

    def of_window(frames):
        return flow(nodes, prompted(model, some(images, frames)), part_of(inversion, frames))

    expected = answer_of_clips(([0, 1, 2], [2, 3, 4]), of_window, inversion, rows)
    clip = windowed(model, lambda model: flow(nodes, prompted(model, images), inversion))
    equal_or_refused(lambda: answer(clip, inversion), expected)
