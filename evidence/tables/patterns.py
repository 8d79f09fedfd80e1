"""Measure edits that must invent a pattern or a hue, by COVE, its controls, alternatives and other methods.

    python -m evidence.tables.patterns [--clips 12] [--seeds 0 1 2] [--frames 6] [--steps 20] [--file FILE]

Clips, kinds of edits and noise are the same for every method. `scores` says what is measured. An edit starts either
from the source with independent noise in every frame (*noise*), so that each frame alone invents something else, or
from the noise of DDIM inversion (*inversion*), with or without Feature Injection.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from unittest import mock

import torch
from torch import Generator, Tensor

from cove.correspondence import Correspondence, find_correspondence
from cove.flow import correspondence_of, dis_flow
from demo.autoencoder import PATCH
from scripts.in_process import call

from ..chance import held_out
from ..patterns.clips import MOTIONS, WINDOW
from ..patterns.edits import KINDS, Edit, random_edit
from ..patterns.scenes import caption
from .alternatives import ALTERNATIVES, alternative
from .demo import digest_of, load_demo
from .edits import save_row
from .grids import Grids
from .matches import true_matches
from .records import FOLDER, Records, add_part
from .scores import scores_of

SIDE, FRAMES, STEPS, CFG = 128, 6, 20, 3.0
START = 700  # timestep of the noise in edits that start from noise: shapes stay, patterns must be invented
BLOCKS = {"resnet_blocks": "0-2", "attention_blocks": "1-4"}  # what `auto` selects on the demo model
SOURCE, TARGET = "source", "target"  # encoded and decoded
FEATURES, FLOW, TRUTH, CHANCE, ANYWHERE, OTHER, STILL = (
    *("features", "flow", "truth", "chance in the window", "chance in the frame", "of another clip", "no motion"),
)


@dataclass(frozen=True)
class Method:
    """Settings of the nodes for one method of editing."""

    k: int | None = None  # None: without Correspondence Attention
    matches: str = FEATURES
    level: int = 1
    timestep: int = 261
    draws: int = 1
    refine: bool = False
    merge_ratio: float = 0.0
    include_self: bool = False
    seen: str = "own frame"  # spatial_temporal of Correspondence Attention
    start_percent: float = 0.0
    end_percent: float = 1.0
    alternative: str | None = None  # in place of attention to the matches, one of `ALTERNATIVES`
    inversion: bool = False  # start from the noise of DDIM inversion
    guided_inversion: bool = True
    injection: float = 0.0  # share of the steps
    tokenflow: bool = False
    grids: bool = False  # RAVE's


PAPER = Method(k=3, merge_ratio=0.5, seen="all frames")
SEEN = ("all frames", "every 2nd frame", "every 4th frame")
GUIDED = Method(k=1)
SHARP = replace(GUIDED, draws=8, refine=True)
INVERTED = Method(inversion=True)


def with_start(methods: dict[str, Method], suffix: str, **changes) -> dict[str, Method]:
    return {f"{name}, {suffix}": replace(method, **changes) for name, method in methods.items()}


CORE = {
    "each frame alone": Method(),
    "COVE, the paper's settings": PAPER,
    "own frame, K = 1, sharp": SHARP,
    "own frame, K = 1, chance": replace(GUIDED, matches=CHANCE),
}
METHODS = {
    **CORE,
    **{f"spatial-temporal attention, {seen}": Method(seen=seen) for seen in SEEN},
    **{f"{seen}, K = 1, sharp": replace(SHARP, seen=seen) for seen in SEEN},
    "own frame, K = 1": GUIDED,
    "own frame, K = 3": replace(GUIDED, k=3),
    "own frame, K = 5": replace(GUIDED, k=5),
    "own frame, K = 3, half merged": replace(GUIDED, k=3, merge_ratio=0.5),
    "own frame, K = 1, token itself": replace(SHARP, include_self=True),
    "own frame, K = 1, level 0": replace(GUIDED, level=0),
    "own frame, K = 1, level 0, 8 draws": replace(GUIDED, level=0, draws=8),
    "own frame, K = 1, 8 draws": replace(GUIDED, draws=8),
    "own frame, K = 1, first half": replace(SHARP, end_percent=0.5),
    "own frame, K = 1, second half": replace(SHARP, start_percent=0.5),
    **{f"own frame, K = 1, {name}": replace(GUIDED, matches=name) for name in (TRUTH, ANYWHERE, OTHER, STILL)},
    "along tracks, DIS flow": replace(GUIDED, matches=FLOW, include_self=True),  # FLATTEN's attention
    "along tracks, truth": replace(GUIDED, matches=TRUTH, include_self=True),
    **{name: replace(SHARP, alternative=name) for name in ALTERNATIVES},
    "reference frame, redrawn, chance": replace(GUIDED, matches=CHANCE, alternative="reference frame, redrawn"),
    "RAVE's grids": Method(grids=True),
    **with_start(CORE, "inverted", inversion=True),
    "spatial-temporal attention, all frames, inverted": replace(INVERTED, seen="all frames"),
    "reference frame, redrawn, inverted": replace(
        SHARP, alternative="reference frame, redrawn", inversion=True, guided_inversion=False
    ),
    "own frame, K = 1, sharp, inverted without": replace(SHARP, inversion=True, guided_inversion=False),
    "TokenFlow, inverted": replace(INVERTED, tokenflow=True),
    **with_start(CORE, "0.4 injected", inversion=True, injection=0.4),
    **with_start(CORE, "0.8 injected", inversion=True, injection=0.8),
}


def case_of(name: str, file: str, frames: int, steps: int) -> dict:
    """Return all settings of a measurement, as the key of its records."""
    settings = asdict(METHODS[name]) if name in METHODS else {}
    return {
        "method": name,
        "settings": settings,
        "frames": frames,
        "steps": steps,
        "cfg": CFG,
        "model": digest_of(file),
    }


class Task:
    """One edit of one clip, with what its methods share."""

    def __init__(self, editor: Editor, edit: Edit, other: Edit, seed: int):
        self.editor, self.edit, self.other, self.seed = editor, edit, other, seed
        self.words = tuple(caption(clip.scenes[0]) for clip in (edit.source, edit.target))
        self.source, self.target, self.nothing = map(editor.prompt, (*self.words, ""))
        self.features: dict[tuple, object] = {}

    @cached_property
    def latent(self) -> dict:
        return self.editor.encode(self.edit, self.seed)

    def matches(self, method: Method) -> Correspondence:
        if method.matches in (FEATURES, OTHER):
            return self._found(method, self.edit if method.matches == FEATURES else self.other)
        grid = SIDE // PATCH
        if method.matches == FLOW:
            return correspondence_of(*dis_flow(self.edit.source.draw(SIDE)), grid, grid)
        if method.matches == TRUTH:
            return true_matches(self.edit.source, grid)
        frames = len(self.edit.source.scenes)
        window = {CHANCE: WINDOW, ANYWHERE: 2 * grid - 1, STILL: 1}[method.matches]
        noise = torch.randn((frames, grid, grid, 8), generator=Generator().manual_seed(self.seed))
        return find_correspondence(noise, window, method.k)

    def _found(self, method: Method, edit: Edit) -> Correspondence:
        """Return matches by the features of an edit's source; features are computed once."""
        key = (edit, method.level, method.timestep, method.draws)
        if key not in self.features:
            self.features[key] = self.editor.features(edit, self.seed, *key[1:])
        refine = "on" if method.refine else "off"
        (found,) = self.editor.node("Correspondence", features=self.features[key], k=method.k, refine=refine)
        return found


