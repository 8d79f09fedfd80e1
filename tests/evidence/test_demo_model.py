"""Quality of the demo model: samples match captions, clips are reconstructed, tables use the blocks of `auto`."""

import re

import numpy
import pytest
import torch
from PIL import Image

from evidence.clip import Clip
from evidence.shapes.classifier import QUESTIONS, answers, load_classifier
from evidence.shapes.clips import demo_clip
from evidence.shapes.scenes import caption, random_scene
from evidence.tables import matches, patterns
from evidence.tables.edits import BLOCKS
from tests.helpers import call
from tests.method_helpers import generator
from tests.test_host import text_to_image


@pytest.fixture(scope="module")
def demo(comfy, nodes):
    """The outputs of Load Demo Model by name."""
    with torch.inference_mode():
        loaded = call(nodes["LoadDemoModel"], file="shapes.safetensors")
    return dict(zip(("model", "clip", "vae"), loaded, strict=True))


def test_demo_model_draws_the_caption_in_stock_nodes(server):
    """Check the colours of shape and ground with the classifier, which was trained on drawn pictures only."""
    scenes = [random_scene(generator(70 + number), most=1) for number in range(6)]
    pictures = []
    for number, scene in enumerate(scenes):
        prompt = text_to_image("", 128, 128)
        prompt["model"] = {"class_type": "CoveLoadDemoModel", "inputs": {"file": "shapes.safetensors"}}
        # The node for empty latents assumes eight pixels per latent; this model has four.
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


def test_blocks_of_the_tables_match_auto(host_module, demo):
    sites = host_module.injection.sites_of(demo["model"], "auto", "auto")
    assert sites == host_module.injection.sites_of(demo["model"], **BLOCKS)
    assert [str(site) for site in sites if site.kind == "resnet"] == ["resnet.0.0", "resnet.1.0", "resnet.2.0"]


def test_probe_finds_the_features_of_diffusion_features(nodes, demo, monkeypatch):
    monkeypatch.setattr(matches, "TIMESTEPS", (21, 261))
    monkeypatch.setattr(matches, "DRAWS", 2)
    clip = demo_clip()
    images = clip.draw(64)[:3]
    with torch.inference_mode():
        states = matches.Probe(*demo.values(), nodes).states(images, caption(clip.scenes[0]), seed=7)
        latent = {"samples": demo["vae"].encode(images)}
        prompt = encoded(demo["clip"], caption(clip.scenes[0]))
        settings = {"conditioning": prompt, "preset": "paper", "seed": 7}
        features, _ = call(nodes["DiffusionFeatures"], model=demo["model"], latent=latent, **settings)
    expected = torch.nn.functional.normalize(states[261, "1 draw"][1], dim=-1)
    assert torch.nn.functional.cosine_similarity(features.tokens, expected, dim=-1).min() > 0.999
    draws = {f"{count}{shared} draw{'s' * (count > 1)}" for count in (1, 2) for shared in ("", " shared")}
    assert {noise for _, noise in states} == {*draws, "no noise", "inverted"}
    assert not torch.allclose(states[21, "inverted"][1], states[21, "no noise"][1], rtol=0.01)


def encoded(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.mark.parametrize("guided", [False, True])
def test_demo_model_reconstructs_a_clip_with_fifty_steps_and_two_refinements(nodes, demo, guided):
    clip = Clip(demo_clip().scenes[:3])
    source = clip.draw(128)
    with torch.inference_mode():
        latent = {"samples": demo["vae"].encode(source)}
        positive, model = encoded(demo["clip"], caption(clip.scenes[0])), demo["model"]
        if guided:
            features, _ = call(nodes["DiffusionFeatures"], model=model, latent=latent, conditioning=positive)
            (matches,) = call(nodes["Correspondence"], features=features)
            (model,) = call(nodes["CorrespondenceAttention"], model=model, correspondence=matches)
        steps = {"steps": 50, "refinements": 2}
        noise, inversion = call(nodes["DDIMInversion"], model=model, conditioning=positive, latent=latent, **steps)
        wires = {"model": model, "positive": positive, "negative": positive, "noise": noise}
        (back,) = call(nodes["DDIMSampler"], **wires, cfg=1.0)
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


ROUTES = {
    "noise": patterns.Method(),
    "paper": patterns.PAPER,
    **{
        kind: patterns.replace(patterns.GUIDED, matches=kind)
        for kind in (patterns.FLOW, patterns.OTHER, patterns.STILL)
    },
    "reference": patterns.replace(patterns.SHARP, draws=2, alternative="reference frame, redrawn"),
    "injected": patterns.replace(patterns.GUIDED, inversion=True, injection=0.5),
    "TokenFlow": patterns.replace(patterns.INVERTED, tokenflow=True),
    "RAVE": patterns.Method(grids=True),
}


def test_patterns_editor_runs_every_route(nodes, demo, monkeypatch):
    """Two steps of two frames each; every route gives other frames."""
    generator_of_edits = generator(4)
    edits = [patterns.random_edit(generator_of_edits, kind, "move", 2, 32, 32) for kind in patterns.KINDS[:2]]
    editor = patterns.Editor(demo["model"], demo["clip"], demo["vae"], nodes, steps=2)
    task = patterns.Task(editor, *edits, seed=1)
    with torch.inference_mode():
        made = {name: editor.run(method, task) for name, method in ROUTES.items()}
        again = editor.run(ROUTES["reference"], task)
    for frames in made.values():
        assert frames.shape == (2, patterns.SIDE, patterns.SIDE, 3) and frames.isfinite().all()
    assert torch.equal(made["reference"], again)
    names = list(made)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(made[one], made[other]), (one, other)
