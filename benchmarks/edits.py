"""Edits of clips whose motion is known, by COVE and by other ways, on the same model, seeds and clips.

    python benchmarks/edits.py [--clips 4] [--seeds 0 1 2] [--frames 6] [--steps 20]

Each clip gets one edit of its colour or its texture. Counted are: how often a classifier sees the edit in a frame, and
how often all that was to stay; how near the clip comes to what was asked for, which the world can draw; how far the
colours of the thing drift along its true tracks; the error of each frame carried onto the last along the true flow;
seconds for the whole edit. What was asked for stands beside them, drawn and brought through the autoencoder: no edit
can be better.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Generator, Tensor  # noqa: E402

from benchmarks.matches import WINDOW, true_matches  # noqa: E402
from benchmarks.model import digest_of, load_demo  # noqa: E402
from benchmarks.records import FOLDER, Records, add_part  # noqa: E402
from cove.correspondence import find_correspondence  # noqa: E402
from cove.flow import correspondence_of, dis_flow  # noqa: E402
from cove.metrics import colour_drift, psnr, warping_error  # noqa: E402
from scripts.host import provide_host  # noqa: E402
from training.classifier import QUESTIONS, answers, load_classifier  # noqa: E402
from training.clips import MOTIONS, Clip, on_top, random_clip  # noqa: E402
from training.world import COLOURS, TEXTURES, Scene, caption, held_out, pixels  # noqa: E402

SIDE, FRAMES, STEPS, CFG, REFINEMENTS = 128, 6, 20, 3.0, 1
BLOCKS = {"resnet_blocks": "0-2", "attention_blocks": "1-4"}  # what `auto` is on the demo model
SOURCE, TARGET = "source", "what was asked for"  # through the autoencoder


@dataclass(frozen=True)
class Way:
    """How to edit: the settings of the nodes, `k` None where the one is left out."""

    k: int | None = None
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


COVE = Way(k=3)  # as the paper has it, with one refinement of inversion
BETTER = replace(COVE, level=1, refine=True)  # matches
ALONG = replace(BETTER, k=1, merge_ratio=0.0, include_self=True)  # a token sees itself in all frames: FLATTEN's idea
WAYS = {
    "each frame alone": Way(all_frames=False),
    "spatial-temporal attention": Way(),
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
    "TokenFlow": Way(all_frames=False, tokenflow=True),
    "COVE, no injection": replace(COVE, injection=False),
    "spatial-temporal attention, no injection": Way(injection=False),
}


def case_of(name: str, frames: int, steps: int) -> dict:
    """What was done to a clip, in full: another setting is another case."""
    settings = asdict(WAYS[name]) if name in WAYS else {}
    case = {"way": name, "settings": settings, "frames": frames, "steps": steps, "cfg": CFG}
    return case | BLOCKS | {"refinements": REFINEMENTS, "model": digest_of()}


class Editor:
    def __init__(self, model, clip, vae, nodes, frames: int, steps: int):
        self.model, self.text, self.vae, self.nodes = model, clip, vae, nodes
        self.frames, self.steps, self.kept = frames, steps, max(1, round(0.8 * steps))

    def node(self, name: str, **inputs):
        """A node's outputs; what is not given is at its default."""
        node = self.nodes[name]
        defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
        return node.execute(**defaults | inputs).args

    def prompt(self, words: str):
        return self.text.encode_from_tokens_scheduled(self.text.tokenize(words))

    def guided(self, way: Way, clip: Clip, latent: dict, source, seed: int):
        """MODEL as this way has it in sampling."""
        if way.k is None:
            return self.attention(way) if way.all_frames else self.model
        grid = tuple(latent["samples"].shape[-2:])
        if way.matches == "flow":
            matches = correspondence_of(*dis_flow(clip.draw(SIDE)), *grid)
        elif way.matches == "truth":
            matches = true_matches(clip, grid[0])
        elif way.matches == "chance":
            noise = torch.randn((self.frames, *grid, 8), generator=Generator().manual_seed(seed))
            matches = find_correspondence(noise, WINDOW, way.k)
        else:
            wires = {"model": self.model, "latent": latent, "conditioning": source}
            features = {"level": way.level, "timestep": way.timestep, "seed": seed}
            found, _ = self.node("DiffusionFeatures", **wires, **features)
            (matches,) = self.node("Correspondence", features=found, k=way.k, refine=way.refine)
        return self.attention(way, correspondence=matches)

    def edit(self, way: Way, clip: Clip, source: str, target: str, seed: int) -> Tensor:
        """The edited clip, [frames, height, width, 3]."""
        latent = {"samples": self.vae.encode(clip.draw(SIDE))}
        source, target, nothing = map(self.prompt, (source, target, ""))
        guided = self.guided(way, clip, latent, source, seed)
        noise, inversion = self.node(
            "DDIMInversion",
            model=guided if way.guided_inversion else self.attention(way),
            conditioning=source,
            latent=latent,
            steps=self.steps,
            sampling_steps=self.steps,
            refinements=REFINEMENTS,
            storage="memory",
            feature_steps=self.kept,
            **BLOCKS,
        )
        edited = guided
        if way.injection:
            steps = {"resnet_steps": self.kept, "attention_steps": self.kept}
            (edited,) = self.node("FeatureInjection", model=edited, inversion=inversion, **steps, **BLOCKS)
        if way.tokenflow:
            (edited,) = self.node("TokenFlow", model=edited, inversion=inversion, every=3, seed=seed)
        (sampled,) = self.node(
            "DDIMSampler", model=edited, positive=target, negative=nothing, noise=noise, steps=self.steps, cfg=CFG
        )
        return self.vae.decode(sampled["samples"])

    def attention(self, way: Way, **inputs):
        (model,) = self.node(
            "CorrespondenceAttention",
            model=self.model,
            merge_ratio=way.merge_ratio,
            include_self=way.include_self,
            spatial_temporal="all frames" if way.all_frames else "own frame",
            **inputs,
        )
        return model


