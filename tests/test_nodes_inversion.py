"""Inversions in a real UNet: their record, storage of features, refused schedules."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import FRAMES, HEIGHT, WIDTH, call, hints, latents, prompt, refused, windowed
from tests.inversion_helpers import ALL, guide, inject, invert, sample, store, store_unless_recomputed, watched

# --- the record ---


def test_ddim_inversion_records_everything_sampling_needs(small, nodes):
    latent = latents()
    noise, inversion = invert(nodes, small, latent=latent, steps=4, multiple=2, refinements=1)
    assert_close(inversion.clip, small.model.process_latent_in(latent["samples"]))
    assert torch.equal(small.model.process_latent_out(inversion.noise), noise["samples"])
    schedule = small.get_model_object("model_sampling").sigmas[[1, 251, 501, 751]]
    assert_close(inversion.sigmas, torch.cat((torch.zeros(1), schedule)), rtol=1e-6, atol=0)
    assert torch.equal(noise["cove_sigmas"], inversion.sigmas)
    assert inversion.latents.shape == (4, FRAMES, 4, HEIGHT, WIDTH) and not inversion.features
    assert inversion.residuals.shape == (7,) and inversion.residuals.isfinite().all()
    assert inversion.about["refinements"] == 1
    assert torch.equal(inversion.conditioning["cond"], prompt(1)[0][0])


def test_ddim_inversion_accepts_every_prompt_and_stores_plain_ones(sd15, small, nodes, control):
    extras = {"pooled_output": torch.randn(1, 11), "width": 7, "crop": None}
    kept = invert(nodes, small, prompt(1, **extras), steps=1)[1]
    assert kept.conditioning.keys() == {"cond", "pooled_output"} and kept.about["prompt"] == {"width": 7}
    several = [*prompt(1), *prompt(2)]
    for model, source in ((small, several), (small, prompt(1, start_percent=0.1)), (sd15, control(prompt(1), hints()))):
        assert not invert(nodes, model, source, steps=1)[1].conditioning


# --- storage ---


def test_feature_injection_edits_are_equal_for_every_storage(small, nodes, base):
    model, edits = guide(nodes, small), {}
    noise, inversion = invert(nodes, model, steps=5, refinements=1)
    for storage in ("recompute", "memory", "disk"):
        kept = store_unless_recomputed(nodes, model, inversion, storage, share=0.6)
        assert sorted(kept.features) == ([] if storage == "recompute" else [2, 3, 4])
        patched = inject(nodes, model, kept, resnet_share=0.6, attention_share=0.4)
        edits[storage] = sample(nodes, patched, noise)
    assert torch.equal(edits["memory"], edits["disk"])
    assert_close(edits["recompute"], edits["memory"])
    assert not torch.equal(sample(nodes, model, noise), edits["memory"])
    # Features on disk have no file name that could be left behind.
    assert not list((base / "temp").glob("*.safetensors"))


def test_feature_injection_recomputes_features_that_are_not_stored(small, nodes):
    noise, inversion = invert(nodes, small, steps=5)
    stored = store(nodes, small, inversion, share=0.6)
    fewer = {"resnet_share": 0.2, "attention_share": 0.4, "resnet_blocks": "0", "attention_blocks": "1-2"}
    more = {"resnet_share": 1.0, "attention_share": 1.0}
    for settings, computed in ((fewer, 0), (more, 2), (more | ALL, 5)):
        with watched(small) as calls:
            edit = sample(nodes, inject(nodes, small, stored, **settings), noise)
        assert len(calls) == 5 + computed
        assert_close(edit, sample(nodes, inject(nodes, small, inversion, **settings), noise))


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_store_features_reports_the_size_before_the_run(small, nodes, host_module, lines, storage):
    stated = []
    model = small.clone()

    def look(apply_model, arguments):
        stated.append(lines())
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    _, inversion = invert(nodes, model, latent=latents(2, 37, 41))
    assert inversion.quality() in lines()[-1]
    known = len(lines())
    model.set_model_unet_function_wrapper(look)
    stored = store(nodes, model, inversion, share=0.6, storage=storage)
    (line,) = stated[0][known:]
    one = host_module.injection.bytes_of(small, host_module.injection.sites_of(small, "auto", "auto"), (37, 41)) / 2**20
    assert line.startswith(f"storing {4 * one:.1f} MiB (2 steps x 2 frames x {one:.1f} MiB); ")
    assert ("of memory are free" if storage == "memory" else "on disk are free") in line
    taken = sum(t.numel() * t.element_size() for some in stored.features.values() for t in some.values())
    assert taken == 4 * one * 2**20


def test_ddim_inversion_reports_the_size_of_unfinished_inversions(small, nodes, lines):
    invert(nodes, small, latent=latents(2, 37, 41))
    assert lines()[0].startswith("unfinished inversions use up to 0.1 MiB of 4.00 GiB")


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_store_features_refuses_features_larger_than_free_space(comfy, small, nodes, host_module, base, storage):
    def never(apply_model, arguments):
        raise AssertionError("the UNet was called")

    model, cpu = small.clone(), torch.device("cpu")
    model.set_model_unet_function_wrapper(never)
    _, inversion = invert(nodes, small, latent=latents(1, 37, 41))
    long = replace(
        inversion,
        clip=inversion.clip.expand(10**7, -1, -1, -1),
        latents=inversion.latents.expand(-1, 10**7, -1, -1, -1),
    )
    place = "of memory" if storage == "memory" else "on disk"
    other = " or set `storage` to disk," if storage == "memory" else ""
    with pytest.raises(ValueError) as caught:
        store(nodes, model, long, storage=storage)
    one = host_module.injection.bytes_of(small, host_module.injection.sites_of(small, "auto", "auto"), (37, 41))
    free = shutil.disk_usage(base).free if storage == "disk" else comfy.model_management.get_free_memory(cpu)
    found = re.fullmatch(
        rf"Store Features: the features take {3 * 10**7 * one / 2**30:.2f} GiB \(3 steps x 10000000 frames x "
        rf"{one / 2**20:.1f} MiB\), but ([\d.]+) GiB {place} are free. Reduce `share`,{other} or remove this node: "
        "Feature Injection then computes the features itself.",
        str(caught.value),
    )
    assert found, caught.value
    assert float(found[1]) == pytest.approx(free / 2**30, rel=0.2)  # other programs allocate and free


def test_store_features_refuses_an_empty_selection(small, nodes):
    _, inversion = invert(nodes, small)
    with refused("Store Features", "at least one block and one step", "Increase `share`"), watched(small) as calls:
        store(nodes, small, inversion, share=0.0)
    assert not calls


def test_store_features_refuses_context_windows(comfy, small, nodes):
    _, inversion = invert(nodes, small)
    with refused("Store Features", "without context windows", "Remove the context windows"), watched(small) as calls:
        store(nodes, windowed(small), inversion)
    assert not calls

    def evolved(executor, model, conds, x, timestep, model_options):
        total = [torch.zeros_like(x) for _ in conds]
        for frames in ([0, 1], [1, 2]):
            model_options["transformer_options"]["ad_params"] = {"sub_idxs": frames}
            for whole, part in zip(
                total, executor(model, conds, x[frames], timestep[frames], model_options), strict=True
            ):
                whole[frames] = part
        return total

    model = small.clone()
    model.add_wrapper_with_key("calc_cond_batch", "ADE", evolved)
    with refused("Store Features", "features cannot be stored with context windows"):
        store(nodes, model, inversion)


# --- schedules ---


@pytest.mark.parametrize(("steps", "multiple"), [(500, 2), (334, 3), (100, 10)])
def test_ddim_inversion_refuses_too_many_steps_before_the_run(small, nodes, steps, multiple):
    wrong = f"at most 999 steps; got {steps} steps times {multiple}"
    with refused("DDIM Inversion", wrong), watched(small) as calls:
        invert(nodes, small, steps=steps, multiple=multiple)
    assert not calls


def test_ddim_sampler_takes_the_schedule_from_the_noise(small, nodes):
    """Sampling has the steps and sigmas of the inversion."""
    for steps, multiple in ((3, 1), (3, 2), (7, 1)):
        noise, inversion = invert(nodes, small, steps=steps, multiple=multiple)
        _, sigmas = call(nodes["DDIMSamplerSelect"], model=small, noise=noise)
        assert torch.equal(sigmas, inversion.sigmas.flip(0)) and len(sigmas) == steps + 1
        with watched(small) as calls:
            sample(nodes, small, noise)
        assert len(calls) == steps


def test_store_features_stops_at_an_interrupt(comfy, small, nodes, monkeypatch):
    import comfy.model_management as management

    _, inversion = invert(nodes, small)
    done = []

    def interrupted():
        done.append(1)
        if len(done) > 1:
            raise management.InterruptProcessingException

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(management.InterruptProcessingException), watched(small) as calls:
        store(nodes, small, inversion)
    assert len(calls) < 3 and not inversion.features
