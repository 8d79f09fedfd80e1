"""Test infrastructure: a real server starts, and stock nodes accept the random models."""

import os
import zlib

import av
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scripts.clip import render_clip
from scripts.host import PACK, PromptFailed, Server, find_host, link_pack
from tests.random_models import FAMILIES, write_checkpoint


def text_to_image(checkpoint: str, width: int = 64, height: int = 40) -> dict:
    sample = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    sample |= {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["empty", 0],
    }
    return {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"text": "a boat on a lake", "clip": ["model", 1]}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["model", 1]}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": width, "height": height, "batch_size": 1}},
        "sample": {"class_type": "KSampler", "inputs": sample},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["model", 2]}},
        "image": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "host"}},
        "latent": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "host"}},
    }


def latent_of(server, outputs: dict) -> torch.Tensor:
    return load_file(server.path_of(outputs["latent"]["latents"][0]))["latent_tensor"]


def test_server_lists_stock_nodes_and_random_checkpoints(server, models):
    loader = server.object_info()["CheckpointLoaderSimple"]
    assert set(models.values()) <= set(loader["input"]["required"]["ckpt_name"][0])


@pytest.fixture(scope="module")
def drawn(server, models):
    """Kind of checkpoint -> outputs of a text-to-image prompt with it."""
    return {kind: server.queue(text_to_image(models[kind]), timeout=120) for kind in FAMILIES}


@pytest.mark.parametrize("kind", FAMILIES)
def test_write_checkpoint_is_usable_in_stock_nodes(server, drawn, kind):
    latent = latent_of(server, drawn[kind])
    assert latent.shape == (1, 4, 5, 8) and latent.isfinite().all()
    image = numpy.asarray(Image.open(server.path_of(drawn[kind]["image"]["images"][0])))
    assert image.shape == (40, 64, 3) and image.std() > 3


def test_write_checkpoint_families_are_recognised(server, drawn):
    log = server.log.read_text(encoding="utf-8")
    assert log.count("model_type EPS") >= 3 and log.count("model_type V_PREDICTION") >= 1
    assert "clip missing" not in log and "unet missing" not in log and "missing controlnet" not in log


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_controlnet_of_random_weights_changes_the_result(server, models, controlnets, kind):
    hint = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=numpy.uint8))
    hint.save(server.base / "input" / "hint.png")

    def latent(strength: float | None) -> torch.Tensor:
        prompt = text_to_image(models[kind])
        if strength is not None:
            prompt["control"] = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": controlnets[kind]}}
            prompt["hint"] = {"class_type": "LoadImage", "inputs": {"image": "hint.png"}}
            apply = {"positive": ["positive", 0], "negative": ["negative", 0], "control_net": ["control", 0]}
            apply |= {"image": ["hint", 0], "strength": strength, "start_percent": 0.0, "end_percent": 1.0}
            prompt["apply"] = {"class_type": "ControlNetApplyAdvanced", "inputs": apply}
            prompt["sample"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
        return latent_of(server, server.queue(prompt, timeout=120))

    without, controlled, zero = latent(None), latent(1.0), latent(0.0)
    assert controlled.isfinite().all() and (controlled - without).abs().mean() > 0.01
    assert torch.equal(zero, without)


def test_write_checkpoint_autoencoder_reconstructs_a_smooth_picture(server, models, tmp_path):
    rows, columns = numpy.mgrid[0:1:80j, 0:1:112j]
    picture = numpy.stack([0.5 + 0.4 * numpy.sin(5 * columns + rows), 0.2 + 0.6 * rows, 0.9 - 0.7 * columns], -1)
    Image.fromarray((picture * 255).round().astype(numpy.uint8)).save(server.base / "input" / "smooth.png")
    outputs = server.queue(
        {
            "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": models["sd15"]}},
            "load": {"class_type": "LoadImage", "inputs": {"image": "smooth.png"}},
            "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": ["model", 2]}},
            "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["encode", 0], "vae": ["model", 2]}},
            "image": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "smooth"}},
        },
        timeout=60,
    )
    back = numpy.asarray(Image.open(server.path_of(outputs["image"]["images"][0]))) / 255
    error = ((back - picture) ** 2).mean(-1)
    assert -10 * numpy.log10(error.mean()) > 30  # a reconstruction, not noise
    assert -10 * numpy.log10(error[:8].mean()) > 26 and -10 * numpy.log10(error[:, -8:].mean()) > 26  # and its border


