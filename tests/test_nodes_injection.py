"""Feature Injection in a real UNet: injected features at each site and sigma, for every way the host calls it."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import FRAMES, HEIGHT, WIDTH, latents, prompt, set_free_memory, state_of
from tests.inversion_helpers import (
    ALL,
    AUTO_SITES,
    SITES,
    ask,
    down,
    edited_at,
    inject,
    invert,
    noise_like,
    sample,
    source_at,
    store,
    store_unless_recomputed,
    tiny,
    watched,
    windows_in,
    windows_of,
)
from tests.random_models import FAMILIES

# --- injected features ---


@pytest.mark.parametrize("storage", ["recompute", "memory", "disk"])
def test_feature_injection_injects_the_source_at_every_site(small, nodes, storage):
    """Stored sites, and other sites that are recomputed."""
    _, inversion = invert(nodes, small, refinements=1)
    model = inject(nodes, small, store_unless_recomputed(nodes, small, inversion, storage), **ALL)
    found = []
    for step in range(3):
        source = source_at(small, inversion, step)
        calls, _ = edited_at(model, inversion, step)
        assert sorted(source.at) == sorted(SITES)
        for site in SITES:
            positive, negative = calls[-1].at[site].chunk(2)
            assert torch.equal(positive, source.at[site]) and torch.equal(negative, source.at[site]), site
        found.append(source.at)
    assert all(not torch.equal(found[0][site], found[2][site]) for site in SITES)


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("multiple", [1, 2])
def test_store_features_stores_the_source_of_every_sampling_step(small, nodes, storage, multiple):
    _, inversion = invert(nodes, small, refinements=2, multiple=multiple)
    stored = store(nodes, small, inversion, storage=storage)
    assert not inversion.features and sorted(stored.features) == [0, 1, 2]
    for step, features in stored.features.items():
        source = source_at(small, inversion, step)
        assert features.keys() == set(AUTO_SITES)
        assert all(torch.equal(features[site], source.at[site]) for site in AUTO_SITES)
    with watched(small) as calls:
        edited_at(inject(nodes, small, stored), inversion, 1)
    assert len(calls) == 1  # the source does not run


def test_feature_injection_injects_queries_and_keys_but_not_values(small, nodes):
    _, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, resnet_blocks="none", attention_blocks="1")
    source = source_at(small, inversion, 0)
    (*_, seen), injected = edited_at(model, inversion, 0, cfg=1.0)
    (without,), plain = edited_at(small, inversion, 0, cfg=1.0)
    site = "attention.1.0"
    assert torch.equal(seen.queries[site], source.queries[site]) and torch.equal(seen.keys[site], source.keys[site])
    assert torch.equal(seen.values[site], without.values[site])
    assert not torch.equal(seen.values[site], source.values[site]) and not torch.equal(injected, plain)
    # Sites before it are unchanged; later sites that are not selected see the edit.
    before = ["resnet.0.0", "resnet.1.0", "attention.0.0"]
    assert all(torch.equal(seen.at[other], without.at[other]) for other in before)
    after = ["resnet.2.0", "attention.2.0", "attention.3.0"]
    assert not any(torch.equal(seen.at[other], source.at[other]) for other in after)


def test_feature_injection_ends_after_its_share_of_the_steps(small, nodes):
    _, inversion = invert(nodes, small, steps=5)
    model = inject(nodes, small, inversion, resnet_share=0.4, attention_share=0.8, **ALL)
    for sampled in range(5):
        step = 4 - sampled
        source, (calls, _) = source_at(small, inversion, step), edited_at(model, inversion, step, cfg=1.0)
        assert len(calls) == (2 if sampled < 4 else 1)
        for site in SITES:
            put_back = torch.equal(calls[-1].at[site], source.at[site])
            assert put_back == (sampled < (2 if site.startswith("resnet") else 4)), (sampled, site)
    assert torch.equal(edited_at(model, inversion, 0)[1], edited_at(small, inversion, 0)[1])


@pytest.mark.parametrize(
    "settings",
    [{"resnet_share": 0.0, "attention_share": 0.0}, {"resnet_blocks": "none", "attention_blocks": "none"}],
)
def test_feature_injection_without_steps_or_blocks_is_plain_sampling(small, nodes, settings):
    noise, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL | settings)
    with watched(small) as calls:
        assert torch.equal(sample(nodes, model, noise), sample(nodes, small, noise))
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("storage", ["recompute", "memory"])
def test_feature_injection_matches_a_finer_inversion_at_every_sampling_step(small, nodes, storage):
    noise, inversion = invert(nodes, small, steps=4, multiple=2)
    assert len(inversion.residuals) == 7 and len(inversion.sigmas) == 5  # timesteps 1, 126, ..., 751
    model = inject(nodes, small, store_unless_recomputed(nodes, small, inversion, storage))
    with watched(small) as calls:
        sample(nodes, model, noise)
    edits = [seen for seen in calls if len(seen.options["cond_or_uncond"]) == 2]
    assert len(edits) == 4
    for step, seen in zip((3, 2, 1, 0), edits, strict=True):
        source = source_at(small, inversion, step)
        assert all(torch.equal(seen.at[site][:FRAMES], source.at[site]) for site in AUTO_SITES)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_feature_injection_counts_its_share_from_the_first_step_of_the_schedule(small, nodes, start):
    """A run that starts later in the schedule injects at the same sigmas."""
    _, inversion = invert(nodes, small, steps=5)
    model = inject(nodes, small, inversion, resnet_share=0.6, attention_share=0.6, **ALL)
    for sampled in range(start, 5):
        with watched(small) as calls:
            ask(model, noise_like(inversion), down(inversion)[start:], sampled - start, prompt(2))
        assert len(calls) == (2 if sampled < 3 else 1)


# --- decoders of full depth, models from the loader ---


@pytest.mark.parametrize(
    ("kind", "resnets", "attentions", "depth"),
    [("sd15", (3, 4, 6), (4, 5, 6, 7, 8, 9), 1), ("sdxl", (0, 1, 3), (1, 2, 3, 4, 5), 3)],
)
def test_feature_injection_auto_selects_flattens_blocks(load, nodes, kind, resnets, attentions, depth):
    with torch.inference_mode():
        model, state = tiny(kind), state_of(tiny(kind))
        source, edit = prompt(1, kind), prompt(2, kind)
        _, inversion = invert(nodes, model, source, steps=2)
        inversion = store(nodes, model, inversion, share=0.5)
        assert list(inversion.features) == [1]
        named = {f"resnet.{block}.0" for block in resnets}
        for block in attentions:
            # SDXL's lower level has fewer transformers per block.
            count = 2 if kind == "sdxl" and block > 2 else depth
            named |= {f"attention.{block}.{index}" for index in range(count)}
        assert inversion.features[1].keys() == named
        injected = inject(nodes, model, inversion)
        before = source_at(model, inversion, 1, source)
        (seen,), _ = edited_at(injected, inversion, 1, edit, prompt(3, kind))
        (plain,), _ = edited_at(model, inversion, 1, edit, prompt(3, kind))
        assert named < plain.at.keys()
        for site in plain.at:
            assert torch.equal(seen.at[site], before.at[site].repeat(2, *[1] * (before.at[site].ndim - 1))) == (
                site in named
            ), site
        assert state_of(model) == state


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@pytest.mark.parametrize("blocks", ["auto", "0, 2-3"])
def test_feature_injection_changes_edits_but_not_the_source_in_every_family(load, nodes, kind, blocks):
    with torch.inference_mode():
        model, state = load(kind), state_of(load(kind))
        settings = {"resnet_blocks": blocks, "attention_blocks": blocks}
        latent, source, edit = latents(2), prompt(1, kind), prompt(2, kind)
        noise, inversion = invert(nodes, model, source, latent, steps=1)
        injected = inject(nodes, model, inversion, **settings)
        asked = (inversion.latents[0], down(inversion), 0)
        assert torch.equal(ask(injected, *asked, source), ask(model, *asked, source))
        assert not torch.equal(ask(injected, *asked, edit), ask(model, *asked, edit))
        # One step with guidance, through the nodes.
        assert sample(nodes, injected, noise, edit, prompt(3, kind)).isfinite().all()
        assert state_of(model) == state


# --- reconstruction ---


@pytest.mark.parametrize("storage", ["recompute", "memory", "disk"])
def test_feature_injection_keeps_the_source_at_its_own_latents(small, nodes, storage):
    _, inversion = invert(nodes, small, steps=5, refinements=2)
    model = inject(nodes, small, store_unless_recomputed(nodes, small, inversion, storage))
    for step in range(5):
        asked = (inversion.latents[step], down(inversion), 4 - step, prompt(1))
        with watched(small) as calls:
            assert torch.equal(ask(model, *asked), ask(small, *asked))
        assert len(calls) == (3 if storage == "recompute" else 2)


def test_feature_injection_keeps_the_reconstruction(small, nodes):
    """The difference is within the error of the reconstruction itself."""
    noise, inversion = invert(nodes, small, steps=7, refinements=10)
    model = inject(nodes, small, inversion, **ALL)
    plain = sample(nodes, small, noise, prompt(1), cfg=1.0)
    back = sample(nodes, model, noise, prompt(1), cfg=1.0)
    edit, kept = (sample(nodes, each, noise) for each in (small, model))
    lost = (plain - latents()["samples"]).norm()
    assert (back - plain).norm() < 2 * lost < 1e-3 * plain.norm()
    assert (kept - edit).norm() > 0.05 * edit.norm()
    # An edit with injected features is closer to the source.
    assert (kept - plain).norm() < (edit - plain).norm()


# --- batches ---


def test_feature_injection_is_independent_of_the_order_of_conditionings(comfy, small, nodes, monkeypatch):
    import comfy.samplers

    _, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL)
    source = source_at(small, inversion, 1)

    def injected(model, batches):
        """Check that every half of every batch has the source's features; return the denoised latents."""
        calls, answer = edited_at(model, inversion, 1, cfg=5.0)
        assert [seen.options["cond_or_uncond"] for seen in calls[1:]] == batches
        for seen in calls[1:]:
            for site in SITES:
                for half in seen.at[site].chunk(len(seen.options["cond_or_uncond"])):
                    assert_close(half, source.at[site], rtol=1e-4, atol=1e-4)
        return answer

    together = injected(model, [[1, 0]])
    swapped = model.clone()
    swapped.model_options["sampler_calc_cond_batch_function"] = lambda seen: comfy.samplers.calc_cond_batch(
        seen["model"], seen["conds"][::-1], seen["input"], seen["sigma"], seen["model_options"]
    )[::-1]
    assert_close(injected(swapped, [[1, 0]]), together, rtol=1e-3, atol=2e-3)
    set_free_memory(monkeypatch, 0)
    assert_close(injected(model, [[1], [0]]), together, rtol=1e-3, atol=2e-3)
    monkeypatch.undo()
    # cfg 1 skips the negative half.
    calls, _ = edited_at(model, inversion, 1, cfg=1.0)
    assert [seen.options["cond_or_uncond"] for seen in calls] == [[0], [0]]
    assert all(torch.equal(calls[1].at[site], source.at[site]) for site in SITES)


