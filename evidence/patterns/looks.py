"""Test whether the model uses its finest self-attention: `python -m evidence.patterns.looks`.

Prints losses on held-out pictures and the agreement between repeats of generated patterns, for the unchanged model and
with the finest self-attention replaced by its mean. Plain drawn scenes are noised to t = 800 and denoised with captions
that name patterns: shapes stay, patterns must be generated. Agreement is the correlation between tiles of a ground, and
between twins in their own coordinates. Chance is the same measure between different pictures.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from demo.autoencoder import PATCH, Autoencoder

from ..chance import held_out
from ..drawing import pixels
from ..scene import Scene
from ..training.export import load_snapshot
from ..training.networks import Diffusion, alphas, encode
from ..training.recipe import scale_of
from ..training.words import make_tokenizer, tokens_of
from .attention import Attention, mean_attention
from .scenes import WORDS, caption, random_scene
from .train import FOLDER, SIZE, TIMESTEPS, WORLD, Probe, trained_so_far
from .world import Thing

NOISED = 800  # timestep from which patterns are generated
STEPS, CFG = 25, 3.0
SHIFTS = range(5 * PATCH - 2, 13 * PATCH)  # candidate tile periods in pixels


def scenes_with_repeats(count: int, grid: int) -> list[Scene]:
    """Return held-out scenes with a paved ground and two or three patterned things of one kind."""
    found: list[Scene] = []
    number = 0
    while len(found) < count:
        scene = random_scene(held_out(number), grid, grid)
        if scene.ground.kind == "paved" and len(scene.things) > 1 and len(twins(scene)) > 1:
            found.append(scene)
        number += 1
    return found


def twins(scene: Scene) -> list[Thing]:
    """Return the patterned things of the first kind."""
    first = scene.things[0]
    return [thing for thing in scene.things if thing.kind == first.kind and first.look.texture == "patterned"]


def without_patterns(scene: Scene) -> Scene:
    things = tuple(replace(thing, look=replace(thing.look, texture="plain")) for thing in scene.things)
    return Scene(replace(scene.ground, kind="plain"), things)


def correlation(one: Tensor, other: Tensor) -> float:
    """Return the correlation of colours at corresponding points, each channel about its mean: [3, points]."""
    one, other = (x - x.mean(1, keepdim=True) for x in (one, other))
    return float((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt().clamp_min(1e-9))


def tile_agreement(
    picture: Tensor, free: Tensor, other: Tensor | None = None, other_free: Tensor | None = None
) -> float:
    """Return the correlation between a ground and itself, or another, shifted by the best period, mean of both axes.

    Args:
        picture, other: [3, height, width].
        free, other_free: [height, width] bool, where the ground is visible.
    """
    other, other_free = (picture, free) if other is None else (other, other_free)
    best = []
    for axis in (-1, -2):
        found = []
        for shift in SHIFTS:
            size = picture.shape[axis] - shift
            if size < shift // 2:
                break
            both = free.narrow(axis, shift, size) & other_free.narrow(axis, 0, size)
            found.append(correlation(picture.narrow(axis, shift, size)[:, both], other.narrow(axis, 0, size)[:, both]))
        best.append(max(found))
    return sum(best) / len(best)


def motif(picture: Tensor, thing: Thing) -> Tensor:
    """Sample the centre of a thing in its own coordinates: [3, height, width] -> [3, points]."""
    height, width = picture.shape[1:]
    places = thing.outside(pixels(24, 24) * 0.55) * min(height, width) / torch.tensor([width, height])
    return F.grid_sample(picture[None], places[None], align_corners=False)[0].flatten(1)


def agreement(pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Return the mean agreement between repeats, and between different pictures."""
    grounds, seen = [], pixels(*pictures.shape[-2:])
    for scene in scenes:
        grounds.append(scene.on_top(seen) < 0)
    rows = []
    for number, (picture, scene) in enumerate(zip(pictures, scenes, strict=True)):
        next_one = (number + 1) % len(scenes)
        one, other = (motif(picture, thing) for thing in twins(scene)[:2])
        rows.append(
            [
                tile_agreement(picture, grounds[number]),
                correlation(one, other),
                tile_agreement(picture, grounds[number], pictures[next_one], grounds[next_one]),
                correlation(one, motif(pictures[next_one], twins(scenes[next_one])[1])),
            ]
        )
    return dict(
        zip(("tiles", "twins", "tiles, chance", "twins, chance"), torch.tensor(rows).mean(0).tolist(), strict=True)
    )


