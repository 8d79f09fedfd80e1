"""The demo model that comes with the pack: stock nodes draw with it what the caption says, and clips come back."""

import json
import re

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from evidence.clip import Clip
from evidence.shapes.classifier import QUESTIONS, answers, load_classifier
from evidence.shapes.clips import demo_clip
from evidence.shapes.scenes import caption, random_scene
from evidence.tables.edits import BLOCKS
from scripts.host import PACK
from tests.helpers import call, latents, predict
from tests.method_helpers import generator
from tests.test_host import text_to_image

FILES = sorted((PACK / "demo").glob("*.safetensors"))


@pytest.fixture(scope="module")
def demo(comfy, nodes):
    """Name of an output of Load Demo Model -> it."""
    with torch.inference_mode():
        loaded = call(nodes["LoadDemoModel"], file="shapes.safetensors")
    return dict(zip(("model", "clip", "vae"), loaded, strict=True))


def words(demo, text):
    return demo["clip"].encode_from_tokens_scheduled(demo["clip"].tokenize(text))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_files_are_small_and_half_precision(path):
    assert path.stat().st_size <= 16 << 20
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["cove_demo"]).keys() >= {"heads", "latent_scale", "tokenizer", "text"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_weights_of_the_autoencoder_can_be_lent_layer_by_layer(demo):
    """ComfyUI does so where memory is short (--novram), and leaves behind layers that are not its own."""
    autoencoder = demo["vae"].first_stage_model
    with_weights = [layer for layer in autoencoder.modules() if next(layer.parameters(recurse=False), None) is not None]
    assert len(with_weights) > 9 and all(hasattr(layer, "comfy_cast_weights") for layer in with_weights)
    counted = getattr(demo["vae"], "model_size", demo["vae"].patcher.model_size)  # older hosts ask the patcher
    assert counted() == sum(weight.nbytes for weight in autoencoder.parameters())


def test_stock_nodes_draw_what_the_caption_says(server):
    """Thing and ground, their colours, by the classifier, which never saw a picture of the model."""
    scenes = [random_scene(generator(70 + number), most=1) for number in range(6)]
    pictures = []
    for number, scene in enumerate(scenes):
        prompt = text_to_image("", 128, 128)
        prompt["model"] = {"class_type": "CoveLoadDemoModel", "inputs": {"file": "shapes.safetensors"}}
        # The node for empty latents counts eight pixels a latent, this model has four.
        prompt["empty"]["inputs"] |= {"width": 256, "height": 256}
        prompt["sample"]["inputs"] |= {"seed": number, "steps": 20, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
        for name, text in (("positive", caption(scene)), ("negative", "")):
            prompt[name]["inputs"]["text"] = text
        (entry,) = server.queue(prompt, timeout=120)["image"]["images"]
        pictures.append(numpy.asarray(Image.open(server.path_of(entry))) / 255)
    pictures = torch.tensor(numpy.stack(pictures)).float().movedim(-1, 1)
    assert pictures.shape == (len(scenes), 3, 128, 128)
    right = torch.tensor([answers(scene) for scene in scenes])
    hits = torch.stack([score.argmax(1) for score in load_classifier()(pictures)], 1) == right
    found = dict(zip(QUESTIONS, hits.float().mean(0).tolist(), strict=True))
    assert found["colour"] >= 0.8 and found["ground"] >= 0.8, found


def test_evidence_is_of_what_auto_injects(host_module, demo):
    sites = host_module.sites_of(demo["model"], "auto", "auto", "test")
    assert sites == host_module.sites_of(demo["model"], **BLOCKS, node="test")
    assert [str(site) for site in sites if site.kind == "resnet"] == ["resnet.0.0", "resnet.1.0", "resnet.2.0"]


def read_safetensors(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


@pytest.fixture(params=["dynamic offloading", "rebuilt"])
def keep_precision(request, comfy):
    """Make Linear and Embedding keep the precision of the file they are loaded from.

    Newer hosts do so where weights are offloaded dynamically; rebuilt, it is tested on every host.
    """
    import comfy.ops

    def rebuilt(patched):
        def take_over(layer, weights, prefix, *rest):
            for name in ("weight", "bias"):
                if prefix + name in weights:
                    setattr(layer, name, torch.nn.Parameter(weights[prefix + name].clone(), requires_grad=False))

        for layer in (comfy.ops.disable_weight_init.Linear, comfy.ops.disable_weight_init.Embedding):
            patched.setattr(layer, "_load_from_state_dict", take_over)

    def switched_on(patched):
        patched.setattr(comfy.memory_management, "aimdo_enabled", True)
        # The host would read the file with a library that needs a GPU.
        patched.setattr(comfy.utils, "load_safetensors", read_safetensors, raising=False)

    if request.param == "rebuilt":
        return rebuilt
    if not hasattr(getattr(comfy, "memory_management", None), "aimdo_enabled"):
        pytest.skip("this ComfyUI has no dynamic offloading")
    return switched_on


@pytest.mark.parametrize("option", ["fp32_unet", "bf16_unet", "force_fp32"])
def test_load_demo_model_brings_weights_to_the_precision_asked_for(comfy, nodes, monkeypatch, keep_precision, option):
    """With options of ComfyUI's command line; the file is in half precision."""
    monkeypatch.setattr(comfy.cli_args.args, option, True)

    def load():
        model, clip, vae = call(nodes["LoadDemoModel"], file="shapes.safetensors")
        unet = model.model.diffusion_model
        assert {weight.dtype for weight in unet.parameters()} == {model.model.get_dtype()}
        text = words({"clip": clip}, "a striped red star on a cloudy blue ground")
        latent = latents(height=16, width=16)
        return predict(model, latent, text), vae.decode(latent["samples"])

    with torch.inference_mode():
        expected = load()
        with monkeypatch.context() as patched:
            keep_precision(patched)
            found = load()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("guided", [False, True])
def test_fifty_steps_with_two_refinements_bring_a_clip_back(nodes, demo, guided):
    clip = Clip(demo_clip().scenes[:3])
    source = clip.draw(128)
    with torch.inference_mode():
        latent = {"samples": demo["vae"].encode(source)}
        positive, model = words(demo, caption(clip.scenes[0])), demo["model"]
        if guided:
            features, _ = call(nodes["DiffusionFeatures"], model=model, latent=latent, conditioning=positive)
            (matches,) = call(nodes["Correspondence"], features=features)
            (model,) = call(nodes["CorrespondenceAttention"], model=model, correspondence=matches)
        steps = {"steps": 50, "sampling_steps": 50, "refinements": 2}
        noise, inversion = call(nodes["DDIMInversion"], model=model, conditioning=positive, latent=latent, **steps)
        wires = {"model": model, "positive": positive, "negative": positive, "noise": noise}
        (back,) = call(nodes["DDIMSampler"], **wires, steps=50, cfg=1.0)
        decoded = {
            "reconstruction": demo["vae"].decode(back["samples"]),
            "vae_only": demo["vae"].decode(latent["samples"]),
        }
        _, report = call(nodes["ReconstructionCheck"], source=source, **decoded, inversion=inversion)
    lowest = float(re.search(r"Lowest PSNR ([\d.]+) dB", report)[1])
    clean, again = latent["samples"], back["samples"]
    of_latents = 10 * ((clean.max() - clean.min()) ** 2 / (clean - again).square().mean((1, 2, 3)).max()).log10()
    print(f"demo model, {'guided' if guided else 'plain'}: frames {lowest:.1f} dB, latents {of_latents:.1f} dB")
    assert of_latents >= 45 and lowest >= 43
