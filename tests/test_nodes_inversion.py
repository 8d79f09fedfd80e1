"""Inversions that are stored, saved, loaded, broken off and taken up again, and how well a clip comes back."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from scripts.host import PACK, PromptFailed, Server, lay_out
from tests.helpers import FRAMES, HEIGHT, WIDTH, call, hints, latents, prompt, state_of
from tests.inversion_helpers import inject, invert, sample, tiny_model, watched
from tests.test_nodes_errors import WINDOWS, refused

ALL = {"resnet_blocks": "0-3", "attention_blocks": "0-3"}  # of a UNet of two levels
TENSORS = ("clip", "noise", "sigmas", "guesses", "residuals", "grew")

tiny = cache(tiny_model)


@pytest.fixture
def small(load, base):
    """A MODEL of two levels, as a node gets it: under inference mode; a node must leave it as it was."""
    shutil.rmtree(base / "user" / "cove", ignore_errors=True)
    model = tiny()
    before = state_of(model)
    with torch.inference_mode():
        yield model
    assert state_of(model) == before


@pytest.fixture
def guide(nodes):
    """MODEL, settings -> MODEL out of Correspondence Attention."""

    def guided(model, latent=None, **settings):
        features, _ = call(nodes["DiffusionFeatures"], model=model, latent=latent or latents())
        (correspondence,) = call(nodes["Correspondence"], features=features, window=3)
        return call(nodes["CorrespondenceAttention"], model=model, correspondence=correspondence, **settings)[0]

    return guided


@pytest.fixture
def unfinished(base):
    """() -> numbers of the steps that are kept for going on, of each inversion that was broken off."""
    folder = base / "user" / "cove" / "unfinished"
    return lambda: sorted([int(step.stem) for step in sorted(one.iterdir())] for one in folder.glob("*/"))


@pytest.fixture
def lines(caplog, nodes):
    """What the nodes said, without the name of the node."""
    caplog.set_level("INFO")
    names = {node.define_schema().display_name for node in nodes.values()}

    def said() -> list[str]:
        messages = [record.getMessage().partition(": ") for record in caplog.records]
        return [text for name, _, text in messages if name in names]

    return said


def same(one, other) -> bool:
    """Whether two inversions hold the same, bit for bit."""
    tensors = [(getattr(one, name), getattr(other, name)) for name in TENSORS]
    tensors += [(one.conditioning[name], other.conditioning[name]) for name in one.conditioning]
    tensors += [(one.features[i][site], other.features[i][site]) for i in one.features for site in one.features[i]]
    alike = one.conditioning.keys() == other.conditioning.keys() and one.about == other.about
    alike &= {i: set(some) for i, some in one.features.items()} == {i: set(some) for i, some in other.features.items()}
    # NaN is alike, too.
    return alike and all(a.dtype == b.dtype and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in tensors)


# --- the record ---


def test_a_record_holds_what_sampling_needs(small, nodes):
    latent = latents()
    noise, inversion = invert(nodes, small, latent=latent, steps=8, sampling_steps=4, refinements=1)
    assert_close(inversion.clip, small.model.process_latent_in(latent["samples"]))
    assert torch.equal(small.model.process_latent_out(inversion.noise), noise["samples"])
    schedule = small.get_model_object("model_sampling").sigmas[[1, 126, 251, 376, 501, 626, 751]]
    assert torch.equal(inversion.sigmas, torch.cat((torch.zeros(1), schedule)))
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


def test_every_storage_gives_the_same_edit(small, nodes, guide, base):
    model, edits, noises = guide(small), {}, {}
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
    (line,) = said[0]
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
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    wrong = ("features cannot be stored with context windows", "`storage` to recompute")
    windowed = ContextWindowsManualNode.execute(small, **WINDOWS).args[0]
    with refused("DDIM Inversion", *wrong), watched(small) as calls:
        invert(nodes, windowed, storage="memory", **ALL)
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


@pytest.mark.parametrize(("steps", "sampling_steps"), [(100, 3), (6, 4), (4, 8)])
def test_grids_that_never_meet_are_named_before_the_run(small, nodes, cove, steps, sampling_steps):
    def spelled(n):
        grid = cove.ddim.sampling_timesteps(n)
        return f"{', '.join(map(str, grid if n < 5 else [*grid[:2], '...', grid[-1]]))}"

    grids = (f"{steps} inversion steps (timesteps {spelled(steps)})", f"begin (timesteps {spelled(sampling_steps)})")
    with refused("DDIM Inversion", *grids), watched(small) as calls:
        invert(nodes, small, steps=steps, sampling_steps=sampling_steps)
    assert not calls


def test_the_largest_numbers_of_steps_stay_in_the_schedule(small, nodes):
    for node in ("DDIMInversion", "DDIMSampler", "DDIMSamplerSelect"):
        slots = {slot.id: slot for slot in nodes[node].define_schema().inputs}
        for name in {"steps", "sampling_steps"} & slots.keys():
            _, sigmas = call(nodes["DDIMSamplerSelect"], model=small, steps=slots[name].max)
            assert (sigmas[:-1] > sigmas[1:]).all()


# --- saved and loaded ---


@pytest.fixture
def saved(nodes, base):
    """Inversion -> the name of its file in Load Inversion's list, once saved."""

    def save(inversion, prefix="cove/test") -> str:
        before = set(listed(nodes))
        call(nodes["SaveInversion"], inversion=inversion, filename_prefix=prefix)
        (new,) = set(listed(nodes)) - before
        return new

    yield save
    shutil.rmtree(base / "output" / "cove", ignore_errors=True)


