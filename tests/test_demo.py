"""The bundled demo model: its file and its loading. For its quality see tests/evidence/test_demo_model.py."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from scripts.host import PACK
from tests.helpers import call, latents, predict

FILES = sorted((PACK / "demo").glob("*.safetensors"))


@pytest.fixture(scope="module")
def demo(comfy, nodes):
    """The outputs of Load Demo Model by name."""
    with torch.inference_mode():
        loaded = call(nodes["LoadDemoModel"], file="shapes.safetensors")
    return dict(zip(("model", "clip", "vae"), loaded, strict=True))


def words(demo, text):
    return demo["clip"].encode_from_tokens_scheduled(demo["clip"].tokenize(text))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_demo_files_are_small_and_half_precision(path):
    assert path.stat().st_size <= 16 << 20
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["cove_demo"]).keys() >= {"heads", "latent_scale", "tokenizer", "text"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_load_demo_model_autoencoder_weights_can_be_cast_per_layer(demo):
    """ComfyUI does so when memory is short (--novram), and skips layers that are not its own."""
    autoencoder = demo["vae"].first_stage_model
    with_weights = [layer for layer in autoencoder.modules() if next(layer.parameters(recurse=False), None) is not None]
    assert len(with_weights) > 9 and all(hasattr(layer, "comfy_cast_weights") for layer in with_weights)
    counted = getattr(demo["vae"], "model_size", demo["vae"].patcher.model_size)  # older hosts ask the patcher
    assert counted() == sum(weight.nbytes for weight in autoencoder.parameters())


def read_safetensors(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


@pytest.fixture(params=["dynamic offloading", "rebuilt"])
def keep_precision(request, comfy):
    """Make Linear and Embedding keep the precision of the file they are loaded from.

    Newer hosts do so when weights are offloaded dynamically; "rebuilt" imitates it on every host.
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
def test_load_demo_model_casts_weights_to_the_requested_precision(comfy, nodes, monkeypatch, keep_precision, option):
    """The file is in half precision; ComfyUI's command line options request the precision."""
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
