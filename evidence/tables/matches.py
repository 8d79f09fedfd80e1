"""Measure the accuracy of matches (PCK) on clips with known motion, for features and matching methods.

    python -m evidence.tables.matches [--clips 5] [--seeds 0 1 2]

Follows the tokens of the first frame through the clip, and measures the share of points on things, and of all points,
that arrive near their true position after one and after five frames. Compares the settings of Diffusion Features,
baselines without the model (patches of colours, optical flow) and methods that refine matches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cove.correspondence import Correspondence, find_correspondence
from cove.ddim import invert
from cove.features import resample
from cove.flow import correspondence_of, dis_flow, flow_tracks
from cove.metrics import pck
from cove.refine import refine
from cove.schedule import Schedule
from cove.tracks import correspondence_along, tracks_of

from ..chance import held_out
from ..clip import Clip
from ..drawing import pixels
from ..shapes.clips import MOTIONS, random_clip
from ..shapes.scenes import caption
from .demo import digest_of, load_demo
from .records import FOLDER, Records, add_part

FRAMES, SIDE, WINDOW, DRAWS = 6, 128, 9, 8
RADII = (0.5, 1.0, 1.5, 2.0)  # in tokens
AFTER = (1, 5)  # frames
TIMESTEPS = (1, 21, 61, 121, 261, 401)
CLOSER = ((21, "no noise"), (261, "1 draw"), (261, f"{DRAWS} draws"))  # slower methods are measured only here
WINDOWS = (3, 5, 15, 2 * 32 - 1)  # the last: the whole frame
PATCHES = (3, 5, 7)  # sides of patches of colours
MIXED = (3, 5)  # sides of patches of two levels' features, each at its best timestep
NOISES = ("1 draw", f"{DRAWS} draws", "1 shared draw", f"{DRAWS} shared draws", "no noise", "inverted")

Levels = list[Tensor]  # one per decoder level, last first: [frames, height, width, channels]


class Probe:
    """Features of a clip at every level of the UNet's decoder."""

    def __init__(self, model, clip, vae, nodes):
        self.model, self.text, self.vae = model, clip, vae
        self.host = sys.modules[nodes["DiffusionFeatures"].__module__].host
        unet = self.host.unet.unet_of(model)
        count = len(set(self.host.unet.block_levels(unet).values()))
        self.layers = [self.host.unet.decoder_level_end(unet, level) for level in range(count)]

    def states(self, pictures: Tensor, words: str, seed: int) -> dict[tuple[int, str], Levels]:
        """Return the features by timestep and one of `NOISES`."""
        latent = {"samples": self.vae.encode(pictures)}
        prompt = self.text.encode_from_tokens_scheduled(self.text.tokenize(words))
        sigmas = self.host.unet.sigmas_at(self.model, list(TIMESTEPS))
        found: dict[tuple[int, str], Levels] = {}

        def probe(denoise, x, _sigmas, extra_args, callback, disable):
            with ExitStack() as stack:
                outputs = [stack.enter_context(self.host.unet.captured(layer)) for layer in self.layers]

                def last() -> Levels:
                    states = [output[-1].float().cpu() for output in outputs]
                    for output in outputs:
                        output.clear()
                    return [resample(state, tuple(x.shape[-2:])).movedim(1, -1) for state in states]

                def seen(noisy: Tensor, sigma: Tensor) -> Levels:
                    self.host.run.run_unet(denoise, noisy, range(len(x)), sigma, extra_args["model_options"])
                    return last()

                for timestep, sigma in zip(TIMESTEPS, sigmas.to(x), strict=True):
                    found[timestep, "no noise"] = seen(x, sigma)
                    for shared in (False, True):
                        generator = torch.Generator().manual_seed(seed)
                        total = 0.0
                        for draw in range(DRAWS):
                            noise = torch.randn((1 if shared else len(x), *x.shape[1:]), generator=generator)
                            levels = seen(x + sigma * noise.to(x), sigma)
                            total = [a + b for a, b in zip(total, levels, strict=True)] if draw else levels
                            if draw + 1 in (1, DRAWS):
                                name = f"{draw + 1}{' shared' if shared else ''} draw{'s' if draw else ''}"
                                found[timestep, name] = total

                # The latents of DDIM inversion at each timestep.
                timesteps = [timestep for timestep in Schedule(50).inversion if timestep <= TIMESTEPS[-1]]
                grid = torch.cat((torch.zeros(1), self.host.unet.sigmas_at(self.model, timesteps)))

                def capture(step: dict) -> None:
                    levels = last()
                    if timesteps[step["i"]] in TIMESTEPS:
                        found[timesteps[step["i"]], "inverted"] = levels

                invert(denoise, x, grid.to(x), 0, extra_args, capture)
            return x

        self.host.run.run_sampler(self.model, probe, latent, sigmas[:1], prompt)
        return found


def unit(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1)


