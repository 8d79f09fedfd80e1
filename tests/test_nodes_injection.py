"""Feature Injection in a real UNet: what was there at that sigma is put back, at each site, in each half of a batch."""

import copy
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from scripts.random_models import FAMILIES
from tests.helpers import FRAMES, HEIGHT, WIDTH, call, hints, latents, prompt, state_of
from tests.inversion_helpers import ask, inject, invert, sample, tiny_model, watched
from tests.test_nodes_errors import refused

ALL = {"resnet_blocks": "0-3", "attention_blocks": "0-3"}  # of a UNet of two levels
SITES = [*(f"resnet.{block}.0" for block in range(4)), *(f"attention.{block}.0" for block in range(4))]
WINDOWS = {"context_length": 3, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1}
WINDOWS |= {"closed_loop": False, "fuse_method": "flat", "dim": 0}

tiny = cache(tiny_model)


@pytest.fixture
def small(load):
    """A MODEL of two levels, as a node gets it: under inference mode; a node must leave it as it was."""
    model = tiny()
    before = state_of(model)
    with torch.inference_mode():
        yield model
    assert state_of(model) == before


def noise_like(inversion, seed=7):
    """Latents as the model sees them, that are none of the inversion's."""
    return 3 * torch.randn(inversion.clip.shape, generator=torch.Generator().manual_seed(seed))


def source_at(model, inversion, step, conditioning=None, frames=slice(None)):
    """What stands in the UNet of MODEL, without injection, at the stored guess of a step."""
    with watched(model) as calls:
        ask(model, inversion.guesses[step][frames], down(inversion), -2 - step, conditioning or prompt(1))
    (seen,) = calls
    return seen


def down(inversion):
    """The sigmas of sampling on the grid of the inversion."""
    return inversion.sigmas.flip(0)


def edited_at(model, inversion, step, positive=None, negative=None, cfg=2.0):
    """The calls of the UNet of MODEL for an edit at this step, and the answer."""
    with watched(model) as calls:
        positive, negative = positive or prompt(2), negative or prompt(3)
        answer = ask(model, noise_like(inversion), down(inversion), -2 - step, positive, negative, cfg)
    return calls, answer


# --- what is put back is what was there ---


@pytest.mark.parametrize("storage", ["recompute", "memory", "disk"])
def test_every_site_gets_what_the_source_had_there_at_that_sigma(small, nodes, storage):
    _, inversion = invert(nodes, small, storage=storage, feature_steps=3, refinements=1, **ALL)
    model = inject(nodes, small, inversion, **ALL)
    found = []
    for step in range(3):
        source = source_at(small, inversion, step)
        calls, _ = edited_at(model, inversion, step)
        assert len(calls) == (2 if storage == "recompute" else 1)
        assert sorted(source.at) == sorted(SITES)
        for site in SITES:
            positive, negative = calls[-1].at[site].chunk(2)
            assert torch.equal(positive, source.at[site]) and torch.equal(negative, source.at[site]), site
        found.append(source.at)
    assert all(not torch.equal(found[0][site], found[2][site]) for site in SITES)


@pytest.mark.parametrize("storage", ["recompute", "memory"])
def test_what_is_stored_is_what_stood_there_in_the_inversion(small, nodes, storage):
    with watched(small) as calls:
        _, inversion = invert(nodes, small, storage=storage, feature_steps=3, refinements=2, **ALL)
    assert sorted(inversion.features) == ([] if storage == "recompute" else [0, 1, 2])
    for step, features in inversion.features.items():
        source = source_at(small, inversion, step)
        (same,) = [seen for seen in calls if torch.equal(seen.latents, source.latents)]
        assert features.keys() == set(SITES)
        assert all(torch.equal(features[site], same.at[site]) for site in SITES)


def test_queries_and_keys_are_put_back_and_values_are_not(small, nodes):
    _, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, resnet_blocks="none", attention_blocks="1")
    source = source_at(small, inversion, 0)
    (*_, seen), injected = edited_at(model, inversion, 0, cfg=1.0)
    (without,), plain = edited_at(small, inversion, 0, cfg=1.0)
    site = "attention.1.0"
    assert torch.equal(seen.queries[site], source.queries[site]) and torch.equal(seen.keys[site], source.keys[site])
    assert torch.equal(seen.values[site], without.values[site])
    assert not torch.equal(seen.values[site], source.values[site]) and not torch.equal(injected, plain)
    # What runs before the site is untouched, and so is what no one named after it: it sees the edit.
    before = ["resnet.0.0", "resnet.1.0", "attention.0.0"]
    assert all(torch.equal(seen.at[other], without.at[other]) for other in before)
    after = ["resnet.2.0", "attention.2.0", "attention.3.0"]
    assert not any(torch.equal(seen.at[other], source.at[other]) for other in after)


