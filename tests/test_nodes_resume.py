"""Inversions that are interrupted and resumed are bit-identical."""

import importlib
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.host import PromptFailed, Server, lay_out
from tests.helpers import latents, prompt, refused, state_of
from tests.inversion_helpers import guide, invert, same, store, tiny, watched


@pytest.fixture
def unfinished(base):
    """() -> step numbers kept for each unfinished inversion."""
    folder = base / "user" / "cove" / "unfinished"
    return lambda: sorted([int(step.stem) for step in sorted(one.iterdir())] for one in folder.glob("*/"))


@pytest.fixture
def break_off(comfy, monkeypatch):
    """function, step -> runs the function and interrupts it after this step."""
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


@pytest.mark.parametrize(("steps", "multiple"), [(5, 1), (3, 2)])  # 5 steps of inversion
@pytest.mark.parametrize("step", [1, 3, 5])
def test_ddim_inversion_resumed_after_an_interrupt_is_bit_identical(
    small, nodes, break_off, unfinished, lines, steps, multiple, step
):
    settings = {"steps": steps, "multiple": multiple, "refinements": 1}
    model = guide(nodes, small)
    with watched(small) as calls:
        noise, whole = invert(nodes, model, **settings)
    assert len(calls) == 10 and unfinished() == [] and not any("resuming" in line for line in lines())
    state = state_of(model), state_of(small)
    with watched(small) as calls:
        break_off(lambda: invert(nodes, model, **settings), step)
    assert len(calls) == 2 * step and unfinished() == [list(range(step))]
    assert (state_of(model), state_of(small)) == state
    with watched(small) as calls:
        again, resumed = invert(nodes, model, **settings)
    assert len(calls) == 2 * (5 - step)
    assert any(line.startswith(f"resuming after step {step} of 5") for line in lines())
    assert torch.equal(again["samples"], noise["samples"]) and same(resumed, whole)
    assert unfinished() == [] and state_of(model) == state[0]


def test_ddim_inversion_resumes_more_than_once(small, nodes, break_off):
    whole = invert(nodes, small, steps=7)[1]
    break_off(lambda: invert(nodes, small, steps=7), 2)
    with watched(small) as calls:
        break_off(lambda: invert(nodes, small, steps=7), 5)
    assert len(calls) == 3
    with watched(small) as calls:
        resumed = invert(nodes, small, steps=7)[1]
    assert len(calls) == 2 and same(resumed, whole)


def test_ddim_inversion_does_not_resume_steps_of_another_format(
    small, nodes, break_off, lines, host_module, monkeypatch
):
    with monkeypatch.context() as older:
        older.setattr(host_module.identity, "INVERSION_FORMAT", "cove.inversion.1")
        break_off(lambda: invert(nodes, small, steps=4), 2)
    with watched(small) as calls:
        invert(nodes, small, steps=4)
    assert len(calls) == 4 and not any("resuming" in line for line in lines())


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_store_features_after_an_interrupt_is_bit_identical(small, nodes, break_off, unfinished, base, storage):
    model = guide(nodes, small)
    _, inversion = invert(nodes, model, steps=5)
    whole = store(nodes, model, inversion, storage=storage)
    state = state_of(model), state_of(small)
    with watched(small) as calls:
        break_off(lambda: store(nodes, model, inversion, storage=storage), 2)
    assert len(calls) == 2 and not inversion.features and unfinished() == []
    assert (state_of(model), state_of(small)) == state
    assert not list((base / "temp").glob("*.safetensors"))
    with watched(small) as calls:
        assert same(store(nodes, model, inversion, storage=storage), whole)
    assert len(calls) == 5


@pytest.mark.parametrize(
    "what", ["frame", "prompt", "refinements", "steps", "multiple", "guidance", "precision", "weights"]
)
def test_ddim_inversion_does_not_resume_another_inversion(small, nodes, break_off, lines, what):
    model = guide(nodes, small)
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
    elif what == "multiple":
        other["multiple"] = 2
    elif what == "guidance":
        other["model"] = guide(nodes, small, merge_ratio=0.25)
    elif what == "precision":
        other["model"] = model.clone()
        other["model"].set_model_compute_dtype(torch.bfloat16)
    else:
        broken["model"], other["model"] = small, tiny(seed=1)
    expected = invert(nodes, **other)[1]
    break_off(lambda: invert(nodes, **broken), 2)
    assert same(invert(nodes, **other)[1], expected)
    assert not any("resuming" in line for line in lines())
    # The steps of the interrupted inversion are still kept.
    invert(nodes, **broken)
    assert any("resuming after step 2 of 4" in line for line in lines())