def listed(nodes) -> list[str]:
    (slot,) = [slot for slot in nodes["LoadInversion"].define_schema().inputs if slot.id == "file"]
    return slot.options


@pytest.mark.parametrize("storage", ["recompute", "memory", "disk"])
def test_loaded_is_what_was_saved_and_edits_alike(small, nodes, saved, storage, lines):
    noise, inversion = invert(nodes, small, storage=storage, feature_steps=2, refinements=2, **ALL)
    file = saved(inversion)
    assert re.search(r"^saved as test_00001_.inversion.safetensors, \d+\.\d MiB$", lines()[-1])
    loaded_noise, loaded = call(nodes["LoadInversion"], file=file, model=small, latent=latents())
    assert same(loaded, inversion) and loaded is not inversion
    assert lines()[-1] == f"3 frames, 3 steps; {inversion.quality()}"
    assert torch.equal(loaded_noise["samples"], noise["samples"])
    edits = [sample(nodes, inject(nodes, small, one, **ALL), noise) for one in (inversion, loaded)]
    assert torch.equal(*edits)
    assert torch.equal(sample(nodes, inject(nodes, small, loaded, **ALL), loaded_noise), edits[0])


def test_each_save_is_a_new_file_and_the_newest_comes_first(small, nodes, saved, base):
    first, second = (invert(nodes, small, prompt(seed), steps=1)[1] for seed in (1, 2))
    files = [saved(first)]
    os.utime(base / "output" / files[0].removesuffix(" [output]"), (1, 1))
    files.append(saved(second))
    assert files == [f"cove/test_0000{n}_.inversion.safetensors [output]" for n in (1, 2)]
    assert [file for file in listed(nodes) if file in files] == files[::-1]
    for file, inversion in zip(files, (first, second), strict=True):
        assert same(call(nodes["LoadInversion"], file=file, model=small)[1], inversion)
    shutil.copyfile(base / "output" / files[0].removesuffix(" [output]"), base / "input" / "a.inversion.safetensors")
    assert "a.inversion.safetensors [input]" in listed(nodes)
    (base / "input" / "a.inversion.safetensors").unlink()


def test_the_prompt_runs_again_when_the_file_changes(small, nodes, saved, base):
    node, file = nodes["LoadInversion"], saved(invert(nodes, small, steps=1)[1])
    state = node.fingerprint_inputs(file=file, model=None)
    assert node.validate_inputs(file=file) is True and node.fingerprint_inputs(file=file) == state
    path = base / "output" / file.removesuffix(" [output]")
    invert(nodes, small, steps=2)[1].save(path)
    assert node.fingerprint_inputs(file=file) != state
    path.unlink()
    assert "there is no file" in node.validate_inputs(file=file) and file in node.validate_inputs(file=file)
    assert node.fingerprint_inputs(file=file) != state


def test_files_that_are_no_inversion(small, nodes, saved, base):
    file = saved(invert(nodes, small, steps=1)[1])
    path = base / "output" / file.removesuffix(" [output]")
    whole = path.read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with refused("Load Inversion", file.removesuffix(" [output]"), "damaged"):
            call(nodes["LoadInversion"], file=file, model=small)
    save_file({"x": torch.zeros(2)}, path, {"format": "another"})
    with refused("Load Inversion", "holds no COVE inversion"):
        call(nodes["LoadInversion"], file=file, model=small)