@torch.no_grad()
def invent(diffusion: Diffusion, latents: Tensor, captions: list[str], seed: int) -> Tensor:
    """Add noise to scaled latents up to `NOISED` and denoise them with DDIM."""
    signal, tokenizer = alphas(), make_tokenizer(WORDS)
    prompts, nothing = tokens_of(tokenizer, captions), tokens_of(tokenizer, [""] * len(captions))
    noise = torch.randn(latents.shape, generator=Generator().manual_seed(seed))
    timesteps = torch.linspace(NOISED, 0, STEPS + 1).round().long().tolist()
    x = signal[NOISED].sqrt() * latents + (1 - signal[NOISED]).sqrt() * noise
    for here, there in zip(timesteps[:-1], timesteps[1:], strict=True):
        with torch.autocast(x.device.type, torch.bfloat16):
            wanted, unguided = (diffusion(x, torch.full((len(x),), here), tokens) for tokens in (prompts, nothing))
        error = unguided.float() + CFG * (wanted.float() - unguided.float())
        left, next_left = signal[here], signal[there] if there else torch.tensor(1.0)
        x = next_left.sqrt() * (x - (1 - left).sqrt() * error) / left.sqrt() + (1 - next_left).sqrt() * error
    return x


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    return (autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the training (default: %(default)s)")
    parser.add_argument("--file", type=Path, help="exported file to test instead")
    parser.add_argument("--grid", type=int, default=32, help="tokens per side (default: %(default)s)")
    parser.add_argument("--count", type=int, default=12, help="scenes with repeats (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="file for the pictures: drawn, sampled, sampled with the mean")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    autoencoder, diffusion, steps = (
        load_snapshot(options.file, SIZE, WORDS) if options.file else trained_so_far(SIZE, options.folder)
    )
    diffusion.eval().unet.set_attn_processor(Attention())
    scale, side = scale_of(SIZE, WORLD, autoencoder), options.grid * PATCH
    losses = Probe(autoencoder, scale, side).losses(diffusion)
    print(f"after {steps} steps, {options.grid}x{options.grid} tokens")
    print(f"{'loss at t =':24}" + "".join(f"{t:>10}" for t in TIMESTEPS))
    for name, row in (("as it is", losses[: len(TIMESTEPS)]), ("mean self-attention", losses[len(TIMESTEPS) :])):
        print(f"{name:24}" + "".join(f"{loss:10.4f}" for loss in row))

    scenes = scenes_with_repeats(options.count, options.grid)
    captions = [caption(scene) for scene in scenes]
    drawn = encode(autoencoder, torch.stack([scene.draw(side) for scene in scenes]))
    plain = encode(autoencoder, torch.stack([without_patterns(scene).draw(side) for scene in scenes])) * scale
    rows = {"drawn, through autoencoder": decode(autoencoder, drawn)}
    for name, context in (("sampled", nullcontext()), ("sampled, mean self-attention", mean_attention(diffusion.unet))):
        with context:
            rows[name] = decode(autoencoder, invent(diffusion, plain, captions, seed=1) / scale)
    print(f"\n{'agreement between':32}" + "".join(f"{name:>16}" for name in agreement(rows["sampled"], scenes)))
    for name, pictures in rows.items():
        print(f"{name:32}" + "".join(f"{value:16.2f}" for value in agreement(pictures, scenes).values()))
    if options.sheet:
        from PIL import Image

        sheet = torch.cat([torch.cat(list(pictures), 2) for pictures in rows.values()], 1)
        Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy()).save(options.sheet)


if __name__ == "__main__":
    main()
