"""Beside KJNodes: what people put on a MODEL and runs without a GPU, its guider, its batches."""

import pytest
import torch

from tests.helpers import call, latents, prompt, refused, run_stock
from tests.inversion_helpers import ALL, flow, guide, inject, invert, sample

FRAMES = 5

# What only watches or plans memory: node -> settings.
WATCHING = {
    "PathchSageAttentionKJ": {"sage_attention": "disabled"},
    "ModelPatchTorchSettings": {"enable_fp16_accumulation": False},
    "ModelMemoryUsageFactorOverride": {"memory_usage_factor": 2.0},
    "ModelPassThrough": {},
}


@pytest.fixture
def arranged(nodes, small):
    """The inversion, and the MODEL with Correspondence Attention and Feature Injection around another node."""
    guided = guide(nodes, small, latents(FRAMES))
    noise, inversion = invert(nodes, guided, latent=latents(FRAMES))

    def inserted(node):
        first = guide(nodes, node(small), latents(FRAMES)), node(guide(nodes, small, latents(FRAMES)))
        models = [inject(nodes, model, inversion, **ALL) for model in first]
        return [*models, node(inject(nodes, guided, inversion, **ALL)), node(flow(nodes, small, inversion))]

    return noise, inserted


@pytest.mark.parametrize("node", WATCHING)
def test_what_only_watches_changes_nothing(small, nodes, kj, arranged, node):
    noise, inserted = arranged

    def watched(model):
        return kj(node, model=model, **WATCHING[node])[0]

    for model, plain in zip(inserted(watched), inserted(lambda model: model), strict=True):
        assert torch.equal(sample(nodes, model, noise), sample(nodes, plain, noise))
    watched_noise, _ = invert(nodes, watched(guide(nodes, small, latents(FRAMES))), latent=latents(FRAMES))
    assert torch.equal(watched_noise["samples"], noise["samples"])


def test_cfg_zero_star_before_and_after(nodes, kj, arranged):
    noise, inserted = arranged
    models = inserted(lambda model: kj("CFGZeroStarAndInit", model=model)[0])
    *injected, flowing = [sample(nodes, model, noise) for model in models]
    plain = sample(nodes, inserted(lambda model: model)[0], noise)
    assert all(torch.equal(edit, injected[0]) for edit in injected)
    assert not torch.equal(injected[0], plain) and flowing.isfinite().all()


def test_scheduled_guidance_is_a_guider_like_any_other(small, nodes, kj):
    from comfy_extras.nodes_custom_sampler import DisableNoise, SamplerCustomAdvanced

    guided = guide(nodes, small, latents(FRAMES))
    noise, inversion = invert(nodes, guided, latent=latents(FRAMES))
    model = inject(nodes, guided, inversion, **ALL)
    sampler, sigmas = call(nodes["DDIMSamplerSelect"], model=model, noise=noise)
    (guider,) = kj("ScheduledCFGGuidance", model=model, positive=prompt(2), negative=prompt(3), cfg=2.0)
    (nothing,) = DisableNoise.execute().args
    edit, _ = SamplerCustomAdvanced.execute(nothing, guider, sampler, sigmas, noise).args
    assert torch.equal(edit["samples"], sample(nodes, model, noise))


def test_frames_from_a_batch_are_a_clip_before_inversion_and_lose_their_schedule_after_it(small, nodes, kj):
    from nodes import LatentFromBatch

    taken = kj("GetLatentRangeFromBatch", latents=latents(FRAMES), start_index=1, num_frames=3)[0]
    noise, _ = invert(nodes, small, latent=taken)
    expected, _ = invert(nodes, small, latent={"samples": latents(FRAMES)["samples"][1:4]})
    assert torch.equal(noise["samples"], expected["samples"])
    whole, inversion = invert(nodes, small, latent=latents(FRAMES))
    part = kj("GetLatentRangeFromBatch", latents=whole, start_index=1, num_frames=3)[0]
    assert set(part) == {"samples"}
    with refused("DDIM Sampler", "lost their schedule in another node", "Connect the `noise` output"):
        sample(nodes, small, part)
    # Core's Latent From Batch keeps it. The frames are then noise, but not that of the inversion.
    part = run_stock(LatentFromBatch, whole, 1, 3)[0]
    assert sample(nodes, small, part).isfinite().all()
    wrong = "Connect the noise of the same inversion"
    with refused("Feature Injection", wrong):
        sample(nodes, inject(nodes, small, inversion, **ALL), part)
    with refused("TokenFlow", wrong):
        sample(nodes, flow(nodes, small, inversion), part)
