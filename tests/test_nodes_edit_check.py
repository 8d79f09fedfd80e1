"""Edit Check: what it says of clips whose steadiness is known, with a small CLIP of random weights, and its errors."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import call, refused
from tests.method_helpers import randn

pytest.importorskip("cv2")
pytest.importorskip("matplotlib")
FRAMES, HEIGHT, WIDTH, WIDE = 11, 31, 43, 24


def filled(module):
    """The same module with random weights: ComfyUI's come with whatever lay in memory."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module


@pytest.fixture(scope="module")
def clip_vision(comfy, tmp_path_factory):
    from comfy.clip_vision import ClipVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    sizes |= {"hidden_act": "gelu", "image_size": 28, "patch_size": 7, "num_channels": 3, "projection_dim": WIDE}
    sizes |= {"model_type": "clip_vision_model"}
    path = tmp_path_factory.mktemp("clip") / "config.json"
    path.write_text(json.dumps(sizes))
    vision = ClipVisionModel(path)
    filled(vision.model)
    return vision


@pytest.fixture(scope="module")
def text(comfy):
    """(width, projected) -> a CLIP as Load CLIP gives it, or without the projection, as SD1.5's checkpoints have it."""
    import comfy.sd
    import comfy.sd1_clip
    from comfy.supported_models_base import ClipTarget

    def build(width=WIDE, projected=True):
        sizes = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        sizes |= {"hidden_act": "quick_gelu", "eos_token_id": 49407, "max_position_embeddings": 77}
        encoder = partial(
            comfy.sd1_clip.SDClipModel, textmodel_json_config=sizes, layer="last", return_projected_pooled=projected
        )
        model = partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder)
        tokens = partial(comfy.sd1_clip.SDTokenizer, embedding_size=width)
        clip = comfy.sd.CLIP(ClipTarget(partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokens), model))
        filled(clip.cond_stage_model)
        return clip

    return build


@pytest.fixture(scope="module")
def moving():
    """A smooth random texture that moves by two pixels a frame."""
    texture = F.interpolate(randn(1, 3, 13, 17), size=(HEIGHT, WIDTH + 2 * FRAMES), mode="bicubic")[0].movedim(0, -1)
    texture = (0.5 + 0.1 * texture).clamp(0.1, 0.9)
    return torch.stack([texture[:, 2 * frame : 2 * frame + WIDTH] for frame in range(FRAMES)])


def numbers(report: str) -> dict[str, list[str]]:
    """Columns of the table by name."""
    names, *lines = report.split("\n\n")[1].splitlines()
    heads = ["frame", *(name for name in COLUMNS if name in names)]
    rows = [line.split() for line in lines]
    assert all(len(row) == len(heads) for row in rows)
    return {head: [row[column] for row in rows] for column, head in enumerate(heads)}


COLUMNS = ("PSNR", "SSIM", "warping error", "of the source", "CLIP, next frame", "CLIP, prompt")


def test_flicker_is_told_from_an_edit_that_is_steady(nodes, moving, lines):
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


def test_clip_compares_each_frame_with_the_next_and_with_the_prompt(nodes, moving, clip_vision, text):
    edited = moving.clone()
    edited[1] = edited[0]
    wires = {"clip_vision": clip_vision, "clip": text(), "prompt": "a red boat"}
    _, report = call(nodes["EditCheck"], source=moving, edited=edited, **wires)
    found = numbers(report)
    assert list(found) == ["frame", *COLUMNS]
    alone = F.normalize(torch.cat([clip_vision.encode_image(frame[None])["image_embeds"] for frame in edited]), dim=-1)
    _, pooled = wires["clip"].encode_from_tokens(wires["clip"].tokenize("a red boat"), return_pooled=True)
    following = [float(one @ other) for one, other in zip(alone[:-1], alone[1:], strict=True)]
    with_prompt = (alone @ F.normalize(pooled[0], dim=0)).tolist()
    assert found["CLIP, next frame"][0] == "1.0000" and found["CLIP, next frame"][-2] == "-"
    for name, expected in (("CLIP, next frame", following), ("CLIP, prompt", with_prompt)):
        assert [float(cell) for cell in found[name][: len(expected)]] == pytest.approx(expected, abs=2e-4)
    assert len(set(found["CLIP, next frame"][1:-2])) > 3
    other = call(nodes["EditCheck"], source=moving, edited=edited, **wires | {"prompt": "a blue boat"})[1]
    assert numbers(other)["CLIP, prompt"] != found["CLIP, prompt"]


def test_bar_counts_pairs_and_frames(nodes, moving, clip_vision, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, done: seen.append((done, bar.total)))
    call(nodes["EditCheck"], source=moving, edited=moving, clip_vision=clip_vision)
    total = FRAMES - 1 + FRAMES
    assert seen == [(done, total) for done in (*range(1, FRAMES), FRAMES - 1 + 8, total)]


def test_what_does_not_go_together_is_refused(nodes, moving, clip_vision, text):
    check = {"source": moving, "edited": moving}
    with refused("Edit Check", f"source is {FRAMES} frames of {WIDTH}x{HEIGHT}", "edited is 2 frames", "same frames"):
        call(nodes["EditCheck"], **check | {"edited": moving[:2]})
    with refused("Edit Check", "without a `clip_vision`", "Connect both"):
        call(nodes["EditCheck"], **check, clip=text())
    with refused("Edit Check", "without it", "Load CLIP", "clip_l.safetensors"):
        call(nodes["EditCheck"], **check, clip_vision=clip_vision, clip=text(projected=False))
    with refused("Edit Check", f"{WIDE} numbers a frame", "16 for the prompt", "different CLIPs"):
        call(nodes["EditCheck"], **check, clip_vision=clip_vision, clip=text(width=16))


def test_the_checkpoints_own_text_encoder_is_refused(comfy, base, models, nodes, moving, clip_vision):
    import comfy.sd

    path = str(base / "models/checkpoints" / models["sd15"])
    clip = comfy.sd.load_checkpoint_guess_config(path, output_model=False, output_vae=False)[1]
    with refused("Edit Check", "got SD1ClipModel without it"):
        call(nodes["EditCheck"], source=moving, edited=moving, clip_vision=clip_vision, clip=clip)