def test_where_it_cannot_be_saved(small, nodes, base, monkeypatch):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Save Inversion", '"../there"', "leaves the output folder"):
        call(nodes["SaveInversion"], inversion=inversion, filename_prefix="../there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=inversion.bytes - 1))
    with refused("Save Inversion", "GiB are free", "Make room"):
        call(nodes["SaveInversion"], inversion=inversion, filename_prefix="cove/full")
    assert not list((base / "output").rglob("*.inversion.safetensors"))


def test_a_record_that_does_not_fit_is_refused_with_the_reason(load, small, nodes, saved):
    noise, inversion = invert(nodes, small, steps=4)
    file = saved(inversion)

    def loading(model=small, latent=None):
        return call(nodes["LoadInversion"], file=file, model=model, latent=latent)

    for other in (tiny(seed=1), load("sd15"), load("sd21")):
        with refused("Load Inversion", "another checkpoint", "invert the clip again"):
            loading(other)
    for other in (latents(2), latents(FRAMES, WIDTH, HEIGHT)):
        sizes = (str([FRAMES, 4, HEIGHT, WIDTH]), str(list(other["samples"].shape)))
        with refused("Load Inversion", *sizes, "same frames"):
            loading(latent=other)
    changed = latents()
    changed["samples"][[0, 2]] = latents(seed=1)["samples"][[0, 2]]
    with refused("Load Inversion", "another clip", "frames [0, 2] differ"):
        loading(latent=changed)
    # Not every machine's autoencoder gives the same.
    rounded = {"samples": latents()["samples"].to(torch.bfloat16).float()}
    (loaded_noise, loaded) = loading(latent=rounded)
    # Another grid than sampling has
    wrong = ("inversion ended at sigma", "(4 steps)", "sampling starts at sigma", "(3 steps)")
    with refused("DDIM Sampler", *wrong), watched(small) as calls:
        sample(nodes, inject(nodes, small, loaded, **ALL), loaded_noise, steps=3)
    with refused("Feature Injection", "Inversion: 4 steps", "Sampling: 3 steps"), watched(small) as calls:
        sample(nodes, inject(nodes, small, loaded, **ALL), {"samples": noise["samples"]}, steps=3)
    assert not calls


def test_a_lora_and_a_half_precision_leave_it_the_same_checkpoint(small, nodes, saved):
    file = saved(invert(nodes, small, steps=1)[1])
    weights = small.model.diffusion_model.named_parameters()
    styled = small.clone()
    styled.add_patches({f"diffusion_model.{name}": ("diff", (0.01 * torch.ones_like(x),)) for name, x in weights})
    half = small.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    for model in (styled, half):
        noise, inversion = call(nodes["LoadInversion"], file=file, model=model)
        assert sample(nodes, inject(nodes, model, inversion, **ALL), noise, steps=1).isfinite().all()
        # ... and while it is loaded with them, too
        call(nodes["LoadInversion"], file=file, model=small)


# --- broken off and taken up again ---


@pytest.fixture
def break_off(comfy, monkeypatch):
    """Run something that is interrupted after this step."""
    import comfy.model_management as management
    import comfy.utils

    def broken(function, step):
        def stop(value, *rest, **more):
            if value == step:
                management.interrupt_current_processing()

        with monkeypatch.context() as patched:
            patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
            with pytest.raises(management.InterruptProcessingException):
                function()

    return broken


@pytest.mark.parametrize("storage", ["recompute", "memory", "disk"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_going_on_after_an_interrupt_gives_the_same_bits(
    small, nodes, guide, break_off, unfinished, lines, storage, step
):
    settings = {"steps": 5, "refinements": 1, "storage": storage, "feature_steps": 3} | ALL
    model = guide(small)
    with watched(small) as calls:
        noise, whole = invert(nodes, model, **settings)
    assert len(calls) == 10 and unfinished() == [] and not any("going on" in line for line in lines())
    state = state_of(model), state_of(small)
    with watched(small) as calls:
        break_off(lambda: invert(nodes, model, **settings), step)
    assert len(calls) == 2 * step and unfinished() == [list(range(step))]
    assert (state_of(model), state_of(small)) == state
    with watched(small) as calls:
        again, resumed = invert(nodes, model, **settings)
    # Features are kept of inversion steps 3 to 5, and went with the break.
    kept = 0 if storage == "recompute" else max(0, step - 2)
    assert len(calls) == 2 * (5 - step) + kept
    assert any(line.startswith(f"going on after step {step} of 5") for line in lines())
    assert torch.equal(again["samples"], noise["samples"]) and same(resumed, whole)
    assert unfinished() == [] and state_of(model) == state[0]


def test_breaking_off_twice_and_with_another_storage(small, nodes, break_off):
    whole = invert(nodes, small, steps=7, storage="memory", **ALL)[1]
    break_off(lambda: invert(nodes, small, steps=7), 2)
    with watched(small) as calls:
        break_off(lambda: invert(nodes, small, steps=7, storage="disk", **ALL), 5)
    # Two finished steps are asked again for their features.
    assert len(calls) == 5
    with watched(small) as calls:
        resumed = invert(nodes, small, steps=7, storage="memory", **ALL)[1]
    assert len(calls) == 2 + 5 and same(resumed, whole)


def test_an_interrupt_while_features_are_taken_again(comfy, small, nodes, break_off, unfinished):
    import comfy.model_management as management

    settings = {"steps": 5, "storage": "memory"} | ALL
    whole = invert(nodes, small, **settings)[1]
    break_off(lambda: invert(nodes, small, **settings), 4)
    model, asked = small.clone(), []

    def stop(apply_model, arguments):
        asked.append(1)
        management.interrupt_current_processing()
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(stop)
    state = state_of(small)
    with pytest.raises(management.InterruptProcessingException):
        invert(nodes, model, **settings)
    assert len(asked) == 1 and state_of(small) == state
    assert same(invert(nodes, small, **settings)[1], whole)


@pytest.mark.parametrize("what", ["frame", "prompt", "refinements", "steps", "guidance", "precision", "weights"])
def test_another_inversion_begins_anew(small, nodes, guide, break_off, lines, what):
    model = guide(small)
    broken = {"model": model, "conditioning": prompt(1), "latent": latents(), "steps": 4, "refinements": 1}
    other = dict(broken)
    if what == "frame":
        other["latent"] = {"samples": latents()["samples"].clone()}
        other["latent"]["samples"][2, 3, 4, 5] += 1e-3
    elif what == "prompt":
        other["conditioning"] = prompt(2)
    elif what == "refinements":
        other["refinements"] = 2
    elif what == "steps":
        other["steps"] = 5
    elif what == "guidance":
        other["model"] = guide(small, merge_ratio=0.25)
    elif what == "precision":
        other["model"] = model.clone()
        other["model"].set_model_compute_dtype(torch.bfloat16)
    else:
        broken["model"], other["model"] = small, tiny(seed=1)
    expected = invert(nodes, **other)[1]
    break_off(lambda: invert(nodes, **broken), 2)
    assert same(invert(nodes, **other)[1], expected)
    assert not any("going on" in line for line in lines())
    # The one broken off is not forgotten for it.
    invert(nodes, **broken)
    assert any("going on after step 2 of 4" in line for line in lines())


def test_an_error_keeps_the_steps_before_it(small, nodes, unfinished):
    whole = invert(nodes, small, steps=4)[1]
    outcome = {"broken": True}

    def third_fails(apply_model, arguments):
        asked.append(1)
        result = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        return result * torch.nan if len(asked) == 3 and outcome["broken"] else result

    model, asked = small.clone(), []
    model.set_model_unet_function_wrapper(third_fails)
    state = state_of(model)
    with refused("DDIM Inversion", "inversion step 3 of 4", error=FloatingPointError):
        invert(nodes, model, steps=4)
    assert unfinished() == [[0, 1]] and state_of(model) == state
    outcome["broken"], asked[:] = False, []
    assert same(invert(nodes, model, steps=4)[1], whole) and len(asked) == 2


def test_steps_where_refining_made_it_worse_are_taken_up_again(small, nodes, break_off):
    """There, the latents that a step ends with are the guess itself."""
    settings = {"steps": 3, "refinements": 10, "storage": "memory"}
    whole = invert(nodes, tiny("sd15"), **settings)[1]
    assert whole.grew.any() and whole.diverged
    first = int(whole.grew.nonzero()[0]) + 1
    break_off(lambda: invert(nodes, tiny("sd15"), **settings), first)
    assert same(invert(nodes, tiny("sd15"), **settings)[1], whole)


def test_without_room_for_its_steps_an_inversion_still_ends(small, nodes, base, caplog):
    whole = invert(nodes, small, steps=2)[1]
    shutil.rmtree(base / "user" / "cove")
    (base / "user" / "cove").write_text("in the way")
    try:
        assert same(invert(nodes, small, steps=2)[1], whole)
    finally:
        (base / "user" / "cove").unlink()
    assert "this step could not be kept" in caplog.text


def test_a_killed_server_goes_on_with_the_same_bits(host, base, models, tmp_path, monkeypatch):
    own = lay_out(tmp_path)
    (own / "models/checkpoints/sd15.ckpt").symlink_to(base / "models/checkpoints" / models["sd15"])
    empty = torch.tensor([])
    save_file({"latent_tensor": latents()["samples"], "latent_format_version_0": empty}, own / "input" / "clip.latent")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    wires = {
        "model": ("CheckpointLoaderSimple", {"ckpt_name": "sd15.ckpt"}),
        "text": ("CLIPTextEncode", {"clip": ["model", 1], "text": "a cat"}),
        "clip": ("LoadLatent", {"latent": "clip.latent"}),
        "features": ("CoveDiffusionFeatures", {"model": ["model", 0], "latent": ["clip", 0]}),
        "matches": ("CoveCorrespondence", {"features": ["features", 0], "window": 3}),
        "guided": ("CoveCorrespondenceAttention", {"model": ["model", 0], "correspondence": ["matches", 0]}),
        "inversion": (
            "CoveDDIMInversion",
            {"model": ["guided", 0], "conditioning": ["text", 0], "latent": ["clip", 0], "steps": 8}
            | {"sampling_steps": 8, "refinements": 0},
        ),
        "noise": ("SaveLatent", {"samples": ["inversion", 0], "filename_prefix": "noise"}),
        "record": ("CoveSaveInversion", {"inversion": ["inversion", 1], "filename_prefix": "cove/clip"}),
    }

    def asked(server, wires) -> dict:
        """The prompt with what each node takes by itself."""
        nodes = server.object_info()
        defaults = {
            node: {
                name: slot[1]["default"]
                for name, slot in nodes[node]["input"]["required"].items()
                if len(slot) > 1 and "default" in slot[1]
            }
            for node, _ in wires.values()
        }
        return {name: {"class_type": node, "inputs": defaults[node] | given} for name, (node, given) in wires.items()}

    def latent_of(server, outputs, node="noise"):
        return load_file(server.path_of(outputs[node]["latents"][0]))["latent_tensor"]

    with Server(host, own, "--cpu") as server:
        server.submit(asked(server, wires))
        end = time.monotonic() + 120
        while not list((own / "user" / "cove" / "unfinished").glob("*/0002.safetensors")):
            assert time.monotonic() < end, server.log_tail()
            time.sleep(0.01)
        server._process.kill()
        server._process.wait()
    (broken,) = (own / "user" / "cove" / "unfinished").iterdir()
    done = len(list(broken.glob("*.safetensors")))
    assert 3 <= done < 8 and not list((own / "output").rglob("*.*"))

    with Server(host, own, "--cpu") as server:
        resumed = latent_of(server, server.queue(asked(server, wires), 120))
        log = server.log.read_text(encoding="utf-8")
        assert f"DDIM Inversion: going on after step {done} of 8, where this inversion was broken off" in log
        assert "storage: " in log and not list((own / "user" / "cove" / "unfinished").iterdir())
        # Changed so that it runs again, and from the start, but is the same inversion.
        wires["inversion"][1]["feature_steps"] = 7
        assert torch.equal(latent_of(server, server.queue(asked(server, wires), 120)), resumed)
        assert server.log.read_text(encoding="utf-8").count("going on after step") == 1
        # A file that was not there when the server started can be loaded.
        load = {"file": "cove/clip_00002_.inversion.safetensors [output]", "model": ["model", 0], "latent": ["clip", 0]}
        kept = {name: wires[name] for name in ("model", "clip")} | {"loaded": ("CoveLoadInversion", load)}
        kept["noise"] = ("SaveLatent", {"samples": ["loaded", 0], "filename_prefix": "loaded"})
        assert torch.equal(latent_of(server, server.queue(asked(server, kept), 120)), resumed)
        load["file"] = "cove/clip_00007_.inversion.safetensors [output]"
        with pytest.raises(PromptFailed, match="there is no file"):
            server.submit(asked(server, kept))


def test_a_kill_while_saving_leaves_the_old_file(small, nodes, saved, base):
    _, inversion = invert(nodes, small, steps=1)
    file = saved(inversion)
    path = base / "output" / file.removesuffix(" [output]")
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from cove.inversion import Inversion; "
        "clip = torch.zeros(5, 4, 300, 700); numbers = torch.zeros(7); "
        "guesses = clip.expand(7, -1, -1, -1, -1).contiguous(); "
        "Inversion(clip, clip.clone(), torch.arange(8.), guesses, numbers, numbers > 0).save(sys.argv[2])"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(PACK), str(path)]) as process:
        end = time.monotonic() + 60
        while not list(path.parent.glob(".*.tmp")):
            assert process.poll() is None and time.monotonic() < end
        process.kill()
    (left,) = path.parent.glob(".*.tmp")
    assert file in listed(nodes) and not any(left.name in name for name in listed(nodes))
    assert same(call(nodes["LoadInversion"], file=file, model=small)[1], inversion)


# --- how well a clip comes back ---


@pytest.fixture(scope="module")
def vae(comfy, base, models):
    """The autoencoder of the random checkpoint: averages and enlarges."""
    import comfy.sd

    path = str(base / "models/checkpoints" / models["sd15"])
    return comfy.sd.load_checkpoint_guess_config(path, output_clip=False, output_model=False)[2]


def pictures(seed=0, frames=FRAMES):
    """Frames of squares of 8x8 pixels in random colours."""
    colours = torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(seed))
    return colours.repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.mark.parametrize(
    ("guided", "dtype", "least"), [(False, None, 45), (True, None, 45), (True, torch.bfloat16, 50)]
)
def test_fifty_steps_with_two_refinements_bring_the_clip_back(small, nodes, guide, vae, guided, dtype, least):
    source = pictures()
    latent = {"samples": vae.encode(source)}
    model = small.clone()
    if dtype is not None:
        model.set_model_compute_dtype(dtype)
    model = guide(model, latent) if guided else model
    noise, inversion = invert(nodes, model, latent=latent, steps=50, refinements=2)
    back = vae.decode(sample(nodes, model, noise, prompt(1), steps=50, cfg=1.0))
    clips = {"source": source, "vae_only": vae.decode(latent["samples"]), "reconstruction": back}
    _, report = call(nodes["ReconstructionCheck"], **clips, inversion=inversion)
    lowest = float(re.search(r"Lowest PSNR ([\d.]+) dB", report)[1])
    print(f"50 steps, 2 refinements, {dtype or 'float32'}, {'guided' if guided else 'plain'}: {lowest:.1f} dB")
    assert lowest >= least