@pytest.mark.parametrize("area", [(3, 4, 1, 3), (2, 4, 3, 0), ("percentage", 3 / 5, 4 / 7, 2 / 5, 3 / 7)])
def test_feature_injection_crops_the_features_to_an_area(small, nodes, area):
    height, width, top, left = area if len(area) == 4 else (3, 4, 2, 3)
    _, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL)
    source = source_at(small, inversion, 1)
    calls, _ = edited_at(model, inversion, 1, [*prompt(2), *prompt(4, area=area)], cfg=1.0)
    (part,) = [seen for seen in calls if seen.latents.shape[2:] == (height, width)]
    for block, level in ((0, 1), (1, 1), (2, 0), (3, 0)):
        whole = (3, 4) if level else (HEIGHT, WIDTH)
        size = [-(-side // 2**level) for side in (height, width)]
        rows, columns = (slice(at >> level, (at >> level) + side) for at, side in zip((top, left), size, strict=True))
        outputs, queries = (source.at[f"{kind}.{block}.0"] for kind in ("resnet", "attention"))
        assert torch.equal(part.at[f"resnet.{block}.0"], outputs[:, :, rows, columns])
        expected = queries.unflatten(1, whole)[:, rows, columns].flatten(1, 2)
        assert torch.equal(part.at[f"attention.{block}.0"], expected)
    (whole,) = [seen for seen in calls[1:] if seen.latents.shape[2:] == (HEIGHT, WIDTH)]
    assert all(torch.equal(whole.at[site], source.at[site]) for site in SITES)


def test_feature_injection_crops_separately_for_areas_in_one_batch(small, nodes):
    _, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL)
    source = source_at(small, inversion, 1).at["resnet.3.0"]
    areas = [prompt(4, area=(3, 4, 0, 2))[0], prompt(5, area=(3, 4, 2, 1))[0]]
    calls, _ = edited_at(model, inversion, 1, [*prompt(2), *areas], cfg=1.0)
    (part,) = [seen for seen in calls if seen.latents.shape[2:] == (3, 4)]
    assert len(part.options["uuids"]) == 2
    expected = [source[:, :, 0:3, 2:6], source[:, :, 2:5, 1:5]]
    found = part.at["resnet.3.0"].chunk(2)
    assert any(all(map(torch.equal, found, order)) for order in (expected, expected[::-1]))


@pytest.mark.parametrize("order", ["core before", "core after", "evolved before", "evolved after"])
def test_feature_injection_injects_the_frames_of_a_context_window(small, nodes, order):
    _, inversion = invert(nodes, small, latent=latents(5), steps=4)
    model = windows_of(small, order, lambda model: inject(nodes, model, inversion, **ALL))
    calls, _ = edited_at(model, inversion, 1)
    edits = [seen for seen in calls if len(seen.options["cond_or_uncond"]) == 2]
    assert len(edits) == 2 and len(calls) == 4
    for (_, frames), seen in zip(windows_in(order), edits, strict=True):
        source = source_at(small, inversion, 1, frames=frames)
        for site in SITES:
            for half in seen.at[site].chunk(2):
                assert torch.equal(half, source.at[site]), site


@pytest.mark.parametrize("order", ["core before", "core after", "evolved before", "evolved after"])
def test_feature_injection_injects_stored_features_in_context_windows(small, nodes, order):
    """With independent frames, the features in a window equal those in the whole clip."""
    _, inversion = invert(nodes, small, latent=latents(5), steps=4)
    inversion = store(nodes, small, inversion)
    model = windows_of(small, order, lambda model: inject(nodes, model, inversion))
    calls, _ = edited_at(model, inversion, 1)
    for (_, frames), seen in zip(windows_in(order), calls, strict=True):
        source = source_at(small, inversion, 1)
        for site in AUTO_SITES:
            for half in seen.at[site].chunk(2):
                assert torch.equal(half, source.at[site][frames]), site


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "size"), [("two levels", (5, 7)), ("sd15", (7, 13)), ("sdxl", (11, 5))])
def test_bytes_of_matches_the_size_of_stored_features(load, nodes, host_module, kind, size, dtype):
    with torch.inference_mode():
        model = tiny(kind).clone()
        if dtype != torch.float32:
            model.set_model_compute_dtype(dtype)
        stated = host_module.injection.bytes_of(model, host_module.injection.sites_of(model, "auto", "auto"), size)
        source = prompt(1, kind.replace("two levels", "sd15"))
        inversion = store(nodes, model, invert(nodes, model, source, latents(2, *size), steps=1)[1])
        (features,) = inversion.features.values()
        assert {tensor.dtype for tensor in features.values()} == {dtype}
        assert sum(tensor.numel() * tensor.element_size() for tensor in features.values()) == 2 * stated


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_feature_injection_in_half_precision_is_as_exact_as_plain_sampling(small, nodes, dtype):
    half = small.clone()
    half.set_model_compute_dtype(dtype)
    _, inversion = invert(nodes, small)

    def error(injected):
        exact, rounded = (edited_at(injected(model), inversion, 1)[1] for model in (small, half))
        assert rounded.dtype == torch.float32 and rounded.isfinite().all()
        return (rounded - exact).abs().mean()

    assert 0 < error(partial(inject, nodes, inversion=inversion, **ALL)) < 2 * error(lambda model: model)
    # Half precision keeps the source at its own latents as well.
    asked = (inversion.latents[1], down(inversion), 1, prompt(1))
    assert torch.equal(ask(inject(nodes, half, inversion, **ALL), *asked), ask(half, *asked))