def changed(clip: Clip, generator: Generator) -> tuple[Clip, str]:
    """The clip with another colour or texture of its thing, and which question that changes."""
    scene = clip.scenes[0]
    thing, choice = scene.things[0], torch.randint(1000, (2,), generator=generator).tolist()
    question, every, taken = (
        ("colour", COLOURS, {thing.colour, scene.ground.colour})
        if choice[0] % 2
        else ("texture", TEXTURES, {thing.texture})
    )
    others = [one for one in every if one not in taken]
    change = {question: others[choice[1] % len(others)]}
    return Clip(tuple(Scene(s.ground, (replace(s.things[0], **change), *s.things[1:])) for s in clip.scenes)), question


def true_flow(clip: Clip, size: int) -> tuple[Tensor, Tensor]:
    """Flow and visibility of each frame's pixels in the next: what `warping_error` takes."""
    flows, seen = [], []
    for pair in pairwise(clip.scenes):
        places, visible = Clip(pair).tracks(0, size)
        flows.append(places[1] - places[0])
        seen.append(visible[1])
    return torch.stack(flows), torch.stack(seen)


def judged(classifier, target: Clip, question: str, made: Tensor) -> dict[str, float]:
    """How often the edit is seen, and what was to stay; how near it is; how colours drift and frames differ."""
    right = torch.tensor(answers(target.scenes[0]))
    hits = torch.stack([score.argmax(1) for score in classifier(made.movedim(-1, 1).float())], 1) == right
    changes = torch.tensor([name == question for name in QUESTIONS])
    middle, grid = len(target.scenes) // 2, SIDE // 4
    places, visible = target.tracks(middle, grid)
    on_thing = on_top(target.scenes[middle], pixels(grid)) >= 0
    return {
        "edited": hits[:, changes].float().mean().item(),
        "kept": hits[:, ~changes].float().mean().item(),
        "PSNR": psnr(made, target.draw(SIDE)).mean().item(),
        "drift": colour_drift(made, places, visible & on_thing),
        "warping error": warping_error(made, *true_flow(target, SIDE)).nanmean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="clips a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--output", type=Path, default=FOLDER / "edits.jsonl")
    parser.add_argument("--pictures", type=Path, default=FOLDER / "edits", help="for the edited clips, a row each")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    editor = Editor(*load_demo(provide_host()), arguments.frames, arguments.steps)
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
                for name in (SOURCE, TARGET, *arguments.ways):
                    case = {"seed": seed, "clip": number} | case_of(name, arguments.frames, arguments.steps)
                    if case in records:
                        continue
                    start = time.perf_counter()
                    if name in WAYS:
                        made = editor.edit(WAYS[name], clip, *words, 1000 * seed + number)
                    else:
                        drawn = clip if name == SOURCE else target
                        made = editor.vae.decode(editor.vae.encode(drawn.draw(SIDE)))
                    seconds = time.perf_counter() - start
                    measured = judged(classifier, target, question, made) | {"seconds": seconds}
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