def test_each_refinement_brings_it_nearer_and_advice_follows(small, nodes, vae):
    source = pictures()
    latent = {"samples": vae.encode(source)}
    lowest = []
    for refinements in (0, 1, 3):
        noise, inversion = invert(nodes, small, latent=latent, steps=5, refinements=refinements)
        back = vae.decode(sample(nodes, small, noise, prompt(1), steps=5, cfg=1.0))
        clips = {"source": source, "vae_only": vae.decode(latent["samples"]), "reconstruction": back}
        _, report = call(nodes["ReconstructionCheck"], **clips, inversion=inversion)
        lowest.append(float(re.search(r"Lowest PSNR ([\d.]+) dB", report)[1]))
        assert inversion.quality() in report
    assert lowest[0] + 3 < lowest[1] < lowest[2] - 3


# --- Reconstruction Check ---


def loss(clip, frame, size):
    """The clip with noise in one frame, `size` dB below full."""
    changed = clip.clone()
    changed[frame] += 10 ** (-size / 20)
    return changed


@pytest.mark.parametrize(
    ("decibels", "verdict", "advice"),
    [(40.0, "Good", None), (27.0, "Fair", "more refinements"), (13.0, "Poor", "more refinements")],
)
def test_the_worst_frame_decides(small, nodes, lines, decibels, verdict, advice):
    source = pictures()
    back = loss(loss(source, 1, decibels), 2, 60.0)
    sheet, report = call(nodes["ReconstructionCheck"], source=source, reconstruction=back)
    assert report.startswith(verdict) and f"Lowest PSNR {decibels:.1f} dB, frame 1." in report
    assert (advice or "Edit on this inversion") in report
    table = report.split("\n\n")[1].splitlines()
    assert table[0].split() == ["frame", "reconstruction", "PSNR", "SSIM"] and len(table) == 1 + FRAMES
    numbers = [line.split() for line in table[1:]]
    assert [row[0] for row in numbers] == ["0", "1", "2"]
    assert [row[1] for row in numbers] == ["inf", f"{decibels:.1f}", "60.0"] and numbers[0][2] == "1.0000"
    assert report in "\n".join(lines())
    assert torch.equal(sheet, torch.cat((source, back), 2))


