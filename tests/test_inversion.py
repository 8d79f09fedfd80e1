"""Inversions: atomic saving, loading, validation, step lookup and quality; tensors on disk."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cove import files
from cove.correspondence import Correspondence
from cove.files import on_disk
from cove.inversion import INVERSION_FORMAT, Inversion
from cove.schedule import Schedule
from tests.method_helpers import PEAK, ROOT, assert_same, fresh, full_disk, randn

STEPS, FRAMES, CHANNELS, HEIGHT, WIDTH = 11, 3, 2, 5, 7
SCHEDULE = Schedule(STEPS, 2)
INVERSION_STEPS = 21
LATENTS = (FRAMES, CHANNELS, HEIGHT, WIDTH)
TENSORS = ["clip", "latents", "sigmas", "residuals", "stopped"]
ABOUT = {"model": "a1b2", "refinements": 2, "prompt": {"width": 512, "ratio": 0.1, "name": "Fuß"}, "none": None}


def make(**changed):
    tensors = {
        "clip": randn(*LATENTS, seed=1),
        "sigmas": torch.cat((torch.zeros(1), torch.logspace(-2, 1, STEPS))),
        "latents": randn(STEPS, *LATENTS, seed=3),
        "residuals": torch.linspace(1e-5, 1e-4, INVERSION_STEPS, dtype=torch.float64),
        "stopped": torch.zeros(INVERSION_STEPS, dtype=torch.bool),
    }
    return Inversion(**({"schedule": SCHEDULE} | tensors | changed))


@pytest.fixture
def full():
    """An inversion with every optional field."""
    features = {
        step: {
            "resnet.3.0": randn(FRAMES, 13, 17, 19, seed=step, dtype=torch.float16),
            "attention.4.1": randn(FRAMES, 23, 29, seed=step + 1),
        }
        for step in (10, 2, 0)
    }
    conditioning = {"cond": randn(1, 31, 37, seed=4), "pooled.output": randn(1, 41, seed=5, dtype=torch.bfloat16)}
    return make(
        residuals=torch.tensor([math.nan, *range(1, INVERSION_STEPS)], dtype=torch.float64),
        stopped=torch.arange(INVERSION_STEPS) % 3 == 0,
        conditioning=conditioning,
        about=ABOUT,
        features=features,
    )


def assert_same_inversion(found, expected):
    for name in TENSORS:
        assert_same(getattr(found, name), getattr(expected, name))
    assert found.schedule == expected.schedule
    assert_same(found.conditioning, expected.conditioning)
    assert_same(found.features, expected.features)
    assert found.about == expected.about


# --- save and load ---


@pytest.mark.parametrize("kind", [str, Path])
def test_inversion_load_returns_the_saved_inversion(full, tmp_path, kind):
    path = kind(tmp_path / "a.safetensors")
    full.save(path)
    assert_same_inversion(Inversion.load(path), full)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_inversion_load_returns_a_minimal_inversion(tmp_path):
    make().save(tmp_path / "a.safetensors")
    found = Inversion.load(tmp_path / "a.safetensors")
    assert_same_inversion(found, make())
    assert (found.frames, found.conditioning, found.about, found.features) == (FRAMES, {}, {}, {})


def test_inversion_save_accepts_any_strides(tmp_path):
    latents = make().latents
    strided = latents.transpose(0, 4).contiguous().transpose(0, 4)
    assert not strided.is_contiguous()
    make(latents=strided).save(tmp_path / "a.safetensors")
    assert_same(Inversion.load(tmp_path / "a.safetensors").latents, latents)


def test_inversion_save_overwrites_the_file_it_was_loaded_from(full, tmp_path):
    path = tmp_path / "a.safetensors"
    full.save(path)
    loaded = Inversion.load(path)
    loaded.save(path)
    assert_same_inversion(loaded, full)  # tensors from the old file remain readable
    assert_same_inversion(Inversion.load(path), full)


def test_inversion_load_does_not_write_changes_to_the_file(full, tmp_path):
    path = tmp_path / "a.safetensors"
    full.save(path)
    loaded = Inversion.load(path)
    loaded.clip.zero_()
    loaded.features[2]["resnet.3.0"].zero_()
    assert_same_inversion(Inversion.load(path), full)


@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
def test_inversion_load_keeps_features_in_the_file(tmp_path):
    """Of 128 MiB of features, loading reads only the header and the system's read-ahead."""
    path = tmp_path / "a.safetensors"
    make(features={0: {"resnet.3.0": torch.ones(32, 1 << 20)}}).save(path)
    used = fresh(
        PEAK
        + f"""
from cove.inversion import Inversion
before = peak()
found = Inversion.load({str(path)!r})
assert found.features[0]["resnet.3.0"].shape == (32, 1 << 20)
print(peak() - before)
"""
    )
    print(f"{used / 2**20:.1f} MiB")
    assert used < 16 << 20


