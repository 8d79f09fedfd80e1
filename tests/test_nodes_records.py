"""Saving and loading of inversions and correspondences: bit-identical, or refused with the reason."""

import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from scripts.host import PACK
from tests.helpers import FRAMES, HEIGHT, WIDTH, call, latents, prompt, refused, run_stock
from tests.inversion_helpers import (
    ALL,
    inject,
    invert,
    same,
    sample,
    store_unless_recomputed,
    tiny,
    watched,
)

# --- inversions ---


@pytest.fixture
def saved(nodes, base):
    """Inversion -> its file name in Load Inversion's list after saving."""

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
def test_load_inversion_returns_the_saved_inversion_and_equal_edits(small, nodes, saved, storage, lines):
    noise, inversion = invert(nodes, small, refinements=2)
    inversion = store_unless_recomputed(nodes, small, inversion, storage, share=0.7)  # 2 of 3 steps
    assert sorted(inversion.features) == ([] if storage == "recompute" else [1, 2])
    blocks = ALL if storage == "recompute" else {}  # the stored ones
    file = saved(inversion)
    assert re.search(r"^saved as test_00001_.inversion.safetensors, \d+\.\d MiB$", lines()[-1])
    loaded_noise, loaded = call(nodes["LoadInversion"], file=file, model=small, latent=latents())
    assert same(loaded, inversion) and loaded is not inversion
    assert lines()[-1] == f"3 frames, 3 steps; {inversion.quality()}"
    assert torch.equal(loaded_noise["samples"], noise["samples"])
    edits, passes = [], []
    for one, start in ((inversion, noise), (loaded, noise), (loaded, loaded_noise)):
        with watched(small) as calls:
            edits.append(sample(nodes, inject(nodes, small, one, **blocks), start))
        passes.append(len(calls))
    assert torch.equal(edits[1], edits[0]) and torch.equal(edits[2], edits[0])
    assert passes == [6 if storage == "recompute" else 4] * 3  # the source runs if features are not stored


def test_save_inversion_writes_a_new_file_that_is_listed_first(small, nodes, saved, base):
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


def test_load_inversion_fingerprint_changes_with_the_file(small, nodes, saved, base):
    node, file = nodes["LoadInversion"], saved(invert(nodes, small, steps=1)[1])
    state = node.fingerprint_inputs(file=file, model=None)
    assert node.validate_inputs(file=file) is True and node.fingerprint_inputs(file=file) == state
    path = base / "output" / file.removesuffix(" [output]")
    invert(nodes, small, steps=2)[1].save(path)
    assert node.fingerprint_inputs(file=file) != state
    path.unlink()
    assert "there is no file" in node.validate_inputs(file=file) and file in node.validate_inputs(file=file)
    assert node.fingerprint_inputs(file=file) != state


def test_load_inversion_refuses_damaged_and_other_files(small, nodes, saved, base):
    file = saved(invert(nodes, small, steps=1)[1])
    path = base / "output" / file.removesuffix(" [output]")
    whole = path.read_bytes()
    for content in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with refused("Load Inversion", file.removesuffix(" [output]"), "damaged"):
            call(nodes["LoadInversion"], file=file, model=small)
    for other in ("another", "cove.inversion.1"):
        save_file({"x": torch.zeros(2)}, path, {"format": other})
        with refused("Load Inversion", "holds no COVE inversion (expected format cove.inversion.2)"):
            call(nodes["LoadInversion"], file=file, model=small)


def test_save_inversion_refuses_paths_outside_and_a_full_disk(small, nodes, base, monkeypatch):
    _, inversion = invert(nodes, small, steps=1)
    with refused("Save Inversion", "'../there'", "inside ComfyUI's output folder"):
        call(nodes["SaveInversion"], inversion=inversion, filename_prefix="../there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=inversion.bytes - 1))
    with refused("Save Inversion", "are free", "Make room"):
        call(nodes["SaveInversion"], inversion=inversion, filename_prefix="cove/full")
    assert not list((base / "output").rglob("*.inversion.safetensors"))


def test_load_inversion_refuses_another_checkpoint_or_clip(comfy, load, small, nodes, saved):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    _, inversion = invert(nodes, small, steps=4)
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
    # Autoencoders round differently on other machines.
    rounded = {"samples": latents()["samples"].to(torch.bfloat16).float()}
    (loaded_noise, loaded) = loading(latent=rounded)
    # Other schedules than in sampling.
    rescaled = run_stock(ModelSamplingDiscrete, small, "eps", True)[0]
    with refused("DDIM Sampler", "inversion ended at sigma"), watched(small) as calls:
        sample(nodes, inject(nodes, rescaled, loaded, **ALL), loaded_noise)
    assert not calls
    noise, _ = invert(nodes, small, steps=3)
    with refused("Feature Injection", "inversion (4 steps", "got 3 steps"), watched(small) as calls:
        sample(nodes, inject(nodes, small, loaded, **ALL), noise)
    assert not calls


def test_load_inversion_accepts_a_lora_and_half_precision(small, nodes, saved):
    file = saved(invert(nodes, small, steps=1)[1])
    weights = small.model.diffusion_model.named_parameters()
    styled = small.clone()
    styled.add_patches({f"diffusion_model.{name}": ("diff", (0.01 * torch.ones_like(x),)) for name, x in weights})
    half = small.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    for model in (styled, half):
        noise, inversion = call(nodes["LoadInversion"], file=file, model=model)
        assert sample(nodes, inject(nodes, model, inversion, **ALL), noise).isfinite().all()
        # Also while the weights are loaded with them.
        call(nodes["LoadInversion"], file=file, model=small)


def test_save_inversion_keeps_the_old_file_if_killed(small, nodes, saved, base):
    _, inversion = invert(nodes, small, steps=1)
    file = saved(inversion)
    path = base / "output" / file.removesuffix(" [output]")
    # The second half of the file is never written, the worst time for a kill.
    program = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[1]); from cove import files, inversion; "
        "files.save_file = lambda tensors, path, metadata: (path.write_bytes(b'half'), time.sleep(60)); "
        "inversion.Inversion.load(sys.argv[2]).save(sys.argv[2])"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(PACK), str(path)]) as process:
        end = time.monotonic() + 60
        while not list(path.parent.glob(".*.tmp")):
            assert process.poll() is None and time.monotonic() < end
        process.kill()
    (left,) = path.parent.glob(".*.tmp")
    assert file in listed(nodes) and not any(left.name in name for name in listed(nodes))
    assert same(call(nodes["LoadInversion"], file=file, model=small)[1], inversion)


# --- correspondences ---


def test_load_correspondence_returns_the_saved_correspondence(small, nodes, base, lines):
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
    with refused("Save Correspondence", "inside ComfyUI's output folder"):
        call(nodes["SaveCorrespondence"], correspondence=found, filename_prefix="../test")