def test_each_kind_ends_after_its_steps(small, nodes):
    _, inversion = invert(nodes, small, steps=5)
    model = inject(nodes, small, inversion, resnet_steps=2, attention_steps=4, **ALL)
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
    [{"resnet_steps": 0, "attention_steps": 0}, {"resnet_blocks": "none", "attention_blocks": "none"}],
)
def test_no_steps_or_no_blocks_is_plain_sampling(small, nodes, settings):
    noise, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL | settings)
    with watched(small) as calls:
        assert torch.equal(sample(nodes, model, noise), sample(nodes, small, noise))
    assert len(calls) == 2 * 3


@pytest.mark.parametrize("storage", ["recompute", "memory"])
def test_coarser_sampling_meets_the_inversion_at_the_sigmas_they_share(small, nodes, storage):
    noise, inversion = invert(nodes, small, steps=8, sampling_steps=4, storage=storage, feature_steps=4, **ALL)
    assert len(inversion.sigmas) == 8  # timesteps 1, 126, ..., 751
    assert sorted(inversion.features) == ([] if storage == "recompute" else [0, 2, 4, 6])
    model = inject(nodes, small, inversion, **ALL)
    with watched(small) as calls:
        sample(nodes, model, noise, steps=4)
    edits = [seen for seen in calls if len(seen.options["cond_or_uncond"]) == 2]
    assert len(edits) == 4
    for step, seen in zip((6, 4, 2, 0), edits, strict=True):
        source = source_at(small, inversion, step)
        assert all(torch.equal(seen.at[site][:FRAMES], source.at[site]) for site in SITES)


# --- the real decoders, and the loaders' models ---


@pytest.mark.parametrize(
    ("kind", "resnets", "attentions", "depth"),
    [("sd15", (3, 4, 6), (4, 5, 6, 7, 8, 9), 1), ("sdxl", (0, 1, 3), (1, 2, 3, 4, 5), 3)],
)
def test_auto_is_flattens_blocks_in_a_decoder_of_full_depth(load, nodes, kind, resnets, attentions, depth):
    with torch.inference_mode():
        model, state = tiny(kind), state_of(tiny(kind))
        source, edit = prompt(1, kind), prompt(2, kind)
        _, inversion = invert(nodes, model, source, steps=2, storage="memory", feature_steps=1)
        assert list(inversion.features) == [1]
        named = {f"resnet.{block}.0" for block in resnets}
        for block in attentions:
            # SDXL's lower level has fewer transformers in a block.
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
def test_every_family_comes_back_unchanged_and_edits_changed(load, nodes, kind, blocks):
    with torch.inference_mode():
        model, state = load(kind), state_of(load(kind))
        settings = {"resnet_blocks": "none" if blocks == "auto" and kind != "sdxl" else blocks, "resnet_steps": 1}
        settings |= {"attention_blocks": blocks, "attention_steps": 1}
        latent, source, edit = latents(2), prompt(1, kind), prompt(2, kind)
        noise, inversion = invert(nodes, model, source, latent, steps=1)
        injected = inject(nodes, model, inversion, **settings)
        asked = (inversion.guesses[0], down(inversion), 0)
        assert torch.equal(ask(injected, *asked, source), ask(model, *asked, source))
        assert not torch.equal(ask(injected, *asked, edit), ask(model, *asked, edit))
        # One step with guidance: the whole chain through the nodes.
        assert sample(nodes, injected, noise, edit, prompt(3, kind), steps=1).isfinite().all()
        assert state_of(model) == state


# --- a reconstruction ---


