"""With KJNodes: MODEL patches that run without a GPU, its guider, its batch nodes."""

import pytest
import torch

from tests.helpers import call, latents, prompt, refused, run_stock
from tests.inversion_helpers import ALL, flow, guide, inject, invert, sample

FRAMES = 5

# Nodes that only observe or plan memory -> settings.
WATCHING = {
    "PathchSageAttentionKJ": {"sage_attention": "disabled"},
    "ModelPatchTorchSettings": {"enable_fp16_accumulation": False},
    "ModelMemoryUsageFactorOverride": {"memory_usage_factor": 2.0},
    "ModelPassThrough": {},
}


@pytest.fixture
def arranged(nodes, small):
    """Noise, and a function that returns MODELs with our nodes before and after another node."""
    guided = guide(nodes, small, latents(FRAMES))
    noise, inversion = invert(nodes, guided, latent=latents(FRAMES))

    def inserted(node):
        first = guide(nodes, node(small), latents(FRAMES)), node(guide(nodes, small, latents(FRAMES)))
        models = [inject(nodes, model, inversion, **ALL) for model in first]
        return [*models, node(inject(nodes, guided, inversion, **ALL)), node(flow(nodes, small, inversion))]

    return noise, inserted


@pytest.mark.parametrize("node", WATCHING)
def test_kjnodes_that_only_watch_do_not_change_edits(small, nodes, kj, arranged, node):
    noise, inserted = arranged

    def watched(model):
        return kj(node, model=model, **WATCHING[node])[0]

    for model, plain in zip(inserted(watched), inserted(lambda model: model), strict=True):
        assert torch.equal(sample(nodes, model, noise), sample(nodes, plain, noise))
    watched_noise, _ = invert(nodes, watched(guide(nodes, small, latents(FRAMES))), latent=latents(FRAMES))
    assert torch.equal(watched_noise["samples"], noise["samples"])


def test_cfg_zero_star_changes_edits_independently_of_order(nodes, kj, arranged):
    noise, inserted = arranged
    models = inserted(lambda model: kj("CFGZeroStarAndInit", model=model)[0])
    *injected, flowing = [sample(nodes, model, noise) for model in models]
    plain = sample(nodes, inserted(lambda model: model)[0], noise)
    assert all(torch.equal(edit, injected[0]) for edit in injected)
    assert not torch.equal(injected[0], plain) and flowing.isfinite().all()


def test_ddim_sampler_select_accepts_scheduled_cfg_guidance(small, nodes, kj):
    from comfy_extras.nodes_custom_sampler import DisableNoise, SamplerCustomAdvanced

    guided = guide(nodes, small, latents(FRAMES))
    noise, inversion = invert(nodes, guided, latent=latents(FRAMES))
    model = inject(nodes, guided, inversion, **ALL)
    sampler, sigmas = call(nodes["DDIMSamplerSelect"], model=model, noise=noise)
    (guider,) = kj("ScheduledCFGGuidance", model=model, positive=prompt(2), negative=prompt(3), cfg=2.0)
    (nothing,) = DisableNoise.execute().args
    edit, _ = SamplerCustomAdvanced.execute(nothing, guider, sampler, sigmas, noise).args
    assert torch.equal(edit["samples"], sample(nodes, model, noise))


def test_ddim_inversion_accepts_frames_of_a_batch_and_samplers_refuse_them(small, nodes, kj):
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
    # Core's Latent From Batch keeps the schedule; the frames are noise, but not that of the inversion.
    part = run_stock(LatentFromBatch, whole, 1, 3)[0]
    assert sample(nodes, small, part).isfinite().all()
    wrong = "Connect the noise of the same inversion"
    with refused("Feature Injection", wrong):
        sample(nodes, inject(nodes, small, inversion, **ALL), part)
    with refused("TokenFlow", wrong):
        sample(nodes, flow(nodes, small, inversion), part)
