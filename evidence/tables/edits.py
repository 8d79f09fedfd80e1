"""Measure edits of clips with known motion by COVE and other methods, on the same model, seeds and clips.

    python -m evidence.tables.edits [--clips 4] [--seeds 0 1 2] [--frames 6] [--steps 20]

Each clip gets one edit of its colour or texture. Measures: share of frames in which a classifier sees the edit, and
sees what should stay; PSNR to the target, which the world can draw; drift of colours along true tracks; warping error
along the true flow; seconds for the whole edit. The drawn target, decoded from its own latents, is the upper bound.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Generator, Tensor

from cove.correspondence import find_correspondence
from cove.flow import correspondence_of, dis_flow
from cove.metrics import colour_drift, psnr, warping_error
from scripts.in_process import call

from ..chance import held_out
from ..clip import Clip
from ..drawing import COLOURS, TEXTURES, pixels
from ..shapes.classifier import QUESTIONS, answers, load_classifier
from ..shapes.clips import MOTIONS, random_clip
from ..shapes.scenes import caption
from .demo import digest_of, load_demo
from .matches import WINDOW, true_matches
from .records import FOLDER, Records, add_part

SIDE, FRAMES, STEPS, CFG, REFINEMENTS = 128, 6, 20, 3.0, 1
BLOCKS = {"resnet_blocks": "0-2", "attention_blocks": "1-4"}  # what `auto` selects on the demo model
SOURCE, TARGET = "source", "target"  # encoded and decoded


@dataclass(frozen=True)
class Method:
    """Settings of the nodes for one method of editing."""

    k: int | None = None  # None: without Correspondence Attention
    matches: str = "features"  # or "flow", "truth", or "chance"
    level: int = 0
    timestep: int = 261
    refine: bool = False
    merge_ratio: float = 0.5
    include_self: bool = False
    all_frames: bool = True
    guided_inversion: bool = True
    injection: bool = True
    tokenflow: bool = False


COVE = Method(k=3)  # the paper's matching and attention, but features of level 0
BETTER = replace(COVE, level=1, refine=True)  # better matches
ALONG = replace(BETTER, k=1, merge_ratio=0.0, include_self=True)  # each token attends to its own track: FLATTEN
METHODS = {
    "each frame alone": Method(all_frames=False),
    "spatial-temporal attention": Method(),
    "COVE, K = 1": replace(COVE, k=1),
    "COVE, K = 3": COVE,
    "COVE, K = 5": replace(COVE, k=5),
    "COVE, nothing merged": replace(COVE, merge_ratio=0.0),
    "COVE, token itself among them": replace(COVE, include_self=True),
    "COVE, guided in sampling only": replace(COVE, guided_inversion=False),
    "COVE, own frame only": replace(COVE, all_frames=False),
    "COVE, matches by chance": replace(COVE, matches="chance"),
    "COVE, level 1, refined": BETTER,
    "along tracks: level 1, refined": ALONG,
    "along tracks: DIS flow": replace(ALONG, matches="flow"),
    "along tracks: true motion": replace(ALONG, matches="truth"),
    "TokenFlow": Method(all_frames=False, tokenflow=True),
    "COVE, no injection": replace(COVE, injection=False),
    "spatial-temporal attention, no injection": Method(injection=False),
}


def case_of(name: str, frames: int, steps: int) -> dict:
    """Return all settings of a measurement, as the key of its records."""
    settings = asdict(METHODS[name]) if name in METHODS else {}
    case = {"method": name, "settings": settings, "frames": frames, "steps": steps, "cfg": CFG}
    return case | BLOCKS | {"refinements": REFINEMENTS, "model": digest_of()}


class Editor:
    def __init__(self, model, clip, vae, nodes, frames: int, steps: int):
        self.model, self.text, self.vae, self.nodes = model, clip, vae, nodes
        self.frames, self.steps = frames, steps

    def node(self, name: str, **inputs) -> tuple:
        """Return a node's outputs; missing inputs get their defaults."""
        return call(self.nodes[name], **inputs)

    def prompt(self, words: str):
        return self.text.encode_from_tokens_scheduled(self.text.tokenize(words))

    def guided(self, method: Method, clip: Clip, latent: dict, source, seed: int):
        """Return the patched MODEL of the method."""
        if method.k is None:
            return self.attention(method) if method.all_frames else self.model
        grid = tuple(latent["samples"].shape[-2:])
        if method.matches == "flow":
            matches = correspondence_of(*dis_flow(clip.draw(SIDE)), *grid)
        elif method.matches == "truth":
            matches = true_matches(clip, grid[0])
        elif method.matches == "chance":
            noise = torch.randn((self.frames, *grid, 8), generator=Generator().manual_seed(seed))
            matches = find_correspondence(noise, WINDOW, method.k)
        else:
            wires = {"model": self.model, "latent": latent, "conditioning": source}
            features = {"level": method.level, "timestep": method.timestep, "ensemble": 1, "seed": seed}
            found, _ = self.node("DiffusionFeatures", **wires, **features)
            (matches,) = self.node(
                "Correspondence", features=found, k=method.k, refine="on" if method.refine else "off"
            )
        return self.attention(method, correspondence=matches)

    def edit(self, method: Method, clip: Clip, source: str, target: str, seed: int) -> Tensor:
        """Return the edited clip, [frames, height, width, 3]."""
        latent = {"samples": self.vae.encode(clip.draw(SIDE))}
        source, target, nothing = map(self.prompt, (source, target, ""))
        guided = self.guided(method, clip, latent, source, seed)
        noise, inversion = self.node(
            "DDIMInversion",
            model=guided if method.guided_inversion else self.attention(method),
            conditioning=source,
            latent=latent,
            steps=self.steps,
            refinements=REFINEMENTS,
        )
        edited = guided
        if method.injection:
            (stored,) = self.node("StoreFeatures", model=guided, inversion=inversion)
            (edited,) = self.node("FeatureInjection", model=edited, inversion=stored, **BLOCKS)
        if method.tokenflow:
            (edited,) = self.node("TokenFlow", model=edited, inversion=inversion, every=3, seed=seed)
        (sampled,) = self.node("DDIMSampler", model=edited, positive=target, negative=nothing, noise=noise, cfg=CFG)
        return self.vae.decode(sampled["samples"])

    def attention(self, method: Method, **inputs):
        (model,) = self.node(
            "CorrespondenceAttention",
            model=self.model,
            merge_ratio=method.merge_ratio,
            include_self=method.include_self,
            spatial_temporal="all frames" if method.all_frames else "own frame",
            **inputs,
        )
        return model