@pytest.mark.parametrize("storage", ["recompute", "memory", "disk"])
def test_asked_at_its_own_guesses_the_source_is_not_changed_by_one_bit(small, nodes, storage):
    _, inversion = invert(nodes, small, steps=5, storage=storage, refinements=2, **ALL)
    model = inject(nodes, small, inversion, **ALL)
    for step in range(5):
        asked = (inversion.guesses[step], down(inversion), 4 - step, prompt(1))
        with watched(small) as calls:
            assert torch.equal(ask(model, *asked), ask(small, *asked))
        assert len(calls) == (3 if storage == "recompute" else 2)


def test_sampling_the_source_back_is_the_same_with_injection(small, nodes):
    """As exactly as the guesses are those that sampling comes by."""
    noise, inversion = invert(nodes, small, steps=7, refinements=10)
    model = inject(nodes, small, inversion, **ALL)
    plain = sample(nodes, small, noise, prompt(1), steps=7, cfg=1.0)
    back = sample(nodes, model, noise, prompt(1), steps=7, cfg=1.0)
    edit, kept = (sample(nodes, each, noise, steps=7) for each in (small, model))
    lost = (plain - latents()["samples"]).norm()
    assert (back - plain).norm() < 2 * lost < 1e-3 * plain.norm()
    assert (kept - edit).norm() > 0.05 * edit.norm()
    # An edit that keeps the features is nearer to the source.
    assert (kept - plain).norm() < (edit - plain).norm()


# --- batches ---


def test_halves_together_apart_and_reversed_get_the_same(comfy, small, nodes, monkeypatch):
    import comfy.samplers

    _, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL)
    source = source_at(small, inversion, 1)

    def injected(model, batches):
        """The answer, when every half of every batch got what the source had."""
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
    monkeypatch.setattr(comfy.samplers, "model_management", SimpleNamespace(get_free_memory=lambda device: 0))
    assert_close(injected(model, [[1], [0]]), together, rtol=1e-3, atol=2e-3)
    monkeypatch.undo()
    # cfg 1 leaves out the negative half
    calls, _ = edited_at(model, inversion, 1, cfg=1.0)
    assert [seen.options["cond_or_uncond"] for seen in calls] == [[0], [0]]
    assert all(torch.equal(calls[1].at[site], source.at[site]) for site in SITES)


@pytest.mark.parametrize("area", [(3, 4, 1, 3), (2, 4, 3, 0), ("percentage", 3 / 5, 4 / 7, 2 / 5, 3 / 7)])
def test_a_conditioning_with_an_area_gets_its_part(small, nodes, area):
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


def test_areas_of_one_size_in_one_batch_get_each_its_own_part(small, nodes):
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


