"""Memory that the nodes let ComfyUI reserve: for the frames of one evaluation, and for what they hold beside it."""

import pytest

from tests.helpers import FRAMES, call, latents
from tests.inversion_helpers import guide, inject, invert, sample, store

BUDGET = 256 << 20


@pytest.fixture
def reserved(comfy, monkeypatch):
    """The memory in bytes that ComfyUI was asked for by each run so far."""
    import comfy.model_management as management

    asked, load = [], management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **settings):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **settings)

    monkeypatch.setattr(management, "load_models_gpu", load_models_gpu)
    return asked


@pytest.mark.parametrize("batch_size", [1, 3, FRAMES + 2])
def test_diffusion_features_reserve_memory_for_their_batch(small, nodes, reserved, batch_size):
    call(nodes["DiffusionFeatures"], model=small, latent=latents(), batch_size=FRAMES)
    whole = reserved.pop()
    call(nodes["DiffusionFeatures"], model=small, latent=latents(), batch_size=batch_size)
    assert reserved[-1] == pytest.approx(whole * min(batch_size, FRAMES) / FRAMES)


def test_correspondence_attention_reserves_its_sets_and_working_memory(small, nodes, reserved):
    noise, _ = invert(nodes, small)
    plain, guided = (reserved_by(reserved, nodes, model, noise) for model in (small, guide(nodes, small)))
    one_frame = small.model.memory_required([2, *noise["samples"].shape[1:]])
    assert BUDGET <= guided - plain <= BUDGET + (1 << 20) + 2 * one_frame


def test_feature_injection_reserves_what_it_recomputes(small, nodes, reserved, host_module):
    noise, inversion = invert(nodes, small)
    plain = reserved_by(reserved, nodes, small, noise)
    stored = reserved_by(reserved, nodes, inject(nodes, small, store(nodes, small, inversion)), noise)
    computed = reserved_by(reserved, nodes, inject(nodes, small, inversion), noise)
    sites = host_module.injection.sites_of(small, "auto", "auto")
    shape = noise["samples"].shape
    held = len(noise["samples"]) * host_module.injection.bytes_of(small, sites, tuple(shape[2:]))
    assert stored == plain
    assert held <= computed - plain <= held + 2 * small.model.memory_required([2, *shape[1:]])


def reserved_by(reserved, nodes, model, noise):
    sample(nodes, model, noise)
    return reserved[-1]