def test_what_the_vae_loses_is_told_apart(small, nodes):
    source = pictures()
    vae_only = loss(source, 0, 20.0)
    back = loss(vae_only, 0, 35.0)
    sheet, report = call(nodes["ReconstructionCheck"], source=source, reconstruction=back, vae_only=vae_only)
    assert report.startswith("Good") and "The VAE alone loses much" in report and "Lowest PSNR 35.0 dB" in report
    head, first, *_ = report.split("\n\n")[1].splitlines()
    assert head.split() == ["frame", "reconstruction", "PSNR", "SSIM", "vae_only", "PSNR", "SSIM"]
    assert first.split()[3] == "20.0" and float(first.split()[1]) < 20
    assert torch.equal(sheet, torch.cat((source, vae_only, back), 2))
    alone = call(nodes["ReconstructionCheck"], source=source, reconstruction=back)[1]
    assert alone.startswith("Poor") and "The VAE" not in alone


def test_advice_knows_how_the_inversion_went(small, nodes):
    source = pictures()
    back = loss(source, 0, 20.0)
    _, one = invert(nodes, small, steps=2, refinements=1)
    _, two = invert(nodes, small, steps=2, refinements=2)
    worse = replace(one, grew=torch.tensor([False, True]), residuals=torch.tensor([0.1, 0.2], dtype=torch.float64))
    for inversion, advice in ((one, "more refinements"), (two, "more steps"), (worse, "more steps")):
        report = call(nodes["ReconstructionCheck"], source=source, reconstruction=back, inversion=inversion)[1]
        assert f"Set {advice} in DDIM Inversion" in report and inversion.quality() in report
    assert "refining diverged at 1 steps, from step 2" in worse.quality()