def windows_of(model, order, injected):
    """MODEL with core's context windows, or AnimateDiff-Evolved's, before or after the injection."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    def core(model):
        return ContextWindowsManualNode.execute(model, **WINDOWS).args[0]

    def evolved(model):
        def cut(executor, model, conds, x, timestep, model_options):
            total, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
            for frames in ([0, 1, 2], [2, 3, 4]):
                model_options["transformer_options"]["ad_params"]["sub_idxs"] = frames
                parts = executor(model, conds, x[frames], timestep[frames], model_options)
                for whole, part in zip(total, parts, strict=True):
                    whole[frames] += part
                count[frames] += 1
            model_options["transformer_options"]["ad_params"]["sub_idxs"] = None
            return [whole / count for whole in total]

        model = model.clone()
        model.model_options["transformer_options"]["ad_params"] = {"sub_idxs": None}
        model.add_wrapper_with_key("calc_cond_batch", "ADE", cut)
        return model

    cut = core if "core" in order else evolved
    return injected(cut(model)) if order.endswith("before") else cut(injected(model))


@pytest.mark.parametrize("order", ["core before", "core after", "evolved before", "evolved after"])
def test_context_windows_get_the_features_of_their_frames(small, nodes, order):
    _, inversion = invert(nodes, small, latent=latents(5), steps=4)
    model = windows_of(small, order, lambda model: inject(nodes, model, inversion, **ALL))
    calls, _ = edited_at(model, inversion, 1)
    edits = [seen for seen in calls if len(seen.options["cond_or_uncond"]) == 2]
    assert len(edits) == 2 and len(calls) == 4
    for frames, seen in zip(([0, 1, 2], [2, 3, 4]), edits, strict=True):
        source = source_at(small, inversion, 1, frames=frames)
        for site in SITES:
            for half in seen.at[site].chunk(2):
                assert torch.equal(half, source.at[site]), site


@pytest.mark.parametrize("order", ["core before", "core after", "evolved before", "evolved after"])
def test_stored_features_serve_context_windows(small, nodes, order):
    """Where frames do not see one another, those of a window have the features that they had in the clip."""
    _, inversion = invert(nodes, small, latent=latents(5), steps=4, storage="memory", **ALL)
    model = windows_of(small, order, lambda model: inject(nodes, model, inversion, **ALL))
    calls, _ = edited_at(model, inversion, 1)
    for frames, seen in zip(([0, 1, 2], [2, 3, 4]), calls, strict=True):
        source = source_at(small, inversion, 1)
        for site in SITES:
            for half in seen.at[site].chunk(2):
                assert torch.equal(half, source.at[site][frames]), site


# --- beside other nodes ---


def test_it_works_before_and_after_correspondence_attention(small, nodes):
    features, _ = call(nodes["DiffusionFeatures"], model=small, latent=latents())
    (correspondence,) = call(nodes["Correspondence"], features=features, window=3)

    def guide(model):
        return call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence)[0]

    guided = guide(small)
    noise, inversion = invert(nodes, guided, refinements=2)
    after = inject(nodes, guided, inversion, **ALL)
    before = guide(inject(nodes, small, inversion, **ALL))
    asked = (inversion.guesses[1], down(inversion), 1, prompt(1))
    assert torch.equal(ask(after, *asked), ask(guided, *asked))
    source, (calls, _) = source_at(guided, inversion, 1), edited_at(after, inversion, 1)
    assert all(torch.equal(half, source.at[site]) for site in SITES for half in calls[-1].at[site].chunk(2))
    edit = sample(nodes, after, noise)
    assert torch.equal(sample(nodes, before, noise), edit)
    assert not torch.equal(sample(nodes, guided, noise), edit)
    stored = invert(nodes, guided, refinements=2, storage="memory", **ALL)[1]
    assert torch.equal(sample(nodes, inject(nodes, guided, stored, **ALL), noise), edit)


def test_stock_samplers_that_stay_on_the_grid_edit_alike(comfy, small, nodes):
    from comfy_extras import nodes_custom_sampler as custom

    noise, inversion = invert(nodes, small)
    model = inject(nodes, small, inversion, **ALL)
    expected = sample(nodes, model, noise)

    def stock(name):
        (guider,) = custom.CFGGuider.execute(model, prompt(2), prompt(3), 2.0).args
        (nothing,) = custom.DisableNoise.execute().args
        (sampler,) = custom.KSamplerSelect.execute(name).args
        return custom.SamplerCustomAdvanced.execute(nothing, guider, sampler, down(inversion), noise).args[0]["samples"]

    assert_close(stock("euler"), expected, rtol=1e-4, atol=1e-3)
    assert stock("heun").isfinite().all()
    with (
        refused("Feature Injection", "it missed 1", "Inversion: 3 steps, sigma ", "Sampling: 1 steps, sigma "),
        watched(small) as calls,
    ):
        stock("dpm_2")  # looks between the sigmas
    assert len(calls) == 2


def test_a_source_prompt_with_a_controlnet_is_connected_again(sd15, nodes, control):
    import comfy.model_management as management

    source = control(prompt(1), hints())
    noise, inversion = invert(nodes, sd15, source, steps=2)
    alone = inject(nodes, sd15, inversion, **ALL)
    with refused("Feature Injection", "not stored", "connect the conditioning"), watched(sd15) as calls:
        sample(nodes, alone, noise, steps=2)
    assert not calls
    management.unload_all_models()
    computed = sample(nodes, inject(nodes, sd15, inversion, conditioning=source, **ALL), noise, steps=2)
    # The ControlNet was loaded like those of the edit's prompts, and keeps no hint of this size.
    net = source[0][1]["control"]
    assert net.control_model in [loaded.model.model for loaded in management.current_loaded_models]
    assert net.cond_hint is None
    stored = invert(nodes, sd15, source, steps=2, storage="memory", **ALL)[1]
    assert_close(sample(nodes, inject(nodes, sd15, stored, **ALL), noise, steps=2), computed)
    other = control(prompt(1), hints(seed=1))
    changed = sample(nodes, inject(nodes, sd15, inversion, conditioning=other, **ALL), noise, steps=2)
    assert (changed - computed).abs().max() > 1e-3
    # Hints that are not one a frame are found before the run.
    two = inject(nodes, sd15, inversion, conditioning=control(prompt(1), hints(2)), **ALL)
    with refused("Feature Injection", "2 hint images for 3 frames"), watched(sd15) as calls:
        sample(nodes, two, noise, steps=2)
    assert not calls


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "size"), [("two levels", (5, 7)), ("sd15", (7, 13)), ("sdxl", (11, 5))])
def test_size_said_is_the_size_of_what_is_stored(load, nodes, host_module, kind, size, dtype):
    with torch.inference_mode():
        model = tiny(kind).clone()
        if dtype != torch.float32:
            model.set_model_compute_dtype(dtype)
        blocks = ALL if kind == "two levels" else {}
        sites = host_module.sites_of(model, *(blocks or dict.fromkeys(ALL, "auto")).values(), "test")
        said = host_module.injection.bytes_of(model, sites, size, "test")
        settings = {"steps": 1, "storage": "memory"} | blocks
        _, inversion = invert(
            nodes, model, prompt(1, kind.replace("two levels", "sd15")), latents(2, *size), **settings
        )
        (features,) = inversion.features.values()
        assert {tensor.dtype for tensor in features.values()} == {dtype}
        assert sum(tensor.numel() * tensor.element_size() for tensor in features.values()) == 2 * said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_without_it(small, nodes, dtype):
    half = small.clone()
    half.set_model_compute_dtype(dtype)
    _, inversion = invert(nodes, small)

    def error(injected):
        exact, rounded = (edited_at(injected(model), inversion, 1)[1] for model in (small, half))
        assert rounded.dtype == torch.float32 and rounded.isfinite().all()
        return (rounded - exact).abs().mean()

    assert 0 < error(partial(inject, nodes, inversion=inversion, **ALL)) < 2 * error(lambda model: model)
    # In half precision, too, the source asked at its own guesses is not changed.
    asked = (inversion.guesses[1], down(inversion), 1, prompt(1))
    assert torch.equal(ask(inject(nodes, half, inversion, **ALL), *asked), ask(half, *asked))


# --- refused ---


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("2, 4", "decoder blocks 0, 1, 2, 3"), ("three", 'expected numbers ("3, 4, 6", "4-9")'), ("3-1", '"3-1"')],
)
@pytest.mark.parametrize("kind", ["resnet", "attention"])
def test_wrong_blocks(small, nodes, kind, text, wrong):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Feature Injection", kind, wrong):
        inject(nodes, small, inversion, **{f"{kind}_blocks": text})
    with refused("DDIM Inversion", kind, wrong), watched(small) as calls:
        invert(nodes, small, storage="memory", **{f"{kind}_blocks": text})
    assert not calls


def test_two_injections(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Feature Injection", "got one with it", "Take one of them off"):
        inject(nodes, inject(nodes, small, inversion), inversion)


def test_a_model_with_injection_is_for_sampling_only(small, nodes):
    _, inversion = invert(nodes, small, steps=1)
    model = inject(nodes, small, inversion)
    wrong = ("without Feature Injection", "Connect the one before it")
    with refused("DDIM Inversion", *wrong):
        invert(nodes, model)
    with refused("Diffusion Features", *wrong):
        call(nodes["DiffusionFeatures"], model=model, latent=latents())


def test_an_inversion_of_another_checkpoint(small, nodes):
    _, inversion = invert(nodes, tiny(seed=1), steps=1)
    with refused("Feature Injection", "another checkpoint", "Load the checkpoint it was made with"):
        inject(nodes, small, inversion)


def test_grids_that_do_not_meet_are_named_before_the_run(small, nodes):
    # Timesteps 1, 31, 61, ..., 751 begin where 4 steps do, and miss 251 and 501.
    noise, inversion = invert(nodes, small, steps=33, sampling_steps=4)
    model = inject(nodes, small, inversion, **ALL)
    sigmas = [f"{sigma:.4g}" for sigma in small.get_model_object("model_sampling").sigmas[[751, 501, 251, 1]].tolist()]
    named = (
        "of the 4 wanted it missed 2",
        "Inversion: 26 steps, sigma ",
        f"Sampling: 4 steps, sigma {', '.join(sigmas)}",
    )
    with refused("Feature Injection", *named, "`sampling_steps`"), watched(small) as calls:
        sample(nodes, model, noise, steps=4)
    assert not calls
    # The first step alone is shared.
    first = inject(nodes, small, inversion, resnet_steps=1, attention_steps=1, **ALL)
    assert sample(nodes, first, noise, steps=4).isfinite().all()
    # Storing for steps that the inversion never makes is refused before it runs.
    named = ("of the 4 wanted it missed 2", "Inversion: 26 steps", "Sampling: 4 steps")
    with refused("DDIM Inversion", *named), watched(small) as calls:
        invert(nodes, small, steps=33, sampling_steps=4, storage="memory", **ALL)
    assert not calls


def test_latents_of_another_clip(small, nodes):
    _, inversion = invert(nodes, small, steps=2)
    model = inject(nodes, small, inversion, **ALL)
    for other in (latents(2), latents(FRAMES, WIDTH, HEIGHT)):
        wrong = (str([FRAMES, 4, HEIGHT, WIDTH]), str(list(other["samples"].shape)), "noise of the same inversion")
        with refused("Feature Injection", *wrong), watched(small) as calls:
            sample(nodes, model, other, steps=2)
        assert not calls


@pytest.mark.parametrize("area", [(3, 4, 1, 3), (HEIGHT, WIDTH, 0, 0)])
def test_a_source_prompt_with_an_area_or_of_several_parts(small, nodes, area):
    _, inversion = invert(nodes, small, steps=2)
    source, wrong = prompt(1, area=area), ("one source prompt for the whole picture", "Use a plain prompt")
    for conditioning in (source, [*prompt(1), *prompt(2)]):
        noise = {"samples": small.model.process_latent_out(inversion.noise)}
        with refused("Feature Injection", *wrong):
            sample(nodes, inject(nodes, small, inversion, conditioning=conditioning, **ALL), noise, steps=2)
        with refused("DDIM Inversion", *wrong):
            invert(nodes, small, conditioning, steps=2, storage="memory", **ALL)


# --- no trace ---


@pytest.mark.parametrize("storage", ["recompute", "memory"])
@pytest.mark.parametrize("ending", ["interrupt", "error"])
def test_a_run_that_breaks_leaves_nothing(comfy, small, nodes, monkeypatch, storage, ending):
    import comfy.model_management as management
    import comfy.utils

    noise, inversion = invert(nodes, small, storage=storage, **ALL)
    model = inject(nodes, small, inversion, **ALL)
    state, before = state_of(small), state_of(model)
    random = torch.random.get_rng_state()
    expected = sample(nodes, model, noise)
    with monkeypatch.context() as patched:
        if ending == "interrupt":
            stop = lambda value, *rest, **more: value == 2 and management.interrupt_current_processing()  # noqa: E731
            patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
            with pytest.raises(management.InterruptProcessingException):
                sample(nodes, model, noise)
        else:
            broken, calls = model.clone(), []

            def fail(apply_model, arguments):
                calls.append(1)
                if len(calls) == 3:
                    raise ArithmeticError
                return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

            broken.set_model_unet_function_wrapper(fail)
            with pytest.raises(ArithmeticError):
                sample(nodes, broken, noise)
    assert state_of(small) == state and state_of(model) == before
    assert torch.equal(sample(nodes, model, noise), expected)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_models_share_nothing(small, nodes):
    noise, one = invert(nodes, small)
    two = invert(nodes, small, prompt(5))[1]
    plain = sample(nodes, small, noise)
    models = [inject(nodes, small, inversion, **ALL) for inversion in (one, two)]
    alone = [sample(nodes, model, noise) for model in models]
    assert not torch.equal(*alone)
    for model, expected in ((models[1], alone[1]), (small, plain), (models[0], alone[0])):
        assert torch.equal(sample(nodes, model, noise), expected)


def test_nodes_after_it_take_it_along_without_copying_the_features(small, nodes):
    noise, inversion = invert(nodes, small, storage="memory", **ALL)
    model = inject(nodes, small, inversion, **ALL)
    clone = copy.copy(model.clone()).clone()
    wrappers = copy.deepcopy(clone.get_wrappers("calc_cond_batch", "cove_injection"))
    assert [wrapper.args[0].inversion for wrapper in wrappers] == [inversion]
    assert torch.equal(sample(nodes, clone, noise), sample(nodes, model, noise))