def changed(clip: Clip, generator: Generator) -> tuple[Clip, str]:
    """Return the clip with another colour or texture of its thing, and the classifier's question for that property."""
    scene = clip.scenes[0]
    thing, choice = scene.things[0], torch.randint(1000, (2,), generator=generator).tolist()
    question, every, taken = (
        ("colour", COLOURS, {thing.colour, scene.ground.colour})
        if choice[0] % 2
        else ("texture", TEXTURES, {thing.texture})
    )
    others = [one for one in every if one not in taken]
    change = {question: others[choice[1] % len(others)]}
    return clip.with_things(lambda one: replace(one, **change)), question


def true_flow(clip: Clip, size: int) -> tuple[Tensor, Tensor]:
    """Return flow and visibility of each frame's pixels in the next frame, as `warping_error` expects them."""
    flows, seen = [], []
    for pair in pairwise(clip.scenes):
        places, visible = Clip(pair).tracks(0, size)
        flows.append(places[1] - places[0])
        seen.append(visible[1])
    return torch.stack(flows), torch.stack(seen)


def score(classifier, target: Clip, question: str, made: Tensor) -> dict[str, float]:
    """Return the measures of an edit against its target; `question` names the edited property."""
    right = torch.tensor(answers(target.scenes[0]))
    hits = torch.stack([scores.argmax(1) for scores in classifier(made.movedim(-1, 1).float())], 1) == right
    changes = torch.tensor([name == question for name in QUESTIONS])
    middle, grid = len(target.scenes) // 2, SIDE // 4
    places, visible = target.tracks(middle, grid)
    on_thing = target.scenes[middle].on_top(pixels(grid)) >= 0
    return {
        "edited": hits[:, changes].float().mean().item(),
        "kept": hits[:, ~changes].float().mean().item(),
        "PSNR": psnr(made, target.draw(SIDE)).mean().item(),
        "drift": colour_drift(made, places, visible & on_thing),
        "warping error": warping_error(made, *true_flow(target, SIDE)).nanmean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="clips per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, default=FOLDER / "edits.jsonl")
    parser.add_argument("--pictures", type=Path, default=FOLDER / "edits", help="folder for rows of frames")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    editor = Editor(*load_demo(), arguments.frames, arguments.steps)
    classifier, records = load_classifier(), Records(arguments.output)
    with torch.inference_mode():
        for seed in arguments.seeds:
            generator = held_out(2000 + seed)
            for number in range(arguments.clips):
                clip = random_clip(generator, arguments.frames, MOTIONS[number % 4])  # with one thing
                target, question = changed(clip, generator)
                if number % parts != part:
                    continue
                words = caption(clip.scenes[0]), caption(target.scenes[0])
                for name in (SOURCE, TARGET, *arguments.methods):
                    case = {"seed": seed, "clip": number} | case_of(name, arguments.frames, arguments.steps)
                    if case in records:
                        continue
                    start = time.perf_counter()
                    if name in METHODS:
                        made = editor.edit(METHODS[name], clip, *words, 1000 * seed + number)
                    else:
                        drawn = clip if name == SOURCE else target
                        made = editor.vae.decode(editor.vae.encode(drawn.draw(SIDE)))
                    seconds = time.perf_counter() - start
                    measured = score(classifier, target, question, made) | {"seconds": seconds}
                    records.add(case, {what: round(value, 6) for what, value in measured.items()})
                    picture = arguments.pictures / f"{seed}_{number}_{name.replace(' ', '_').replace(':', '')}.png"
                    save_row(picture, clip.draw(SIDE), made)
                    print(f"{seed}.{number} {words[0]} -> {words[1]}: {name}: {measured}", flush=True)


def save_row(path: Path, *clips: Tensor) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = torch.cat([torch.cat(list(clip), 1) for clip in clips])
    Image.fromarray((rows.clamp(0, 1) * 255).round().byte().numpy()).save(path)


if __name__ == "__main__":
    main()