def test_ddim_inversion_keeps_the_steps_before_an_error(small, nodes, unfinished, monkeypatch):
    whole = invert(nodes, small, steps=4)[1]
    apply_model, asked = type(small.model).apply_model, []

    def third_fails(self, *args, **arguments):
        asked.append(1)
        return apply_model(self, *args, **arguments) * (torch.nan if len(asked) == 3 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(type(small.model), "apply_model", third_fails)
        with refused("DDIM Inversion", "inversion step 3 of 4"):
            invert(nodes, small, steps=4)
    assert unfinished() == [[0, 1]]
    with watched(small) as calls:
        assert same(invert(nodes, small, steps=4)[1], whole)
    assert len(calls) == 2


def test_ddim_inversion_resumes_after_a_step_where_refining_stopped(small, nodes, break_off):
    """The latents of such a step are the first guess."""
    settings = {"steps": 3, "refinements": 10}
    whole = invert(nodes, tiny("sd15"), **settings)[1]
    assert whole.stopped.any() and whole.diverged
    first = int(whole.stopped.nonzero()[0]) + 1
    break_off(lambda: invert(nodes, tiny("sd15"), **settings), first)
    assert same(invert(nodes, tiny("sd15"), **settings)[1], whole)


def test_ddim_inversion_completes_without_space_for_unfinished_steps(small, nodes, base, caplog):
    whole = invert(nodes, small, steps=2)[1]
    shutil.rmtree(base / "user" / "cove")
    (base / "user" / "cove").write_text("in the way")
    try:
        assert same(invert(nodes, small, steps=2)[1], whole)
    finally:
        (base / "user" / "cove").unlink()
    assert "this step could not be kept" in caplog.text


def limit(nodes, monkeypatch, size):
    """Set the size limit of all unfinished inversions, in bytes."""
    module = importlib.import_module(f"{nodes['DDIMInversion'].__module__.partition('.')[0]}.nodes.host.unfinished")
    monkeypatch.setattr(module.UnfinishedInversion, "LIMIT", size)


def test_ddim_inversion_reports_unfinished_sizes_and_removes_the_oldest(
    small, nodes, break_off, unfinished, base, lines, monkeypatch
):
    clip = latents(29, 11, 13)
    one = 5 * (4 * clip["samples"].numel() + 1024)  # bytes of five steps
    limit(nodes, monkeypatch, 9 * one // 5)

    def used():
        return sum(path.stat().st_size for path in (base / "user" / "cove").rglob("*.safetensors"))

    def mib(size):
        return f"{size / 2**20:.1f} MiB"

    for seed, others in ((1, 0), (2, 1), (3, 1)):
        break_off(lambda seed=seed: invert(nodes, small, prompt(seed), clip, steps=5), 3)
        assert unfinished() == [[0, 1, 2]] * (others + 1) and used() <= 9 * one // 5
        size = one + used() * others / (others + 1)
        assert lines()[-1] == f"unfinished inversions use up to {mib(size)} of {mib(9 * one / 5)} in user/cove"
    # The first was removed, the second resumes, and the node finally reports the remaining size.
    invert(nodes, small, prompt(2), clip, steps=5)
    assert [line for line in lines() if line.startswith("resuming after step 3 of 5, ") and line.endswith("user/cove")]
    left = f"unfinished inversions use {mib(used())} of {mib(9 * one / 5)} in user/cove"
    assert used() and lines()[-1].endswith(left) and unfinished() == [[0, 1, 2]]
    invert(nodes, small, prompt(1), clip, steps=5)
    assert len([line for line in lines() if line.startswith("resuming")]) == 1


def test_ddim_inversion_over_the_limit_keeps_no_steps(small, nodes, break_off, unfinished, lines, monkeypatch):
    whole = invert(nodes, small, steps=5)[1]
    break_off(lambda: invert(nodes, small, prompt(2), steps=2), 1)
    one = 5 * (4 * latents()["samples"].numel() + 1024)
    limit(nodes, monkeypatch, one - 1)
    break_off(lambda: invert(nodes, small, steps=5), 3)
    assert unfinished() == [[0]]  # the other inversion is kept
    (line,) = [line for line in lines() if line.startswith("steps are not kept for resuming: ")]
    assert f"{one / 2**20:.1f} MiB and " in line and line.endswith(f"exceed {one / 2**20:.1f} MiB in user/cove")
    with watched(small) as calls:
        assert same(invert(nodes, small, steps=5)[1], whole)
    assert len(calls) == 5


def test_ddim_inversion_resumes_after_the_server_was_killed(host, base, models, tmp_path, monkeypatch):
    own = lay_out(tmp_path)
    (own / "models/checkpoints/sd15.ckpt").symlink_to(base / "models/checkpoints" / models["sd15"])
    empty = torch.tensor([])
    for name in ("clip.latent", "again.latent"):
        save_file({"latent_tensor": latents()["samples"], "latent_format_version_0": empty}, own / "input" / name)
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
            {"model": ["guided", 0], "conditioning": ["text", 0], "latent": ["clip", 0], "steps": 8, "refinements": 0},
        ),
        "noise": ("SaveLatent", {"samples": ["inversion", 0], "filename_prefix": "noise"}),
        "record": ("CoveSaveInversion", {"inversion": ["inversion", 1], "filename_prefix": "cove/clip"}),
    }

    def asked(server, wires) -> dict:
        """Return the prompt with the defaults of its nodes."""
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
        assert f"DDIM Inversion: resuming after step {done} of 8, where this inversion was interrupted; " in log
        assert "unfinished inversions use up to " in log
        assert not list((own / "user" / "cove" / "unfinished").iterdir())
        # The same clip from another file: the same inversion runs again, from the start.
        wires["clip"][1]["latent"] = "again.latent"
        assert torch.equal(latent_of(server, server.queue(asked(server, wires), 120)), resumed)
        assert server.log.read_text(encoding="utf-8").count("resuming after step") == 1
        # A file that was saved after the server started can be loaded.
        load = {"file": "cove/clip_00002_.inversion.safetensors [output]", "model": ["model", 0], "latent": ["clip", 0]}
        kept = {name: wires[name] for name in ("model", "clip")} | {"loaded": ("CoveLoadInversion", load)}
        kept["noise"] = ("SaveLatent", {"samples": ["loaded", 0], "filename_prefix": "loaded"})
        assert torch.equal(latent_of(server, server.queue(asked(server, kept), 120)), resumed)
        load["file"] = "cove/clip_00007_.inversion.safetensors [output]"
        with pytest.raises(PromptFailed, match="there is no file"):
            server.submit(asked(server, kept))
