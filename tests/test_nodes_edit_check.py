"""Edit Check: its report on clips of known flicker, with a small CLIP of random weights, and its errors."""

import importlib.util
import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import call, refused
from tests.method_helpers import randn

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")
FRAMES, HEIGHT, WIDTH = 11, 31, 43


def filled(module):
    """Return the module with random weights; ComfyUI leaves them uninitialised."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module


@pytest.fixture(scope="module")
def clip_vision(comfy, tmp_path_factory):
    """Width -> a small CLIP Vision model with image embeddings of this width."""
    from comfy.clip_vision import ClipVisionModel

    @cache
    def build(width):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
        sizes |= {"hidden_act": "gelu", "image_size": 28, "patch_size": 7, "num_channels": 3, "projection_dim": width}
        path = tmp_path_factory.mktemp("clip") / "config.json"
        path.write_text(json.dumps(sizes | {"model_type": "clip_vision_model"}))
        vision = ClipVisionModel(path)
        filled(vision.model)
        return vision

    return build


@pytest.fixture(scope="module")
def text(comfy, base, models):
    """Kind of a random checkpoint -> its CLIP, from the stock loader."""
    import comfy.sd

    @cache
    def load(kind):
        path = str(base / "models/checkpoints" / models[kind])
        return comfy.sd.load_checkpoint_guess_config(path, output_model=False, output_vae=False)[1]

    return load


@pytest.fixture(scope="module")
def moving():
    """A smooth random texture that moves two pixels per frame."""
    texture = F.interpolate(randn(1, 3, 13, 17), size=(HEIGHT, WIDTH + 2 * FRAMES), mode="bicubic")[0].movedim(0, -1)
    texture = (0.5 + 0.1 * texture).clamp(0.1, 0.9)
    return torch.stack([texture[:, 2 * frame : 2 * frame + WIDTH] for frame in range(FRAMES)])


def numbers(report: str) -> dict[str, list[str]]:
    """Return the columns of the report's table by name."""
    names, *lines = report.split("\n\n")[1].splitlines()
    heads = ["frame", *(name for name in COLUMNS if name in names)]
    rows = [line.split() for line in lines]
    assert all(len(row) == len(heads) for row in rows)
    return {head: [row[column] for row in rows] for column, head in enumerate(heads)}


COLUMNS = ("PSNR", "SSIM", "warping error", "of the source", "CLIP, next frame", "CLIP, prompt")


def test_edit_check_distinguishes_flicker_from_a_steady_edit(nodes, moving, lines):
    steady, flickering = 0.9 * moving, moving + 0.1 * (torch.arange(FRAMES) % 2)[:, None, None, None]
    plot, report = call(nodes["EditCheck"], source=moving, edited=steady)
    assert report.startswith("Motion taken out, frames differ 0.81 times as much as the source's own do.")
    assert report in "\n".join(lines())
    _, worse = call(nodes["EditCheck"], source=moving, edited=flickering)
    found = numbers(worse)
    assert list(found) == ["frame", *COLUMNS[:4]]
    assert found["frame"] == [*map(str, range(FRAMES)), "mean"]
    assert abs(float(found["warping error"][0]) - 0.01) < 0.001 and found["warping error"][-2] == "-"
    assert found["PSNR"][:2] == ["inf", "20.0"] and found["SSIM"][0] == "1.0000"
    assert plot.shape[0] == 1 and plot.shape[3] == 3 and plot.std() > 0.05


@pytest.mark.parametrize(("kind", "width"), [("sd21", 1024), ("sdxl", 1280)])
def test_edit_check_compares_clip_embeddings_of_neighbours_and_prompt(nodes, moving, clip_vision, text, kind, width):
    edited = moving.clone()
    edited[1] = edited[0]
    wires = {"clip_vision": clip_vision(width), "clip": text(kind), "prompt": "a red boat"}
    with torch.inference_mode():
        _, report = call(nodes["EditCheck"], source=moving, edited=edited, **wires)
        alone = [clip_vision(width).encode_image(frame[None])["image_embeds"] for frame in edited]
        _, pooled = text(kind).encode_from_tokens(text(kind).tokenize("a red boat"), return_pooled=True)
        other = call(nodes["EditCheck"], source=moving, edited=edited, **wires | {"prompt": "a blue boat"})[1]
    alone = F.normalize(torch.cat(alone), dim=-1)
    found = numbers(report)
    assert list(found) == ["frame", *COLUMNS]
    following = [float(one @ other) for one, other in zip(alone[:-1], alone[1:], strict=True)]
    with_prompt = (alone @ F.normalize(pooled[0].float(), dim=0)).tolist()
    assert found["CLIP, next frame"][0] == "1.0000" and found["CLIP, next frame"][-2] == "-"
    for name, expected in (("CLIP, next frame", following), ("CLIP, prompt", with_prompt)):
        assert [float(cell) for cell in found[name][: len(expected)]] == pytest.approx(expected, abs=2e-4)
    assert len(set(found["CLIP, next frame"][1:-2])) > 3
    assert numbers(other)["CLIP, prompt"] != found["CLIP, prompt"]


def test_edit_check_progress_counts_pairs_and_frames(nodes, moving, clip_vision, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, done: seen.append((done, bar.total)))
    with torch.inference_mode():
        call(nodes["EditCheck"], source=moving, edited=moving, clip_vision=clip_vision(16))
    total = FRAMES - 1 + FRAMES
    assert seen == [(done, total) for done in (8, FRAMES, *range(FRAMES + 1, total + 1))]


def test_edit_check_refuses_mismatched_inputs(nodes, moving, clip_vision, text):
    check = {"source": moving, "edited": moving}
    with refused("Edit Check", f"source is {FRAMES} frames of {WIDTH}x{HEIGHT}", "edited is 2 frames", "same frames"):
        call(nodes["EditCheck"], **check | {"edited": moving[:2]})
    words = {"clip": text("sd21"), "prompt": "a boat"}
    with refused("Edit Check", "without `clip_vision`", "Connect both"):
        call(nodes["EditCheck"], **check, **words)
    with refused("Edit Check", "without `prompt`", "Connect both"):
        call(nodes["EditCheck"], **check, clip_vision=clip_vision(1024), clip=text("sd21"), prompt=" ")
    with refused("Edit Check", "got SD1ClipModel", "of an SD2.x checkpoint", "leave `clip` open"):
        call(nodes["EditCheck"], **check, clip_vision=clip_vision(768), clip=text("sd15"), prompt="a boat")
    with torch.inference_mode(), refused("Edit Check", "24 numbers a frame", "1024 for the prompt", "different CLIPs"):
        call(nodes["EditCheck"], **check, clip_vision=clip_vision(24), **words)


def test_edit_check_names_missing_libraries_first(nodes, moving, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("Edit Check", "pip install opencv-python-headless matplotlib"):
        call(nodes["EditCheck"], source=moving, edited=moving)