def test_inversion_bytes_match_the_file_without_its_header(full, tmp_path):
    for content in (full, make()):
        content.save(tmp_path / "a.safetensors")
        data = (tmp_path / "a.safetensors").read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        assert content.bytes == len(data) - header
        assert header < 4096


def test_inversion_save_keeps_the_old_file_after_a_failure(full, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    full.save(path)
    old = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(old[: len(old) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    for target in (path, tmp_path / "b.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            make().save(target)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.safetensors"]


def killed_while_saving(path):
    """Kill an interpreter that saves 88 MiB to `path` once the folder changes; return whether it had not finished."""
    before = os.listdir(path.parent)
    code = f"""
import torch
from cove.inversion import Inversion
from cove.schedule import Schedule
z = torch.ones(11, 1 << 18, 2, 2)
zero = torch.zeros(1)
made = Inversion(Schedule(1), z, torch.stack([z]), torch.arange(2.), zero.double(), zero.bool())
print("ready", flush=True)
made.save({str(path)!r})
print("done", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while os.listdir(path.parent) == before and process.poll() is None and time.monotonic() < deadline:
            pass
        process.kill()
        return "done" not in process.stdout.read()


def test_inversion_save_keeps_the_old_file_if_killed(full, tmp_path):
    path = tmp_path / "a.safetensors"
    for _ in range(3):  # on a busy machine saving may finish before the kill
        full.save(path)
        old = path.read_bytes()
        if killed := killed_while_saving(path):
            break
    assert killed
    assert path.read_bytes() == old
    assert_same_inversion(Inversion.load(path), full)
    assert [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")] == ["a.safetensors"]


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", *map(slice, (8, 100, 5000, -10))])
def test_inversion_load_refuses_a_damaged_file(full, tmp_path, content):
    path = tmp_path / "a.safetensors"
    full.save(path)
    path.write_bytes(path.read_bytes()[content] if isinstance(content, slice) else content)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged, or no safetensors file"):
        Inversion.load(path)


GOOD = {"format": INVERSION_FORMAT, "about": "{}", "schedule": json.dumps({"steps": STEPS, "multiple": 2})}


def write(path, tensors, metadata):
    save_file({name: getattr(make(), name) for name in TENSORS} | tensors, path, metadata)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "holds no COVE inversion .expected format"),
        ({"about": "{}"}, "holds no COVE inversion .expected format"),
        ({**GOOD, "format": "cove.inversion.1"}, "holds no COVE inversion .expected format"),
        ({"format": INVERSION_FORMAT}, "is damaged"),
        ({**GOOD, "about": "{"}, "is damaged"),
        ({**GOOD, "schedule": "{}"}, "do not belong to one inversion"),
        ({**GOOD, "schedule": '{"steps": 0}'}, "is damaged"),
        ({**GOOD, "schedule": '{"count": 3}'}, "is damaged"),
    ],
)
def test_inversion_load_refuses_wrong_metadata(tmp_path, metadata, message):
    write(tmp_path / "a.safetensors", {}, metadata)
    with pytest.raises(ValueError, match=rf"a\.safetensors.*{message}"):
        Inversion.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "tensors",
    [
        {"clip": randn(*LATENTS[:-1], WIDTH + 1)},
        {f"features.{STEPS}.resnet.3.0": randn(3)},
        {"features.third.resnet.3.0": randn(3)},
        {"features": randn(3)},
    ],
)
def test_inversion_load_refuses_wrong_tensors_and_names_the_file(tmp_path, tensors):
    write(tmp_path / "a.safetensors", tensors, GOOD)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        Inversion.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", TENSORS)
def test_inversion_load_refuses_a_file_without_a_tensor(tmp_path, name):
    path = tmp_path / "a.safetensors"
    make().save(path)
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path, GOOD)
    with pytest.raises(ValueError, match=rf"a\.safetensors is damaged.*{name}"):
        Inversion.load(path)


def test_inversion_load_refuses_a_correspondence(tmp_path):
    links = torch.zeros(2, 35, 3, dtype=torch.int32)
    Correspondence(links, links.clone(), 5, 7, 5).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no COVE inversion"):
        Inversion.load(tmp_path / "a.safetensors")


def test_inversion_load_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        Inversion.load(tmp_path / "missing.safetensors")


# --- validation, steps and quality ---


@pytest.mark.parametrize(
    "changed",
    [
        {"schedule": Schedule(STEPS)},
        {"schedule": Schedule(STEPS + 1, 2)},
        {"clip": randn(FRAMES + 1, *LATENTS[1:])},
        {"sigmas": torch.arange(STEPS)},
        {"latents": randn(STEPS + 1, *LATENTS)},
        {"latents": randn(STEPS, *LATENTS[1:])},
        {"residuals": torch.zeros(INVERSION_STEPS - 1)},
        {"residuals": torch.zeros(STEPS), "stopped": torch.zeros(STEPS, dtype=torch.bool)},
        {"stopped": torch.zeros(INVERSION_STEPS + 1, dtype=torch.bool)},
        {"features": {0: {}, STEPS: {}}},
        {"features": {-1: {}}},
    ],
)
def test_inversion_refuses_mismatched_tensors(changed):
    with pytest.raises(ValueError, match="do not belong to one inversion") as caught:
        make(**changed)
    for thing in changed.values():
        shown = thing.shape if isinstance(thing, torch.Tensor) else thing
        assert str(shown if isinstance(shown, Schedule) else list(shown)) in str(caught.value)


def test_inversion_refuses_mismatched_replaced_fields():
    with pytest.raises(ValueError, match="do not belong to one inversion"):
        replace(make(), sigmas=torch.arange(3.0))


def test_step_at_tolerates_rounding_of_sigma():
    """Sigmas of one schedule differ by rounding, at most 1e-6 relative; steps differ by much more than 1e-4."""
    found = make()
    for step, sigma in enumerate(found.sigmas[1:].tolist()):
        for rounding in (1, 1 - 1e-6, 1 + 1e-6, 1 - 9e-5, 1 + 9e-5):
            assert found.step_at(sigma * rounding) == step
        for other in (1 - 2e-4, 1 + 2e-4, 0.5, 1.5):
            assert found.step_at(sigma * other) is None
    assert found.step_at(0.0) is None  # no step ends at sigma 0


@pytest.mark.parametrize("multiple", [1, 2, 5])
def test_of_steps_keeps_latents_of_the_sampling_grid(multiple):
    schedule = Schedule(3, multiple)
    count = len(schedule.inversion)
    every = randn(count, *LATENTS)
    sigmas = torch.arange(count + 1.0)
    numbers = {"residuals": torch.zeros(count), "stopped": torch.zeros(count, dtype=torch.bool)}
    found = Inversion.of_steps(schedule, randn(*LATENTS), list(every), sigmas, **numbers)
    assert torch.equal(found.latents, every[[0, multiple, 2 * multiple]])
    assert found.sigmas.tolist() == [0, 1, 1 + multiple, 1 + 2 * multiple]
    assert torch.equal(found.noise, every[-1])


def test_diverged_lists_stopped_steps_with_a_large_residual():
    stopped = torch.zeros(INVERSION_STEPS, dtype=torch.bool)
    stopped[[2, 5, 7]] = True
    residuals = torch.full((INVERSION_STEPS,), 0.5, dtype=torch.float64)
    residuals[5] = 1e-4
    assert make(residuals=residuals, stopped=stopped).diverged == [2, 7]
    assert make(residuals=residuals).diverged == []
    assert make(residuals=residuals * math.nan).diverged == []


def test_quality_describes_the_worst_step_in_one_line():
    residuals = torch.full((INVERSION_STEPS,), 1e-5, dtype=torch.float64)
    residuals[4] = 0.025
    steps = torch.arange(INVERSION_STEPS)
    worst = "largest residual 2.5e-02, at step 5 of 21"
    assert make(residuals=residuals).quality() == worst
    assert make(residuals=residuals, stopped=(steps == 4) | (steps == 2)).quality() == (
        f"{worst}; refining diverged in 1 steps, first in step 5, and was undone there"
    )
    residuals[2] = 0.02
    stopped = (steps == 4) | (steps == 2)
    assert "diverged in 2 steps, first in step 3," in make(residuals=residuals, stopped=stopped).quality()


# --- tensors on disk ---


@pytest.mark.parametrize("kind", [str, Path])
def test_on_disk_returns_equal_tensors(tmp_path, kind):
    tensors = {
        "resnet.3.0": randn(FRAMES, 13, 17, 19, dtype=torch.float16),
        "attention.4.1": randn(29, 23, FRAMES).permute(2, 1, 0),
        "nan": torch.tensor(math.nan),
    }
    found = on_disk(tensors, kind(tmp_path))
    assert_same(found, tensors)
    found["resnet.3.0"].zero_()
    assert tensors["resnet.3.0"].any()


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file keeps its name on Windows")
def test_on_disk_leaves_no_file_name(tmp_path):
    found = on_disk({"a": randn(3, 5)}, tmp_path)
    assert os.listdir(tmp_path) == []
    assert_same(found["a"], randn(3, 5))


def test_on_disk_leaves_no_file_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        on_disk({"a": randn(3, 5)}, tmp_path)
    assert os.listdir(tmp_path) == []