def test_server_queue_names_the_node_of_a_refused_prompt(server, models):
    prompt = text_to_image(models["sd15"])
    prompt["sample"]["inputs"]["steps"] = "many"
    with pytest.raises(PromptFailed, match=r"sample \(KSampler\).*steps") as failure:
        server.queue(prompt, timeout=60)
    assert (failure.value.node_id, failure.value.node_type) == ("sample", "KSampler")

    with pytest.raises(PromptFailed, match="NoSuchNode") as failure:
        server.queue({"7": {"class_type": "NoSuchNode", "inputs": {}}}, timeout=60)
    assert (failure.value.node_id, failure.value.node_type) == ("7", "NoSuchNode")

    with pytest.raises(PromptFailed, match="no outputs"):
        server.queue({}, timeout=60)


def test_server_queue_names_a_failing_node_and_survives(server):
    (server.base / "models/checkpoints/broken.ckpt").write_bytes(b"this is no checkpoint")
    with pytest.raises(PromptFailed) as failure:
        server.queue(text_to_image("broken.ckpt"), timeout=60)
    assert (failure.value.node_id, failure.value.node_type) == ("model", "CheckpointLoaderSimple")
    assert server.object_info()


def test_server_queue_interrupts_a_prompt_at_the_timeout(server, models):
    prompt = text_to_image(models["sd15"])
    prompt["sample"]["inputs"] |= {"steps": 2000, "seed": 2}
    with pytest.raises(TimeoutError):
        server.queue(prompt, timeout=3)
    prompt["sample"]["inputs"]["steps"] = 1
    assert server.queue(prompt, timeout=60)


def test_server_shows_the_log_if_it_fails_to_start(host, tmp_path):
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-option"):
        Server(host, tmp_path, "--cpu", "--no-such-option").__enter__()


def test_link_pack_is_idempotent_and_never_overwrites(tmp_path):
    link = link_pack(tmp_path)
    assert link.resolve() == PACK and link_pack(tmp_path) == link
    other = tmp_path / "other"
    (other / "custom_nodes" / link.name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="not this checkout"):
        link_pack(other)


def test_find_host_refuses_a_wrong_comfyui_path(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="COMFYUI_PATH"):
        find_host()


def test_write_checkpoint_is_small_and_deterministic(tmp_path):
    sums = []
    for seed in (3, 3, 4):
        path = write_checkpoint(tmp_path / f"{len(sums)}.ckpt", "sdxl", seed)
        assert path.stat().st_size < 8 * 2**20
        weight = torch.load(path, weights_only=True)["state_dict"]["model.diffusion_model.out.2.weight"]
        sums.append(zlib.crc32(weight.numpy().tobytes()))
    assert sums[0] == sums[1] != sums[2]
    assert sorted(os.listdir(tmp_path)) == ["0.ckpt", "1.ckpt", "2.ckpt"]
    with pytest.raises(ValueError, match="sd15, sd21, sd21v, sdxl"):
        write_checkpoint(tmp_path / "x.ckpt", "sd3")


def test_render_clip_moves_smoothly(tmp_path):
    path = render_clip(tmp_path / "clip.mp4", frames=5, width=96, height=64, fps=12)
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (64, 96, 3) and rate == 12
    steps = [abs(after - before).mean() for before, after in zip(frames, frames[1:], strict=False)]
    assert 1 < min(steps) and max(steps) < 2 * min(steps) and frames[0].std() > 20
