"""Inversions in a real UNet: what their record holds, where features are stored, which grids are refused."""

import re
import shutil

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import FRAMES, HEIGHT, WIDTH, call, hints, latents, prompt, refused, windowed
from tests.inversion_helpers import ALL, guide, inject, invert, sample, watched

# --- the record ---


def test_a_record_holds_what_sampling_needs(small, nodes):
    latent = latents()
    noise, inversion = invert(nodes, small, latent=latent, steps=8, sampling_steps=4, refinements=1)
    assert_close(inversion.clip, small.model.process_latent_in(latent["samples"]))
    assert torch.equal(small.model.process_latent_out(inversion.noise), noise["samples"])
    schedule = small.get_model_object("model_sampling").sigmas[[1, 126, 251, 376, 501, 626, 751]]
    assert_close(inversion.sigmas, torch.cat((torch.zeros(1), schedule)), rtol=1e-6, atol=0)
    assert inversion.guesses.shape == (7, FRAMES, 4, HEIGHT, WIDTH) and not inversion.features
    assert inversion.residuals.isfinite().all() and inversion.about["refinements"] == 1
    assert torch.equal(inversion.conditioning["cond"], prompt(1)[0][0])
    assert "nothing is known" in invert(nodes, small, steps=2)[1].quality()


def test_every_kind_of_prompt_inverts_and_plain_ones_are_kept(sd15, small, nodes, control):
    extras = {"pooled_output": torch.randn(1, 11), "width": 7, "crop": None}
    kept = invert(nodes, small, prompt(1, **extras), steps=1)[1]
    assert kept.conditioning.keys() == {"cond", "pooled_output"} and kept.about["prompt"] == {"width": 7}
    several = [*prompt(1), *prompt(2)]
    for model, source in ((small, several), (small, prompt(1, start_percent=0.1)), (sd15, control(prompt(1), hints()))):
        assert not invert(nodes, model, source, steps=1)[1].conditioning


# --- storage ---


def test_every_storage_gives_the_same_edit(small, nodes, base):
    model, edits, noises = guide(nodes, small), {}, {}
    for storage in ("recompute", "memory", "disk"):
        settings = {"storage": storage, "feature_steps": 3, "refinements": 1} | ALL
        noise, inversion = invert(nodes, model, steps=5, **settings)
        assert sorted(inversion.features) == ([] if storage == "recompute" else [2, 3, 4])
        patched = inject(nodes, model, inversion, resnet_steps=3, attention_steps=2, **ALL)
        edits[storage], noises[storage] = sample(nodes, patched, noise, steps=5), noise["samples"]
    assert torch.equal(edits["memory"], edits["disk"])
    assert_close(edits["recompute"], edits["memory"])
    assert torch.equal(noises["recompute"], noises["memory"]) and torch.equal(noises["recompute"], noises["disk"])
    assert not torch.equal(sample(nodes, model, noise, steps=5), edits["memory"])
    # On disk, features have no name that could be left behind.
    assert not list((base / "temp").glob("*.safetensors"))


def test_fewer_steps_or_blocks_than_stored_are_taken_from_what_is_stored(small, nodes):
    noise, inversion = invert(nodes, small, steps=5, storage="memory", feature_steps=3, **ALL)
    fewer = {"resnet_steps": 1, "attention_steps": 2, "resnet_blocks": "1", "attention_blocks": "2-3"}
    with watched(small) as calls:
        edit = sample(nodes, inject(nodes, small, inversion, **fewer), noise, steps=5)
    assert len(calls) == 5
    plain = invert(nodes, small, steps=5)[1]
    assert_close(edit, sample(nodes, inject(nodes, small, plain, **fewer), noise, steps=5))
    # What is not stored is computed again.
    more = {"resnet_steps": 5, "attention_steps": 5} | ALL
    with watched(small) as calls:
        edit = sample(nodes, inject(nodes, small, inversion, **more), noise, steps=5)
    assert len(calls) == 5 + 2
    assert_close(edit, sample(nodes, inject(nodes, small, plain, **more), noise, steps=5))