class Editor:
    def __init__(self, model, clip, vae, nodes, steps: int):
        self.model, self.text, self.vae, self.nodes, self.steps = model, clip, vae, nodes, steps
        self.attention = sys.modules[nodes["CorrespondenceAttention"].__module__].host.attention

    def node(self, name: str, **inputs) -> tuple:
        """Return a node's outputs; missing inputs get their defaults."""
        return call(self.nodes[name], **inputs)

    def prompt(self, words: str):
        return self.text.encode_from_tokens_scheduled(self.text.tokenize(words))

    def encode(self, edit: Edit, seed: int) -> dict:
        return {"samples": self.vae.encode(edit.draw_source(SIDE, SIDE, Generator().manual_seed(seed)))}

    def features(self, edit: Edit, seed: int, level: int, timestep: int, draws: int):
        found, _ = self.node(
            "DiffusionFeatures",
            model=self.model,
            latent=self.encode(edit, seed),
            conditioning=self.prompt(caption(edit.source.scenes[0])),
            level=level,
            timestep=timestep,
            ensemble=draws,
            seed=seed,
        )
        return found

    def run(self, method: Method, clip: Task) -> Tensor:
        """Return the edited clip, [frames, height, width, 3]."""
        with self._answering(method):
            return self.vae.decode(self._inverted(method, clip) if method.inversion else self._noised(method, clip))

    @contextmanager
    def _answering(self, method: Method) -> Iterator[None]:
        if method.alternative is None:
            yield
        else:
            answer = alternative(method.alternative, SIDE // PATCH)

            def answered(tokens: Tensor, sets: Tensor, heads: int, *_, **__) -> Tensor:
                return answer(tokens, sets, heads)

            with mock.patch.object(self.attention, "attend_to_sets", answered):
                yield

    def _guided(self, method: Method, clip: Task):
        if method.grids:
            model = self.model.clone()
            model.set_model_unet_function_wrapper(Grids(clip.seed))
            return model
        if method.k is None and method.seen == "own frame":
            return self.model
        matches = {} if method.k is None else {"correspondence": clip.matches(method)}
        (model,) = self.node(
            "CorrespondenceAttention",
            model=self.model,
            merge_ratio=method.merge_ratio,
            include_self=method.include_self,
            spatial_temporal=method.seen,
            start_percent=method.start_percent,
            end_percent=method.end_percent,
            **matches,
        )
        return model

    def _noised(self, method: Method, clip: Task) -> Tensor:
        """Sample from the source with noise of its own in each frame, with ComfyUI's sampler."""
        import comfy.sample
        import comfy.samplers

        model, latents = self._guided(method, clip), clip.latent["samples"]
        sampling = model.get_model_object("model_sampling")
        timesteps = torch.linspace(START, 1, self.steps)
        sigmas = torch.cat([sampling.sigma(timesteps), torch.zeros(1)])
        noise = torch.randn(latents.shape, generator=Generator().manual_seed(clip.seed))
        sampler, prompts = comfy.samplers.sampler_object("euler"), (clip.target, clip.nothing)
        return comfy.sample.sample_custom(
            model, noise, CFG, sampler, sigmas, *prompts, latents, seed=clip.seed, disable_pbar=True
        )

    def _inverted(self, method: Method, clip: Task) -> Tensor:
        guided = self._guided(method, clip)
        plain = self._guided(replace(method, k=None), clip)
        noise, inversion = self.node(
            "DDIMInversion",
            model=guided if method.guided_inversion else plain,
            conditioning=clip.source,
            latent=clip.latent,
            steps=self.steps,
            refinements=0,
        )
        edited = guided
        if method.injection:
            shares = {"resnet_share": method.injection, "attention_share": method.injection}
            (edited,) = self.node("FeatureInjection", model=edited, inversion=inversion, **shares, **BLOCKS)
        if method.tokenflow:
            (edited,) = self.node("TokenFlow", model=edited, inversion=inversion, every=3, seed=clip.seed)
        prompts = {"positive": clip.target, "negative": clip.nothing}
        (sampled,) = self.node("DDIMSampler", model=edited, **prompts, noise=noise, cfg=CFG)
        return sampled["samples"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=12, help="clips per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--file", default="patterns.safetensors", help="model in demo/, or the path of a file")
    parser.add_argument("--output", type=Path, default=FOLDER / "patterns.jsonl")
    parser.add_argument("--pictures", type=Path, default=FOLDER / "patterns", help="folder for rows of frames")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    editor, records = Editor(*load_demo(arguments.file), arguments.steps), Records(arguments.output)
    for seed in arguments.seeds:
        generator = held_out(3000 + seed)
        edits = [
            random_edit(
                generator,
                KINDS[number % len(KINDS)],
                MOTIONS[number // len(KINDS) % len(MOTIONS)],
                arguments.frames,
                SIDE // PATCH,
                SIDE // PATCH,
            )
            for number in range(arguments.clips)
        ]
        for number, edit in enumerate(edits):
            if number % parts != part:
                continue
            clip = Task(editor, edit, edits[number - 1], 1000 * seed + number)
            with torch.inference_mode():
                drawn = editor.vae.decode(editor.vae.encode(edit.target.draw(SIDE)))
                for name in (TARGET, SOURCE, *arguments.methods):
                    case = {"seed": seed, "clip": number, "kind": KINDS[number % len(KINDS)]}
                    case |= case_of(name, arguments.file, arguments.frames, arguments.steps)
                    if case in records:
                        continue
                    start = time.perf_counter()
                    if name in METHODS:
                        made = editor.run(METHODS[name], clip)
                    else:
                        made = drawn if name == TARGET else editor.vae.decode(clip.latent["samples"])
                    measured = scores_of(edit, made, drawn) | {"seconds": time.perf_counter() - start}
                    records.add(case, {what: round(value, 5) for what, value in measured.items()})
                    save_row(arguments.pictures / f"{seed}_{number}_{name.replace(' ', '_')}.png", made)
                    print(f"{seed}.{number} {' -> '.join(clip.words)}: {name}: {measured}", flush=True)


if __name__ == "__main__":
    main()