def patches(features: Tensor, side: int = 3) -> Tensor:
    """Return each token with its neighbours: [frames, height, width, channels * side^2]."""
    padded = F.pad(features.movedim(-1, 1), [side // 2] * 4, mode="replicate")
    return rearrange(F.unfold(padded, side), "f c (h w) -> f h w c", h=features.shape[1])


def agreed(features: Tensor) -> Correspondence:
    """Return, of the five best matches, the one whose own best match lies nearest to the start."""
    found = find_correspondence(features, WINDOW, 5)
    width = found.width

    def chosen(there: Tensor, back: Tensor) -> Tensor:
        best = []
        own = torch.arange(there.shape[1])[:, None]
        for matches, returns in zip(there.long(), back.long(), strict=True):
            home = returns[matches, 0]
            off = torch.hypot((home % width - own % width).float(), (home // width - own // width).float())
            order = off + 0.01 * torch.arange(5)  # ties go to the more similar
            best.append(matches.gather(1, order.argmin(1, keepdim=True)))
        return torch.stack(best).int()

    return Correspondence(
        chosen(found.forward, found.backward), chosen(found.backward, found.forward), found.height, width, WINDOW
    )


def colours(small: Tensor, side: int) -> Tensor:
    """Return patches of colours, with a large constant appended so that the highest cosine is the smallest distance.

    The cosine of (a, c) and (b, c) is 1 - |a - b|^2 / 2c^2, up to the fourth order in a / c and b / c.
    """
    found = patches(small - small.mean((0, 1, 2)), side)
    return torch.cat([found, torch.full_like(found[..., :1], 3.0 * side)], -1)


Tracks = Callable[[int], Tensor]  # of the tokens of a frame, [frames, height, width, 2]


def followed(find: Callable[[], Correspondence]) -> Tracks:
    matches = cache(find)
    return lambda frame: tracks_of(matches(), frame)


def methods(probe: Probe, pictures: Tensor, words: str, seed: int) -> Iterator[tuple[str, Tracks]]:
    """Yield the name of each method and its tracks, computed on demand.

    Args:
        pictures: [frames, SIDE, SIDE, 3] from 0 to 1.
        words: the prompt that describes them.
        seed: of the noise.
    """

    def tracked(features: Tensor, window: int = WINDOW) -> Tracks:
        return followed(lambda: find_correspondence(features, window, 1))

    def refined(features: Tensor) -> Tracks:
        return followed(lambda: refine(find_correspondence(features, WINDOW, 1), features))

    grid = SIDE // probe.vae.downscale_ratio
    small = F.adaptive_avg_pool2d(pictures.movedim(-1, 1), grid).movedim(1, -1)
    yield "no motion", tracked(torch.ones(len(pictures), grid, grid, 1), 1)
    for side in PATCHES:
        yield f"RGB {side}x{side}", tracked(colours(small, side))
        yield f"RGB {side}x{side}, refined", refined(colours(small, side))
    flow = dis_flow(pictures)
    yield "DIS flow", lambda frame: flow_tracks(*flow, frame, grid, grid)
    yield "DIS flow, in tokens", followed(lambda: correspondence_of(*flow, grid, grid))
    seen = probe.states(pictures, words, seed)
    mixed = torch.cat((unit(seen[21, "no noise"][0]), unit(seen[261, f"{DRAWS} draws"][1])), -1)
    for side in MIXED:
        yield f"mixed, {side}x{side}", tracked(patches(mixed, side))
        yield f"mixed, {side}x{side}, refined", refined(patches(mixed, side))
    for (timestep, noise), states in seen.items():
        levels = [unit(state) for state in states]
        together = torch.cat(levels, -1)
        where = f"t {timestep}, {noise}"
        for number, level in enumerate(levels):
            yield f"level {number}, {where}", tracked(level)
        yield f"all levels, {where}", tracked(together)
        if (timestep, noise) in CLOSER:
            yield f"level 0, refined, {where}", refined(levels[0])
            for name, features in (("level 1", levels[1]), ("all levels", together)):
                yield f"{name}, agreed, {where}", followed(partial(agreed, features))
                yield f"{name}, refined, {where}", refined(features)
                yield f"{name}, neighbours, {where}", tracked(patches(features))
            yield f"level 1, neighbours, refined, {where}", refined(patches(levels[1]))
            for window in WINDOWS:
                yield f"level 1, window {window}, {where}", tracked(levels[1], window)


def true_matches(clip: Clip, grid: int) -> Correspondence:
    """Return matches along the true motion; an occluded point is matched with the occluder."""
    return correspondence_along(torch.stack([clip.tracks(frame, grid)[0] for frame in range(len(clip.scenes))]))


def upper_bounds(clip: Clip, grid: int) -> Iterator[tuple[str, Tracks]]:
    """Yield upper bounds for matches between whole tokens: rounded once per frame, or at every link."""
    matches = true_matches(clip, grid)
    yield "true motion, in tokens", followed(lambda: matches)
    yield "true motion, link by link", followed(lambda: replace(matches, pairs=None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=5, help="clips per seed, cycling through the motions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER / "matches.jsonl")
    add_part(parser)
    arguments = parser.parse_args()
    part, parts = arguments.part

    probe, records = Probe(*load_demo()), Records(arguments.output)
    grid = SIDE // probe.vae.downscale_ratio
    with torch.inference_mode():
        for seed in arguments.seeds:
            generator = held_out(1000 + seed)
            for number in range(arguments.clips):
                clip = random_clip(generator, FRAMES, MOTIONS[number % len(MOTIONS)])
                case = {"seed": seed, "clip": number, "model": digest_of()}
                if number % parts != part or case in records:
                    continue
                true, visible = clip.tracks(0, grid)
                points = {"things": visible & (clip.scenes[0].on_top(pixels(grid)) >= 0), "all": visible}
                measured = {}
                found = methods(probe, clip.draw(SIDE), caption(clip.scenes[0]), 1000 * seed + number)
                for name, find in chain(upper_bounds(clip, grid), found):
                    places = find(0)
                    measured[name] = {
                        f"{what}, {after}, {radius}": round(pck(places, true, which, radius)[after].item(), 4)
                        for what, which in points.items()
                        for after in AFTER
                        for radius in RADII
                    }
                records.add(case, measured)
                print(f"seed {seed}: {number + 1} of {arguments.clips} clips", flush=True)


if __name__ == "__main__":
    main()