@pytest.mark.parametrize("storage", ["recompute", "memory", "disk"])
def test_the_size_is_said_before_the_run(small, nodes, host_module, lines, storage):
    said = []
    model = small.clone()

    def look(apply_model, arguments):
        said.append(lines())
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(look)
    latent = latents(2, 37, 41)
    _, inversion = invert(nodes, model, latent=latent, storage=storage, feature_steps=2, **ALL)
    ((line, _, room),) = [line.rpartition("; ") for line in said[0]]
    assert room.startswith("unfinished inversions use up to 0.3 MiB of 4.00 GiB")
    one = host_module.injection.bytes_of(small, host_module.sites_of(small, "0-3", "0-3", ""), (37, 41), "") / 2**20
    assert f"{4 * one:.1f} MiB (2 steps x 2 frames x {one:.1f} MiB)" in line
    assert line.startswith("storage: ")
    if storage == "recompute":
        latents_alone = 4 * 4 * 2 * 4 * 37 * 41 / 2**20
        assert f"{latents_alone:.1f} MiB of latents" in line and "if stored" in line
    else:
        assert ("of memory, " if storage == "memory" else "on disk, ") in line and line.endswith("are free")
        taken = sum(t.numel() * t.element_size() for some in inversion.features.values() for t in some.values())
        assert taken == 4 * one * 2**20
    assert inversion.quality() in lines()[-1]


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_what_does_not_fit_is_refused_with_the_figures(comfy, small, nodes, host_module, base, storage):
    def never(apply_model, arguments):
        raise AssertionError("the UNet was called")

    model, cpu = small.clone(), torch.device("cpu")
    model.set_model_unet_function_wrapper(never)
    long = {"samples": torch.zeros(1, 4, 37, 41).expand(10**4, -1, -1, -1)}
    place, other = ("of memory", "disk, recompute") if storage == "memory" else ("on disk", "recompute")
    with pytest.raises(ValueError) as caught:
        invert(nodes, model, latent=long, steps=999, storage=storage, feature_steps=999, **ALL)
    one = host_module.injection.bytes_of(small, host_module.sites_of(small, "0-3", "0-3", ""), (37, 41), "")
    free = shutil.disk_usage(base).free if storage == "disk" else comfy.model_management.get_free_memory(cpu)
    found = re.fullmatch(
        rf"DDIM Inversion: the features take {999 * 10**4 * one / 2**30:.2f} GiB \(999 steps x 10000 frames x "
        rf"{one / 2**20:.1f} MiB\), but ([\d.]+) GiB {place} are free. Set `storage` to {other}, or take fewer "
        r"`feature_steps`, blocks or frames.",
        str(caught.value),
    )
    assert found, caught.value
    assert float(found[1]) == pytest.approx(free / 2**30, rel=0.2)  # other programs take and give back


@pytest.mark.parametrize("settings", [{"feature_steps": 0}, {"resnet_blocks": "none", "attention_blocks": "none"}])
def test_nothing_to_store(small, nodes, settings):
    with refused("DDIM Inversion", "nothing to store", "`storage` to recompute"), watched(small) as calls:
        invert(nodes, small, storage="memory", **ALL | settings)
    assert not calls
    assert invert(nodes, small, steps=1, **ALL | settings)[1].frames == FRAMES


def test_context_windows_cannot_be_stored(comfy, small, nodes):
    wrong = ("features cannot be stored with context windows", "`storage` to recompute")
    with refused("DDIM Inversion", *wrong), watched(small) as calls:
        invert(nodes, windowed(small), storage="memory", **ALL)
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
    with refused("DDIM Inversion", *wrong):
        invert(nodes, model, storage="memory", **ALL)


# --- grids ---


@pytest.mark.parametrize(("steps", "sampling_steps"), [(100, 3), (6, 4), (34, 30), (4, 8)])
def test_grids_that_never_meet_are_named_before_the_run(small, nodes, cove, steps, sampling_steps):
    def spelled(n):
        grid = cove.ddim.sampling_timesteps(n)
        return f"{', '.join(map(str, grid if n < 5 else [*grid[:2], '...', grid[-1]]))}"

    grids = (
        f"{steps} inversion steps (timesteps {spelled(steps)})",
        f"{sampling_steps} sampling steps ({spelled(sampling_steps)})",
    )
    with refused("DDIM Inversion", *grids), watched(small) as calls:
        invert(nodes, small, steps=steps, sampling_steps=sampling_steps)
    assert not calls


def test_the_largest_numbers_of_steps_stay_in_the_schedule(small, nodes):
    for node in ("DDIMInversion", "DDIMSampler", "DDIMSamplerSelect"):
        slots = {slot.id: slot for slot in nodes[node].define_schema().inputs}
        for name in {"steps", "sampling_steps"} & slots.keys():
            _, sigmas = call(nodes["DDIMSamplerSelect"], model=small, steps=slots[name].max)
            assert (sigmas[:-1] > sigmas[1:]).all()