def test_pictures_of_other_sizes(nodes):
    source = pictures()
    for name in ("reconstruction", "vae_only"):
        for other in (pictures(frames=2), source[:, :16], source[:, :, :24]):
            spelled = f"{len(other)} frames of {other.shape[2]}x{other.shape[1]}"
            clips = {"source": source, "reconstruction": source} | {name: other}
            with refused("Reconstruction Check", "source is 3 frames of 56x40", f"{name} is {spelled}", "same frames"):
                call(nodes["ReconstructionCheck"], **clips)
    # Transparency is not compared.
    alpha = torch.cat((source, torch.rand(*source.shape[:3], 1)), 3)
    assert call(nodes["ReconstructionCheck"], source=alpha, reconstruction=source)[1].startswith("Good")


# --- correspondences ---


def test_a_correspondence_is_loaded_as_it_was_saved(small, nodes, base, lines):
    features, _ = call(nodes["DiffusionFeatures"], model=small, latent=latents())
    (found,) = call(nodes["Correspondence"], features=features, window=3)
    call(nodes["SaveCorrespondence"], correspondence=found, filename_prefix="cove/test")
    file = "cove/test_00001_.correspondence.safetensors [output]"
    assert lines()[-1].startswith("saved as test_00001_.correspondence.safetensors, ")
    node = nodes["LoadCorrespondence"]
    (slot,) = node.define_schema().inputs
    assert file in slot.options and node.validate_inputs(file=file) is True
    (loaded,) = call(node, file=file)
    assert torch.equal(loaded.forward, found.forward) and torch.equal(loaded.backward, found.backward)
    assert (loaded.height, loaded.width, loaded.window) == (HEIGHT, WIDTH, 3)
    state, path = node.fingerprint_inputs(file=file), base / "output" / file.removesuffix(" [output]")
    path.write_bytes(b"nothing")
    with refused("Load Correspondence", "test_00001_.correspondence.safetensors"):
        call(node, file=file)
    assert node.fingerprint_inputs(file=file) != state
    path.unlink()
    assert "there is no file" in node.validate_inputs(file=file)
    with refused("Save Correspondence", "leaves the output folder"):
        call(nodes["SaveCorrespondence"], correspondence=found, filename_prefix="../test")
